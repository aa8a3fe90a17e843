//! What is computed of each document, and how one number comes of it.

use super::boot::bootstrap;
use super::cleaning::Cleaning;
use crate::score::Score;
use crate::{Error, Result};
use lightmoe_data::harness::{MetricConfig, OutputType, TaskConfig};
use lightmoe_data::overlap::{
    Bleu, Case, Chrf, CorpusMetric, Rouge, Stemming, Tokenizer, Unit as Overlap, add_counts,
};

/// Resamples of the harness: for what is the mean of something, and for metrics of a corpus.
const RESAMPLES: u32 = 100_000;
const CORPUS_RESAMPLES: u32 = 100;

/// A metric of a task, ready to use.
pub(super) struct Metric {
    pub(super) name: String,
    /// What the task calls it.
    pub(super) asked: String,
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
    /// What an answer has in common with the nearest target.
    Rouge(Rouge),
    /// Counts of an answer and its targets.
    Corpus(Box<dyn CorpusMetric>),
    /// How likely one of so many answers is a program that passes the tests.
    Passes(usize),
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
    /// The score of counts, under the metric's own name.
    Corpus,
    Perplexity,
    WeightedPerplexity,
    BitsPerByte,
}

/// A document's value: log-likelihoods come with the units that they are of.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    One(f64),
    Of(f64, f64),
    Counts(Vec<usize>),
}

/// The metrics of a task.
///
/// # Errors
/// [`Error::Invalid`] for one that is not known, or not of the task's output type.
pub(super) fn metrics(task: &TaskConfig) -> Result<Vec<Metric>> {
    let configs = match &task.metric_list {
        Some(list) => list.clone(),
        None => defaults(task.output_type()).iter().map(plain).collect(),
    };
    let mut metrics = Vec::new();
    for config in &configs {
        match config.metric.as_str() {
            // One metric for each number of programs.
            "pass_at_k" if !config.k.is_empty() => {
                for &k in &config.k {
                    metrics.push(Metric::new(task, config, k)?);
                }
            }
            _ => metrics.push(Metric::new(task, config, 1)?),
        }
    }
    Ok(metrics)
}

/// The metric of a corpus that a task's `metric_list` asks for; none for other metrics, and for options
/// that cannot be.
pub fn corpus_metric(config: &MetricConfig) -> Option<Box<dyn CorpusMetric>> {
    match Kind::new(config, 1, 1) {
        Ok(Kind::Corpus(metric)) => Some(metric),
        _ => None,
    }
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
        OutputType::GenerateUntil => &[
            "exact_match",
            "rouge1",
            "rouge2",
            "rougeL",
            "rougeLsum",
            "bleu",
            "chrf",
            "chrf++",
            "pass_at_k",
            "pass_at_1",
        ],
    }
}

/// Those that the harness takes where a task names none.
fn defaults(output: OutputType) -> &'static [&'static str] {
    let known = known(output);
    match output {
        // Per token is ours, not the harness's.
        OutputType::LoglikelihoodRolling => &known[..3],
        OutputType::GenerateUntil => &known[..1],
        _ => known,
    }
}

impl Metric {
    fn new(task: &TaskConfig, config: &MetricConfig, k: usize) -> Result<Self> {
        let name = config.metric.as_str();
        let invalid = |problem: String| {
            Error::Invalid(format!(
                "task `{}`, `metric_list`, metric `{name}`: {problem}",
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
        let kind = Kind::new(config, k, task.repeats()).map_err(invalid)?;
        let aggregation = match (&kind, name) {
            (Kind::Likelihood, _) => Aggregation::Perplexity,
            (Kind::PerUnit(_), "bits_per_byte") => Aggregation::BitsPerByte,
            (Kind::PerUnit(_), _) => Aggregation::WeightedPerplexity,
            (Kind::Corpus(_), _) => Aggregation::Corpus,
            _ => Aggregation::Mean,
        };
        let expected = aggregation.name(name);
        if config
            .aggregation
            .as_deref()
            .is_some_and(|given| given != expected)
        {
            return Err(invalid(format!(
                "its aggregation is `{expected}`; leave the key out"
            )));
        }
        let is_score = matches!(aggregation, Aggregation::Mean | Aggregation::Corpus);
        Ok(Self {
            name: match name {
                "pass_at_k" => format!("pass@{k}"),
                other => other.to_owned(),
            },
            asked: name.to_owned(),
            higher_is_better: config.higher_is_better.unwrap_or(is_score),
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
        match (self.aggregation, &self.kind) {
            (Aggregation::Corpus, Kind::Corpus(metric)) => {
                let score = |values: &[Value]| {
                    let mut sums = Vec::new();
                    for value in values {
                        if let Value::Counts(counts) = value {
                            add_counts(&mut sums, counts);
                        }
                    }
                    metric.score(&sums)
                };
                let stderr = || bootstrap(values, CORPUS_RESAMPLES, &score);
                (score(values), (values.len() > 1).then(stderr))
            }
            (Aggregation::Mean | Aggregation::Corpus, _) => {
                let score = Score::mean(&ones);
                (score.value, (score.n > 1).then_some(score.stderr))
            }
            (Aggregation::Perplexity, _) => {
                let perplexity = |values: &[f64]| (-Score::mean(values).value).exp();
                (
                    perplexity(&ones),
                    (ones.len() > 1).then(|| bootstrap(&ones, RESAMPLES, &perplexity)),
                )
            }
            (Aggregation::WeightedPerplexity, _) => ((-per_unit()).exp(), None),
            (Aggregation::BitsPerByte, _) => (-per_unit() / std::f64::consts::LN_2, None),
        }
    }

    /// What decides the score of a corpus besides the texts, which have so many references each.
    pub(super) fn signature(&self, references: Option<usize>) -> Option<String> {
        match &self.kind {
            Kind::Corpus(metric) => Some(metric.signature(references)),
            _ => None,
        }
    }
}

impl Kind {
    fn new(config: &MetricConfig, k: usize, answers: usize) -> std::result::Result<Self, String> {
        let name = config.metric.as_str();
        for (key, is_there, metrics) in [
            (
                "use_stemmer",
                config.use_stemmer,
                &["rouge1", "rouge2", "rougeL", "rougeLsum"][..],
            ),
            (
                "math_equivalence",
                config.math_equivalence,
                &["exact_match"],
            ),
            ("tokenize", config.tokenize.is_some(), &["bleu"]),
            ("k", !config.k.is_empty(), &["pass_at_k"]),
        ] {
            if is_there && !metrics.contains(&name) {
                return Err(format!(
                    "it has no `{key}`, which is for {}",
                    metrics.join(", ")
                ));
            }
        }
        let case = match config.ignore_case {
            true => Case::Lower,
            false => Case::Mixed,
        };
        let rouge = |unit| {
            Self::Rouge(Rouge {
                unit,
                stemming: match config.use_stemmer {
                    true => Stemming::Porter,
                    false => Stemming::None,
                },
            })
        };
        Ok(match name {
            "acc" => Self::Accuracy,
            "acc_norm" => Self::AccuracyByLength,
            "perplexity" => Self::Likelihood,
            "word_perplexity" => Self::PerUnit(Unit::Words),
            "byte_perplexity" | "bits_per_byte" => Self::PerUnit(Unit::Bytes),
            "token_perplexity" => Self::PerUnit(Unit::Tokens),
            "rouge1" => rouge(Overlap::Ngrams(1)),
            "rouge2" => rouge(Overlap::Ngrams(2)),
            "rougeL" => rouge(Overlap::Subsequence),
            "rougeLsum" => rouge(Overlap::Lines),
            "bleu" => {
                let given = config.tokenize.as_deref();
                let tokenizer = given.map_or(Some(Tokenizer::default()), Tokenizer::named);
                let tokenizer = tokenizer.ok_or("its `tokenize` is neither `13a` nor `zh`")?;
                Self::Corpus(Box::new(Bleu { tokenizer, case }))
            }
            "chrf" => Self::Corpus(Box::new(Chrf { words: 0, case })),
            "chrf++" => Self::Corpus(Box::new(Chrf { words: 2, case })),
            "pass_at_k" | "pass_at_1" if k == 0 || k > answers => {
                return Err(format!(
                    "`k` is {k} and each document has {answers} answers; use 1 to that many, or raise \
                     `repeats`"
                ));
            }
            "pass_at_k" | "pass_at_1" => Self::Passes(k),
            _ => Self::ExactMatch(Cleaning::new(config)?),
        })
    }
}

impl Aggregation {
    fn name(self, metric: &str) -> &str {
        match self {
            Self::Mean => "mean",
            Self::Corpus => metric,
            Self::Perplexity => "perplexity",
            Self::WeightedPerplexity => "weighted_perplexity",
            Self::BitsPerByte => "bits_per_byte",
        }
    }
}

impl Value {
    fn pair(&self) -> (f64, f64) {
        match self {
            Self::One(value) => (*value, 1.0),
            Self::Of(value, units) => (*value, *units),
            Self::Counts(_) => (f64::NAN, f64::NAN),
        }
    }
}
