//! RMSNorm with a backward: `y = x · w / sqrt(mean(x²) + eps)` over the last dimension.
//!
//! candle's fused `rms_norm` has no gradient; the composed form costs six passes over the data.

use crate::composed;
use crate::lanes::{dot, simd, sum};
use crate::mixed::as_rows;
use crate::real::{Real, dispatch, same_dtype, slice, storage, tracked, view};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Rows of a task; fixed, so that the sum of weight gradients has one order.
const CHUNK_ROWS: usize = 64;

struct RmsNorm {
    eps: f64,
}

#[inline(always)]
fn scale<T: Real>(x: &[T], eps: f64) -> T {
    let square = sum(x, |v| v * v);
    T::one() / (square / T::from_f64(x.len() as f64) + T::from_f64(eps)).sqrt()
}

simd! {
    fn forward_rows<T: Real>(y: &mut [T], x: &[T], w: &[T], eps: f64) {
        for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
            let r = scale(x, eps);
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
        }
    }
}

simd! {
    /// Writes the rows of `dx` and returns their part of `dw`.
    fn backward_rows<T: Real>(dx: &mut [T], x: &[T], w: &[T], dy: &[T], eps: f64) -> Vec<T> {
        let width = w.len();
        let mut dw = vec![T::zero(); width];
        let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
        for ((dx, x), dy) in rows.zip(dy.chunks_exact(width)) {
            let r = scale(x, eps);
            let terms = dx.iter_mut().zip(&mut dw).zip(x.iter().zip(w).zip(dy));
            for ((dx, dw), ((&x, &w), &dy)) in terms {
                *dw += dy * x * r;
                *dx = dy * w;
            }
            let mean = dot(dx, x) * r / T::from_f64(width as f64);
            for (dx, &x) in dx.iter_mut().zip(x) {
                *dx = r * (*dx - x * r * mean);
            }
        }
        dw
    }
}

fn forward<T: Real>(x: &[T], w: &[T], eps: f64) -> Vec<T> {
    let width = w.len().max(1);
    let mut y = vec![T::zero(); x.len()];
    y.par_chunks_mut(width * CHUNK_ROWS)
        .zip(x.par_chunks(width * CHUNK_ROWS))
        .for_each(|(y, x)| forward_rows(y, x, w, eps));
    y
}

/// With `n = x·r` and `g = dy·w`: `dx = r·(g − n·mean(g·n))`, `dw = Σ dy·n`.
fn backward<T: Real>(x: &[T], w: &[T], dy: &[T], eps: f64) -> (Vec<T>, Vec<T>) {
    let width = w.len().max(1);
    let mut dx = vec![T::zero(); x.len()];
    let partial: Vec<Vec<T>> = dx
        .par_chunks_mut(width * CHUNK_ROWS)
        .zip(
            x.par_chunks(width * CHUNK_ROWS)
                .zip(dy.par_chunks(width * CHUNK_ROWS)),
        )
        .map(|(dx, (x, dy))| backward_rows(dx, x, w, dy, eps))
        .collect();
    let mut dw = vec![T::zero(); w.len()];
    for part in partial {
        for (sum, v) in dw.iter_mut().zip(part) {
            *sum += v;
        }
    }
    (dx, dw)
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        same_dtype(self.name(), x.dtype(), w.dtype())?;
        let y = dispatch!(x.dtype(), self.name(), T => {
            storage(forward::<T>(slice(x, lx)?, slice(w, lw)?, self.eps))
        });
        Ok((y, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (vx, vw, vd) = (view(x), view(w), view(&dy));
        dispatch!(x.dtype(), self.name(), T => {
            let (dx, dw) = backward::<T>(vx.slice()?, vw.slice()?, vd.slice()?, self.eps);
            Ok((tracked(x, dx)?, tracked(w, dw)?))
        })
    }
}

/// RMSNorm over the last dimension: `x: [.., H]`, `weight: [H]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if x.dims().last() != Some(&weight.dims1()?) {
        candle_core::bail!(
            "rms_norm: x is {:?} but weight is {:?}",
            x.shape(),
            weight.shape()
        )
    }
    if composed::is_for(x) {
        return composed::rms_norm(x, weight, eps);
    }
    let weight = as_rows(weight)?.contiguous()?;
    x.contiguous()?.apply_op2(&weight, RmsNorm { eps })
}
