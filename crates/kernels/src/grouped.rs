//! Grouped linear maps: rows sorted by group, one weight matrix per group, one parallel operation.
//!
//! `y[s] = w[g(s)] · x[s]` with `x: [S, K]`, `w: [G, N, K]`, `y: [S, N]` (row-major; a weight is
//! stored as `torch.nn.Linear` stores it). With one group this is an ordinary linear layer, so the
//! whole model uses this one product. The backward skips the gradient of whatever nobody asked for:
//! most weights of a compressed model are frozen.

use crate::real::{dispatch, same_dtype, slice, storage, tensor, view};
use crate::runs::{Run, backward, forward, outer};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use std::sync::Arc;

/// A run of consecutive rows that use one weight matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Index into the first dimension of the weights.
    pub group: usize,
    /// First row.
    pub start: usize,
    /// Number of rows; may be zero.
    pub len: usize,
}

impl Segment {
    /// Checks that `segments` cover `rows` rows in order, of `groups` groups; `name` is told in errors.
    pub(crate) fn check(segments: &[Self], rows: usize, groups: usize, name: &str) -> Result<()> {
        let mut next = 0;
        for s in segments {
            if s.group >= groups || s.start != next {
                candle_core::bail!(
                    "{name}: {s:?} does not continue at row {next} of {groups} groups"
                )
            }
            next = s.start + s.len;
        }
        if next != rows {
            candle_core::bail!("{name}: segments cover {next} of {rows} rows")
        }
        Ok(())
    }
}

struct GroupedLinear {
    segments: Arc<[Segment]>,
}

impl GroupedLinear {
    /// The runs, and the shape of the result.
    fn runs(&self, x: &Shape, w: &Shape) -> Result<(Vec<Run>, [usize; 2])> {
        let ((rows, k), (groups, n, wk)) = (x.dims2()?, w.dims3()?);
        if k != wk {
            candle_core::bail!("grouped_linear: x is [{rows}, {k}] but w is [{groups}, {n}, {wk}]")
        }
        Segment::check(&self.segments, rows, groups, self.name())?;
        let run = |s: &Segment| Run {
            rows: s.len,
            inner: k,
            columns: n,
            input: s.start * k,
            matrix: s.group * n * k,
            output: s.start * n,
        };
        Ok((self.segments.iter().map(run).collect(), [rows, n]))
    }
}

impl CustomOp2 for GroupedLinear {
    fn name(&self) -> &'static str {
        "grouped_linear"
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
        let (runs, shape) = self.runs(lx.shape(), lw.shape())?;
        let y = dispatch!(x.dtype(), self.name(), T => {
            let mut y = vec![T::default(); shape.iter().product()];
            forward::<T>(&runs, slice(x, lx)?, slice(w, lw)?, &mut y);
            storage(y)
        });
        Ok((y, Shape::from(&shape[..])))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (runs, _) = self.runs(x.shape(), w.shape())?;
        let dy = dy.contiguous()?;
        let (vx, vw, vdy) = (view(x), view(w), view(&dy));
        dispatch!(x.dtype(), self.name(), T => {
            let dx = x.track_op().then(|| {
                let mut dx = vec![T::default(); x.elem_count()];
                backward::<T>(&runs, vdy.slice()?, vw.slice()?, &mut dx);
                tensor(dx, x.shape())
            });
            let dw = w.track_op().then(|| {
                let mut dw = vec![T::default(); w.elem_count()];
                outer::<T>(&runs, vdy.slice()?, vx.slice()?, &mut dw);
                tensor(dw, w.shape())
            });
            Ok((dx.transpose()?, dw.transpose()?))
        })
    }
}

/// `y[s] = w[g(s)] · x[s]` for rows sorted into `segments`.
///
/// `x: [S, K]`, `w: [G, N, K]`, result `[S, N]`. The segments must cover the rows in order, without
/// gaps; a group may have no rows. An error names the shapes that do not fit.
pub fn grouped_linear(x: &Tensor, w: &Tensor, segments: &Arc<[Segment]>) -> Result<Tensor> {
    x.contiguous()?.apply_op2(
        &w.contiguous()?,
        GroupedLinear {
            segments: segments.clone(),
        },
    )
}

/// An ordinary linear layer without bias: `x: [.., K]`, `w: [N, K]`, result `[.., N]`.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let Some(k) = dims.pop() else {
        candle_core::bail!("linear: x has no dimensions")
    };
    let rows = dims.iter().product();
    let segments: Arc<[Segment]> = Arc::new([Segment {
        group: 0,
        start: 0,
        len: rows,
    }]);
    dims.push(w.dim(0)?);
    grouped_linear(&x.reshape((rows, k))?, &w.unsqueeze(0)?, &segments)?.reshape(dims)
}
