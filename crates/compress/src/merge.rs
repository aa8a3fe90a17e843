//! Several experts as one.

use crate::Result;
use crate::align::{permutation, permuted};
use candle_core::Tensor;

/// Where the matrices of an expert come from, by its number: gate `[F, H]`, up `[F, H]`, down `[H, F]`.
pub type Weights<'a> = dyn Fn(usize) -> Result<[Tensor; 3]> + Sync + 'a;

/// The mean of the experts `members`, weighted by `scores` (even where none has a score), each matrix
/// by itself. With `align`, the neurons of all are first put into the order of the first member's. One
/// expert is in memory beside the sum.
///
/// # Errors
/// What reading the weights brings, and the alignment; [`crate::Error::Invalid`] without members.
pub fn merge(
    weights: &Weights<'_>,
    members: &[usize],
    scores: &[f64],
    align: bool,
) -> Result<[Tensor; 3]> {
    let shares = shares(scores);
    let mut sum: Option<[Tensor; 3]> = None;
    let mut reference = None;
    for (&expert, &share) in members.iter().zip(&shares) {
        let mut own = weights(expert)?;
        if align {
            match &reference {
                Some(reference) => own = permuted(&own, &permutation(reference, &own)?)?,
                None => reference = Some(own.clone()),
            }
        }
        let [gate, up, down] = own;
        let part = [(gate * share)?, (up * share)?, (down * share)?];
        sum = Some(match sum {
            None => part,
            Some([gate, up, down]) => {
                let [more_gate, more_up, more_down] = part;
                [(gate + more_gate)?, (up + more_up)?, (down + more_down)?]
            }
        });
    }
    sum.ok_or_else(|| crate::Error::Invalid("a merge of no experts; plan again".to_owned()))
}

/// `s_i / Σ s_i`; even shares where no expert has a score, so that experts without calibration tokens
/// make no NaN.
fn shares(scores: &[f64]) -> Vec<f64> {
    let total: f64 = scores.iter().sum();
    let even = 1.0 / scores.len() as f64;
    let share = |s: &f64| if total > 0.0 { s / total } else { even };
    scores.iter().map(share).collect()
}
