//! The same operations made of candle's own, for tensors that are not in the memory of the host. They run
//! wherever candle does and have gradients there. Products of sorted rows, attention, sums, activations, norms and
//! losses are left to the kernels of `cuda` where a GPU has the tensors and the kernels can do it.
//!
//! Rows may be 16-bit floats there. Norms, rotations, softmax and losses are computed in f32 then, parameters
//! take the type of the rows that they meet, and their gradients the type that they have.
//!
//! With the feature `composed` they run on the CPU too, which checks them against the fused operations and
//! against the models of other programs.

#[cfg(any(test, feature = "linked"))]
mod at_once;
mod attention;
mod experts;
mod given;
#[cfg(any(test, feature = "linked"))]
mod many;
mod products;

pub(crate) use attention::{attention, rotate};
pub(crate) use experts::{
    grouped_linear, linear, low_rank, select_rows, spread_columns, weighted_scatter,
};
#[cfg(all(test, feature = "linked"))]
pub(crate) use {at_once::AtOnce, products::Between};

use crate::adamw::AdamW;
#[cfg(feature = "linked")]
use crate::cuda;
#[cfg(feature = "linked")]
use crate::padded::PIECE;
use candle_core::{D, DType, Result, Tensor};
use given::given;
#[cfg(feature = "linked")]
pub(crate) use many::given_many;
#[cfg(feature = "linked")]
use std::sync::Arc;

/// Whether tensors where `x` is are worked on here.
pub(crate) fn is_for(x: &Tensor) -> bool {
    cfg!(feature = "composed") || !x.device().is_cpu()
}

/// Whether candle's fused operations can take it. They have no gradients, which are written out beside them, so
/// that what trains has the same bits as what does not; and no f64.
fn fuses(x: &Tensor) -> bool {
    x.dtype() != DType::F64 && x.elem_count() > 0
}

/// The GPU of rows like those of `x`, if kernels of our own can work on them: 16-bit floats, a multiple of 8 a row.
#[cfg(feature = "linked")]
pub(crate) fn kernels_for(x: &Tensor) -> Result<Option<Arc<cuda::Gpu>>> {
    let width = x.dims().last().copied().unwrap_or(0);
    match x.elem_count() > 0 && width.is_multiple_of(PIECE) {
        true => cuda::gpu_of(x),
        false => Ok(None),
    }
}

/// At least f32.
fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::BF16 | DType::F16 => x.to_dtype(DType::F32),
        _ => Ok(x.clone()),
    }
}

/// A parameter in the type of the rows that it meets.
fn of_type(w: &Tensor, rows: &Tensor) -> Result<Tensor> {
    w.to_dtype(rows.dtype())
}

/// Adds to a sum that may not have begun.
fn add(sum: &mut Option<Tensor>, more: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => sum.broadcast_add(&more)?,
        None => more,
    });
    Ok(())
}

/// As [`crate::rms_norm`].
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !fuses(x) || !fuses(weight) {
        let wide = wide(x)?;
        let square = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?;
        let normed = wide.broadcast_div(&square.sqrt()?)?;
        return normed
            .to_dtype(x.dtype())?
            .broadcast_mul(&of_type(weight, x)?);
    }
    let of_x = x.detach().contiguous()?;
    let of_weight = of_type(&weight.detach(), x)?.contiguous()?;
    let value = candle_nn::ops::rms_norm(&of_x, &of_weight, eps as f32)?;
    let (trains, dtype) = (weight.track_op(), weight.dtype());
    #[cfg(feature = "linked")]
    let gpu = kernels_for(x)?;
    given("rms_norm", [x, weight, &of_x.clone()], value, move |dy| {
        #[cfg(feature = "linked")]
        if let (false, Some(gpu)) = (trains, &gpu) {
            let dx = cuda::norm_gradient(gpu, &of_x, &of_weight, dy, eps)?;
            return Ok([Some(dx), None, None]);
        }
        let (x, dy) = (wide(&of_x)?, wide(dy)?);
        let square = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?;
        let normed = x.broadcast_div(&square.sqrt()?)?;
        let weighted = dy.broadcast_mul(&wide(&of_weight)?)?;
        let part = (&weighted * &normed)?.mean_keepdim(D::Minus1)?;
        let dx = (weighted - normed.broadcast_mul(&part)?)?.broadcast_div(&square.sqrt()?)?;
        let dw = trains.then(|| {
            let rows = (dy * normed)?.reshape(((), of_weight.elem_count()))?;
            rows.sum(0)?.to_dtype(dtype)
        });
        Ok([Some(dx.to_dtype(of_x.dtype())?), dw.transpose()?, None])
    })
}

/// The softmax over the last dimension.
fn softmax(x: &Tensor) -> Result<Tensor> {
    if !fuses(x) {
        return x.broadcast_sub(&log_sum_exp(x)?)?.exp();
    }
    let value = candle_nn::ops::softmax_last_dim(&x.detach().contiguous()?)?;
    let shares = value.clone();
    given("softmax", [x, &x.detach(), &x.detach()], value, move |dy| {
        let part = (dy * &shares)?.sum_keepdim(D::Minus1)?;
        let dx = (&shares * dy.broadcast_sub(&part)?)?;
        Ok([Some(dx), None, None])
    })
}

/// As [`crate::swiglu`].
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "linked")]
    if let Some(gpu) = kernels_for(gate)?
        && up.dtype() == gate.dtype()
        && up.dims() == gate.dims()
    {
        let (of_gate, of_up) = (gate.detach(), up.detach());
        let value = cuda::swiglu(&gpu, &of_gate, &of_up)?;
        let inputs = [gate, up, &of_gate.clone()];
        return given("swiglu", inputs, value, move |dh| {
            let [d_gate, d_up] = cuda::swiglu_gradients(&gpu, &of_gate, &of_up, dh)?;
            Ok([d_gate, d_up, None])
        });
    }
    (wide(gate)?.silu()? * wide(up)?)?.to_dtype(gate.dtype())
}

/// `ln Σ exp` over the last dimension, which stays with one entry.
fn log_sum_exp(x: &Tensor) -> Result<Tensor> {
    // The same whatever it is, as long as nothing overflows.
    let most = x.detach().max_keepdim(D::Minus1)?;
    x.broadcast_sub(&most)?
        .exp()?
        .sum_keepdim(D::Minus1)?
        .log()?
        .broadcast_add(&most)
}

/// As [`crate::cross_entropy`]; targets are known to fit.
pub(crate) fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let logits = wide(&logits.contiguous()?)?;
    #[cfg(feature = "linked")]
    if let (false, Some(gpu)) = (targets.is_empty(), cuda::gpu_of_f32(&logits)?) {
        let (of_logits, of_targets) = (logits.detach(), targets.to_vec());
        let [losses, sums] = cuda::cross_entropy(&gpu, &of_logits, targets)?;
        let inputs = [&logits, &of_logits.clone(), &of_logits.clone()];
        return given("cross_entropy", inputs, losses, move |dy| {
            let d = cuda::cross_entropy_gradient(&gpu, &of_logits, &of_targets, &sums, dy)?;
            Ok([Some(d), None, None])
        });
    }
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    (log_sum_exp(&logits)? - logits.gather(&targets, 1)?)?.squeeze(1)
}

/// As [`AdamW::update`]: what the parameter and its moments become.
pub(crate) fn adamw(
    s: &AdamW,
    parameter: &Tensor,
    grad: &Tensor,
    [first, second]: [&Tensor; 2],
) -> Result<[Tensor; 3]> {
    let correction = |beta: f64| 1.0 - beta.powi(s.step as i32);
    let grad = (grad.detach() * s.grad_scale)?;
    let first = ((first * s.beta1)? + (&grad * (1.0 - s.beta1))?)?;
    let second = ((second * s.beta2)? + (grad.sqr()? * (1.0 - s.beta2))?)?;
    let root = ((&second / correction(s.beta2))?.sqrt()? + s.eps)?;
    let step = (&first.div(&root)? * (s.lr / correction(s.beta1)))?;
    let kept = (parameter.detach() * (1.0 - s.lr * s.weight_decay))?;
    Ok([(kept - step)?, first, second])
}
