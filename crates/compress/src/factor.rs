//! Low-rank factors of a matrix that lose least on the inputs it is given (SVD-LLM, arXiv 2403.07378;
//! MoE-SVD; D²-MoE, arXiv 2502.17298, section 3.3).
//!
//! For inputs with second moment `G = Σ x·xᵀ` the output error of `P` in place of `W` is
//! `Σ ‖(W−P)·x‖² = tr((W−P)·G·(W−P)ᵀ) = ‖(W−P)·S‖²` with `G = S·Sᵀ` (Cholesky). So the best `P` of rank
//! `r` is the truncated SVD of `W·S`, times `S⁻¹`. A small multiple of the identity is added to `G`, so
//! that few inputs, or none, still give an answer.
//!
//! Where output errors count by a metric `M = L·Lᵀ`, as `eᵀ·M·e`, the same holds of `Lᵀ·W·S`, and the
//! factors are taken back through `L` too.
//!
//! The singular vectors come from the smaller of the two Gram matrices of `Lᵀ·W·S`, in f64: for a wide
//! matrix `Lᵀ·W·G·Wᵀ·L`, whose leading eigenvectors `U` give `P = L⁻ᵀ·U·(Uᵀ·Lᵀ·W)` without an inverse of
//! `S`; for a tall one `Sᵀ·Wᵀ·M·W·S`, without one of `L`.

use crate::{Error, Result};
use candle_core::{Device, Tensor};
use faer::linalg::matmul::triangular::BlockStructure::{
    self, Rectangular, TriangularLower, TriangularUpper,
};
use faer::linalg::matmul::triangular::matmul;
use faer::linalg::solvers::Solve;
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Accum, Mat, MatRef, Par, Side};
use lightmoe_models::random::stream;
use rand::Rng;
use std::sync::Arc;

/// What is added to the diagonal of a second moment, as a share of its mean.
pub const DAMPING: f64 = 0.01;
/// Leading eigenvectors are few if so many times their number, with those that are [`SPARE`], is no more
/// than there are.
const FEW: usize = 4;
/// Directions that the search of leading eigenvectors takes along beside those that are wanted.
const SPARE: usize = 16;
/// Its rounds.
const ROUNDS: usize = 4;
/// Rows and columns of a tile of [`tiles`].
const TILE: usize = 16;

/// A second moment `[n, n]`, damped, and positive definite; `None` for the identity. A clone shares it.
#[derive(Debug, Clone)]
pub struct Gram(Option<Arc<Mat<f64>>>);

impl Gram {
    /// Of the sums `values`, row-major; all zeros count as the identity: every direction alike.
    pub fn new(n: usize, values: &[f32]) -> Self {
        Self::damped(symmetric(n, values), DAMPING)
    }

    /// Of no inputs: every direction alike.
    pub fn identity() -> Self {
        Self(None)
    }

    /// A matrix that is positive semidefinite, with `damping` times its mean diagonal added to the
    /// diagonal; all zeros count as the identity.
    pub(crate) fn damped(mut matrix: Mat<f64>, damping: f64) -> Self {
        let mean = mean_diagonal(&matrix);
        if mean <= 0.0 {
            return Self::identity();
        }
        lift(&mut matrix, damping * mean);
        Self(Some(Arc::new(matrix)))
    }

    /// The lower half of `W·G·Wᵀ` `[out, out]` of `w: [out, in]`; zeros above it.
    pub(crate) fn between(&self, w: MatRef<'_, f64>) -> Mat<f64> {
        let half = |left: MatRef<'_, f64>| {
            product(
                TriangularLower,
                (left, Rectangular),
                (w.transpose(), Rectangular),
            )
        };
        match &self.0 {
            Some(gram) => half((w * gram.as_ref()).as_ref()),
            None => half(w),
        }
    }

    /// The lower factor `S`; `None` for the identity.
    fn cholesky(&self) -> Result<Option<Mat<f64>>> {
        let Some(gram) = &self.0 else {
            return Ok(None);
        };
        let factor = gram.llt(Side::Lower);
        let factor = factor.map_err(|_| failed("Cholesky factor"))?;
        Ok(Some(factor.L().to_owned()))
    }
}

/// `[n, n]` row-major as f64: sums in f32 are not quite symmetric.
pub(crate) fn symmetric(n: usize, values: &[f32]) -> Mat<f64> {
    tiled(n, n, |i, j| {
        0.5 * (f64::from(values[i * n + j]) + f64::from(values[j * n + i]))
    })
}

/// A matrix made tile by tile: what `of` reads row by row would else leave the cache before it is read
/// again.
pub(crate) fn tiled(rows: usize, columns: usize, of: impl Fn(usize, usize) -> f64) -> Mat<f64> {
    let mut made = Mat::zeros(rows, columns);
    tiles(rows, columns, |i, j| made[(i, j)] = of(i, j));
    made
}

/// Visits all places of a matrix, tile by tile, each along its columns.
fn tiles(rows: usize, columns: usize, mut visit: impl FnMut(usize, usize)) {
    for left in (0..columns).step_by(TILE) {
        for top in (0..rows).step_by(TILE) {
            for j in left..columns.min(left + TILE) {
                (top..rows.min(top + TILE)).for_each(|i| visit(i, j));
            }
        }
    }
}

/// A matrix as the product of two.
#[derive(Debug, Clone)]
pub struct Factors {
    /// `[rank, in]`
    pub a: Tensor,
    /// `[out, rank]`
    pub b: Tensor,
}

/// `[out, in]` as f64.
pub(crate) fn matrix(w: &Tensor) -> Result<Mat<f64>> {
    let (rows, columns) = w.dims2()?;
    let values = w.flatten_all()?.to_vec1::<f32>()?;
    Ok(tiled(rows, columns, |i, j| {
        f64::from(values[i * columns + j])
    }))
}

/// Back to f32.
fn tensor(m: MatRef<'_, f64>) -> Result<Tensor> {
    let (rows, columns) = m.shape();
    let mut values = vec![0.0; rows * columns];
    tiles(rows, columns, |i, j| {
        values[i * columns + j] = m[(i, j)] as f32
    });
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

fn failed(what: &str) -> Error {
    Error::Invalid(format!(
        "the {what} of an expert's moments did not converge; observe more tokens"
    ))
}

/// The product of two matrices, reckoned where `wanted` says, of factors that are zero where their structure
/// says so: half the work of a whole one for each triangle.
fn product(
    wanted: BlockStructure,
    (left, left_has): (MatRef<'_, f64>, BlockStructure),
    (right, right_has): (MatRef<'_, f64>, BlockStructure),
) -> Mat<f64> {
    let mut made = Mat::zeros(left.nrows(), right.ncols());
    let threads = faer::get_global_parallelism();
    matmul(
        made.as_mut(),
        wanted,
        Accum::Replace,
        left,
        left_has,
        right,
        right_has,
        1.0,
        threads,
    );
    made
}

/// The eigenvectors of a symmetric matrix by its lower half, those of the largest eigenvalues first.
fn eigenvectors(m: &Mat<f64>) -> Result<Mat<f64>> {
    let decomposed = m
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| failed("eigenvalues"))?;
    let n = m.nrows();
    let vectors = decomposed.U();
    Ok(Mat::from_fn(n, n, |i, j| vectors[(i, n - 1 - j)]))
}

/// The `rank` leading eigenvectors of a symmetric, positive semidefinite matrix by its lower half, those of
/// the largest eigenvalues first. Where they are few beside its side they are searched for, from random
/// directions on (subspace iteration, arXiv 0909.4061, algorithm 4.4): near ones, then, where eigenvalues
/// lie close together.
fn leading(m: &Mat<f64>, rank: usize) -> Result<Mat<f64>> {
    let (n, width) = (m.nrows(), rank + SPARE);
    if FEW * width > n {
        let vectors = eigenvectors(m)?;
        return Ok(vectors.subcols(0, rank.min(n)).to_owned());
    }
    let whole = tiled(n, n, |i, j| m[(i.max(j), i.min(j))]);
    let mut random = stream(0, "leading eigenvectors");
    let mut basis = Mat::from_fn(n, width, |_, _| random.random_range(-1.0..1.0));
    for _ in 0..ROUNDS {
        basis = (&whole * &basis).qr().compute_thin_Q();
    }
    let inside = basis.transpose() * &whole * &basis;
    Ok(&basis * eigenvectors(&inside)?.subcols(0, rank))
}

/// What the errors of a matrix are measured by: `Σ (e·x)ᵀ·M·(e·x)` for an error `e: [out, in]`.
#[derive(Debug, Clone)]
pub struct Metric {
    /// `M`: `[out, out]`
    pub out: Gram,
    /// `Σ x·xᵀ`: `[in, in]`
    pub input: Gram,
}

impl Metric {
    /// Every direction of the output alike.
    pub fn of_inputs(input: Gram) -> Self {
        let out = Gram::identity();
        Self { out, input }
    }

    /// `w` seen from both sides.
    fn see(&self, w: &Tensor) -> Result<Seen> {
        let w = matrix(w)?;
        let is_wide = w.nrows() <= w.ncols();
        let (root, seen, small);
        match is_wide {
            true => {
                root = self.out.cholesky()?;
                seen = root.as_ref().map_or_else(
                    || w.clone(),
                    |l| {
                        let root = (l.transpose(), TriangularUpper);
                        product(Rectangular, root, (w.as_ref(), Rectangular))
                    },
                );
                small = self.input.between(seen.as_ref());
            }
            false => {
                root = self.input.cholesky()?;
                seen = root.as_ref().map_or_else(
                    || w.clone(),
                    |s| {
                        let root = (s.as_ref(), TriangularLower);
                        product(Rectangular, (w.as_ref(), Rectangular), root)
                    },
                );
                small = self.out.between(seen.transpose());
            }
        }
        Ok(Seen {
            is_wide,
            root,
            seen,
            small,
        })
    }
}

/// A matrix `W` within a metric.
struct Seen {
    is_wide: bool,
    /// `L` of a wide matrix, `S` of a tall one; `None` for the identity.
    root: Option<Mat<f64>>,
    /// `Lᵀ·W` or `W·S`.
    seen: Mat<f64>,
    /// The lower half of the smaller Gram matrix of `Lᵀ·W·S`.
    small: Mat<f64>,
}

/// The singular values of `Lᵀ·W·S`, descending, as many as the smaller side of `w: [out, in]` has.
///
/// # Errors
/// If the moments have no Cholesky factor, which needs numbers that are not finite.
pub fn singular_values(w: &Tensor, metric: &Metric) -> Result<Vec<f64>> {
    let seen = metric.see(w)?;
    let values = seen
        .small
        .self_adjoint_eigenvalues(Side::Lower)
        .map_err(|_| failed("eigenvalues"))?;
    Ok(values.iter().rev().map(|v| v.max(0.0).sqrt()).collect())
}

/// The factors of rank `rank` of `w: [out, in]` that lose least on inputs of this second moment.
///
/// # Errors
/// As [`singular_values`].
pub fn whitened(w: &Tensor, gram: &Gram, rank: usize) -> Result<Factors> {
    fitted(w, &Metric::of_inputs(gram.clone()), rank)
}

/// The factors of rank `rank` of `w: [out, in]` that lose least in this metric.
///
/// The two are balanced: the `i`-th row of `a` and column of `b` have the same norm. Components come
/// with the largest singular value first.
///
/// # Errors
/// As [`singular_values`].
pub fn fitted(w: &Tensor, metric: &Metric, rank: usize) -> Result<Factors> {
    let Seen {
        is_wide,
        root,
        seen,
        small,
    } = metric.see(w)?;
    let rank = rank.min(seen.nrows()).min(seen.ncols());
    let vectors = eigenvectors(&small)?;
    let leading = vectors.subcols(0, rank);
    // The side that the vectors are on is taken back through the root: Lᵀ·B = U, or Sᵀ·Aᵀ = V.
    let mut back = leading.to_owned();
    if let Some(root) = root {
        solve_upper_triangular_in_place(root.transpose(), back.as_mut(), Par::Seq);
    }
    let (mut a, mut b) = match is_wide {
        true => (leading.transpose() * &seen, back),
        false => (back.transpose().to_owned(), &seen * leading),
    };
    for i in 0..rank {
        let (na, nb) = (a.row(i).norm_l2(), b.col(i).norm_l2());
        if na > 0.0 && nb > 0.0 {
            let scale = (nb / na).sqrt();
            (0..a.ncols()).for_each(|j| a[(i, j)] *= scale);
            (0..b.nrows()).for_each(|j| b[(j, i)] /= scale);
        }
    }
    Ok(Factors {
        a: tensor(a.as_ref())?,
        b: tensor(b.as_ref())?,
    })
}

/// The leading right singular vectors of `w: [out, in]`, `[rank, in]`; `rank` at most the smaller side. Those
/// of a wide matrix come times their singular values. Where they are few they are near ones.
///
/// # Errors
/// If numbers are not finite.
pub fn leading_rows(w: &Tensor, rank: usize) -> Result<Tensor> {
    let Seen {
        is_wide,
        seen,
        small,
        ..
    } = Metric::of_inputs(Gram::identity()).see(w)?;
    let leading = leading(&small, rank)?;
    match is_wide {
        true => tensor((leading.transpose() * &seen).as_ref()),
        false => tensor(leading.transpose()),
    }
}

/// The `A: [out, rank]` for which `A·v` is closest to `w: [out, in]`, `v: [rank, in]`. Rows of `v` that
/// depend on each other are told apart by a tiny multiple of the identity.
///
/// # Errors
/// If numbers are not finite.
pub fn least_squares(w: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (w, v) = (matrix(w)?, matrix(v)?);
    let mut gram = &v * v.transpose();
    let tiny = 1e-8 * mean_diagonal(&gram) + f64::MIN_POSITIVE;
    lift(&mut gram, tiny);
    let found = solved(&gram, (w * v.transpose()).as_ref());
    found.ok_or_else(|| {
        Error::Invalid("the bases of mixed experts are no numbers any more; report it".to_owned())
    })?
}

/// The `B: [out, in]` with `B·(G + λ) = P + λ·mean`, where `λ` is `damping` times the mean diagonal of `G`;
/// `mean` itself where `G` is zero.
///
/// # Errors
/// If numbers are not finite.
pub(crate) fn ridge(
    mut gram: Mat<f64>,
    mut product: Mat<f64>,
    mean: Tensor,
    damping: f64,
) -> Result<Tensor> {
    let lambda = damping * mean_diagonal(&gram);
    if lambda == 0.0 {
        return Ok(mean);
    }
    product += matrix(&mean)? * faer::Scale(lambda);
    lift(&mut gram, lambda);
    solved(&gram, product.as_ref()).ok_or_else(|| failed("Cholesky factor"))?
}

/// The `B` with `B·G = P` for a positive definite `G`; `None` where it is not, as with numbers that are not
/// finite.
fn solved(gram: &Mat<f64>, product: MatRef<'_, f64>) -> Option<Result<Tensor>> {
    let factor = gram.llt(Side::Lower).ok()?;
    Some(tensor(factor.solve(product.transpose()).transpose()))
}

fn mean_diagonal(m: &Mat<f64>) -> f64 {
    let n = m.nrows();
    (0..n).map(|i| m[(i, i)]).sum::<f64>() / n.max(1) as f64
}

/// Adds `by` times the identity.
fn lift(m: &mut Mat<f64>, by: f64) {
    (0..m.nrows()).for_each(|i| m[(i, i)] += by);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    /// Few of many are found by search, and hold nearly as much as the true ones; where the spectrum falls,
    /// they are these.
    #[test]
    fn leading_vectors_are_found_by_search() {
        let (n, rank) = (160, 20);
        let mut random = stream(1, "test");
        let mut numbers =
            |columns| Mat::<f64>::from_fn(n, columns, |_, _| random.random_range(-1.0..1.0));
        let (flat, low) = (numbers(2 * n), numbers(rank));
        for (m, share) in [
            (&flat * flat.transpose(), 0.95),
            (&low * low.transpose(), 1.0 - 1e-9),
        ] {
            let held = |vectors: &Mat<f64>| {
                let inside = vectors.transpose() * &m * vectors;
                (0..rank).map(|i| inside[(i, i)]).sum::<f64>()
            };
            let (found, exact) = (leading(&m, rank).unwrap(), eigenvectors(&m).unwrap());
            let ours = held(&found) / held(&exact.subcols(0, rank).to_owned());
            assert!((share..1.0 + 1e-9).contains(&ours), "{ours}");
            let square = found.transpose() * &found;
            let apart = (&square - Mat::<f64>::identity(rank, rank)).norm_l2();
            assert!(apart < 1e-9, "{apart}");
        }
    }
}
