//! The list of benchmarks, in the terminal and as a page of the documentation.

use crate::cli::TasksArgs;
use crate::preflight::Refused;
use crate::report::table::{Section, ascii};
use anyhow::Result;
use lightmoe_data::harness::{Benchmark, Catalogue, DataFiles, TaskConfig};
use lightmoe_eval::harness::check_task;
use serde_json::Value;

/// `tasks`
///
/// # Errors
/// [`Refused`] for a name that is none and a file that cannot be understood.
pub fn list(args: &TasksArgs) -> Result<String> {
    let catalogue = Catalogue::built_in()?.checking(check_task);
    if args.markdown {
        return page(&catalogue);
    }
    let names = match args.names.is_empty() {
        true => top(&catalogue),
        false => args.names.clone(),
    };
    let selected = catalogue.select(&names).map_err(Refused::of)?;
    let mut table = Section::new([
        "task",
        "output type",
        "shots",
        "version",
        "metrics",
        "files",
    ]);
    add_rows(&mut table, &selected, 0);
    Ok(ascii(&table, table.head.len()))
}

/// The groups and tasks that are in no group.
fn top(catalogue: &Catalogue) -> Vec<String> {
    let groups = catalogue.groups().iter().map(|group| group.group.clone());
    let tasks = catalogue.tasks().iter().map(|task| task.name().to_owned());
    let is_member = |name: &String| {
        let mut members = catalogue.groups().iter().flat_map(|group| &group.task);
        members.any(|member| member.name() == Some(name.as_str()))
    };
    let mut names: Vec<String> = groups
        .chain(tasks)
        .filter(|name| !is_member(name))
        .collect();
    names.sort();
    names
}

fn add_rows(table: &mut Section, benchmarks: &[Benchmark], depth: usize) {
    let mark = "  ".repeat(depth);
    for benchmark in benchmarks {
        match benchmark {
            Benchmark::Task(task) => {
                table.rows.push(vec![
                    format!("{mark}{}", task.name()),
                    output_type(task),
                    task.num_fewshot.unwrap_or(0).to_string(),
                    shown(&task.version()),
                    metrics(task),
                    files(task),
                ]);
            }
            Benchmark::Group(group, members) => {
                let count = format!("{} tasks", benchmark.tasks().len());
                let empty = String::new();
                table.rows.push(vec![
                    format!("{mark}{}", group.group),
                    count,
                    empty.clone(),
                    shown(&group.version()),
                    empty.clone(),
                    empty,
                ]);
                add_rows(table, members, depth + 1);
            }
        }
    }
}

/// A version.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// In the words of the files.
fn output_type(task: &TaskConfig) -> String {
    serde_json::to_value(task.output_type()).map_or(String::new(), |value| {
        value.as_str().unwrap_or_default().to_owned()
    })
}

fn metrics(task: &TaskConfig) -> String {
    let list = task.metric_list.iter().flatten();
    list.map(|metric| metric.metric.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

/// The file of the split that is scored, and its labels.
fn files(task: &TaskConfig) -> String {
    let split = task.eval_split().unwrap_or_default();
    let paths = |data: &DataFiles| -> Vec<String> {
        let rows = data.splits.get(split).and_then(|paths| paths.0.first());
        let labels = data.labels.get(split).and_then(|paths| paths.0.first());
        let name = task.dataset_name.as_deref().unwrap_or_default();
        rows.into_iter()
            .chain(labels)
            .map(|p| p.replace("{{dataset_name}}", name))
            .collect()
    };
    task.data_files
        .as_ref()
        .map(paths)
        .unwrap_or_default()
        .join(", ")
}

/// `docs/tasks.md`
fn page(catalogue: &Catalogue) -> Result<String> {
    let mut page = include_str!("page.md").trim_end().to_owned();
    page.push_str("\n\n| task | output type | shots | version | metrics | file scored | where people get it |\n|---|---|---:|---:|---|---|---|\n");
    for name in top(catalogue) {
        for benchmark in catalogue.select(&[name])? {
            let tasks = benchmark.tasks();
            let Some(task) = tasks.first() else { continue };
            let (of_group, version) = match &benchmark {
                Benchmark::Group(group, _) => {
                    (format!(" ({} tasks)", tasks.len()), shown(&group.version()))
                }
                Benchmark::Task(task) => (String::new(), shown(&task.version())),
            };
            page.push_str(&format!(
                "| `{}`{of_group} | {} | {} | {version} | {} | `{}` | {} |\n",
                benchmark.name(),
                output_type(task),
                task.num_fewshot.unwrap_or(0),
                metrics(task),
                files(task),
                task.data_files
                    .as_ref()
                    .map_or("", |data| data.source.as_str()),
            ));
        }
    }
    page.push_str("\nGroups and what is in them:\n\n");
    for group in catalogue.groups() {
        let members: Vec<String> = group
            .task
            .iter()
            .filter_map(|m| Some(format!("`{}`", m.name()?)))
            .collect();
        page.push_str(&format!("- `{}`: {}\n", group.group, members.join(", ")));
    }
    page.truncate(page.trim_end().len());
    Ok(page)
}
