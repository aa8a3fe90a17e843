//! Grouped linear maps: rows sorted by group, one weight matrix per group, one parallel operation.
//!
//! `y[s] = w[g(s)] · x[s]` with `x: [S, K]`, `w: [G, N, K]`, `y: [S, N]` (row-major; a weight is
//! stored as `torch.nn.Linear` stores it). With one group this is an ordinary linear layer, so the
//! whole model uses this one product.

use crate::composed;
use crate::runs::{Products, Run, Way};
use candle_core::{Result, Tensor};
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

/// `y[s] = w[g(s)] · x[s]` for rows sorted into `segments`.
///
/// `x: [S, K]`, `w: [G, N, K]`, result `[S, N]`. The segments must cover the rows in order, without
/// gaps; a group may have no rows. An error names the shapes that do not fit.
pub fn grouped_linear(x: &Tensor, w: &Tensor, segments: &Arc<[Segment]>) -> Result<Tensor> {
    const NAME: &str = "grouped_linear";
    let ((rows, k), (groups, n, wk)) = (x.dims2()?, w.dims3()?);
    if k != wk {
        candle_core::bail!("{NAME}: x is [{rows}, {k}] but w is [{groups}, {n}, {wk}]")
    }
    Segment::check(segments, rows, groups, NAME)?;
    if composed::is_for(x) {
        return composed::grouped_linear(x, w, segments);
    }
    let run = |s: &Segment| Run {
        rows: s.len,
        inner: k,
        columns: n,
        input: s.start * k,
        matrix: s.group * n * k,
        output: s.start * n,
    };
    let products = Products {
        name: NAME,
        runs: segments.iter().map(run).collect(),
        way: Way::There,
        shape: (rows, n).into(),
    };
    x.contiguous()?.apply_op2(&w.contiguous()?, products)
}

/// An ordinary linear layer without bias: `x: [.., K]`, `w: [N, K]`, result `[.., N]`.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let Some(k) = dims.pop() else {
        candle_core::bail!("linear: x has no dimensions")
    };
    let rows = dims.iter().product();
    dims.push(w.dim(0)?);
    let x = x.reshape((rows, k))?;
    if composed::is_for(&x) {
        return composed::linear(&x, w)?.reshape(dims);
    }
    let segments: Arc<[Segment]> = Arc::new([Segment {
        group: 0,
        start: 0,
        len: rows,
    }]);
    grouped_linear(&x, &w.unsqueeze(0)?, &segments)?.reshape(dims)
}
