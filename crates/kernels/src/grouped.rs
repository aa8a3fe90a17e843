//! Grouped linear maps: rows sorted by group, one weight matrix per group, one parallel operation.
//!
//! `y[s] = w[g(s)] · x[s]` with `x: [S, K]`, `w: [G, N, K]`, `y: [S, N]` (row-major; a weight is
//! stored as `torch.nn.Linear` stores it). With one group this is an ordinary linear layer, so the
//! whole model uses this one product. The backward skips the gradient of whatever nobody asked for:
//! most weights of a compressed model are frozen.

use crate::gemm::{Mat, Output};
use crate::lanes::transpose;
use crate::real::{Real, dispatch, same_dtype, slice, storage, tensor, view};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Rows and columns of a task's tile. Fixed, so that results do not depend on the thread count.
const TILE_ROWS: usize = 512;
const TILE_COLS: usize = 512;
/// Inputs of a tile's weights that are turned at once, so that they stay in the cache.
const TILE_DEPTH: usize = 256;
/// Rows of a tile from which turning its weights pays.
const TURN_FROM: usize = 4;
/// Output rows of a task that reduces over tokens (weight gradients).
const TILE_GRAD: usize = 64;

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

struct GroupedLinear {
    segments: Arc<[Segment]>,
}

struct Dims {
    rows: usize,
    groups: usize,
    n: usize,
    k: usize,
}

impl GroupedLinear {
    fn dims(&self, x: &Shape, w: &Shape) -> Result<Dims> {
        let ((rows, k), (groups, n, wk)) = (x.dims2()?, w.dims3()?);
        if k != wk {
            candle_core::bail!("grouped_linear: x is [{rows}, {k}] but w is [{groups}, {n}, {wk}]")
        }
        let mut next = 0;
        for s in self.segments.iter() {
            if s.group >= groups || s.start != next {
                candle_core::bail!(
                    "grouped_linear: {s:?} does not continue at row {next} of {groups} groups"
                )
            }
            next = s.start + s.len;
        }
        if next != rows {
            candle_core::bail!("grouped_linear: segments cover {next} of {rows} rows")
        }
        Ok(Dims { rows, groups, n, k })
    }

    /// The tiles of an output `[rows, cols]`: (segment, first row, rows, first column, columns).
    fn tiles(&self, cols: usize) -> Vec<(Segment, usize, usize, usize, usize)> {
        let mut tiles = Vec::new();
        for &s in self.segments.iter() {
            for row in (0..s.len).step_by(TILE_ROWS) {
                for col in (0..cols).step_by(TILE_COLS) {
                    let m = TILE_ROWS.min(s.len - row);
                    tiles.push((s, s.start + row, m, col, TILE_COLS.min(cols - col)));
                }
            }
        }
        tiles
    }

    fn forward<T: Real>(&self, d: &Dims, x: &[T], w: &[T]) -> Vec<T> {
        let mut y = vec![T::zero(); d.rows * d.n];
        let out = Output::new(&mut y);
        self.tiles(d.n)
            .into_par_iter()
            .for_each_init(Vec::new, |turned, (s, row, m, col, n)| {
                let w = &w[(s.group * d.n + col) * d.k..];
                // A few rows read every weight once, as it lies.
                let step = if m < TURN_FROM { d.k } else { TILE_DEPTH };
                for depth in (0..d.k).step_by(step.max(1)) {
                    let k = step.min(d.k - depth);
                    let b = if m < TURN_FROM {
                        Mat::new(w, d.k, 1).t()
                    } else {
                        turned.resize(k * n, T::zero());
                        transpose(&w[depth..], d.k, n, k, turned);
                        Mat::new(turned, n, 1)
                    };
                    let a = Mat::new(&x[row * d.k + depth..], d.k, 1);
                    let tile = (row * d.n + col, d.n, 1);
                    let before = if depth == 0 { T::zero() } else { T::one() };
                    // SAFETY: the tiles partition the output.
                    unsafe { out.matmul(tile, (m, k, n), a, b, T::one(), before) };
                }
            });
        y
    }

    /// `dx[s] = w[g(s)]ᵀ · dy[s]`
    fn grad_x<T: Real>(&self, d: &Dims, w: &[T], dy: &[T]) -> Vec<T> {
        let mut dx = vec![T::zero(); d.rows * d.k];
        let out = Output::new(&mut dx);
        self.tiles(d.k)
            .into_par_iter()
            .for_each(|(s, row, m, col, n)| {
                let a = Mat::new(&dy[row * d.n..], d.n, 1);
                let b = Mat::new(&w[s.group * d.n * d.k + col..], d.k, 1);
                // SAFETY: the tiles partition the output.
                unsafe {
                    out.matmul(
                        (row * d.k + col, d.k, 1),
                        (m, d.n, n),
                        a,
                        b,
                        T::one(),
                        T::zero(),
                    )
                };
            });
        dx
    }

    /// `dw[g] = Σ_s dy[s] ⊗ x[s]` over the rows of group `g`; several segments may share a group.
    fn grad_w<T: Real>(&self, d: &Dims, x: &[T], dy: &[T]) -> Vec<T> {
        let mut dw = vec![T::zero(); d.groups * d.n * d.k];
        let tile = TILE_GRAD.min(d.n).max(1);
        dw.par_chunks_mut(tile * d.k.max(1))
            .enumerate()
            .for_each(|(i, chunk)| {
                let out = Output::new(chunk);
                let first = i * tile;
                // A chunk may straddle two groups when n is not a multiple of the tile.
                let mut done = 0;
                let rows = out.rows(d.k);
                while done < rows {
                    let (group, row) = ((first + done) / d.n, (first + done) % d.n);
                    let m = (d.n - row).min(rows - done);
                    for s in self
                        .segments
                        .iter()
                        .filter(|s| s.group == group && s.len > 0)
                    {
                        let a = Mat::new(&dy[s.start * d.n + row..], d.n, 1).t();
                        let b = Mat::new(&x[s.start * d.k..], d.k, 1);
                        // SAFETY: this task owns the whole chunk.
                        unsafe {
                            out.matmul(
                                (done * d.k, d.k, 1),
                                (m, s.len, d.k),
                                a,
                                b,
                                T::one(),
                                T::one(),
                            )
                        };
                    }
                    done += m;
                }
            });
        dw
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
        let d = self.dims(lx.shape(), lw.shape())?;
        let y = dispatch!(x.dtype(), self.name(), T => {
            storage(self.forward::<T>(&d, slice(x, lx)?, slice(w, lw)?))
        });
        Ok((y, Shape::from((d.rows, d.n))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _res: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d = self.dims(x.shape(), w.shape())?;
        let dy = dy.contiguous()?;
        let (vx, vw, vdy) = (view(x), view(w), view(&dy));
        dispatch!(x.dtype(), self.name(), T => {
            let dx = x
                .track_op()
                .then(|| tensor(self.grad_x::<T>(&d, vw.slice()?, vdy.slice()?), x.shape()))
                .transpose()?;
            let dw = w
                .track_op()
                .then(|| tensor(self.grad_w::<T>(&d, vx.slice()?, vdy.slice()?), w.shape()))
                .transpose()?;
            Ok((dx, dw))
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
