//! The distance between two distributions over the next token, from the logits of both.
//!
//! Logits are f32 as the models give them; all sums are f64. Each token's number is computed by one
//! task in a fixed order.

use crate::{Error, Result};
use rayon::prelude::*;

/// The distance at one predicted token. All in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct TokenDistance {
    /// KL divergence of the compressed model's distribution from the original's.
    pub(super) kl: f64,
    /// Whether both have the same likeliest token (the first of equal ones).
    pub(super) agrees: bool,
    /// Negative log-likelihood of the token that follows in the text, by the original.
    pub(super) original_nll: f64,
    /// The same by the compressed model.
    pub(super) nll: f64,
}

/// What the original predicts.
pub(super) struct Predicted<'a> {
    /// `[A, V]`
    logits: Vec<f32>,
    /// The tokens that follow in the text, `[A]`.
    targets: &'a [u32],
    rows: Vec<Summary>,
}

impl<'a> Predicted<'a> {
    /// Of logits `[A, V]` and the tokens that follow.
    pub(super) fn new(logits: Vec<f32>, targets: &'a [u32]) -> Self {
        let width = logits.len() / targets.len().max(1);
        let rows = logits.par_chunks(width.max(1)).map(Summary::of).collect();
        Self {
            logits,
            targets,
            rows,
        }
    }
}

/// What is known of a row of logits.
#[derive(Clone, Copy)]
struct Summary {
    /// The logarithm of the sum of all exponentials.
    log_sum: f64,
    /// The first of the highest.
    best: usize,
}

impl Summary {
    fn of(logits: &[f32]) -> Self {
        let (mut best, mut highest) = (0, f32::NEG_INFINITY);
        for (number, &logit) in logits.iter().enumerate() {
            if logit > highest {
                (best, highest) = (number, logit);
            }
        }
        let highest = f64::from(highest);
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - highest).exp()).sum();
        Self {
            log_sum: highest + sum.ln(),
            best,
        }
    }
}

/// The distance of logits `[A, V]` from the original's, token by token.
///
/// # Errors
/// [`Error::NoNumbers`] if one of them is none.
pub(super) fn distances(original: &Predicted<'_>, logits: &[f32]) -> Result<Vec<TokenDistance>> {
    let width = logits.len() / original.targets.len().max(1);
    let rows = original.logits.par_chunks(width.max(1));
    rows.zip(logits.par_chunks(width.max(1)))
        .zip(original.rows.par_iter().zip(original.targets))
        .map(|((p, q), (of_p, &target))| {
            let of_q = Summary::of(q);
            let kl: f64 = p
                .iter()
                .zip(q)
                .map(|(&p, &q)| {
                    let log_p = f64::from(p) - of_p.log_sum;
                    let log_q = f64::from(q) - of_q.log_sum;
                    log_p.exp() * (log_p - log_q)
                })
                .sum();
            let nll =
                |logits: &[f32], of: &Summary| of.log_sum - f64::from(logits[target as usize]);
            let distance = TokenDistance {
                // Of equal distributions the rounding may be left, which has either sign.
                kl: kl.max(0.0),
                agrees: of_p.best == of_q.best,
                original_nll: nll(p, of_p),
                nll: nll(q, &of_q),
            };
            // `max` would hide that it is no number.
            let is_finite = kl.is_finite() && (distance.original_nll + distance.nll).is_finite();
            is_finite.then_some(distance).ok_or(Error::NoNumbers)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(p: &[f32], q: &[f32], target: u32) -> TokenDistance {
        let targets = [target];
        let predicted = Predicted::new(p.to_vec(), &targets);
        distances(&predicted, q).unwrap()[0]
    }

    #[test]
    fn worked_by_hand() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2.
        let logits = |shares: [f32; 3]| shares.map(|share| share.ln() + 7.0);
        let (p, q) = (logits([0.5, 0.25, 0.25]), logits([0.25, 0.5, 0.25]));
        let distance = of(&p, &q, 1);
        let ln2 = std::f64::consts::LN_2;
        assert!((distance.kl - 0.25 * ln2).abs() < 1e-7, "{distance:?}");
        assert!((distance.original_nll - 2.0 * ln2).abs() < 1e-6);
        assert!((distance.nll - ln2).abs() < 1e-6);
        assert!(!distance.agrees);
        // Not symmetric in general: against an even q, KL = ln 3 - H(p).
        let even = of(&p, &[0.0; 3], 0);
        assert!((even.kl - (3f64.ln() - 1.5 * ln2)).abs() < 1e-7);
        // The first of equals is the likeliest.
        assert!(even.agrees);
    }

    /// Values of SciPy, see `fixtures/paired`.
    #[test]
    fn as_scipy_has_it() {
        let text = include_str!("../../../../fixtures/paired/paired.json");
        let all: serde_json::Value = serde_json::from_str(text).unwrap();
        let numbers = |key: &str| -> Vec<f64> {
            serde_json::from_value(all["distances"][key].clone()).unwrap()
        };
        let logits = |key: &str| -> Vec<f32> { numbers(key).iter().map(|&x| x as f32).collect() };
        let targets = [0; 6];
        let original = Predicted::new(logits("p"), &targets);
        let found = distances(&original, &logits("q")).unwrap();
        for (found, want) in found.iter().zip(numbers("kl")) {
            assert!(
                (found.kl - want).abs() <= 1e-12 + 1e-9 * want,
                "{found:?} {want}"
            );
        }
    }

    #[test]
    fn equal_logits_have_no_distance_and_large_ones_no_overflow() {
        let large = [3e38, 1e38, -3e38];
        assert_eq!(of(&large, &large, 0).kl, 0.0);
        let shifted = of(&[1.0, 2.0, 3.0], &[1001.0, 1002.0, 1003.0], 0);
        assert!(shifted.kl < 1e-12 && shifted.agrees, "{shifted:?}");
    }

    #[test]
    fn small_distances_are_told_apart() {
        // d ln p = e on one of two even choices: KL = e²/8 to first order.
        let e = 1e-3f32;
        let kl = of(&[0.0, 0.0], &[e, 0.0], 0).kl;
        assert!(
            (kl / (f64::from(e).powi(2) / 8.0) - 1.0).abs() < 1e-5,
            "{kl}"
        );
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let targets = [0];
            let predicted = Predicted::new(vec![0.0, 0.0], &targets);
            assert!(matches!(
                distances(&predicted, &[0.0, bad]),
                Err(Error::NoNumbers)
            ));
        }
    }
}
