//! Two evaluations of the same items, A and B: what they differ by, how sure that is, and which items
//! changed.
//!
//! Items that both models find hard make scores vary together, so the difference is known better than
//! either score: its standard error is that of the items' differences. Intervals are 95 %: the
//! difference ± 1.96 standard errors; of the bootstrap, quantiles of the resamples; where items are
//! right or wrong, Bonett and Price's, which does not shrink to nothing where no item changed.
//!
//! Sources: McNemar, "Note on the sampling error of the difference between correlated proportions or
//! percentages" (1947), in the exact form; Efron and Tibshirani, *An Introduction to the Bootstrap*
//! (1993), chapter 13; Koehn, "Statistical significance tests for machine translation evaluation"
//! (2004), for scores of a corpus; Bonett and Price, "Adjusted Wald confidence interval for a difference
//! of binomial proportions based on paired data" (2012).

use crate::score::deviation;
use lightmoe_models::random::stream;
use rand::Rng;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Standard errors that 95 % of a normal distribution lie within, on either side.
const NORMAL_95: f64 = 1.959_963_984_540_054;
/// Fixed, so that the same items have the same interval.
const SEED: u64 = 1234;

/// Two scores and their difference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Difference {
    /// The score of A.
    pub a: f64,
    /// The score of B.
    pub b: f64,
    /// B minus A.
    pub difference: f64,
    /// How sure it is; null where that cannot be known, as of one item.
    pub uncertainty: Option<Uncertainty>,
}

/// How sure a difference is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Uncertainty {
    /// Where it comes from.
    pub by: Basis,
    /// Standard error of the difference.
    pub stderr: f64,
    /// Lower end of the 95 % interval.
    pub low: f64,
    /// Upper end of the 95 % interval.
    pub high: f64,
    /// Of the bootstrap, the p-value as sacreBLEU computes it: how often the size of the difference exceeds
    /// its own mean over the resamples by more than the difference. Where all resamples are on one side of
    /// 0, it is the probability in one direction: 0.025 is where the interval ends. 1 where no resample
    /// differs, where sacreBLEU has its smallest value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap_p: Option<f64>,
}

/// Where an uncertainty comes from, the best first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// The differences of the items.
    Paired,
    /// Scores of items drawn with replacement, the same for A and B.
    Bootstrap,
    /// The standard errors of both scores, as if of different items: too wide if they are the same.
    Independent,
}

impl Uncertainty {
    fn normal(by: Basis, difference: f64, stderr: f64) -> Self {
        Self {
            by,
            stderr,
            low: difference - NORMAL_95 * stderr,
            high: difference + NORMAL_95 * stderr,
            bootstrap_p: None,
        }
    }
}

impl Difference {
    fn new(a: f64, b: f64) -> Self {
        Self {
            a,
            b,
            difference: b - a,
            uncertainty: None,
        }
    }

    /// Of the means of two lists of the same items.
    ///
    /// # Panics
    /// If the lists are of different lengths.
    pub fn of_means(a: &[f64], b: &[f64]) -> Self {
        assert_eq!(a.len(), b.len(), "every item has two values");
        let n = a.len() as f64;
        let mean = |values: &[f64]| values.iter().sum::<f64>() / n.max(1.0);
        let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| b - a).collect();
        let new = Self::new(mean(a), mean(b));
        let stderr = deviation(&differences) / n.sqrt();
        Self {
            uncertainty: (n > 1.0)
                .then(|| Uncertainty::normal(Basis::Paired, new.difference, stderr)),
            ..new
        }
    }

    /// Of two scores that are no means: `score` gives both from the numbers of items, each of which
    /// may come more than once. All `n` items are scored, and `resamples` draws of `n` of them.
    pub fn bootstrapped(
        n: usize,
        resamples: usize,
        score: &(impl Fn(&[usize]) -> (f64, f64) + Sync),
    ) -> Self {
        // Drawn in one row, so that the draws do not depend on the threads.
        let mut rng = stream(SEED, "paired bootstrap");
        let resamples = if n < 2 { 0 } else { resamples };
        let draws: Vec<Vec<u32>> = (0..resamples)
            .map(|_| (0..n).map(|_| rng.random_range(0..n as u32)).collect())
            .collect();
        Self::of_draws(n, &draws, score)
    }

    /// As [`Difference::bootstrapped`], with items that were drawn before.
    pub fn of_draws(
        n: usize,
        draws: &[Vec<u32>],
        score: &(impl Fn(&[usize]) -> (f64, f64) + Sync),
    ) -> Self {
        let (a, b) = score(&(0..n).collect::<Vec<_>>());
        let new = Self::new(a, b);
        if draws.len() < 2 {
            return new;
        }
        let mut differences: Vec<f64> = draws
            .par_iter()
            .map(|draw| {
                let items: Vec<usize> = draw.iter().map(|&item| item as usize).collect();
                let (a, b) = score(&items);
                b - a
            })
            .collect();
        differences.sort_by(f64::total_cmp);
        Self {
            uncertainty: Some(Uncertainty {
                by: Basis::Bootstrap,
                stderr: deviation(&differences),
                low: quantile(&differences, 0.025),
                high: quantile(&differences, 0.975),
                bootstrap_p: Some(bootstrap_p(new.difference, &differences)),
            }),
            ..new
        }
    }

    /// Of two scores of which only the standard errors are known.
    pub fn independent(a: (f64, Option<f64>), b: (f64, Option<f64>)) -> Self {
        let new = Self::new(a.0, b.0);
        let stderr = a.1.zip(b.1).map(|(a, b)| a.hypot(b));
        Self {
            uncertainty: stderr
                .map(|stderr| Uncertainty::normal(Basis::Independent, new.difference, stderr)),
            ..new
        }
    }

    /// The weighted mean of differences on different items; none of no items. The interval reaches as
    /// far as the parts' intervals do together, so that of flips none shrinks to nothing.
    pub fn pooled(parts: &[(f64, Self)]) -> Option<Self> {
        let weights: f64 = parts.iter().map(|(weight, _)| weight).sum();
        let mean = |of: &dyn Fn(&Self) -> f64| {
            let sum: f64 = parts.iter().map(|(weight, part)| weight * of(part)).sum();
            sum / weights
        };
        let new = Self::new(mean(&|part| part.a), mean(&|part| part.b));
        let known: Option<Vec<(f64, Uncertainty)>> = parts
            .iter()
            .map(|(weight, part)| Some((weight / weights, part.uncertainty?)))
            .collect();
        let uncertainty = known.and_then(|known| {
            let together = |error: &dyn Fn(&Uncertainty) -> f64| {
                let squares = known.iter().map(|(share, of)| (share * error(of)).powi(2));
                squares.sum::<f64>().sqrt()
            };
            let reach = together(&|of| (of.high - of.low) / 2.0);
            Some(Uncertainty {
                // What is known least well decides what the whole is called.
                by: known.iter().map(|(_, of)| of.by).max()?,
                stderr: together(&|of| of.stderr),
                low: new.difference - reach,
                high: new.difference + reach,
                bootstrap_p: None,
            })
        });
        (weights > 0.0).then_some(Self { uncertainty, ..new })
    }

    /// The same with the interval of the flips among `n` items, for shares of right ones.
    pub fn with_flips(self, flips: Flips, n: usize) -> Self {
        let (low, high) = flips.interval(n);
        Self {
            uncertainty: self.uncertainty.map(|of| Uncertainty { low, high, ..of }),
            ..self
        }
    }

    /// Whether the interval leaves out 0.
    pub fn is_clear(&self) -> bool {
        self.uncertainty
            .is_some_and(|of| of.low > 0.0 || of.high < 0.0)
    }
}

/// [`Uncertainty::bootstrap_p`] of differences of resamples (Riezler and Maxwell, "On some pitfalls in
/// automatic evaluation and significance testing for MT", 2005).
fn bootstrap_p(difference: f64, resampled: &[f64]) -> f64 {
    // sacreBLEU gives the smallest value that it has for a system against itself.
    if resampled.iter().all(|d| *d == 0.0) {
        return 1.0;
    }
    let mean = resampled.iter().map(|d| d.abs()).sum::<f64>() / resampled.len() as f64;
    let exceeds = |d: &&f64| d.abs() - mean > difference.abs();
    (resampled.iter().filter(exceeds).count() + 1) as f64 / (resampled.len() + 1) as f64
}

/// Items that are right in one evaluation and wrong in the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Flips {
    /// Right in A, wrong in B.
    pub lost: usize,
    /// Wrong in A, right in B.
    pub gained: usize,
}

impl Flips {
    /// 95 % interval of the difference of the shares of right ones among `n` items: as if one item more
    /// had flipped either way.
    fn interval(self, n: usize) -> (f64, f64) {
        let n = n as f64 + 2.0;
        let (lost, gained) = ((self.lost + 1) as f64 / n, (self.gained + 1) as f64 / n);
        let difference = gained - lost;
        let stderr = ((lost + gained - difference * difference) / n).sqrt();
        let reach = NORMAL_95 * stderr;
        (
            (difference - reach).max(-1.0),
            (difference + reach).min(1.0),
        )
    }

    /// The probability of at least so uneven flips if every flipped item were as likely to flip either
    /// way: McNemar's test in its exact form, two-sided.
    pub fn p_value(self) -> f64 {
        let (n, fewer) = (self.lost + self.gained, self.lost.min(self.gained));
        // ln C(n, k) 2^-n, from one k to the next, so that nothing overflows.
        let mut term = -(n as f64) * std::f64::consts::LN_2;
        let mut tail = term.exp();
        for k in 0..fewer {
            term += ((n - k) as f64 / (k + 1) as f64).ln();
            tail += term.exp();
        }
        (2.0 * tail).min(1.0)
    }
}

/// A quantile of sorted values, of which there is at least one; linear between neighbours, as NumPy
/// does it.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-12, "got {got}, want {want}");
    }

    #[test]
    fn a_difference_of_means_worked_by_hand() {
        // Differences 0, -1, 0, 1, -1: mean -1/5, squares 3 - 5/25 = 2.8.
        let (a, b) = ([1.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0]);
        let found = Difference::of_means(&a, &b);
        close(found.a, 0.6);
        close(found.b, 0.4);
        close(found.difference, -0.2);
        let of = found.uncertainty.unwrap();
        close(of.stderr, (2.8f64 / 4.0 / 5.0).sqrt());
        close(of.high - of.low, 2.0 * NORMAL_95 * of.stderr);
        assert!(!found.is_clear());
        assert_eq!(Difference::of_means(&[1.0], &[0.0]).uncertainty, None);
    }

    #[test]
    fn what_varies_together_does_not_count() {
        let a: Vec<f64> = (0..50).map(f64::from).collect();
        let b: Vec<f64> = a.iter().map(|a| a - 0.5).collect();
        let found = Difference::of_means(&a, &b);
        assert!(found.is_clear() && found.uncertainty.unwrap().stderr < 1e-9);
    }

    #[test]
    fn the_bootstrap_of_a_mean_is_near_its_error() {
        let mut rng = stream(3, "values");
        let mut draw = || -> Vec<f64> { (0..400).map(|_| rng.random_range(0.0..1.0)).collect() };
        let (a, b) = (draw(), draw());
        let mean = |values: &[f64], items: &[usize]| {
            items.iter().map(|&i| values[i]).sum::<f64>() / items.len() as f64
        };
        let score = |items: &[usize]| (mean(&a, items), mean(&b, items));
        let exact = Difference::of_means(&a, &b);
        let found = Difference::bootstrapped(400, 2000, &score);
        close(found.difference, exact.difference);
        let (found_of, exact_of) = (found.uncertainty.unwrap(), exact.uncertainty.unwrap());
        assert!((found_of.stderr / exact_of.stderr - 1.0).abs() < 0.05);
        assert!((found_of.low - exact_of.low).abs() < 0.1 * exact_of.stderr * NORMAL_95);
        assert_eq!(found, Difference::bootstrapped(400, 2000, &score));
        assert_eq!(Difference::bootstrapped(1, 2000, &score).uncertainty, None);
        let same = Difference::bootstrapped(400, 20, &|items| (mean(&a, items), mean(&a, items)));
        assert_eq!(same.uncertainty.unwrap().bootstrap_p, Some(1.0));
    }

    #[test]
    fn parts_are_pooled_by_weight() {
        let part = |a: &[f64], b: &[f64]| Difference::of_means(a, b);
        let one = part(&[1.0, 0.0, 1.0], &[0.0, 0.0, 1.0]);
        let other = part(&[0.0, 1.0], &[1.0, 1.0]);
        let found = Difference::pooled(&[(3.0, one), (2.0, other)]).unwrap();
        close(found.a, 3.0 / 5.0);
        close(found.b, 3.0 / 5.0);
        let (se1, se2) = (
            one.uncertainty.unwrap().stderr,
            other.uncertainty.unwrap().stderr,
        );
        let stderr = (0.6 * se1).hypot(0.4 * se2);
        close(found.uncertainty.unwrap().stderr, stderr);
        // What is not known of a part is not known of the whole.
        let unknown = part(&[1.0], &[1.0]);
        let found = Difference::pooled(&[(3.0, one), (1.0, unknown)]).unwrap();
        assert_eq!(found.uncertainty, None);
        let rough = Difference::independent((0.5, Some(0.3)), (0.4, Some(0.4)));
        close(rough.uncertainty.unwrap().stderr, 0.5);
        let found = Difference::pooled(&[(1.0, rough), (1.0, one)]).unwrap();
        assert_eq!(found.uncertainty.unwrap().by, Basis::Independent);
        assert_eq!(Difference::pooled(&[]), None);
    }

    #[test]
    fn the_interval_of_flips_by_hand() {
        // Of ten items one lost, three gained: 2/12 and 4/12, 1/6 ± 1.96 sqrt((1/2 - 1/36)/12).
        let (low, high) = Flips { lost: 1, gained: 3 }.interval(10);
        let reach = NORMAL_95 * ((0.5f64 - 1.0 / 36.0) / 12.0).sqrt();
        close(low, 1.0 / 6.0 - reach);
        close(high, 1.0 / 6.0 + reach);
        // Nothing flipped, and yet nothing is certain.
        let none = Difference::of_means(&[1.0, 0.0], &[1.0, 0.0]).with_flips(Flips::default(), 2);
        let of = none.uncertainty.unwrap();
        close(of.high, NORMAL_95 * (0.5f64 / 4.0).sqrt());
        close(of.low, -of.high);
        assert_eq!(of.stderr, 0.0);
        // Two such parts, alike in weight: the root of two halves.
        let pooled = Difference::pooled(&[(1.0, none), (1.0, none)]).unwrap();
        let whole = pooled.uncertainty.unwrap();
        close(whole.high, of.high / 2.0f64.sqrt());
        close(whole.low, -whole.high);
        assert_eq!(whole.stderr, 0.0);
    }

    #[test]
    fn mcnemar_by_hand() {
        // Of three flips none lost: 2 (1/8); of one and four: 2 (1 + 5)/32; even: 1.
        let p = |lost, gained| Flips { lost, gained }.p_value();
        close(p(0, 3), 0.25);
        close(p(1, 4), 0.375);
        close(p(4, 1), 0.375);
        close(p(2, 2), 1.0);
        close(p(0, 0), 1.0);
    }
}
