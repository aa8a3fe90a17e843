//! `results.json`: what a run did to the model, in numbers.

use crate::keep::Kept;
use crate::machine::Environment;
use crate::verdict::{Measured, Verdict};
use crate::versioned;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Result, ensure};
pub use lightmoe_compress::plan::{Parameters, Ratio};
use lightmoe_eval::divergence::Distance;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Version of the layout of `results.json`.
pub const SCHEMA_VERSION: u32 = 1;

/// The scores of one stage: task, then metric.
pub type TaskScores = BTreeMap<String, BTreeMap<String, Score>>;

/// The whole of `results.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Results {
    /// Version of this layout.
    #[schemars(extend("const" = SCHEMA_VERSION))]
    pub schema_version: u32,
    /// Version of the program that wrote it.
    pub lightmoe_version: String,
    /// The model's name or folder, as given.
    pub model: String,
    /// The task that the model was compressed for.
    pub task: String,
    /// The method's name.
    pub method: String,
    /// The seed of every random choice.
    pub seed: u64,
    /// How much smaller the model became.
    pub ratio: Ratio,
    /// Parameter counts.
    pub parameters: Parameters,
    /// Bytes of the weights on disk.
    pub bytes: Bytes,
    /// Scores of the original, the built and the recovered model by task and metric; a stage may be missing.
    /// Metrics: `exact_match`, `answer_nll` (nats per answer token), for multiple choice `acc` and
    /// `acc_norm`, for translation `chrf` (0 to 100); of text `nll` (nats per token), `perplexity` (its exp)
    /// and `bits_per_byte` (of the decoded windows).
    pub stages: BTreeMap<Stage, TaskScores>,
    /// Wall-clock seconds of each step of the run.
    pub seconds: BTreeMap<String, f64>,
    /// Greatest resident memory of the run, in bytes.
    pub peak_rss_bytes: u64,
    /// Greatest resident memory while each step ran, in bytes.
    pub peak_rss_by_stage: BTreeMap<String, u64>,
    /// Which model was kept, where the better one was to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// How far the result's predictions are from the original's on test items; `divergence.json` says
    /// more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<Distance>,
    /// What follows from the thresholds of the recipe, if it sets any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Where the run ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<Environment>,
    /// Hash of all that the numbers depend on.
    pub fingerprint: String,
}

/// Bytes of the weights on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Bytes {
    /// Of the original model.
    pub before: u64,
    /// Of the compressed model.
    pub after: u64,
}

/// A state of the model that is scored.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// As it was given.
    Original,
    /// Compressed, before any training.
    Built,
    /// Compressed and trained.
    Recovered,
}

impl Stage {
    /// Every state, in the order in which a run passes through them.
    pub const ALL: [Self; 3] = [Self::Original, Self::Built, Self::Recovered];

    /// The name in `results.json` and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Original => "original",
            Self::Built => "built",
            Self::Recovered => "recovered",
        }
    }
}

/// One metric of one task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Score {
    /// The estimate.
    pub value: f64,
    /// Its standard error.
    pub stderr: f64,
    /// Test items behind it.
    pub n: u64,
}

impl Score {
    /// `0.554 ± 0.022`, with `digits` after the point.
    pub fn show(&self, digits: usize) -> String {
        format!("{:.digits$} ± {:.digits$}", self.value, self.stderr)
    }
}

/// Digits after the point for a metric: one for percentages such as chrF, else three.
pub fn digits(metric: &str) -> usize {
    if metric.contains("chrf") { 1 } else { 3 }
}

/// Whether a smaller value of the metric is the better one.
pub fn lower_is_better(metric: &str) -> bool {
    ["nll", "loss", "perplexity", "bits_per_byte"]
        .iter()
        .any(|part| metric.contains(part))
}

/// The mean negative log-likelihood among the scores of a task: of its answers, or of its text.
pub fn nll<T>(scores: &BTreeMap<String, T>) -> Option<&T> {
    scores.get("answer_nll").or_else(|| scores.get("nll"))
}

/// How the recovered model stands to the original one on one metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The metric.
    pub metric: String,
    /// The original model's score.
    pub original: Score,
    /// The recovered model's score.
    pub recovered: Score,
    /// Two standard errors of the difference, the two scores taken as independent.
    pub margin: f64,
    /// What follows.
    pub outcome: Outcome,
}

/// What two scores and their standard errors say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Better by more than two standard errors.
    Better,
    /// No difference of more than two standard errors.
    Within,
    /// Worse by more than two standard errors.
    Worse,
}

impl Comparison {
    fn new(metric: &str, original: Score, recovered: Score) -> Self {
        let margin = 2.0 * original.stderr.hypot(recovered.stderr);
        let difference = recovered.value - original.value;
        let gain = if lower_is_better(metric) {
            -difference
        } else {
            difference
        };
        let outcome = if gain.abs() <= margin {
            Outcome::Within
        } else if gain > 0.0 {
            Outcome::Better
        } else {
            Outcome::Worse
        };
        Self {
            metric: metric.to_owned(),
            original,
            recovered,
            margin,
            outcome,
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = digits(&self.metric);
        let Self {
            metric,
            original,
            recovered,
            ..
        } = self;
        write!(
            f,
            "{metric} {:.digits$} against {:.digits$}: ",
            recovered.value, original.value
        )?;
        let gap = (recovered.value - original.value).abs();
        match self.outcome {
            Outcome::Within => write!(f, "within two standard errors"),
            Outcome::Better => write!(f, "better by {gap:.digits$}"),
            Outcome::Worse => write!(f, "worse by {gap:.digits$}"),
        }?;
        write!(f, " (± {:.digits$}, n = {})", self.margin, recovered.n)
    }
}

impl Results {
    /// The scores of what the run ended with: of the built model, where there was no recovery.
    pub fn ended(&self) -> Option<&TaskScores> {
        let recovered = self.stages.get(&Stage::Recovered);
        recovered.or_else(|| self.stages.get(&Stage::Built))
    }

    /// The scores of a stage on the run's task. A run without recovery ends with what was built.
    pub fn scores(&self, stage: Stage) -> Option<&BTreeMap<String, Score>> {
        let tasks = match stage {
            Stage::Recovered => self.ended(),
            _ => self.stages.get(&stage),
        };
        tasks?.get(&self.task)
    }

    /// What a verdict is drawn from.
    pub fn measured(&self) -> Measured<'_> {
        Measured {
            original: self.stages.get(&Stage::Original),
            result: self.ended(),
            kl: self.divergence.map(|distance| distance.kl),
            bytes: self.bytes.after,
        }
    }

    /// Compares the result with the original model on every metric of the run's task.
    pub fn comparisons(&self) -> Vec<Comparison> {
        let scores = |stage| self.scores(stage);
        let (Some(original), Some(recovered)) = (scores(Stage::Original), scores(Stage::Recovered))
        else {
            return Vec::new();
        };
        let compared = original.iter().filter_map(|(metric, &before)| {
            // One item has no standard error, so nothing follows from it.
            let after = *recovered.get(metric)?;
            let enough = before.n > 1 && after.n > 1;
            enough.then(|| Comparison::new(metric, before, after))
        });
        compared.collect()
    }

    /// The file's text: indented JSON.
    ///
    /// # Errors
    /// If a number is not finite: JSON cannot hold it.
    pub fn to_json(&self) -> Result<String> {
        let scores = self.stages.values().flat_map(|tasks| tasks.values());
        for (metric, score) in scores.flatten() {
            ensure!(
                score.value.is_finite() && score.stderr.is_finite(),
                "`{metric}` is {}: the model gives no numbers any more; lower the learning rate \
                 and recover again",
                score.show(digits(metric))
            );
        }
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Writes the file, atomically.
    ///
    /// # Errors
    /// If it cannot be written, or as [`Results::to_json`].
    pub fn save(&self, path: &Path) -> Result<()> {
        lightmoe_models::folder::write_file(path, self.to_json()?.as_bytes())?;
        Ok(())
    }

    /// Reads the file.
    ///
    /// # Errors
    /// If it cannot be read, is no such file, or is of another version.
    pub fn load(path: &Path) -> Result<Self> {
        versioned::load(path, SCHEMA_VERSION, "evaluate the run again")
    }
}

#[cfg(test)]
pub(crate) mod tests;
