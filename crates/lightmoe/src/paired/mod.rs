//! `compare-results`: two evaluations of the same items, and what a difference between them is worth.

mod built_in;
mod evaluation;
mod groups;
mod harness;
mod rows;
mod table;
mod way;

pub use rows::{Outcome, Row};

use crate::cli::CompareResultsArgs;
use crate::preflight::Refused;
use anyhow::Result;
use evaluation::Evaluation;
use lightmoe_models::folder::write_file;
use rows::compare_task;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of the layout of what `--json` writes.
pub const SCHEMA_VERSION: u32 = 1;

/// What `--json` writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PairedFile {
    /// Version of this layout.
    #[schemars(extend("const" = SCHEMA_VERSION))]
    pub schema_version: u32,
    /// Version of the program that wrote it.
    pub lightmoe_version: String,
    /// The one evaluation.
    pub a: Side,
    /// The other.
    pub b: Side,
    /// Groups and tasks by name, groups first.
    pub rows: Vec<Row>,
}

/// One of two evaluations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Side {
    /// As it was given.
    pub path: String,
    /// The model, as the evaluation names it.
    pub model: String,
    /// Tasks that the other has not.
    pub alone: Vec<String>,
}

/// Compares two evaluations, writes what was asked for and returns the table.
///
/// # Errors
/// [`Refused`] for files that are no evaluations, or not of the same items; if a file cannot be
/// written.
pub fn run(args: &CompareResultsArgs) -> Result<String> {
    let (a, b) = (Evaluation::open(&args.a)?, Evaluation::open(&args.b)?);
    let (file, flipped) = compare((&args.a, &a), (&args.b, &b))?;
    if let Some(path) = &args.json {
        write_file(
            path,
            (serde_json::to_string_pretty(&file)? + "\n").as_bytes(),
        )?;
    }
    if let Some(path) = &args.markdown {
        write_file(path, table::page(&file).as_bytes())?;
    }
    if let Some(path) = &args.flips {
        let lines: String = flipped.iter().map(|line| format!("{line}\n")).collect();
        write_file(path, lines.as_bytes())?;
    }
    Ok(table::table(&file))
}

/// The comparison, and the items that are right in one evaluation alone.
fn compare(a: (&str, &Evaluation), b: (&str, &Evaluation)) -> Result<(PairedFile, Vec<Value>)> {
    let side = |(path, own): (&str, &Evaluation), other: &Evaluation| Side {
        path: path.to_owned(),
        model: own.model.clone(),
        alone: own
            .tasks
            .keys()
            .filter(|name| !other.tasks.contains_key(*name))
            .cloned()
            .collect(),
    };
    let (mut of_tasks, mut flipped) = (Vec::new(), Vec::new());
    for (name, task) in &a.1.tasks {
        if let Some(other) = b.1.tasks.get(name) {
            of_tasks.extend(compare_task(name, task, other, &mut flipped)?);
        }
    }
    if of_tasks.is_empty() {
        let names = |of: &Evaluation| of.tasks.keys().cloned().collect::<Vec<_>>().join(", ");
        let message = format!(
            "`{}` has {}, and `{}` has {}: no metric of a task is in both; evaluate both models on \
             the same tasks",
            a.1.path.display(),
            names(a.1),
            b.1.path.display(),
            names(b.1)
        );
        return Err(Refused(message).into());
    }
    let mut rows = Vec::new();
    for name in a.1.groups.keys() {
        rows.extend(groups::compare_group(name, (a.1, b.1), &of_tasks));
    }
    rows.extend(of_tasks);
    let file = PairedFile {
        schema_version: SCHEMA_VERSION,
        lightmoe_version: env!("CARGO_PKG_VERSION").into(),
        a: side(a, b.1),
        b: side(b, a.1),
        rows,
    };
    Ok((file, flipped))
}

#[cfg(test)]
mod tests;
