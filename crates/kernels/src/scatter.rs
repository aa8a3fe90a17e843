//! Weighted scatter: expert outputs back to their tokens (or to their token-group pairs).
//!
//! `y[target[s]] += weight[s] · rows[s]`, summed in ascending row order per target, so the result
//! does not depend on the number of threads.

use crate::composed;
use crate::lanes::{dot, simd};
use crate::real::{Real, dispatch, same_dtype, slice, storage, tracked, view};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Fewest rows of a task.
const TASK_ROWS: usize = 32;

struct WeightedScatter {
    targets: Arc<[u32]>,
    outputs: usize,
}

simd! {
    /// `y += Σ weights[row] · rows[row]` over the row numbers in `run`.
    fn gather<T: Real>(y: &mut [T], run: &[u32], rows: &[T], weights: &[T]) {
        for &row in run {
            let (at, w) = (row as usize * y.len(), weights[row as usize]);
            for (y, &v) in y.iter_mut().zip(&rows[at..]) {
                *y += w * v;
            }
        }
    }
}

simd! {
    /// `d_row = w · dy`; returns the gradient of `w`.
    fn backward_row<T: Real>(d_row: &mut [T], row: &[T], w: T, dy: &[T]) -> T {
        for (d, &g) in d_row.iter_mut().zip(dy) {
            *d = w * g;
        }
        dot(row, dy)
    }
}

impl WeightedScatter {
    /// Row numbers sorted by target, and where each target's run begins: `[outputs + 1]`.
    fn inverse(&self) -> (Vec<u32>, Vec<usize>) {
        let mut starts = vec![0usize; self.outputs + 1];
        for &t in self.targets.iter() {
            starts[t as usize + 1] += 1;
        }
        for i in 0..self.outputs {
            starts[i + 1] += starts[i];
        }
        let mut next = starts.clone();
        let mut rows = vec![0; self.targets.len()];
        for (row, &t) in self.targets.iter().enumerate() {
            rows[next[t as usize]] = row as u32;
            next[t as usize] += 1;
        }
        (rows, starts)
    }

    fn check(&self, rows: &Shape, weights: &Shape) -> Result<(usize, usize)> {
        let (s, width) = rows.dims2()?;
        let max = self.targets.iter().max().map_or(0, |&t| t as usize + 1);
        if weights.dims1()? != s || self.targets.len() != s || max > self.outputs {
            candle_core::bail!(
                "weighted_scatter: {s} rows, weights {weights:?}, {} targets below {max} do not \
                 fit {} outputs",
                self.targets.len(),
                self.outputs
            )
        }
        Ok((s, width))
    }

    fn forward<T: Real>(&self, width: usize, rows: &[T], weights: &[T]) -> Vec<T> {
        let mut y = vec![T::zero(); self.outputs * width];
        let (order, starts) = self.inverse();
        y.par_chunks_mut(width.max(1))
            .zip(starts.par_windows(2))
            .with_min_len(TASK_ROWS)
            .for_each(|(y, run)| gather(y, &order[run[0]..run[1]], rows, weights));
        y
    }

    fn backward<T: Real>(&self, width: usize, [rows, weights, dy]: [&[T]; 3]) -> (Vec<T>, Vec<T>) {
        let (mut d_rows, mut d_weights) =
            (vec![T::zero(); rows.len()], vec![T::zero(); weights.len()]);
        d_rows
            .par_chunks_mut(width.max(1))
            .zip(d_weights.par_iter_mut())
            .zip(
                self.targets
                    .par_iter()
                    .zip(rows.par_chunks(width.max(1)).zip(weights)),
            )
            .with_min_len(TASK_ROWS)
            .for_each(|((d_row, d_weight), (&target, (row, &w)))| {
                let dy = &dy[target as usize * width..(target as usize + 1) * width];
                *d_weight = backward_row(d_row, row, w, dy);
            });
        (d_rows, d_weights)
    }
}

impl CustomOp2 for WeightedScatter {
    fn name(&self) -> &'static str {
        "weighted_scatter"
    }

    fn cpu_fwd(
        &self,
        rows: &CpuStorage,
        lr: &Layout,
        weights: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        same_dtype(self.name(), rows.dtype(), weights.dtype())?;
        let (_, width) = self.check(lr.shape(), lw.shape())?;
        let y = dispatch!(rows.dtype(), self.name(), T => {
            storage(self.forward::<T>(width, slice(rows, lr)?, slice(weights, lw)?))
        });
        Ok((y, Shape::from((self.outputs, width))))
    }

    fn bwd(
        &self,
        rows: &Tensor,
        weights: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, width) = self.check(rows.shape(), weights.shape())?;
        let dy = dy.contiguous()?;
        let (vr, vw, vd) = (view(rows), view(weights), view(&dy));
        dispatch!(rows.dtype(), self.name(), T => {
            let (d_rows, d_weights) =
                self.backward::<T>(width, [vr.slice()?, vw.slice()?, vd.slice()?]);
            Ok((tracked(rows, d_rows)?, tracked(weights, d_weights)?))
        })
    }
}

/// `y[targets[s]] += weights[s] · rows[s]`: `rows: [S, W]`, `weights: [S]`, `targets: [S]` below
/// `outputs`, result `[outputs, W]`. Differentiable in rows and weights.
pub fn weighted_scatter(
    rows: &Tensor,
    weights: &Tensor,
    targets: &Arc<[u32]>,
    outputs: usize,
) -> Result<Tensor> {
    let op = WeightedScatter {
        targets: targets.clone(),
        outputs,
    };
    if composed::is_for(rows) {
        op.check(rows.shape(), weights.shape())?;
        return composed::weighted_scatter(rows, weights, targets, outputs);
    }
    rows.contiguous()?.apply_op2(&weights.contiguous()?, op)
}

/// `x[index[s]]`: `x: [N, W]`, `index: [S]` below `N`, result `[S, W]`; several may be of one row.
/// Differentiable.
pub fn select_rows(x: &Tensor, index: &Arc<[u32]>) -> Result<Tensor> {
    if composed::is_for(x) {
        return composed::select_rows(x, index);
    }
    x.index_select(&Tensor::new(&index[..], x.device())?, 0)
}
