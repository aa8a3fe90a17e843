//! RMSNorm with a backward: `y = x · w / sqrt(mean(x²) + eps)` over the last dimension.
//!
//! candle's fused `rms_norm` has no gradient; the composed form costs six passes over the data.

use crate::real::{Real, dispatch, same_dtype, slice, storage, tensor, view};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Rows of a task; fixed, so that the sum of weight gradients has one order.
const CHUNK_ROWS: usize = 64;

struct RmsNorm {
    eps: f64,
}

fn scale<T: Real>(x: &[T], eps: f64) -> T {
    let sum: T = x.iter().map(|&v| v * v).sum();
    T::one() / (sum / T::from_f64(x.len() as f64) + T::from_f64(eps)).sqrt()
}

fn forward<T: Real>(x: &[T], w: &[T], eps: f64) -> Vec<T> {
    let width = w.len();
    let mut y = vec![T::zero(); x.len()];
    y.par_chunks_mut(width * CHUNK_ROWS)
        .zip(x.par_chunks(width * CHUNK_ROWS))
        .for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let r = scale(x, eps);
                for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                    *y = x * r * w;
                }
            }
        });
    y
}

/// With `n = x·r` and `g = dy·w`: `dx = r·(g − n·mean(g·n))`, `dw = Σ dy·n`.
fn backward<T: Real>(x: &[T], w: &[T], dy: &[T], eps: f64) -> (Vec<T>, Vec<T>) {
    let width = w.len();
    let mut dx = vec![T::zero(); x.len()];
    let partial: Vec<Vec<T>> = dx
        .par_chunks_mut(width * CHUNK_ROWS)
        .zip(
            x.par_chunks(width * CHUNK_ROWS)
                .zip(dy.par_chunks(width * CHUNK_ROWS)),
        )
        .map(|(dx, (x, dy))| {
            let mut dw = vec![T::zero(); width];
            let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
            for ((dx, x), dy) in rows.zip(dy.chunks_exact(width)) {
                let r = scale(x, eps);
                let mut dot = T::zero();
                for j in 0..width {
                    let n = x[j] * r;
                    dot += dy[j] * w[j] * n;
                    dw[j] += dy[j] * n;
                }
                let mean = dot / T::from_f64(width as f64);
                for j in 0..width {
                    dx[j] = r * (dy[j] * w[j] - x[j] * r * mean);
                }
            }
            dw
        })
        .collect();
    let mut dw = vec![T::zero(); width];
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
        if lx.dims().last() != Some(&lw.shape().dims1()?) {
            candle_core::bail!(
                "rms_norm: x is {:?} but weight is {:?}",
                lx.shape(),
                lw.shape()
            )
        }
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
            let dw = w.track_op().then(|| tensor(dw, w.shape())).transpose()?;
            Ok((Some(tensor(dx, x.shape())?), dw))
        })
    }
}

/// RMSNorm over the last dimension: `x: [.., H]`, `weight: [H]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?
        .apply_op2(&weight.contiguous()?, RmsNorm { eps })
}
