//! Products of runs of rows with one matrix each, in parallel: what grouped maps and adapters are made of.
//! The backward skips the gradient of whatever nobody asked for: most weights of a compressed model are
//! frozen.

use crate::few::{self, DEPTH, parts};
use crate::gemm::{Mat, Output};
use crate::lanes::transpose;
use crate::mixed;
use crate::panels::{self, Inputs, Product, Stored, Unit};
use crate::real::{Real, dispatch, same_dtype, slice, storage, tensor, view};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows of a task's tile, the fewest and the most columns, and how many numbers of the matrix it is to have: threads
/// wait for the last tile, so that none may take long.
const TILE_ROWS: usize = 512;
const TILE_COLS: [usize; 2] = [128, 512];
const TILE_NUMBERS: usize = 1 << 20;
/// Numbers of a matrix that does not stay in the second cache.
const LARGE: usize = 1 << 18;
/// Output rows of a task that reduces over tokens (weight gradients).
const TILE_GRAD: usize = 64;

/// A run of rows `[rows, inner]` that meet the matrix `[columns, inner]` and give `[rows, columns]`. Each of
/// the three lies without a gap in a buffer, from the place that is given on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) columns: usize,
    /// Where the rows begin.
    pub(crate) input: usize,
    /// Where the matrix begins.
    pub(crate) matrix: usize,
    /// Where the result begins.
    pub(crate) output: usize,
}

/// A part of a run: its first row and column, and how many of each.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) run: Run,
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) column: usize,
    pub(crate) columns: usize,
}

impl Tile {
    /// Whether its matrix is so large that it comes from memory, which a unit fetches beforehand; smaller ones
    /// `gemm` multiplies faster in f32, with the same bits.
    pub(crate) fn is_large(&self) -> bool {
        self.run.inner * self.run.columns >= LARGE
    }

    /// Computes it by a unit of the processor, for the part `w` of a matrix that begins at its columns, with the
    /// numbers from a row to the next.
    ///
    /// # Safety
    /// No other task may use its part of the output at the same time.
    pub(crate) unsafe fn by_unit<'a, W: Stored>(
        &self,
        unit: Unit,
        way: Way,
        rows: &'a [f32],
        w: (&[W], usize),
        out: Output<'_, f32>,
        scratch: &mut panels::Scratch<'a>,
    ) {
        let run = self.run;
        let (from, inner, to, width, inputs) = match way {
            Way::There => (
                run.input,
                run.inner,
                run.output,
                run.columns,
                Inputs::InRows,
            ),
            Way::Back => (
                run.output,
                run.columns,
                run.input,
                run.inner,
                Inputs::InColumns,
            ),
        };
        let product = Product {
            rows: self.rows,
            inner,
            columns: self.columns,
            x: (&rows[from + self.row * inner..], inner),
            w,
            inputs,
        };
        let at = to + self.row * width + self.column;
        let out = out.part(at, width, [self.rows, self.columns]);
        // SAFETY: the caller's promise.
        unsafe { W::run(unit, &product, scratch, out) };
    }
}

/// Memory of a task.
#[derive(Default)]
pub(crate) struct Scratch<'a, T> {
    numbers: Vec<T>,
    panels: panels::Scratch<'a>,
}

/// Columns from `first` on, `most` at a time. Two at least, where there are as many: of a single one `gemm`
/// sums in another order.
pub(crate) fn pieces(columns: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let Range { mut start, end } = columns;
    std::iter::from_fn(move || {
        let left = end - start;
        let count = if left <= most + 1 { left } else { most };
        start += count;
        (count > 0).then_some(start - count..start)
    })
}

/// The parts of results.
pub(crate) fn tiles(runs: &[Run], way: Way) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for run in runs.iter().filter(|run| run.inner * run.columns > 0) {
        let (depth, width) = match way {
            Way::There => (run.inner, run.columns),
            Way::Back => (run.columns, run.inner),
        };
        let [fewest, most] = TILE_COLS;
        let columns = (TILE_NUMBERS / depth / fewest * fewest).clamp(fewest, most);
        for row in (0..run.rows).step_by(TILE_ROWS) {
            tiles.extend(pieces(0..width, columns).map(|columns| Tile {
                run: *run,
                row,
                rows: TILE_ROWS.min(run.rows - row),
                column: columns.start,
                columns: columns.len(),
            }));
        }
    }
    tiles
}

/// Does `work` for each of `tasks`, with memory of its thread. Whoever is free takes tasks that follow each other, first
/// many and in the end one by one: divided beforehand, as `rayon` does it, those of one thread may take longer than
/// those of another.
pub(crate) fn share_out<T: Sync, M: Default>(tasks: &[T], work: impl Fn(&mut M, &T) + Sync) {
    let next = AtomicUsize::new(0);
    let threads = rayon::current_num_threads().min(tasks.len());
    let after = |first: usize| {
        let left = tasks.len() - first;
        (left > 0).then(|| first + (left / (2 * threads)).max(1))
    };
    let workers = (0..threads).into_par_iter().with_max_len(1);
    workers.for_each(|_| {
        let mut memory = M::default();
        while let Ok(first) = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after) {
            let mine = &tasks[first..after(first).unwrap_or(first)];
            mine.iter().for_each(|task| work(&mut memory, task));
        }
    });
}

/// `y = x · wᵀ` of every run, `count` numbers in all; the results do not overlap. What a row gives does not
/// depend on the other rows of its run.
fn forward<T: Real>(runs: &[Run], x: &[T], w: &[T], count: usize) -> Vec<T> {
    let mut y = vec![T::zero(); count];
    let out = Output::new(&mut y);
    share_out(&tiles(runs, Way::There), |scratch, tile| {
        let w = &w[tile.run.matrix + tile.column * tile.run.inner..];
        // SAFETY: the tiles partition the output.
        unsafe { there(tile, x, w, out, scratch) };
    });
    y
}

/// One tile of `y = x · wᵀ`, for the rows `w` of its columns.
///
/// # Safety
/// No other task may use the tile's part of the output at the same time.
pub(crate) unsafe fn there<'a, T: Real>(
    tile: &Tile,
    x: &'a [T],
    w: &[T],
    out: Output<'_, T>,
    scratch: &mut Scratch<'a, T>,
) {
    let Scratch {
        numbers: scratch,
        panels,
    } = scratch;
    let (run, m, n) = (tile.run, tile.rows, tile.columns);
    let (inner, stride) = (run.inner, run.columns);
    let at = run.output + tile.row * stride + tile.column;
    let of_tile = &x[run.input + tile.row * inner..];
    let shape = few::Shape {
        rows: m,
        inner,
        columns: n,
    };
    if shape.is_small() {
        scratch.resize(m * n, T::zero());
        if T::few_rows(shape, of_tile, w, scratch) {
            for (r, row) in scratch.chunks_exact(n).enumerate() {
                // SAFETY: the caller's promise.
                unsafe { out.write(at + r * stride, row) };
            }
            return;
        }
    }
    // SAFETY: the caller's promise.
    if unsafe { T::by_unit(tile, Way::There, (x, w, inner), out, panels) } {
        return;
    }
    // The weights are turned in parts that stay in the cache.
    for part in parts(inner, DEPTH) {
        let (depth, k) = (part.start, part.len());
        scratch.resize(k * n, T::zero());
        transpose(&w[depth..], inner, n, k, scratch);
        let (a, b) = (
            Mat::new(&of_tile[depth..], inner, 1),
            Mat::new(scratch, n, 1),
        );
        let before = if depth == 0 { T::zero() } else { T::one() };
        // SAFETY: the caller's promise.
        unsafe { out.matmul((at, stride, 1), (m, k, n), a, b, T::one(), before) };
    }
}

/// `x = y · w` of every run, `count` numbers in all: the way back.
fn backward<T: Real>(runs: &[Run], y: &[T], w: &[T], count: usize) -> Vec<T> {
    let mut x = vec![T::zero(); count];
    let out = Output::new(&mut x);
    share_out(&tiles(runs, Way::Back), |scratch, tile| {
        let w = (&w[tile.run.matrix + tile.column..], tile.run.inner);
        // SAFETY: the tiles partition the output.
        unsafe { back(tile, y, w, out, scratch) };
    });
    x
}

/// One tile of `x = y · w`, for the columns `w` of the tile and the numbers from a row of them to the next.
///
/// # Safety
/// No other task may use the tile's part of the output at the same time.
pub(crate) unsafe fn back<'a, T: Real>(
    tile: &Tile,
    y: &'a [T],
    (w, stride): (&[T], usize),
    out: Output<'_, T>,
    scratch: &mut Scratch<'a, T>,
) {
    // SAFETY: the caller's promise.
    if unsafe { T::by_unit(tile, Way::Back, (y, w, stride), out, &mut scratch.panels) } {
        return;
    }
    let (run, m, n) = (tile.run, tile.rows, tile.columns);
    let at = run.input + tile.row * run.inner + tile.column;
    for part in parts(run.columns, DEPTH) {
        let (depth, k) = (part.start, part.len());
        let y = &y[run.output + tile.row * run.columns + depth..];
        let (a, b) = (
            Mat::new(y, run.columns, 1),
            Mat::new(&w[depth * stride..], stride, 1),
        );
        let before = if depth == 0 { T::zero() } else { T::one() };
        // SAFETY: the caller's promise.
        unsafe { out.matmul((at, run.inner, 1), (m, k, n), a, b, T::one(), before) };
    }
}

/// `w = yᵀ · x` of every run, `count` numbers in all: several may share a matrix, which then has the sum in
/// their order.
fn outer<T: Real>(runs: &[Run], y: &[T], x: &[T], count: usize) -> Vec<T> {
    let mut w = vec![T::zero(); count];
    // Of no columns nothing comes, and such a matrix begins where the next one does.
    let counts = |run: &&Run| run.rows * run.columns * run.inner > 0;
    let mut order: Vec<&Run> = runs.iter().filter(counts).collect();
    order.sort_by_key(|run| run.matrix);
    let of_matrices: Vec<&[&Run]> = order.chunk_by(|a, b| a.matrix == b.matrix).collect();
    let parts = of_matrices.into_iter().flat_map(|runs| {
        let rows = (0..runs[0].columns).step_by(TILE_GRAD);
        rows.map(move |row| (runs, row))
    });
    let out = Output::new(&mut w);
    let parts: Vec<(&[&Run], usize)> = parts.collect();
    share_out(&parts, |(): &mut (), &(runs, row)| {
        for run in runs {
            let m = TILE_GRAD.min(run.columns - row);
            let a = Mat::new(&y[run.output + row..], run.columns, 1).t();
            let b = Mat::new(&x[run.input..], run.inner, 1);
            let at = run.matrix + row * run.inner;
            // SAFETY: the parts are rows of different matrices, or different rows of one.
            unsafe {
                out.matmul(
                    (at, run.inner, 1),
                    (m, run.rows, run.inner),
                    a,
                    b,
                    T::one(),
                    T::one(),
                )
            };
        }
    });
    w
}

/// Which way rows go through their matrices.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    /// From the inputs to the outputs of the runs, `y = x · wᵀ`.
    There,
    /// From the outputs to the inputs, `x = y · w`.
    Back,
}

impl Way {
    /// The other one.
    fn turned(self) -> Self {
        match self {
            Self::There => Self::Back,
            Self::Back => Self::There,
        }
    }

    /// What stands at the outputs of the runs and at their inputs, of results and of what they came of.
    fn sides<'a, T>(self, results: &'a [T], rows: &'a [T]) -> (&'a [T], &'a [T]) {
        match self {
            Self::There => (results, rows),
            Self::Back => (rows, results),
        }
    }
}

/// The products of some runs as an operation on rows and matrices, which are contiguous.
pub(crate) struct Products {
    /// What errors name.
    pub(crate) name: &'static str,
    pub(crate) runs: Vec<Run>,
    pub(crate) way: Way,
    /// The shape of the result.
    pub(crate) shape: Shape,
}

impl CustomOp2 for Products {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        rows: &CpuStorage,
        lr: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let count = self.shape.elem_count();
        if let (DType::F32, DType::BF16) = (rows.dtype(), w.dtype()) {
            let (rows, w) = (slice(rows, lr)?, slice(w, lw)?);
            let out = mixed::products(&self.runs, self.way, rows, w, count);
            return Ok((storage(out), self.shape.clone()));
        }
        same_dtype(self.name, rows.dtype(), w.dtype())?;
        let out = dispatch!(rows.dtype(), self.name, T => {
            let (rows, w) = (slice::<T>(rows, lr)?, slice(w, lw)?);
            storage(match self.way {
                Way::There => forward(&self.runs, rows, w, count),
                Way::Back => backward(&self.runs, rows, w, count),
            })
        });
        Ok((out, self.shape.clone()))
    }

    fn bwd(
        &self,
        rows: &Tensor,
        w: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (of_rows, of_w) = (rows.elem_count(), w.elem_count());
        let (vr, vw, vg) = (view(rows), view(w), view(&grad));
        if w.dtype() == DType::BF16 {
            return self.bwd_mixed([rows, w], (vr.slice()?, vw.slice()?, vg.slice()?));
        }
        dispatch!(rows.dtype(), self.name, T => {
            let (r, m, g) = (vr.slice::<T>()?, vw.slice()?, vg.slice()?);
            let d_rows = rows.track_op().then(|| {
                let found = match self.way {
                    Way::There => backward(&self.runs, g, m, of_rows),
                    Way::Back => forward(&self.runs, g, m, of_rows),
                };
                tensor(found, rows.shape())
            });
            let d_w = w.track_op().then(|| {
                let (y, x) = self.way.sides(g, r);
                tensor(outer(&self.runs, y, x, of_w), w.shape())
            });
            Ok((d_rows.transpose()?, d_w.transpose()?))
        })
    }
}

impl Products {
    /// As `bwd`, of matrices in bf16; their own gradient is summed in f32.
    fn bwd_mixed(
        &self,
        [rows, w]: [&Tensor; 2],
        (r, m, g): (&[f32], &[bf16], &[f32]),
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d_rows = rows.track_op().then(|| {
            let back = self.way.turned();
            let found = mixed::products(&self.runs, back, g, m, rows.elem_count());
            tensor(found, rows.shape())
        });
        let d_w = w.track_op().then(|| {
            let (y, x) = self.way.sides(g, r);
            tensor(outer(&self.runs, y, x, w.elem_count()), w.shape())?.to_dtype(DType::BF16)
        });
        Ok((d_rows.transpose()?, d_w.transpose()?))
    }
}
