//! Fits the matrices of a layer by transforms of mixed bases (MoBE, arXiv 2508.05257, section 3):
//! `W_i ≈ A_i · silu(Σ_m softmax(w_i)_m · B_m)`, the least mean of squares over all matrices.
//!
//! The weights alone decide; no inputs are needed. The bases start as the leading right singular vectors
//! of the matrices of a group of experts each, and every expert leans towards its group's. Adam moves
//! bases, mixing weights and transforms together; at the start and the end the transforms, on which the
//! error depends quadratically, are solved for. The gradients are written out, as matrix products.

use crate::factor::{leading_rows, least_squares};
use crate::{Error, Result};
use candle_core::{D, Device, Tensor};
use lightmoe_kernels::{AdamW, Moments, silu_with_slope};
use rayon::prelude::*;
use std::ops::Range;

/// Steps of Adam, if nothing else is asked for; the paper takes 10 000 to 30 000.
pub const STEPS: usize = 1000;
/// Adam's rate at the start, the paper's; it falls to zero.
const RATE: f64 = 0.07;
/// Numbers of a tensor between two products: below what the allocator would hand back to the system.
const NEAR: usize = 6 << 20;
/// What the mixing weight of an expert's own group is above the others at the start.
const LEAN: f32 = 2.0;

/// Matrices as transforms of mixed bases.
#[derive(Debug, Clone)]
pub struct Fit {
    /// `B_m`: `[M, R, H]`
    pub bases: Tensor,
    /// `w_i`: `[n, M]`
    pub weights: Tensor,
    /// `A_i`: `[n, F, R]`
    pub transforms: Tensor,
    /// What is lost of the sum of squares of all matrices, as a share.
    pub loss: f64,
}

/// Fits `n` matrices `[n, F, H]` over `bases` bases of `rank` rows, at most `min(F, H)`, in `steps` steps.
///
/// # Errors
/// If numbers are not finite.
pub fn fit(matrices: &Tensor, bases: usize, rank: usize, steps: usize) -> Result<Fit> {
    let scale = f64::from(matrices.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt();
    let scale = if scale > 0.0 { scale } else { 1.0 };
    let target = (matrices / scale)?;
    let mut state = State::start(&target, bases, rank)?;
    let mut moments: [Moments; 3] = Default::default();
    for step in 0..steps {
        let update = AdamW {
            lr: RATE * (1.0 - step as f64 / steps as f64),
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            step: step + 1,
            grad_scale: 1.0,
        };
        let gradients = state.gradients(&target)?;
        let parameters = [&state.bases, &state.weights, &state.transforms];
        for ((parameter, gradient), moments) in
            parameters.into_iter().zip(&gradients).zip(&mut moments)
        {
            update.update(parameter, gradient, moments)?;
        }
    }
    state.solve(&target)?;
    let loss = f64::from(
        state
            .residuals(&target)?
            .sqr()?
            .mean_all()?
            .to_scalar::<f32>()?,
    );
    if !loss.is_finite() {
        return Err(Error::Invalid(
            "the fit of a layer's experts by mixed bases diverged; lower the ratio".to_owned(),
        ));
    }
    Ok(Fit {
        bases: state.bases,
        weights: state.weights,
        transforms: (state.transforms * scale)?,
        loss,
    })
}

/// The parameters of a fit of normalised matrices.
struct State {
    bases: Tensor,
    weights: Tensor,
    transforms: Tensor,
}

impl State {
    fn start(target: &Tensor, count: usize, rank: usize) -> Result<Self> {
        let (n, f, h) = target.dims3()?;
        let groups: Vec<Range<usize>> = (0..count).map(|m| group(m, count, n)).collect();
        let basis = |members: &Range<usize>| -> Result<Tensor> {
            let stacked = target.narrow(0, members.start, members.len())?;
            let stacked = stacked.reshape((members.len() * f, h))?;
            let rows = leading_rows(&stacked, rank)?;
            // Rows of unit mean square, where the nonlinearity is felt.
            let norms = rows.sqr()?.mean_keepdim(D::Minus1)?.sqrt()?;
            Ok(rows.broadcast_div(&(norms + 1e-12)?)?)
        };
        let mut bases = Vec::new();
        // As many at a time as there are threads: each holds the matrices of one group in f64.
        for some in groups.chunks(rayon::current_num_threads()) {
            bases.extend(some.par_iter().map(basis).collect::<Result<Vec<_>>>()?);
        }
        let lean = |i: usize| groups.iter().map(move |group| group.contains(&i));
        let weights: Vec<f32> = (0..n)
            .flat_map(|i| lean(i).map(|own| if own { LEAN } else { 0.0 }))
            .collect();
        let mut state = Self {
            bases: Tensor::stack(&bases, 0)?,
            weights: Tensor::from_vec(weights, (n, count), &Device::Cpu)?,
            transforms: Tensor::zeros((n, f, rank), target.dtype(), &Device::Cpu)?,
        };
        state.solve(target)?;
        Ok(state)
    }

    /// What each basis counts for in each slot: `[n, M]`.
    fn shares(&self) -> Result<Tensor> {
        let largest = self.weights.max_keepdim(D::Minus1)?;
        let powers = self.weights.broadcast_sub(&largest)?.exp()?;
        Ok(powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?)
    }

    /// The bases as rows `[M, R·H]`.
    fn rows(&self) -> Result<Tensor> {
        Ok(self.bases.flatten_from(1)?)
    }

    /// The bases of each slot, mixed and transformed by the nonlinearity: `[n, R, H]`.
    fn mixed(&self) -> Result<Tensor> {
        let (_, rank, width) = self.bases.dims3()?;
        let inner = self.shares()?.matmul(&self.rows()?)?;
        Ok(inner.silu()?.reshape(((), rank, width))?)
    }

    /// `A·V − W`.
    fn residuals(&self, target: &Tensor) -> Result<Tensor> {
        Ok((self.transforms.matmul(&self.mixed()?)? - target)?)
    }

    /// The transforms that lose least with these bases and weights.
    fn solve(&mut self, target: &Tensor) -> Result<()> {
        let outer = self.mixed()?;
        let of_slot = |i: usize| least_squares(&target.get(i)?, &outer.get(i)?);
        let slots = (0..target.dim(0)?).into_par_iter();
        let each: Vec<Tensor> = slots.map(of_slot).collect::<Result<_>>()?;
        self.transforms = Tensor::stack(&each, 0)?;
        Ok(())
    }

    /// The gradients of half the sum of squares by bases, weights and transforms.
    fn gradients(&self, target: &Tensor) -> Result<[Tensor; 3]> {
        let (shares, rows) = (self.shares()?, self.rows()?);
        let (_, rank, width) = self.bases.dims3()?;
        let each = rank * width;
        let mut of_inner = vec![0.0; target.dim(0)? * each];
        // A few slots at a time, so that what lies between the products stays near.
        let some = (NEAR / each).max(1);
        let made: Vec<(Tensor, Tensor)> = of_inner
            .par_chunks_mut(some * each)
            .enumerate()
            .map(|(i, of_inner)| {
                let of = |t: &Tensor| t.narrow(0, i * some, of_inner.len() / each);
                let slots = [of(target)?, of(&self.transforms)?, of(&shares)?];
                slot_gradients(slots, &rows, width, of_inner)
            })
            .collect::<Result<_>>()?;
        let (of_transforms, of_shares): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let of_inner = Tensor::from_vec(of_inner, ((), each), &Device::Cpu)?;
        let of_bases = shares.t()?.matmul(&of_inner)?;
        let of_shares = Tensor::cat(&of_shares, 0)?;
        let mean = (&of_shares * &shares)?.sum_keepdim(D::Minus1)?;
        let of_weights = (of_shares.broadcast_sub(&mean)? * &shares)?;
        Ok([
            of_bases.reshape(self.bases.shape())?,
            of_weights,
            Tensor::cat(&of_transforms, 0)?,
        ])
    }
}

/// The gradients of some slots by their transforms `[n, F, R]` and shares `[n, M]`, and into `of_inner` by
/// what the nonlinearity is given `[n, R·H]`; of the matrices `[n, F, H]`, transforms and shares, with the
/// rows of the bases `[M, R·H]`.
fn slot_gradients(
    [target, transforms, shares]: [Tensor; 3],
    rows: &Tensor,
    width: usize,
    of_inner: &mut [f32],
) -> Result<(Tensor, Tensor)> {
    let mut outer = shares.matmul(rows)?.flatten_all()?.to_vec1::<f32>()?;
    silu_with_slope(&mut outer, of_inner);
    let (n, _, rank) = transforms.dims3()?;
    let outer = Tensor::from_vec(outer, (n, rank, width), &Device::Cpu)?;
    // `(A·V − W)·Vᵀ` and `Aᵀ·(A·V − W)` by way of the small `V·Vᵀ` and `Aᵀ·A`: the difference is as large
    // as the matrices, and would be written and read again.
    let (across, along) = (outer.t()?, transforms.t()?);
    let of_transforms = (transforms.matmul(&outer.matmul(&across)?)? - target.matmul(&across)?)?;
    let of_outer = (along.matmul(&transforms)?.matmul(&outer)? - along.matmul(&target)?)?;
    for (slope, of_outer) in of_inner
        .iter_mut()
        .zip(of_outer.flatten_all()?.to_vec1::<f32>()?)
    {
        *slope *= of_outer;
    }
    let inner = Tensor::from_slice(of_inner, (n, rank * width), &Device::Cpu)?;
    Ok((of_transforms, inner.matmul(&rows.t()?)?))
}

/// The experts of group `m` of `count`, of `n`: consecutive, at least one.
fn group(m: usize, count: usize, n: usize) -> Range<usize> {
    let start = m * n / count;
    start..((m + 1) * n / count).max(start + 1)
}
