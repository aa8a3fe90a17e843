//! A value with its uncertainty, computed as lm-evaluation-harness does.

use lightmoe_data::overlap::corpus_chrf;
use lightmoe_models::random::stream;
use rand::Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Resamples of a bootstrap: what the harness uses for corpus metrics.
const RESAMPLES: usize = 100;
/// Fixed, so that the same answers have the same standard error.
const SEED: u64 = 1234;

/// Scores by the name of the metric; the names are listed at [`crate::evaluate`].
pub type Scores = BTreeMap<String, Score>;

/// One metric over all examples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The value, in the metric's unit.
    pub value: f64,
    /// Standard error of the value, in the same unit; 0 for a single example, where it is unknown.
    pub stderr: f64,
    /// Number of examples.
    pub n: usize,
}

impl Score {
    /// The mean, with the sample standard deviation over `sqrt(n)`. No values give 0.
    pub fn mean(values: &[f64]) -> Self {
        let n = values.len();
        Self {
            value: mean(values),
            stderr: deviation(values) / (n.max(1) as f64).sqrt(),
            n,
        }
    }

    /// What rows sum up to a unit, such as nats a token: of each row the sum and the units. Units of one
    /// row have their context in common, so they are no independent draws: the standard error takes
    /// the rows as such, as surveys do with clusters (Cochran, *Sampling Techniques*, 3rd ed., eq. 6.13,
    /// the ratio of two totals).
    pub fn per_unit(rows: &[(f64, f64)]) -> Self {
        let units: f64 = rows.iter().map(|row| row.1).sum();
        let value = rows.iter().map(|row| row.0).sum::<f64>() / units;
        let n = rows.len();
        let squares: f64 = rows.iter().map(|row| (row.0 - value * row.1).powi(2)).sum();
        let spread = n as f64 / n.saturating_sub(1).max(1) as f64;
        Self {
            value,
            stderr: match n {
                1 => 0.0,
                _ => (squares * spread).sqrt() / units,
            },
            n,
        }
    }

    /// chrF2 of a corpus of (hypothesis, reference), 0 to 100, with the standard deviation over 100
    /// resamples (seed fixed).
    pub fn chrf(pairs: &[(&str, &str)]) -> Self {
        let n = pairs.len();
        let mut rng = stream(SEED, "bootstrap");
        let resamples = if n > 1 { RESAMPLES } else { 0 };
        let values: Vec<f64> = (0..resamples)
            .map(|_| {
                let drawn: Vec<_> = (0..n).map(|_| pairs[rng.random_range(0..n)]).collect();
                corpus_chrf(&drawn)
            })
            .collect();
        Self {
            value: corpus_chrf(pairs),
            stderr: deviation(&values),
            n,
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The standard deviation of a sample; 0 for fewer than two values.
pub(crate) fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (squares / values.len().saturating_sub(1).max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_share_is_that_of_the_harness() {
        let score = Score::mean(&[1.0, 0.0, 1.0, 1.0]);
        // sqrt(p (1 - p) / (n - 1))
        assert_eq!((score.value, score.n), (0.75, 4));
        assert!((score.stderr - (0.75f64 * 0.25 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(Score::mean(&[0.5]).stderr, 0.0);
    }

    #[test]
    fn the_bootstrap_is_repeatable_and_sees_the_spread() {
        let good = ("the dog sleeps", "the dog sleeps");
        let bad = ("zzzz", "the dog sleeps");
        let mixed = [good, bad, good, bad, good, bad];
        let score = Score::chrf(&mixed);
        assert!(score.value > 20.0 && score.value < 80.0, "{score:?}");
        assert!(score.stderr > 1.0, "{score:?}");
        assert_eq!(score, Score::chrf(&mixed));
        assert_eq!(Score::chrf(&[good; 5]).stderr, 0.0);
        assert_eq!(Score::chrf(&[bad]).stderr, 0.0);
    }
}
