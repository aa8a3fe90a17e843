//! How a score comes of the values of items, and the difference of two scores of the same items.

use super::evaluation::{Item, ItemValue, Key, Recorded};
use lightmoe_data::overlap::corpus_chrf;
use lightmoe_eval::paired::Difference;

/// Resamples of the bootstrap of scores that sum numbers, and of those that read texts, which takes
/// longer.
const RESAMPLES: usize = 10_000;
const TEXT_RESAMPLES: usize = 200;
/// Scores that are written with fewer digits than they were computed with are equal up to this.
const TOLERANCE: f64 = 1e-6;

/// How a score comes of the values of the items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// `Σ values / Σ units`
    Mean,
    /// `exp(-Σ log-likelihoods / Σ units)`
    Perplexity,
    /// `-Σ log-likelihoods / Σ bytes`, in bits
    BitsPerByte,
    Chrf,
}

impl Way {
    /// The way in which the items of both evaluations give the scores that were written, if they do.
    pub(super) fn of(key: &Key, a: (&[Item], &Recorded), b: (&[Item], &Recorded)) -> Option<Self> {
        let way = match key.metric.as_str() {
            "chrf" => Self::Chrf,
            "bits_per_byte" => Self::BitsPerByte,
            name if name.contains("perplexity") => Self::Perplexity,
            _ => Self::Mean,
        };
        let gives = |(items, recorded): (&[Item], &Recorded)| {
            let values: Option<Vec<&ItemValue>> = items
                .iter()
                .map(|item| item.values.get(&key.metric))
                .collect();
            let score = values.and_then(|values| way.score(values.into_iter()));
            score.is_some_and(|score| is_near(score, recorded.value))
        };
        (gives(a) && gives(b)).then_some(way)
    }

    /// Of some items, each of which may come more than once; none if one has another kind of value.
    fn score<'a>(self, values: impl Iterator<Item = &'a ItemValue>) -> Option<f64> {
        if self == Self::Chrf {
            let texts: Option<Vec<(&str, &str)>> = values
                .map(|value| match value {
                    ItemValue::Texts(answer, target) => Some((answer.as_str(), target.as_str())),
                    _ => None,
                })
                .collect();
            return Some(corpus_chrf(&texts?));
        }
        let (mut sum, mut units) = (0.0, 0.0);
        for value in values {
            let (value, of) = match value {
                ItemValue::One(value) => (*value, 1.0),
                ItemValue::Of(value, of) => (*value, *of),
                ItemValue::Texts(..) => return None,
            };
            sum += value;
            units += of;
        }
        let mean = sum / units;
        Some(match self {
            Self::Perplexity => (-mean).exp(),
            Self::BitsPerByte => -mean / std::f64::consts::LN_2,
            Self::Mean | Self::Chrf => mean,
        })
    }

    /// Of the scores of pairs of items; none if one has not the value for it.
    pub(super) fn difference(self, pairs: &[(&Item, &Item)], metric: &str) -> Option<Difference> {
        let values = pairs
            .iter()
            .map(|(a, b)| Some((a.values.get(metric)?, b.values.get(metric)?)));
        let (a, b): (Vec<&ItemValue>, Vec<&ItemValue>) =
            values.collect::<Option<Vec<_>>>()?.into_iter().unzip();
        let numbers = |values: &[&ItemValue]| -> Option<Vec<f64>> {
            let one = values.iter().map(|value| match value {
                ItemValue::One(value) => Some(*value),
                _ => None,
            });
            one.collect()
        };
        if let (Self::Mean, Some(a), Some(b)) = (self, numbers(&a), numbers(&b)) {
            return Some(Difference::of_means(&a, &b));
        }
        let resamples = match self {
            Self::Chrf => TEXT_RESAMPLES,
            _ => RESAMPLES,
        };
        let score = |values: &[&ItemValue], items: &[usize]| {
            let drawn = items.iter().map(|&item| values[item]);
            // All are of one kind, or the whole would have had no score.
            self.score(drawn).unwrap_or(f64::NAN)
        };
        let both = |items: &[usize]| (score(&a, items), score(&b, items));
        Some(Difference::bootstrapped(a.len(), resamples, &both))
    }
}

/// Whether two scores are the same.
pub(super) fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() <= TOLERANCE * a.abs().max(b.abs()) + f64::EPSILON
}
