//! Few columns to their places among many: what the kept rows of a sparse matrix give, in the outputs
//! that those rows stand for.

use crate::composed;
use crate::grouped::Segment;
use crate::real::{Real, dispatch, slice, storage, tracked, view};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Fewest rows of a task.
const TASK_ROWS: usize = 32;

struct SpreadColumns {
    /// The group of each row.
    groups: Vec<usize>,
    /// `[G, N]` places below `width`, each group's without a double.
    places: Arc<[u32]>,
    width: usize,
}

impl SpreadColumns {
    fn check(&self, x: &Shape) -> Result<usize> {
        let (rows, n) = x.dims2()?;
        let groups = self.groups.iter().max().map_or(0, |group| group + 1);
        let most = self
            .places
            .iter()
            .max()
            .map_or(0, |&place| place as usize + 1);
        let fits = rows == self.groups.len() && groups * n <= self.places.len();
        if !fits || most > self.width {
            candle_core::bail!(
                "spread_columns: {:?} with {groups} groups of {} rows and {} places below {most} do \
                 not fit {} columns",
                x,
                self.groups.len(),
                self.places.len(),
                self.width
            )
        }
        Ok(n)
    }

    /// The places of the columns of each row.
    fn places(&self, n: usize) -> impl IndexedParallelIterator<Item = &[u32]> {
        let groups = self.groups.par_iter();
        groups.map(move |group| &self.places[group * n..(group + 1) * n])
    }

    fn forward<T: Real>(&self, n: usize, x: &[T]) -> Vec<T> {
        let mut y = vec![T::zero(); self.groups.len() * self.width];
        y.par_chunks_mut(self.width.max(1))
            .zip(x.par_chunks(n.max(1)).zip(self.places(n)))
            .with_min_len(TASK_ROWS)
            .for_each(|(y, (x, places))| {
                for (&place, &x) in places.iter().zip(x) {
                    y[place as usize] = x;
                }
            });
        y
    }

    fn backward<T: Real>(&self, n: usize, dy: &[T]) -> Vec<T> {
        let mut dx = vec![T::zero(); self.groups.len() * n];
        dx.par_chunks_mut(n.max(1))
            .zip(dy.par_chunks(self.width.max(1)).zip(self.places(n)))
            .with_min_len(TASK_ROWS)
            .for_each(|(dx, (dy, places))| {
                for (&place, dx) in places.iter().zip(dx) {
                    *dx = dy[place as usize];
                }
            });
        dx
    }
}

impl CustomOp1 for SpreadColumns {
    fn name(&self) -> &'static str {
        "spread_columns"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let n = self.check(layout.shape())?;
        let y = dispatch!(x.dtype(), self.name(), T => {
            storage(self.forward::<T>(n, slice(x, layout)?))
        });
        Ok((y, Shape::from((self.groups.len(), self.width))))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let n = self.check(x.shape())?;
        let dy = dy.contiguous()?;
        let view = view(&dy);
        dispatch!(x.dtype(), self.name(), T => {
            tracked(x, self.backward::<T>(n, view.slice()?))
        })
    }
}

/// `y[s, places[g(s), i]] = x[s, i]`, zero elsewhere: `x: [S, N]` in rows sorted by group, `places`
/// `[G, N]` below `width` and without doubles in a group, result `[S, width]`. Differentiable.
pub fn spread_columns(
    x: &Tensor,
    places: &Arc<[u32]>,
    segments: &[Segment],
    width: usize,
) -> Result<Tensor> {
    let groups = segments.iter();
    let op = SpreadColumns {
        groups: groups
            .flat_map(|segment| std::iter::repeat_n(segment.group, segment.len))
            .collect(),
        places: places.clone(),
        width,
    };
    if composed::is_for(x) {
        op.check(x.shape())?;
        return composed::spread_columns(x, places, segments, width);
    }
    x.contiguous()?.apply_op1(op)
}
