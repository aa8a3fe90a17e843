//! How a score comes of the values of items, and the difference of two scores of the same items.

use super::evaluation::{Item, ItemValue, Key, Recorded};
use lightmoe_data::harness::MetricConfig;
use lightmoe_data::overlap::{CorpusMetric, add_counts};
use lightmoe_eval::harness::corpus_metric;
use lightmoe_eval::paired::Difference;

/// Resamples of the bootstrap.
const RESAMPLES: usize = 10_000;
/// Scores that are written with fewer digits than they were computed with are equal up to this.
const TOLERANCE: f64 = 1e-6;

/// How a score comes of the values of the items.
pub(super) enum Way {
    /// `Σ values / Σ units`
    Mean,
    /// `exp(-Σ log-likelihoods / Σ units)`
    Perplexity,
    /// `-Σ log-likelihoods / Σ bytes`, in bits
    BitsPerByte,
    /// Of counts that are added up: BLEU, chrF
    Corpus(Box<dyn CorpusMetric>),
}

/// What a way takes of an item.
enum Part {
    /// A number, and the units that it is of.
    Of(f64, f64),
    Counts(Vec<usize>),
}

impl Way {
    /// The way in which the items of both evaluations give the scores that were written, if they do.
    /// `config` is what the task says of the metric, if it says something.
    pub(super) fn of(
        key: &Key,
        config: Option<&MetricConfig>,
        a: (&[Item], &Recorded),
        b: (&[Item], &Recorded),
    ) -> Option<Self> {
        let way = match (config.and_then(corpus_metric), key.metric.as_str()) {
            (Some(metric), _) => Self::Corpus(metric),
            (_, "bits_per_byte") => Self::BitsPerByte,
            (_, name) if name.contains("perplexity") => Self::Perplexity,
            _ => Self::Mean,
        };
        let gives = |(items, recorded): (&[Item], &Recorded)| {
            let parts = way.parts(items, &key.metric);
            parts.is_some_and(|parts| is_near(way.score(&parts), recorded.value))
        };
        (gives(a) && gives(b)).then_some(way)
    }

    /// What is taken of each item; none if one has no value for it.
    fn parts<'a>(
        &self,
        items: impl IntoIterator<Item = &'a Item>,
        metric: &str,
    ) -> Option<Vec<Part>> {
        let part = |item: &Item| match (self, item.values.get(metric)?) {
            (Self::Corpus(metric), ItemValue::Texts { answer, references }) => {
                let references: Vec<&str> = references.iter().map(String::as_str).collect();
                Some(Part::Counts(metric.counts(answer, &references)))
            }
            (Self::Corpus(_), _) | (_, ItemValue::Texts { .. }) => None,
            (_, ItemValue::One(value)) => Some(Part::Of(*value, 1.0)),
            (_, ItemValue::Of(value, of)) => Some(Part::Of(*value, *of)),
        };
        items.into_iter().map(part).collect()
    }

    /// Of the parts of some items, each of which may come more than once.
    fn score<'a>(&self, parts: impl IntoIterator<Item = &'a Part>) -> f64 {
        let (mut sum, mut units, mut counts) = (0.0, 0.0, Vec::new());
        for part in parts {
            match part {
                Part::Of(value, of) => {
                    sum += value;
                    units += of;
                }
                Part::Counts(of_item) => add_counts(&mut counts, of_item),
            }
        }
        let mean: f64 = sum / units;
        match self {
            Self::Corpus(metric) => metric.score(&counts),
            Self::Perplexity => (-mean).exp(),
            Self::BitsPerByte => -mean / std::f64::consts::LN_2,
            Self::Mean => mean,
        }
    }

    /// Of the scores of pairs of items; none if one has not the value for it.
    pub(super) fn difference(self, pairs: &[(&Item, &Item)], metric: &str) -> Option<Difference> {
        let of_a = self.parts(pairs.iter().map(|(a, _)| *a), metric)?;
        let of_b = self.parts(pairs.iter().map(|(_, b)| *b), metric)?;
        let score =
            |parts: &[Part], items: &[usize]| self.score(items.iter().map(|&item| &parts[item]));
        let both = |items: &[usize]| (score(&of_a, items), score(&of_b, items));
        let alike = |part: &Part| matches!(part, Part::Of(_, 1.0));
        let one_each = of_a.iter().chain(&of_b).all(alike);
        Some(match self {
            Self::Mean if one_each => {
                let numbers = |parts: &[Part]| -> Vec<f64> {
                    parts.iter().map(|part| self.score([part])).collect()
                };
                Difference::of_means(&numbers(&of_a), &numbers(&of_b))
            }
            _ => Difference::bootstrapped(pairs.len(), RESAMPLES, &both),
        })
    }
}

/// Whether two scores are the same.
pub(super) fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() <= TOLERANCE * a.abs().max(b.abs()) + f64::EPSILON
}
