//! Attention and rotations.

use super::given::given;
use super::{add, fuses, softmax, wide};
use crate::attention::Seen;
#[cfg(feature = "linked")]
use crate::cuda::Attention;
use crate::rope::RopePairs;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::rotary_emb::rope_thd;

/// The most scores at once.
const SCORES: usize = 1 << 28;
/// Added to the score of a key that is not seen.
const UNSEEN: f64 = -1e30;

/// Turns the pairs of `x: [B, T, heads, D]` by angles whose cosines and sines are `[B or 1, T, D/2]`.
pub(crate) fn rotate(x: &Tensor, [cos, sin]: &[Tensor; 2], pairs: RopePairs) -> Result<Tensor> {
    if x.track_op() {
        let (of_x, back) = (x.detach(), [cos.clone(), sin.neg()?]);
        let value = rotate(&of_x, &[cos.clone(), sin.clone()], pairs)?;
        // What is turned is turned back.
        return given("rope", [x, &of_x, &of_x], value, move |dy| {
            Ok([Some(rotate(dy, &back, pairs)?), None, None])
        });
    }
    let (_, len, _, dim) = x.dims4()?;
    let wide = wide(x)?;
    let half = dim / 2;
    if pairs == RopePairs::Halves && fuses(&wide) {
        let of_rows = |table: &Tensor| match table.dim(0)? {
            1 => table.squeeze(0),
            _ => Ok(table.clone()),
        };
        let (cos, sin) = (of_rows(cos)?, of_rows(sin)?);
        return rope_thd(&wide.contiguous()?, &cos, &sin)?.to_dtype(x.dtype());
    }
    let table = |table: &Tensor| table.unsqueeze(2)?.to_dtype(wide.dtype());
    let (cos, sin) = (table(cos)?, table(sin)?);
    let turned = |a: &Tensor, b: &Tensor| -> Result<[Tensor; 2]> {
        Ok([
            (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?,
            (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?,
        ])
    };
    let y = match pairs {
        RopePairs::Halves => {
            let [a, b] = [wide.narrow(3, 0, half)?, wide.narrow(3, half, half)?];
            Tensor::cat(&turned(&a, &b)?, 3)?
        }
        RopePairs::Adjacent => {
            let split = wide.reshape((x.dim(0)?, len, x.dim(2)?, half, 2))?;
            let part = |i: usize| split.narrow(4, i, 1)?.squeeze(4);
            Tensor::stack(&turned(&part(0)?, &part(1)?)?, 4)?.flatten_from(3)?
        }
    };
    y.to_dtype(x.dtype())
}

/// As [`crate::attention`]; `seen` is known to fit.
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    seen: &Seen,
) -> Result<Tensor> {
    #[cfg(feature = "linked")]
    if let Some(y) = without_scores([q, k, v], scale, seen)? {
        return Ok(y);
    }
    let (batch, queries, heads, dim) = q.dims4()?;
    let (_, keys, kv_heads, width) = v.dims4()?;
    let each = heads / kv_heads.max(1);
    let by_head = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    // Scaled first: 16 bits may not hold the products.
    let q = (wide(q)? * scale)?.to_dtype(q.dtype())?;
    let (q, k, v) = (by_head(&q)?, by_head(k)?, by_head(v)?);
    let k = k.t()?;
    let strip = (SCORES / (batch * heads * keys).max(1)).clamp(1, queries.max(1));
    let mut strips = Vec::new();
    for first in (0..queries).step_by(strip) {
        let count = strip.min(queries - first);
        // The query heads of one key head are rows of one product.
        let q = q.narrow(2, first, count)?.contiguous()?;
        let q = q.reshape((batch, kv_heads, each * count, dim))?;
        let scores = wide(&q.matmul(&k)?)?;
        let scores = scores.reshape((batch, kv_heads, each, count, keys))?;
        let scores = match unseen(seen, [first, count, queries, keys], q.device())? {
            Some(mask) => scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?,
            None => scores,
        };
        let shares = softmax(&scores)?;
        let shares = match padding(seen, [first, count], q.device())? {
            Some(held) => shares.broadcast_mul(&held.to_dtype(shares.dtype())?)?,
            None => shares,
        };
        let shares = shares.to_dtype(v.dtype())?;
        let y = shares
            .reshape((batch, kv_heads, each * count, keys))?
            .matmul(&v)?;
        strips.push(y.reshape((batch, heads, count, width))?);
    }
    Tensor::cat(&strips, 2)?.transpose(1, 2)?.contiguous()
}

/// The same by kernels of our own, which hold no scores; nothing where they cannot do it.
#[cfg(feature = "linked")]
fn without_scores(inputs: [&Tensor; 3], scale: f64, seen: &Seen) -> Result<Option<Tensor>> {
    let trains = inputs.iter().any(|t| t.track_op());
    let [q, k, v] = inputs.map(Tensor::detach);
    let Some(kernels) = Attention::new(&q, [&k, &v], scale, seen)? else {
        return Ok(None);
    };
    let (y, sums) = kernels.forward(&q, [&k, &v], trains)?;
    let Some(sums) = sums else {
        return Ok(Some(y));
    };
    let of_y = y.clone();
    given("attention", inputs, y, move |dy| {
        Ok(kernels.backward([&q, &k, &v], &of_y, &sums, dy)?.map(Some))
    })
    .map(Some)
}

/// What is added to the scores of `count` of the `queries`, from the `first` on: `[B or 1, 1, 1, count, keys]`;
/// `None` if they see all keys.
fn unseen(
    seen: &Seen,
    [first, count, queries, keys]: [usize; 4],
    device: &Device,
) -> Result<Option<Tensor>> {
    if queries == 1 && seen.window.is_none_or(|window| window >= keys) && seen.starts.is_empty() {
        return Ok(None);
    }
    let begin = (keys - queries + first) as f32;
    let at = |count: usize, from: f32| Tensor::arange(from, from + count as f32, device);
    let mut mask: Option<Tensor> = None;
    let mut hide =
        |hidden: Tensor| -> Result<()> { add(&mut mask, (hidden.to_dtype(DType::F32)? * UNSEEN)?) };
    let key = at(keys, 0.0)?;
    let behind = at(count, begin)?
        .unsqueeze(1)?
        .broadcast_sub(&key.unsqueeze(0)?)?;
    if queries > 1 {
        hide(behind.lt(0.0)?.reshape((1, 1, 1, count, keys))?)?;
    }
    if let Some(window) = seen.window.filter(|&window| window < keys) {
        let far = behind.ge(window as f64)?;
        hide(far.reshape((1, 1, 1, count, keys))?)?;
    }
    if !seen.starts.is_empty() {
        let starts: Vec<f32> = seen.starts.iter().map(|&start| start as f32).collect();
        let rows = starts.len();
        let starts = Tensor::new(starts, device)?.unsqueeze(1)?;
        let before = key.unsqueeze(0)?.broadcast_lt(&starts)?;
        hide(before.reshape((rows, 1, 1, 1, keys))?)?;
    }
    Ok(mask)
}

/// One for queries that are no padding, and zero for others: `[B, 1, 1, count, 1]`; `None` if none is.
fn padding(seen: &Seen, [first, count]: [usize; 2], device: &Device) -> Result<Option<Tensor>> {
    if seen.lengths.is_empty() {
        return Ok(None);
    }
    let rows = seen.lengths.len();
    let of_row = |&length: &usize| (first..first + count).map(move |at| f32::from(at < length));
    let held: Vec<f32> = seen.lengths.iter().flat_map(of_row).collect();
    Tensor::from_vec(held, (rows, 1, 1, count, 1), device).map(Some)
}
