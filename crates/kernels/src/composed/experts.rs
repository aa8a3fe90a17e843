//! What experts are made of: products of sorted rows, and the way from tokens to rows and back.
//!
//! Their gradients are written out: those that candle makes of many parts of one tensor are as large as the
//! whole of it, for each part.

use super::given::given;
use super::products::{Between, by_group, filled, joined, rows};
use super::{add, of_type, wide};
#[cfg(feature = "linked")]
use crate::cuda;
use crate::grouped::Segment;
#[cfg(feature = "linked")]
use candle_core::DType;
use candle_core::{D, Result, Tensor};
use std::sync::Arc;

/// As [`crate::linear`], of rows: `x: [S, K]`, `w: [N, K]`, result `[S, N]`.
pub(crate) fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (of_x, of_w) = (x.detach(), w.detach());
    let value = of_x.matmul(&of_type(&of_w, x)?.t()?)?;
    let (of_rows, of_weights, dtype) = (x.track_op(), w.track_op(), w.dtype());
    given("linear", [x, w, &x.detach()], value, move |dy| {
        let dx = of_rows.then(|| dy.matmul(&of_type(&of_w, dy)?));
        // Most weights are frozen, and candle would make their gradients too.
        let dw = of_weights.then(|| dy.t()?.matmul(&of_x)?.to_dtype(dtype));
        Ok([dx.transpose()?, dw.transpose()?, None])
    })
}

/// As [`crate::grouped_linear`]; shapes are known to fit.
pub(crate) fn grouped_linear(x: &Tensor, w: &Tensor, segments: &Arc<[Segment]>) -> Result<Tensor> {
    let (groups, n, k) = w.dims3()?;
    let starts = (0..=groups).map(|group| group * n).collect();
    let of_x = x.detach().contiguous()?;
    let of_w = w.detach().reshape((groups * n, k))?;
    let products = by_group(&of_x, &[&of_w], segments, &starts, Between::Seen)?;
    let value = products.there(&of_x, &of_w)?.reshape((x.dim(0)?, n))?;
    let (of_rows, of_groups, dtype) = (x.track_op(), w.track_op(), w.dtype());
    let inputs = [x, w, &x.detach()];
    given("grouped_linear", inputs, value, move |dy| {
        let dx = of_rows.then(|| products.back(dy, &of_w));
        let dw = of_groups.then(|| products.outer(dy, &of_x, dtype)?.reshape((groups, n, k)));
        Ok([dx.transpose()?, dw.transpose()?, None])
    })
}

/// As [`crate::low_rank`]; shapes are known to fit.
pub(crate) fn low_rank(
    x: &Tensor,
    [a, b]: [&Tensor; 2],
    segments: &Arc<[Segment]>,
    starts: &Arc<[usize]>,
) -> Result<Tensor> {
    let (of_x, of_a, of_b) = (x.detach().contiguous()?, a.detach(), b.detach());
    let products = by_group(&of_x, &[&of_a, &of_b], segments, starts, Between::Unseen)?;
    let value = products.back(&products.there(&of_x, &of_a)?, &of_b)?;
    let trains = [x, a, b].map(Tensor::track_op);
    let types = [a.dtype(), b.dtype()];
    given("low_rank", [x, a, b], value, move |dy| {
        // What lies between is computed again, and as narrow as adapters are.
        let dz = products.there(dy, &of_b)?;
        let dx = trains[0].then(|| products.back(&dz, &of_a));
        let da = trains[1].then(|| products.outer(&dz, &of_x, types[0]));
        let db = trains[2].then(|| {
            let z = products.there(&of_x, &of_a)?;
            products.outer(&z, dy, types[1])
        });
        Ok([dx.transpose()?, da.transpose()?, db.transpose()?])
    })
}

/// As [`crate::select_rows`]: `x[index[s]]`.
pub(crate) fn select_rows(x: &Tensor, index: &Arc<[u32]>) -> Result<Tensor> {
    let (of_x, index) = (x.detach().contiguous()?, index.clone());
    let value = of_x.index_select(&Tensor::new(&index[..], x.device())?, 0)?;
    let outputs = x.dim(0)?;
    let inputs = [x, &of_x, &of_x];
    given("select_rows", inputs, value, move |dy| {
        Ok([Some(summed(dy, &index, outputs)?), None, None])
    })
}

/// `y[targets[s]] = Σ rows[s]`: `[outputs, ..]`. Each output takes its rows one after the other, so nothing
/// depends on who is first.
fn summed(rows: &Tensor, targets: &[u32], outputs: usize) -> Result<Tensor> {
    #[cfg(feature = "linked")]
    if let (2, Some(gpu)) = (rows.rank(), super::kernels_for(rows)?) {
        return cuda::sum_rows(&gpu, rows, None, targets, outputs);
    }
    let mut taken: Vec<Vec<u32>> = Vec::new();
    let mut counts = vec![0usize; outputs];
    let none = targets.len() as u32;
    for (row, &target) in targets.iter().enumerate() {
        let count = &mut counts[target as usize];
        if taken.len() == *count {
            taken.push(vec![none; outputs]);
        }
        taken[*count][target as usize] = row as u32;
        *count += 1;
    }
    // A row of zeros, for outputs that have no more.
    let padded = wide(rows)?.pad_with_zeros(0, 0, 1)?;
    let mut sum: Option<Tensor> = None;
    for index in taken {
        let index = Tensor::new(index, rows.device())?;
        add(&mut sum, padded.index_select(&index, 0)?)?;
    }
    match sum {
        Some(sum) => sum.to_dtype(rows.dtype()),
        None => {
            let dims = [&[outputs], &rows.dims()[1..]].concat();
            Tensor::zeros(dims, rows.dtype(), rows.device())
        }
    }
}

/// As [`crate::weighted_scatter`]; shapes are known to fit. The weights may be wider than the rows.
pub(crate) fn weighted_scatter(
    rows: &Tensor,
    weights: &Tensor,
    targets: &Arc<[u32]>,
    outputs: usize,
) -> Result<Tensor> {
    let (of_rows, targets) = (rows.detach(), targets.clone());
    #[cfg(feature = "linked")]
    if let (2, Some(gpu)) = (rows.rank(), super::kernels_for(rows)?) {
        let weight = weights.detach().to_dtype(DType::F32)?;
        let value = cuda::sum_rows(&gpu, &of_rows, Some(&weight), &targets, outputs)?;
        let (wanted, dtype) = ([rows.track_op(), weights.track_op()], weights.dtype());
        let inputs = [rows, weights, &of_rows.clone()];
        return given("weighted_scatter", inputs, value, move |dy| {
            let [d_rows, d_weights] =
                cuda::spread_rows(&gpu, dy, &of_rows, &weight, &targets, wanted)?;
            let d_weights = d_weights.map(|d| d.to_dtype(dtype)).transpose()?;
            Ok([d_rows, d_weights, None])
        });
    }
    let weight = of_type(&weights.detach(), &wide(rows)?)?.unsqueeze(1)?;
    let weighted = wide(&of_rows)?.broadcast_mul(&weight)?;
    let value = summed(&weighted, &targets, outputs)?.to_dtype(rows.dtype())?;
    let (trains, dtype) = ([rows.track_op(), weights.track_op()], weights.dtype());
    let inputs = [rows, weights, &of_rows.clone()];
    given("weighted_scatter", inputs, value, move |dy| {
        let index = Tensor::new(&targets[..], dy.device())?;
        let dy = wide(&dy.index_select(&index, 0)?)?;
        let d_rows = trains[0].then(|| dy.broadcast_mul(&weight)?.to_dtype(of_rows.dtype()));
        let d_weights = trains[1].then(|| {
            let products = (wide(&of_rows)? * &dy)?.sum(D::Minus1)?;
            products.to_dtype(dtype)
        });
        Ok([d_rows.transpose()?, d_weights.transpose()?, None])
    })
}

/// As [`crate::spread_columns`]; shapes are known to fit.
pub(crate) fn spread_columns(
    x: &Tensor,
    places: &Arc<[u32]>,
    segments: &[Segment],
    width: usize,
) -> Result<Tensor> {
    let (of_x, n) = (x.detach().contiguous()?, x.dim(1)?);
    let parts = filled(segments).map(|s| {
        // A column of zeros, for places that have none.
        let mut columns = vec![n as u32; width];
        let of_group = &places[s.group * n..(s.group + 1) * n];
        for (column, &place) in of_group.iter().enumerate() {
            columns[place as usize] = column as u32;
        }
        let columns = Tensor::new(columns, of_x.device())?;
        rows(&of_x, s)?
            .pad_with_zeros(1, 0, 1)?
            .index_select(&columns, 1)
    });
    let value = joined(&parts.collect::<Result<Vec<_>>>()?, width, &of_x)?;
    let (places, segments) = (places.clone(), segments.to_vec());
    let inputs = [x, &of_x.clone(), &of_x.clone()];
    given("spread_columns", inputs, value, move |dy| {
        let parts = filled(&segments).map(|s| {
            let places = &places[s.group * n..(s.group + 1) * n];
            let places = Tensor::new(places, dy.device())?;
            rows(dy, s)?.contiguous()?.index_select(&places, 1)
        });
        let dx = joined(&parts.collect::<Result<Vec<_>>>()?, n, &of_x)?;
        Ok([Some(dx), None, None])
    })
}
