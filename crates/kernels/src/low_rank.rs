//! Adapters of different ranks: rows sorted by slot, and every slot as many components as its rank is.
//!
//! A component is a row `a_k` `[K]` and a row `b_k` `[N]`; a slot gives `y = Σ_k (a_k·x)·b_k` over its own. The
//! components of all slots lie one after the other, so ranks that differ take neither the memory nor the
//! time of the widest. What lies between, `a_k·x` of every row, is as wide as the row's slot has components.

use crate::grouped::Segment;
use crate::real::{dispatch, same_dtype, slice, storage, tensor, view};
use crate::runs::{Run, backward, forward, outer};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use std::sync::Arc;

/// Which rows belong to which slot, and which components.
#[derive(Clone)]
struct Slots {
    segments: Arc<[Segment]>,
    /// Where the components of each slot begin, and the last end: `[slots + 1]`.
    starts: Arc<[usize]>,
}

impl Slots {
    /// From rows of `width` numbers to their components, `c: [components, width]`.
    fn runs(&self, rows: usize, c: &Shape, name: &str) -> Result<Vec<Run>> {
        let (components, width) = c.dims2()?;
        let slots = self.starts.len().saturating_sub(1);
        if self.starts.last() != Some(&components) || !self.starts.is_sorted() {
            candle_core::bail!(
                "{name}: components {:?} do not divide {components} rows",
                self.starts
            )
        }
        Segment::check(&self.segments, rows, slots, name)?;
        let mut output = 0;
        let run = |s: &Segment| {
            let first = self.starts[s.group];
            let run = Run {
                rows: s.len,
                inner: width,
                columns: self.starts[s.group + 1] - first,
                input: s.start * width,
                matrix: first * width,
                output,
            };
            output += run.rows * run.columns;
            run
        };
        Ok(self.segments.iter().map(run).collect())
    }

    fn rows(&self) -> usize {
        self.segments.last().map_or(0, |s| s.start + s.len)
    }
}

/// How many numbers the rows have together, by their components.
fn between(runs: &[Run]) -> usize {
    runs.iter().map(|run| run.rows * run.columns).sum()
}

/// `a_k·x`: of `x: [S, K]` and `a: [C, K]`, the numbers of every row one after the other.
struct Shrink(Slots);

/// `Σ_k z_k·b_k`: of what [`Shrink`] gives and `b: [C, N]`, `[S, N]`.
struct Expand(Slots);

impl CustomOp2 for Shrink {
    fn name(&self) -> &'static str {
        "low_rank"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        a: &CpuStorage,
        la: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        same_dtype(self.name(), x.dtype(), a.dtype())?;
        let ((rows, k), (_, width)) = (lx.shape().dims2()?, la.shape().dims2()?);
        if k != width {
            candle_core::bail!(
                "{}: x is [{rows}, {k}] but a is {:?}",
                self.name(),
                la.shape()
            )
        }
        let runs = self.0.runs(rows, la.shape(), self.name())?;
        let between = between(&runs);
        let z = dispatch!(x.dtype(), self.name(), T => {
            let mut z = vec![T::default(); between];
            forward::<T>(&runs, slice(x, lx)?, slice(a, la)?, &mut z);
            storage(z)
        });
        Ok((z, Shape::from(between)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        _res: &Tensor,
        dz: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let runs = self.0.runs(x.dim(0)?, a.shape(), self.name())?;
        let dz = dz.contiguous()?;
        let (vx, va, vdz) = (view(x), view(a), view(&dz));
        dispatch!(x.dtype(), self.name(), T => {
            let dx = x.track_op().then(|| {
                let mut dx = vec![T::default(); x.elem_count()];
                backward::<T>(&runs, vdz.slice()?, va.slice()?, &mut dx);
                tensor(dx, x.shape())
            });
            let da = a.track_op().then(|| {
                let mut da = vec![T::default(); a.elem_count()];
                outer::<T>(&runs, vdz.slice()?, vx.slice()?, &mut da);
                tensor(da, a.shape())
            });
            Ok((dx.transpose()?, da.transpose()?))
        })
    }
}

impl CustomOp2 for Expand {
    fn name(&self) -> &'static str {
        "low_rank"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        lz: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        same_dtype(self.name(), z.dtype(), b.dtype())?;
        let shape = (self.0.rows(), lb.shape().dims2()?.1);
        let runs = self.0.runs(shape.0, lb.shape(), self.name())?;
        let y = dispatch!(z.dtype(), self.name(), T => {
            let mut y = vec![T::default(); shape.0 * shape.1];
            backward::<T>(&runs, slice(z, lz)?, slice(b, lb)?, &mut y);
            storage(y)
        });
        Ok((y, Shape::from(shape)))
    }

    fn bwd(
        &self,
        z: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let runs = self.0.runs(self.0.rows(), b.shape(), self.name())?;
        let dy = dy.contiguous()?;
        let (vz, vb, vdy) = (view(z), view(b), view(&dy));
        dispatch!(z.dtype(), self.name(), T => {
            let dz = z.track_op().then(|| {
                let mut dz = vec![T::default(); z.elem_count()];
                forward::<T>(&runs, vdy.slice()?, vb.slice()?, &mut dz);
                tensor(dz, z.shape())
            });
            let db = b.track_op().then(|| {
                let mut db = vec![T::default(); b.elem_count()];
                outer::<T>(&runs, vz.slice()?, vdy.slice()?, &mut db);
                tensor(db, b.shape())
            });
            Ok((dz.transpose()?, db.transpose()?))
        })
    }
}

/// `y[s] = Bᵀ·A·x[s]` with the components of the row's slot, for rows sorted into `segments`.
///
/// `x: [S, K]`, `a: [C, K]`, `b: [C, N]`, result `[S, N]`; the components of slot `i` are the rows
/// `starts[i]..starts[i + 1]` of both, and may be none. The segments must cover the rows in order, without
/// gaps. An error names the shapes that do not fit.
pub fn low_rank(
    x: &Tensor,
    [a, b]: [&Tensor; 2],
    segments: &Arc<[Segment]>,
    starts: &Arc<[usize]>,
) -> Result<Tensor> {
    let slots = Slots {
        segments: segments.clone(),
        starts: starts.clone(),
    };
    let z = x
        .contiguous()?
        .apply_op2(&a.contiguous()?, Shrink(slots.clone()))?;
    z.apply_op2(&b.contiguous()?, Expand(slots))
}
