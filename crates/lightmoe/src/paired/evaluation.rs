//! An evaluation, whichever program wrote it: scores, and what became of each item.

use super::{built_in, harness};
use crate::preflight::Refused;
use anyhow::Result;
use lightmoe_data::harness::MetricConfig;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// One evaluation.
pub struct Evaluation {
    /// The file with the scores.
    pub path: PathBuf,
    /// The model, by the name that the file has for it, and the stage of a run.
    pub model: String,
    /// By name.
    pub tasks: BTreeMap<String, TaskItems>,
    /// By name.
    pub groups: BTreeMap<String, GroupScores>,
}

/// A task.
#[derive(Default)]
pub struct TaskItems {
    /// What should be the same where items are compared: a name and a value.
    pub conditions: Vec<(&'static str, Value)>,
    /// What the task says of its metrics, by name.
    pub metrics: BTreeMap<String, MetricConfig>,
    /// By metric and filter.
    pub scores: BTreeMap<Key, Recorded>,
    /// By filter.
    pub items: BTreeMap<String, Vec<Item>>,
}

/// A group of tasks.
pub struct GroupScores {
    /// The tasks in it and in its groups.
    pub tasks: Vec<String>,
    /// By metric and filter.
    pub scores: BTreeMap<Key, Recorded>,
}

/// What is scored.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The metric.
    pub metric: String,
    /// The chain of filters before it; empty where there is none.
    pub filter: String,
}

/// A score as it was written.
#[derive(Debug, Clone, Copy)]
pub struct Recorded {
    /// The score.
    pub value: f64,
    /// Its standard error.
    pub stderr: Option<f64>,
    /// Whether more is better, where that is known.
    pub higher_is_better: Option<bool>,
}

/// What became of an item.
pub struct Item {
    /// Its number in the task.
    pub id: u64,
    /// A hash of the item and its right answer: equal for the same item.
    pub content: String,
    /// A hash of what the model read.
    pub prompt: String,
    /// By metric.
    pub values: BTreeMap<String, ItemValue>,
    /// What a reader wants to see of the item itself.
    pub shown: Map<String, Value>,
    /// What the model gave.
    pub response: Value,
}

/// The value of a metric for an item.
#[derive(Debug, Clone, PartialEq)]
pub enum ItemValue {
    /// A number.
    One(f64),
    /// A log-likelihood and what it is of: words, bytes or tokens.
    Of(f64, f64),
    /// An answer and what was to be answered, of scores that a corpus has alone.
    Texts {
        /// What the model gave.
        answer: String,
        /// What is right.
        references: Vec<String>,
    },
}

impl Evaluation {
    /// Reads what `lightmoe evaluate`, a run of `lightmoe compress` or lm-evaluation-harness left: a
    /// folder or the file with the scores. `@original`, `@built` or `@recovered` behind the path of a
    /// run says which model; else it is the one that the run ended with.
    ///
    /// # Errors
    /// [`Refused`], naming file and field: nothing that can be read as such, or samples are missing.
    pub fn open(given: &str) -> Result<Self> {
        let (path, stage) = match given.rsplit_once('@') {
            Some((path, stage)) if !Path::new(given).exists() => (Path::new(path), Some(stage)),
            _ => (Path::new(given), None),
        };
        let file = scores_file(path)?;
        let scores = read_json(&file)?;
        match (scores.get("stages").is_some(), stage) {
            (true, stage) => built_in::of_run(&file, stage),
            (false, Some(stage)) => Err(refused(
                &file,
                format!("it is no run's, so it has no stage `{stage}`; leave out `@{stage}`"),
            )),
            (false, None) if scores.get("results").is_some() => harness::read(&file, &scores),
            (false, None) => built_in::of_scores(&file, &scores),
        }
    }
}

/// The file with the scores: `path` itself, `results.json` in it, or the newest `results_*.json` in it
/// or in its only folder that has some, as lm-evaluation-harness leaves them.
fn scores_file(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_owned());
    }
    let in_folder = |folder: &Path| -> Result<Option<PathBuf>> {
        if folder.join("results.json").is_file() {
            return Ok(Some(folder.join("results.json")));
        }
        let mut dated = entries(folder)?;
        dated.retain(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("results_") && name.ends_with(".json")
        });
        // The names end with the date, so the last one is the newest.
        Ok(dated.pop())
    };
    if let Some(file) = in_folder(path)? {
        return Ok(file);
    }
    let mut below = Vec::new();
    for folder in entries(path)?.into_iter().filter(|path| path.is_dir()) {
        below.extend(in_folder(&folder)?);
    }
    match below.as_slice() {
        [file] => Ok(file.clone()),
        [] => Err(refused(
            path,
            "it has no results.json and no results_*.json; give what `lightmoe evaluate --out`, \
             `lightmoe compress --out` or `lm_eval --output_path` wrote",
        )),
        several => Err(refused(
            path,
            format!(
                "there are results of {} models below it; give the folder of one",
                several.len()
            ),
        )),
    }
}

/// What is in a folder, by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let cannot = |e| refused(folder, format!("it cannot be read ({e}); check the path"));
    let all = fs::read_dir(folder).map_err(cannot)?;
    let mut paths = Vec::new();
    for entry in all {
        paths.push(entry.map_err(cannot)?.path());
    }
    paths.sort();
    Ok(paths)
}

/// A JSON file.
fn read_json(path: &Path) -> Result<Value> {
    let text = read(path)?;
    serde_json::from_str(&text)
        .map_err(|e| refused(path, format!("it is not JSON ({e}); evaluate again")))
}

/// The lines of a JSON-lines file.
pub(super) fn read_lines<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let text = read(path)?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|e| {
                let number = number + 1;
                refused(
                    path,
                    format!("line {number} is no sample ({e}); evaluate again"),
                )
            })
        })
        .collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| {
        refused(
            path,
            format!(
                "it cannot be read ({e}); paired results need scores and samples: evaluate with \
                 `--out`, and lm-evaluation-harness with `--log_samples`"
            ),
        )
    })
}

/// What is wrong with a file.
pub(super) fn refused(path: &Path, message: impl std::fmt::Display) -> anyhow::Error {
    Refused(format!("`{}`: {message}", path.display())).into()
}
