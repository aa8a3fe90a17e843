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

struct AddRows {
    index: Arc<[u32]>,
    share: f64,
}

simd! {
    /// `y = own + share · row`
    fn add_row<T: Real>(y: &mut [T], own: &[T], row: &[T], share: T) {
        for (y, (&own, &v)) in y.iter_mut().zip(own.iter().zip(row)) {
            *y = own + share * v;
        }
    }
}

impl AddRows {
    fn check(&self, own: &Shape, x: &Shape) -> Result<usize> {
        let ((s, width), (n, of_x)) = (own.dims2()?, x.dims2()?);
        let most = self.index.iter().max().map_or(0, |&row| row as usize + 1);
        if width != of_x || self.index.len() != s || most > n {
            candle_core::bail!(
                "add_rows: [{s}, {width}] and {} rows below {most} do not fit [{n}, {of_x}]",
                self.index.len()
            )
        }
        Ok(width)
    }

    fn forward<T: Real>(&self, width: usize, own: &[T], x: &[T]) -> Vec<T> {
        let (mut y, share) = (vec![T::zero(); own.len()], T::from_f64(self.share));
        y.par_chunks_mut(width.max(1))
            .zip(own.par_chunks(width.max(1)).zip(self.index.par_iter()))
            .with_min_len(TASK_ROWS)
            .for_each(|(y, (own, &row))| add_row(y, own, &x[row as usize * width..], share));
        y
    }
}

impl CustomOp2 for AddRows {
    fn name(&self) -> &'static str {
        "add_rows"
    }

    fn cpu_fwd(
        &self,
        own: &CpuStorage,
        lo: &Layout,
        x: &CpuStorage,
        lx: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        same_dtype(self.name(), own.dtype(), x.dtype())?;
        let width = self.check(lo.shape(), lx.shape())?;
        let y = dispatch!(own.dtype(), self.name(), T => {
            storage(self.forward::<T>(width, slice(own, lo)?, slice(x, lx)?))
        });
        Ok((y, lo.shape().clone()))
    }

    fn bwd(
        &self,
        own: &Tensor,
        x: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d_x = x.track_op().then(|| {
            let shares = Tensor::full(self.share, self.index.len(), dy.device())?;
            let shares = shares.to_dtype(dy.dtype())?;
            weighted_scatter(dy, &shares, &self.index, x.dim(0)?)
        });
        Ok((own.track_op().then(|| dy.clone()), d_x.transpose()?))
    }
}

/// `own[s] + share · x[index[s]]`: `own: [S, W]`, `x: [N, W]`, `index: [S]` below `N`, result `[S, W]`; several may be
/// of one row. Differentiable in both.
pub fn add_rows(own: &Tensor, x: &Tensor, index: &Arc<[u32]>, share: f64) -> Result<Tensor> {
    let op = AddRows {
        index: index.clone(),
        share,
    };
    if composed::is_for(own) {
        op.check(own.shape(), x.shape())?;
        return own + composed::select_rows(&(x * share)?, index)?;
    }
    own.contiguous()?.apply_op2(&x.contiguous()?, op)
}

/// `x[index[s]]`: `x: [N, W]`, `index: [S]` below `N`, result `[S, W]`; several may be of one row.
/// Differentiable.
pub fn select_rows(x: &Tensor, index: &Arc<[u32]>) -> Result<Tensor> {
    if composed::is_for(x) {
        return composed::select_rows(x, index);
    }
    x.index_select(&Tensor::new(&index[..], x.device())?, 0)
}
