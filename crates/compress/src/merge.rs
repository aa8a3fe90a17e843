//! Several experts as one.

use crate::Result;
use crate::align::{permutation, permuted};
use crate::factor::{DAMPING, matrix, ridge, symmetric};
use candle_core::Tensor;
use faer::Mat;

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

/// What the matrices of an expert were given, by its number: the second moments `[H, H]` of gate and up,
/// `[F, F]` of down, row-major.
pub type Sums<'a> = dyn Fn(usize) -> Result<[Vec<f32>; 2]> + Sync + 'a;

/// The matrices `B` that lose least in place of those of `members`, `Σ ‖(W_e − B)·x‖²` over all that each
/// was given, with a pull to `mean`: as if [`DAMPING`] of the inputs were of no direction, and `mean` of
/// use for them. By ridge regression, `B·(Σ G_e + λ) = Σ W_e·G_e + λ·mean`.
///
/// # Errors
/// What reading brings, and numbers that are not finite.
pub fn nearest(
    weights: &Weights<'_>,
    sums: &Sums<'_>,
    members: &[usize],
    mean: [Tensor; 3],
) -> Result<[Tensor; 3]> {
    let (f, h) = mean[0].dims2()?;
    let mut grams = [h, f].map(|n| Mat::<f64>::zeros(n, n));
    let mut products = [(f, h), (f, h), (h, f)].map(|(rows, n)| Mat::<f64>::zeros(rows, n));
    for &expert in members {
        let own = weights(expert)?;
        let [input, hidden] = sums(expert)?;
        let moments = [symmetric(h, &input), symmetric(f, &hidden)];
        for (i, (product, w)) in products.iter_mut().zip(&own).enumerate() {
            *product += matrix(w)? * &moments[i / 2];
        }
        for (gram, moment) in grams.iter_mut().zip(&moments) {
            *gram += moment;
        }
    }
    let [input, hidden] = grams;
    let [of_gate, of_up, of_down] = products;
    let [gate, up, down] = mean;
    let solve = |gram: &Mat<f64>, product, mean| ridge(gram.clone(), product, mean, DAMPING);
    Ok([
        solve(&input, of_gate, gate)?,
        solve(&input, of_up, up)?,
        solve(&hidden, of_down, down)?,
    ])
}

/// `s_i / Σ s_i`; even shares where no expert has a score, so that experts without calibration tokens
/// make no NaN.
pub(crate) fn shares(scores: &[f64]) -> Vec<f64> {
    let total: f64 = scores.iter().sum();
    let even = 1.0 / scores.len() as f64;
    let share = |s: &f64| if total > 0.0 { s / total } else { even };
    scores.iter().map(share).collect()
}
