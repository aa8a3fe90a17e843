//! Whether a result may ship: what was measured, held against the thresholds that its recipe sets.

use crate::results::{Score, TaskScores, lower_is_better};
use anyhow::{Result, anyhow, ensure};
use lightmoe_eval::divergence::Estimate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a result must meet; what is not set asks for nothing.
#[derive(Debug, Clone, Default, PartialEq, clap::Args, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// For the verdict: least share of the original's score to keep, on every task and metric of which more is better, such as 0.97
    #[arg(long, value_name = "SHARE")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_score: Option<f64>,
    /// For the verdict: the most that the answer NLL may rise on a task, in nats per answer token
    #[arg(long, value_name = "NATS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_nll_increase: Option<f64>,
    /// For the verdict: the most that the predictions may differ from the original's, as the mean of KL(original ‖ result) in nats a token
    #[arg(long, value_name = "NATS")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
    /// For the verdict: the most bytes of weights, such as 6GiB
    #[arg(long, value_name = "SIZE")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<String>,
}

impl Thresholds {
    /// Whether none is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These thresholds, and those of `other` where these are silent.
    pub fn or(self, other: Self) -> Self {
        Self {
            min_score: self.min_score.or(other.min_score),
            max_nll_increase: self.max_nll_increase.or(other.max_nll_increase),
            max_kl: self.max_kl.or(other.max_kl),
            max_bytes: self.max_bytes.or(other.max_bytes),
        }
    }

    /// Refuses thresholds that nothing can be held against.
    ///
    /// # Errors
    /// One that is no number in its range, or no size.
    pub fn check(&self) -> Result<()> {
        let numbers = [
            ("min_score", self.min_score),
            ("max_nll_increase", self.max_nll_increase),
            ("max_kl", self.max_kl),
        ];
        for (key, value) in numbers {
            ensure!(
                value.is_none_or(|v| v >= 0.0 && v.is_finite()),
                "`{key}` is {}; give a number from 0",
                value.unwrap_or_default()
            );
        }
        self.bytes().map(drop)
    }

    fn bytes(&self) -> Result<Option<u64>> {
        let size = |text: &String| {
            let size: Result<bytesize::ByteSize, String> = text.parse();
            let size = size
                .map_err(|e| anyhow!("`max_bytes` is `{text}` ({e}); give a size such as 6GiB"))?;
            Ok(size.0)
        };
        self.max_bytes.as_ref().map(size).transpose()
    }
}

/// What follows from the thresholds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Verdict {
    /// The verdict in a word.
    pub word: Word,
    /// Every threshold on everything that it is about.
    pub checks: Vec<Check>,
}

/// The verdict in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// Every threshold is met.
    Go,
    /// At least one is missed.
    NoGo,
    /// None is missed, but at least one could not be measured.
    Undecided,
}

impl Word {
    /// `Go`, `No-go` or `Undecided`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Go => "Go",
            Self::NoGo => "No-go",
            Self::Undecided => "Undecided",
        }
    }

    /// What it says, in a sentence.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Go => "every threshold is met",
            Self::NoGo => "a threshold is missed",
            Self::Undecided => "a threshold could not be measured",
        }
    }
}

/// A threshold held against one number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// The threshold's key.
    pub threshold: String,
    /// What it asks for, in the unit of what is measured; null where that is a share of a score that is not there.
    pub limit: Option<f64>,
    /// Where a share of the original's score is asked for: that share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// Likewise: the original's score, if it was scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<f64>,
    /// What it is about: a task with its metric, or the weights.
    pub of: String,
    /// The number held against it; null where there is none.
    pub measured: Option<f64>,
    /// Two standard errors of that number, the two models' scores taken as independent; null for
    /// what has no error.
    pub margin: Option<f64>,
    /// What follows.
    pub outcome: Outcome,
}

/// Whether a threshold is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is.
    Met,
    /// It is not.
    Missed,
    /// There is no number to hold against it.
    Unmeasured,
}

/// On which side of its limit a number must lie.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    AtLeast,
    AtMost,
}

/// A number and what it is held against.
#[derive(Clone, Copy)]
struct Held {
    limit: Option<f64>,
    share: Option<f64>,
    original: Option<f64>,
    /// With its standard error, if it has one.
    number: Option<(f64, Option<f64>)>,
}

impl Check {
    fn new((threshold, side): (&str, Side), of: String, held: Held) -> Self {
        let outcome = match (held.number.zip(held.limit), side) {
            (None, _) => Outcome::Unmeasured,
            (Some(((value, _), limit)), Side::AtLeast) if value >= limit => Outcome::Met,
            (Some(((value, _), limit)), Side::AtMost) if value <= limit => Outcome::Met,
            _ => Outcome::Missed,
        };
        let error = held.number.and_then(|number| number.1);
        Self {
            threshold: threshold.to_owned(),
            limit: held.limit,
            share: held.share,
            original: held.original,
            of,
            measured: held.number.map(|number| number.0),
            margin: error.map(|error| 2.0 * error),
            outcome,
        }
    }

    /// Whether the limit lies within two standard errors of the number, so that other test items could
    /// have said otherwise.
    pub fn is_close(&self) -> bool {
        let distance = self.measured.zip(self.limit);
        let distance = distance.map(|(value, limit)| (value - limit).abs());
        distance.zip(self.margin).is_some_and(|(d, m)| d <= m)
    }

    /// A number of this check as it is read: bytes in units, others with three digits.
    pub fn show(&self, value: f64) -> String {
        match self.threshold.as_str() {
            "max_bytes" => crate::report::table::bytes_text(value as u64),
            _ => format!("{value:.3}"),
        }
    }

    /// The number with its margin.
    pub fn number(&self) -> String {
        let value = self.measured.map(|value| self.show(value));
        match (value, self.margin) {
            (None, _) => "not measured".to_owned(),
            (Some(value), None) => value,
            (Some(value), Some(margin)) => format!("{value} ± {margin:.3}"),
        }
    }

    /// What it asks for, as it is read.
    pub fn asked(&self) -> String {
        let Some(limit) = self.limit else {
            let share = 100.0 * self.share.unwrap_or_default();
            return format!("at least {share:.1}% of the original's score");
        };
        let shown = self.show(limit);
        match self.original {
            Some(original) if original > 0.0 => {
                let percent = 100.0 * limit / original;
                format!("at least {shown} ({percent:.1}% of {original:.3})")
            }
            Some(_) => format!("at least {shown}"),
            None => format!("at most {shown}"),
        }
    }

    /// What follows, in words.
    pub fn word(&self) -> &'static str {
        match (self.outcome, self.is_close()) {
            (Outcome::Met, false) => "met",
            (Outcome::Met, true) => "met, within the error",
            (Outcome::Missed, false) => "missed",
            (Outcome::Missed, true) => "missed, within the error",
            (Outcome::Unmeasured, _) => "not measured",
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (of, threshold) = (&self.of, &self.threshold);
        let (number, asked) = (self.number(), self.asked());
        write!(f, "{of}: {number}, {asked} by {threshold}: {}", self.word())
    }
}

/// What a verdict is drawn from.
#[derive(Debug, Clone, Copy)]
pub struct Measured<'a> {
    /// Scores of the original, if it was scored.
    pub original: Option<&'a TaskScores>,
    /// Scores of the result, on the same items.
    pub result: Option<&'a TaskScores>,
    /// Mean KL divergence of the result's predictions from the original's, nats a token, if it was
    /// measured.
    pub kl: Option<Estimate>,
    /// Bytes of the result's weights.
    pub bytes: u64,
}

/// Holds what was measured against thresholds; `None` where none is set.
///
/// # Errors
/// If a threshold is none.
pub fn judge(measured: &Measured<'_>, thresholds: &Thresholds) -> Result<Option<Verdict>> {
    thresholds.check()?;
    if thresholds.is_empty() {
        return Ok(None);
    }
    let mut checks = Vec::new();
    if let Some(share) = thresholds.min_score {
        let key = ("min_score", Side::AtLeast);
        checks.extend(on_scores(measured, key, &|before, after| Held {
            limit: before.map(|before| share * before.value),
            share: Some(share),
            original: before.map(|before| before.value),
            number: before.zip(after).map(|(before, after)| {
                let error = after.stderr.hypot(share * before.stderr);
                (after.value, Some(error))
            }),
        }));
    }
    if let Some(limit) = thresholds.max_nll_increase {
        let key = ("max_nll_increase", Side::AtMost);
        checks.extend(on_scores(measured, key, &|before, after| Held {
            limit: Some(limit),
            share: None,
            original: None,
            number: before.zip(after).map(|(before, after)| {
                let error = after.stderr.hypot(before.stderr);
                (after.value - before.value, Some(error))
            }),
        }));
    }
    let mut add = |key: &str, of: &str, limit: f64, number| {
        let held = Held {
            limit: Some(limit),
            share: None,
            original: None,
            number,
        };
        checks.push(Check::new((key, Side::AtMost), of.to_owned(), held));
    };
    if let Some(limit) = thresholds.max_kl {
        let number = measured.kl.map(|kl| (kl.value, kl.stderr));
        add("max_kl", "predictions", limit, number);
    }
    if let Some(limit) = thresholds.bytes()? {
        let number = Some((measured.bytes as f64, None));
        add("max_bytes", "weights on disk", limit as f64, number);
    }
    let any = |outcome| checks.iter().any(|check| check.outcome == outcome);
    let word = match (any(Outcome::Missed), any(Outcome::Unmeasured)) {
        (true, _) => Word::NoGo,
        (_, true) => Word::Undecided,
        _ => Word::Go,
    };
    Ok(Some(Verdict { word, checks }))
}

/// A check of the original's score and the result's for every task and every metric of which more is
/// better, where the number must be at least something, or every NLL; one without a number where nothing was
/// scored.
fn on_scores(
    measured: &Measured<'_>,
    key: (&str, Side),
    hold: &dyn Fn(Option<Score>, Option<Score>) -> Held,
) -> Vec<Check> {
    let tasks = measured.original.into_iter().flatten();
    let scores = tasks.flat_map(|(task, metrics)| {
        let metrics = metrics.iter().map(move |(m, &score)| (task, m, score));
        metrics.filter(move |(_, metric, _)| match key.1 {
            Side::AtLeast => !lower_is_better(metric),
            // Of what less is better, perplexity and the like say the same in other units.
            Side::AtMost => metric.contains("nll"),
        })
    });
    let mut checks: Vec<Check> = scores
        .map(|(task, metric, before)| {
            let after = measured.result;
            let after = after.and_then(|r| r.get(task)?.get(metric).copied());
            let mut held = hold(Some(before), after);
            // One item has no standard error.
            if before.n < 2 || after.is_some_and(|after| after.n < 2) {
                held.number = held.number.map(|(value, _)| (value, None));
            }
            Check::new(key, format!("{task} · {metric}"), held)
        })
        .collect();
    if checks.is_empty() {
        checks.push(Check::new(key, "scores".to_owned(), hold(None, None)));
    }
    checks
}

#[cfg(test)]
mod tests;
