//! What is computed of each document, and how one number comes of it.

use super::boot::bootstrap;
use crate::score::Score;
use crate::{Error, Result};
use fancy_regex::Regex;
use lightmoe_data::harness::{MetricConfig, OutputType, TaskConfig, python};

/// A metric of a task, ready to use.
pub(super) struct Metric {
    pub(super) name: String,
    pub(super) higher_is_better: bool,
    pub(super) kind: Kind,
    aggregation: Aggregation,
}

/// What is computed of a document.
pub(super) enum Kind {
    /// Whether the likeliest choice is right, or a single answer the likeliest text.
    Accuracy,
    /// The same by likelihood per character of the choice.
    AccuracyByLength,
    /// Whether an answer is the target as text.
    ExactMatch(Cleaning),
    /// Log-likelihood of an answer.
    Likelihood,
    /// Log-likelihood of a text, and its words, bytes or tokens.
    PerUnit(Unit),
}

/// What a perplexity is per.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Words,
    Bytes,
    Tokens,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aggregation {
    Mean,
    Perplexity,
    WeightedPerplexity,
    BitsPerByte,
}

/// A document's value: log-likelihoods come with the units that they are of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    One(f64),
    Of(f64, f64),
}

/// What is left out before texts are compared.
pub(super) struct Cleaning {
    regexes: Vec<Regex>,
    case: bool,
    punctuation: bool,
    numbers: bool,
}

/// The metrics of a task.
///
/// # Errors
/// [`Error::Invalid`] for one that is not known, or not of the task's output type.
pub(super) fn metrics(task: &TaskConfig) -> Result<Vec<Metric>> {
    let defaults = known(task.output_type());
    let configs = match &task.metric_list {
        Some(list) => list.clone(),
        // Per token is ours, not the harness's.
        None => defaults
            .iter()
            .filter(|name| **name != "token_perplexity")
            .map(plain)
            .collect(),
    };
    configs
        .iter()
        .map(|config| Metric::new(task, config))
        .collect()
}

fn plain(name: &&str) -> MetricConfig {
    MetricConfig {
        metric: (*name).to_owned(),
        ..MetricConfig::default()
    }
}

/// The metrics of an output type.
fn known(output: OutputType) -> &'static [&'static str] {
    match output {
        OutputType::Loglikelihood => &["perplexity", "acc"],
        OutputType::LoglikelihoodRolling => &[
            "word_perplexity",
            "byte_perplexity",
            "bits_per_byte",
            "token_perplexity",
        ],
        OutputType::MultipleChoice => &["acc", "acc_norm"],
        OutputType::GenerateUntil => &["exact_match"],
    }
}

impl Metric {
    fn new(task: &TaskConfig, config: &MetricConfig) -> Result<Self> {
        let name = config.metric.as_str();
        let invalid = |problem: String| {
            Error::Invalid(format!(
                "task `{}`, metric `{name}`: {problem}",
                task.name()
            ))
        };
        let names = known(task.output_type());
        if !names.contains(&name) {
            return Err(invalid(format!(
                "it is not known for this output type; use one of {}",
                names.join(", ")
            )));
        }
        let (kind, aggregation) = match name {
            "acc" => (Kind::Accuracy, Aggregation::Mean),
            "acc_norm" => (Kind::AccuracyByLength, Aggregation::Mean),
            "perplexity" => (Kind::Likelihood, Aggregation::Perplexity),
            "word_perplexity" => (Kind::PerUnit(Unit::Words), Aggregation::WeightedPerplexity),
            "byte_perplexity" => (Kind::PerUnit(Unit::Bytes), Aggregation::WeightedPerplexity),
            "token_perplexity" => (Kind::PerUnit(Unit::Tokens), Aggregation::WeightedPerplexity),
            "bits_per_byte" => (Kind::PerUnit(Unit::Bytes), Aggregation::BitsPerByte),
            _ => {
                let cleaning = Cleaning::new(config).map_err(invalid)?;
                (Kind::ExactMatch(cleaning), Aggregation::Mean)
            }
        };
        let expected = aggregation.name();
        if config
            .aggregation
            .as_deref()
            .is_some_and(|given| given != expected)
        {
            return Err(invalid(format!(
                "its aggregation is `{expected}`; leave the key out"
            )));
        }
        Ok(Self {
            name: name.to_owned(),
            higher_is_better: config
                .higher_is_better
                .unwrap_or(aggregation == Aggregation::Mean),
            kind,
            aggregation,
        })
    }

    /// The metric over all documents, and its standard error where the harness knows one.
    pub(super) fn aggregate(&self, values: &[Value]) -> (f64, Option<f64>) {
        let ones: Vec<f64> = values.iter().map(|value| value.pair().0).collect();
        let per_unit = || {
            let units: f64 = values.iter().map(|value| value.pair().1).sum();
            ones.iter().sum::<f64>() / units
        };
        match self.aggregation {
            Aggregation::Mean => {
                let score = Score::mean(&ones);
                (score.value, (score.n > 1).then_some(score.stderr))
            }
            Aggregation::Perplexity => {
                let perplexity = |values: &[f64]| (-Score::mean(values).value).exp();
                (
                    perplexity(&ones),
                    (ones.len() > 1).then(|| bootstrap(&ones, &perplexity)),
                )
            }
            Aggregation::WeightedPerplexity => ((-per_unit()).exp(), None),
            Aggregation::BitsPerByte => (-per_unit() / std::f64::consts::LN_2, None),
        }
    }
}

impl Aggregation {
    fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Perplexity => "perplexity",
            Self::WeightedPerplexity => "weighted_perplexity",
            Self::BitsPerByte => "bits_per_byte",
        }
    }
}

impl Value {
    fn pair(self) -> (f64, f64) {
        match self {
            Self::One(value) => (value, 1.0),
            Self::Of(value, units) => (value, units),
        }
    }
}

impl Cleaning {
    fn new(config: &MetricConfig) -> std::result::Result<Self, String> {
        let regexes = config
            .regexes_to_ignore
            .iter()
            .map(|pattern| python::regex(pattern));
        Ok(Self {
            regexes: regexes.collect::<std::result::Result<_, _>>()?,
            case: config.ignore_case,
            punctuation: config.ignore_punctuation,
            numbers: config.ignore_numbers,
        })
    }

    /// Whether two texts are the same once cleaned.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a pattern takes too many steps.
    pub(super) fn is_same(&self, a: &str, b: &str) -> Result<bool> {
        Ok(self.cleaned(a)? == self.cleaned(b)?)
    }

    fn cleaned(&self, text: &str) -> Result<String> {
        let mut text = text.to_owned();
        for regex in &self.regexes {
            text = python::substitute(regex, "", &text)
                .map_err(Error::Invalid)?
                .into_owned();
        }
        if self.case {
            text = text.to_lowercase();
        }
        text.retain(|c| {
            !(self.punctuation && c.is_ascii_punctuation() || self.numbers && c.is_ascii_digit())
        });
        Ok(text)
    }
}
