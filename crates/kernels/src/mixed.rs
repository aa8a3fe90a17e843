//! Products of rows in f32, rounded to bf16, with matrices that stay in bf16: by the processor's own unit for such
//! numbers, or with parts of the matrices widened to f32 where it has none.

use crate::composed;
use crate::gemm::Output;
use crate::panels::{Stored, Unit};
use crate::runs::{Run, Scratch, Tile, Way, back, pieces, share_out, there, tiles};
use candle_core::{DType, Result, Tensor};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Parameters in the type of the rows that work goes on with: on the CPU rows are f32 where parameters are bf16,
/// elsewhere they are what parameters are.
pub fn as_rows(parameters: &Tensor) -> Result<Tensor> {
    match parameters.dtype() {
        DType::BF16 if !composed::is_for(parameters) => parameters.to_dtype(DType::F32),
        _ => Ok(parameters.clone()),
    }
}

/// Columns that are widened at a time, so that they stay in the second cache.
const WIDENED: usize = 64;

/// The products of every run, `count` numbers in all: see [`Way`].
pub(crate) fn products(runs: &[Run], way: Way, rows: &[f32], w: &[bf16], count: usize) -> Vec<f32> {
    products_by(bf16::unit(), runs, way, (rows, w), count)
}

/// The same by a `unit`, or without one.
fn products_by(
    unit: Option<Unit>,
    runs: &[Run],
    way: Way,
    (rows, w): (&[f32], &[bf16]),
    count: usize,
) -> Vec<f32> {
    let mut results = vec![0.0; count];
    let out = Output::new(&mut results);
    let tiles = tiles(runs, way);
    match unit {
        Some(unit) => share_out(&tiles, |scratch, tile| {
            let stride = tile.run.inner;
            let first = match way {
                Way::There => tile.column * stride,
                Way::Back => tile.column,
            };
            let w = (&w[tile.run.matrix + first..], stride);
            // SAFETY: the tiles partition the output.
            unsafe { tile.by_unit(unit, way, rows, w, out, scratch) };
        }),
        None => {
            // As a unit does.
            let round = |x: &f32| bf16::from_f32(*x).to_f32();
            let rows: Vec<f32> = rows.par_iter().map(round).collect();
            share_out(&tiles, |scratch, tile| {
                // SAFETY: the tiles partition the output.
                unsafe { widened(tile, way, &rows, w, out, scratch) };
            });
        }
    }
    results
}

/// # Safety
/// No other task may use the tile's part of the output at the same time.
unsafe fn widened<'a>(
    tile: &Tile,
    way: Way,
    rows: &'a [f32],
    w: &[bf16],
    out: Output<'_, f32>,
    (wide, scratch): &mut (Vec<f32>, Scratch<'a, f32>),
) {
    let run = tile.run;
    let w = &w[run.matrix..][..run.columns * run.inner];
    for columns in pieces(tile.column..tile.column + tile.columns, WIDENED) {
        let count = columns.len();
        let part = Tile {
            column: columns.start,
            columns: count,
            ..*tile
        };
        match way {
            Way::There => {
                let w = &w[columns.start * run.inner..columns.end * run.inner];
                wide.resize(w.len(), 0.0);
                w.convert_to_f32_slice(wide);
                // SAFETY: the caller's promise, of a part of the tile.
                unsafe { there(&part, rows, wide, out, scratch) };
            }
            Way::Back => {
                wide.resize(run.columns * count, 0.0);
                let w = w.chunks_exact(run.inner);
                for (w, wide) in w.zip(wide.chunks_exact_mut(count)) {
                    w[columns.clone()].convert_to_f32_slice(wide);
                }
                // SAFETY: as above.
                unsafe { back(&part, rows, (wide, count), out, scratch) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers, whose sums nothing rounds.
    fn whole(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i * 7 % 17) as f32 - 8.0).collect()
    }

    #[test]
    fn with_and_without_a_unit() {
        for (rows, inner, columns) in [(1, 5, 3), (20, 70, 130), (3, 600, 65), (15, 1, 1)] {
            let run = Run {
                rows,
                inner,
                columns,
                input: 4,
                matrix: 8,
                output: 2,
            };
            let (x, y) = (whole(4 + rows * inner), whole(2 + rows * columns));
            let w: Vec<bf16> = whole(8 + inner * columns)
                .into_iter()
                .map(bf16::from_f32)
                .collect();
            let at = |m: &[f32], row: usize, width: usize, k: usize| m[row * width + k];
            for unit in [None, bf16::unit()] {
                let there = products_by(unit, &[run], Way::There, (&x, &w), y.len());
                let back = products_by(unit, &[run], Way::Back, (&y, &w), x.len());
                let weight = |n: usize, k: usize| w[8 + n * inner + k].to_f32();
                for row in 0..rows {
                    for n in 0..columns {
                        let terms = (0..inner).map(|k| at(&x[4..], row, inner, k) * weight(n, k));
                        assert_eq!(at(&there[2..], row, columns, n), terms.sum::<f32>());
                    }
                    for k in 0..inner {
                        let terms =
                            (0..columns).map(|n| at(&y[2..], row, columns, n) * weight(n, k));
                        assert_eq!(at(&back[4..], row, inner, k), terms.sum::<f32>());
                    }
                }
            }
        }
    }
}
