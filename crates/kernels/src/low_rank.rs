//! Adapters of different ranks: rows sorted by slot, and every slot as many components as its rank is.
//!
//! A component is a row `a_k` `[K]` and a row `b_k` `[N]`; a slot gives `y = Σ_k (a_k·x)·b_k` over its own. The
//! components of all slots lie one after the other, so ranks that differ take neither the memory nor the
//! time of the widest. What lies between, `a_k·x` of every row, is as wide as the row's slot has components.

use crate::composed;
use crate::grouped::Segment;
use crate::runs::{Products, Run, Way};
use candle_core::{Result, Tensor};
use std::sync::Arc;

const NAME: &str = "low_rank";

/// The runs from rows of `width` numbers to the components of their slots, and how many numbers those are
/// together.
fn runs(segments: &[Segment], starts: &[usize], width: usize) -> (Vec<Run>, usize) {
    let mut output = 0;
    let run = |s: &Segment| {
        let first = starts[s.group];
        let run = Run {
            rows: s.len,
            inner: width,
            columns: starts[s.group + 1] - first,
            input: s.start * width,
            matrix: first * width,
            output,
        };
        output += run.rows * run.columns;
        run
    };
    let runs = segments.iter().map(run).collect();
    (runs, output)
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
    let ((rows, k), (components, ak), (of_b, n)) = (x.dims2()?, a.dims2()?, b.dims2()?);
    if k != ak || components != of_b {
        candle_core::bail!("{NAME}: x is [{rows}, {k}], a [{components}, {ak}] and b [{of_b}, {n}]")
    }
    if starts.last() != Some(&components) || !starts.is_sorted() {
        candle_core::bail!("{NAME}: components {starts:?} do not divide {components} rows")
    }
    Segment::check(segments, rows, starts.len() - 1, NAME)?;
    if composed::is_for(x) {
        return composed::low_rank(x, [a, b], segments, starts);
    }
    let (shrink, between) = runs(segments, starts, k);
    let shrink = Products {
        name: NAME,
        runs: shrink,
        way: Way::There,
        shape: between.into(),
    };
    let expand = Products {
        name: NAME,
        runs: runs(segments, starts, n).0,
        way: Way::Back,
        shape: (rows, n).into(),
    };
    let z = x.contiguous()?.apply_op2(&a.contiguous()?, shrink)?;
    z.apply_op2(&b.contiguous()?, expand)
}
