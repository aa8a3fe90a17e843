//! `results.json` in the layout of lm-evaluation-harness.

use super::layout::{
    BenchmarkResults, CallOptions, Cell, Documents, Partial, Row, ScoreKey, TaskKeys,
};
use super::{Outcome, TaskOutcome, TaskPrompts, hash_text, metrics::metrics};
use crate::Result;
use indexmap::IndexMap;
use lightmoe_data::harness::{Benchmark, GroupConfig, GroupMetric, TaskConfig};
use lightmoe_models::ModelTokenizer;
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;

/// What is recorded of a run besides its scores.
pub struct RunFacts<'a> {
    /// The model, as given.
    pub model: &'a str,
    /// Options of the run.
    pub config: CallOptions,
    /// Text before the tasks' descriptions.
    pub system_instruction: Option<&'a str>,
    /// The chat template, if it was used.
    pub chat_template: Option<&'a str>,
    /// Whether few-shot examples were turns of their own.
    pub fewshot_as_multiturn: bool,
    /// Seconds since the epoch when the run began.
    pub date: f64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Version of the program.
    pub version: &'a str,
    /// The commit that the program was built from, where that is known.
    pub git_hash: Option<&'a str>,
}

/// The whole of `results.json`. Of an interrupted run it holds what was done, and says so under
/// `partial`.
///
/// # Errors
/// None in practice: every metric was known when the tasks ran.
pub fn results(
    selected: &[Benchmark],
    tasks: &[TaskPrompts],
    outcome: &Outcome,
    tokenizer: &ModelTokenizer,
    facts: RunFacts<'_>,
) -> Result<BenchmarkResults> {
    let mut tables = Tables {
        outcome,
        results: IndexMap::new(),
        groups: IndexMap::new(),
        subtasks: IndexMap::new(),
        versions: BTreeMap::new(),
    };
    tables.add(selected, 0);
    let mut directions: BTreeMap<String, Directions> = tasks
        .iter()
        .map(|task| Ok((name(task), directions(&task.task)?)))
        .collect::<Result<_>>()?;
    for benchmark in selected {
        add_directions(benchmark, &mut directions)?;
    }
    let configs = tasks.iter().map(|task| Ok((name(task), keys(task)?)));
    let shots = tasks
        .iter()
        .map(|task| (name(task), task.prompts.num_fewshot));
    let documents = tasks.iter().map(|task| {
        let documents = Documents {
            original: task.prompts.documents,
            effective: task.prompts.items.len(),
        };
        (name(task), documents)
    });
    let hashes = outcome.tasks.iter();
    let hashes = hashes.map(|task| (task.name.clone(), task.hash.clone()));
    let token = |id: u32| -> Result<(String, String)> {
        Ok((tokenizer.decode_all(&[id])?, id.to_string()))
    };
    let partial = || Partial {
        documents_done: outcome.tasks.iter().map(|task| task.documents).sum(),
        documents: tasks.iter().map(|task| task.prompts.items.len()).sum(),
    };
    Ok(BenchmarkResults {
        results: tables.results,
        groups: tables.groups,
        group_subtasks: tables.subtasks,
        configs: configs.collect::<Result<_>>()?,
        versions: tables.versions,
        n_shot: shots.collect(),
        higher_is_better: directions,
        n_samples: documents.collect(),
        config: facts.config,
        git_hash: facts.git_hash.map(str::to_owned),
        date: facts.date,
        lightmoe_version: facts.version.to_owned(),
        tokenizer_eos_token: token(tokenizer.eos)?,
        tokenizer_bos_token: tokenizer.bos.map(token).transpose()?,
        eot_token_id: tokenizer.eos,
        max_length: outcome.max_length,
        signatures: signatures(outcome),
        task_hashes: hashes.collect(),
        model_source: "lightmoe",
        model_name: facts.model.to_owned(),
        model_name_sanitized: sanitized(facts.model),
        system_instruction: facts.system_instruction.map(str::to_owned),
        system_instruction_sha: facts.system_instruction.map(hash_text),
        fewshot_as_multiturn: facts.fewshot_as_multiturn,
        chat_template: facts.chat_template.map(str::to_owned),
        chat_template_sha: facts.chat_template.map(hash_text),
        total_evaluation_time_seconds: facts.seconds.to_string(),
        partial: (!outcome.is_whole).then(partial),
    })
}

fn name(task: &TaskPrompts) -> String {
    task.task.name().to_owned()
}

/// By task and metric, what decides the scores of a corpus besides the texts.
fn signatures(outcome: &Outcome) -> IndexMap<String, IndexMap<String, String>> {
    let of_task = |task: &TaskOutcome| {
        let signed = task
            .scores
            .iter()
            .filter_map(|score| Some((score.metric.clone(), score.signature.clone()?)));
        let signed: IndexMap<String, String> = signed.collect();
        (!signed.is_empty()).then(|| (task.name.clone(), signed))
    };
    outcome.tasks.iter().filter_map(of_task).collect()
}

/// Characters that names of files may not hold become `__`, a run of them one.
fn sanitized(name: &str) -> String {
    let is_bad = |c: char| {
        matches!(
            c,
            '"' | '<' | '>' | ':' | '/' | '|' | '\\' | '?' | '*' | '[' | ']'
        )
    };
    let mut out = String::new();
    for c in name.chars() {
        match is_bad(c) {
            true if out.ends_with("__") => {}
            true => out.push_str("__"),
            false => out.push(c),
        }
    }
    out
}

/// The keys of a task with what was filled in.
fn keys(task: &TaskPrompts) -> Result<TaskKeys> {
    let mut keys = task.task.to_map()?;
    let mut fill = |key: &str, value: Json| {
        keys.entry(key).or_insert(value);
    };
    fill("description", json!(""));
    fill("target_delimiter", task.task.target_delimiter().into());
    fill("fewshot_delimiter", task.task.fewshot_delimiter().into());
    fill("output_type", json!(task.task.output_type()));
    fill("repeats", json!(1));
    fill("should_decontaminate", json!(false));
    keys.insert("num_fewshot".into(), task.prompts.num_fewshot.into());
    Ok(TaskKeys(keys))
}

/// By metric, whether more is better; unknown where tasks disagree.
type Directions = IndexMap<String, Option<bool>>;

fn directions(task: &TaskConfig) -> Result<Directions> {
    let metrics = metrics(task)?.into_iter();
    let directions = metrics.map(|metric| (metric.asked, Some(metric.higher_is_better)));
    Ok(directions.collect())
}

/// Those of each group, of all metrics of its tasks.
fn add_directions(benchmark: &Benchmark, all: &mut BTreeMap<String, Directions>) -> Result<()> {
    if let Benchmark::Group(group, members) = benchmark {
        let mut of_group = Directions::new();
        for task in benchmark.tasks() {
            for (metric, higher) in directions(task)? {
                let agreed = of_group.entry(metric).or_insert(higher);
                if *agreed != higher {
                    *agreed = None;
                }
            }
        }
        all.insert(group.group.clone(), of_group);
        for member in members {
            add_directions(member, all)?;
        }
    }
    Ok(())
}

/// The parts of the results that groups have a place in.
struct Tables<'a> {
    outcome: &'a Outcome,
    results: IndexMap<String, Row>,
    groups: IndexMap<String, Row>,
    subtasks: IndexMap<String, Vec<String>>,
    versions: BTreeMap<String, Json>,
}

impl Tables<'_> {
    /// Adds benchmarks by name, each group before what is in it, indented by depth in tables.
    fn add(&mut self, benchmarks: &[Benchmark], depth: usize) {
        let mut sorted: Vec<&Benchmark> = benchmarks.iter().collect();
        sorted.sort_by_key(|benchmark| benchmark.name());
        for benchmark in sorted {
            let mark = match depth {
                0 => String::new(),
                _ => format!("{}- ", " ".repeat(depth)),
            };
            let name = benchmark.name().to_owned();
            match benchmark {
                Benchmark::Task(task) => {
                    let scores = self.of(&name).into_iter().flat_map(|t| &t.scores);
                    let row = Row {
                        alias: format!("{mark}{}", task.alias()),
                        scores: scores
                            .flat_map(|s| cells(&s.metric, &s.filter, s.value, s.stderr))
                            .collect(),
                    };
                    self.results.insert(name.clone(), row);
                    self.versions.insert(name.clone(), task.version());
                    if depth == 0 {
                        self.subtasks.insert(name, Vec::new());
                    }
                }
                Benchmark::Group(group, members) => {
                    let row = self.group(group, benchmark, format!("{mark}{}", group.alias()));
                    if group.aggregate_metric_list.is_some() {
                        self.groups.insert(name.clone(), row.clone());
                        self.versions.insert(name.clone(), group.version());
                    }
                    self.results.insert(name.clone(), row);
                    let names = members.iter().map(|member| member.name().to_owned());
                    self.subtasks.insert(name, names.collect());
                    self.add(members, depth + 1);
                }
            }
        }
    }

    fn of(&self, task: &str) -> Option<&TaskOutcome> {
        self.outcome
            .tasks
            .iter()
            .find(|outcome| outcome.name == task && outcome.documents > 0)
    }

    fn group(&self, group: &GroupConfig, benchmark: &Benchmark, alias: String) -> Row {
        let mut scores = IndexMap::new();
        let Some(list) = &group.aggregate_metric_list else {
            scores.insert(ScoreKey(" ".into()), Cell::Text(" "));
            return Row { alias, scores };
        };
        let tasks = benchmark.tasks();
        let tasks: Vec<&TaskOutcome> = tasks.iter().filter_map(|t| self.of(t.name())).collect();
        for metric in list {
            for filter in &metric.filter_list {
                if let Some((value, stderr)) = pooled(metric, filter, &tasks) {
                    scores.extend(cells(&metric.metric, filter, value, stderr));
                }
            }
        }
        Row { alias, scores }
    }
}

fn cells(metric: &str, filter: &str, value: f64, stderr: Option<f64>) -> [(ScoreKey, Cell); 2] {
    [
        (ScoreKey(format!("{metric},{filter}")), Cell::Number(value)),
        (
            ScoreKey(format!("{metric}_stderr,{filter}")),
            stderr.map_or(Cell::Text("N/A"), Cell::Number),
        ),
    ]
}

/// The mean over tasks, by documents where the group says so, and the standard error of all documents
/// together (pooled variance).
fn pooled(
    metric: &GroupMetric,
    filter: &str,
    tasks: &[&TaskOutcome],
) -> Option<(f64, Option<f64>)> {
    let of_metric = tasks.iter().filter_map(|task| {
        let mut scores = task.scores.iter();
        let score = scores.find(|s| s.metric == metric.metric && s.filter == filter)?;
        Some((score, task.documents as f64))
    });
    let of_metric: Vec<_> = of_metric.collect();
    let weight = |size: f64| if metric.weight_by_size { size } else { 1.0 };
    let weights: f64 = of_metric.iter().map(|(_, size)| weight(*size)).sum();
    let sum: f64 = of_metric
        .iter()
        .map(|(score, size)| score.value * weight(*size))
        .sum();
    let sizes: f64 = of_metric.iter().map(|(_, size)| size).sum();
    let variances = of_metric.iter().map(|(score, size)| {
        score
            .stderr
            .map(|stderr| (size - 1.0) * stderr.powi(2) * size)
    });
    let variance: Option<f64> = variances.sum();
    let freedom = sizes - of_metric.len() as f64;
    let stderr = variance.map(|variance| (variance / freedom / sizes).sqrt());
    (!of_metric.is_empty()).then(|| (sum / weights, stderr))
}
