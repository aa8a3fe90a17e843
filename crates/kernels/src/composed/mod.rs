//! The same operations made of candle's own, for tensors that are not in the memory of the host. They run
//! wherever candle does and have gradients there. Products of sorted rows are left to the kernels of
//! `cuda` where a GPU has the tensors and the kernels can do it.
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
mod products;

#[cfg(all(test, feature = "linked"))]
pub(crate) use at_once::AtOnce;
pub(crate) use attention::{attention, rotate};
pub(crate) use experts::{
    grouped_linear, linear, low_rank, select_rows, spread_columns, weighted_scatter,
};

use crate::adamw::AdamW;
use candle_core::{D, DType, Result, Tensor};

/// Whether tensors where `x` is are worked on here.
pub(crate) fn is_for(x: &Tensor) -> bool {
    cfg!(feature = "composed") || !x.device().is_cpu()
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
    let wide = wide(x)?;
    let square = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?;
    let normed = wide.broadcast_div(&square.sqrt()?)?;
    normed
        .to_dtype(x.dtype())?
        .broadcast_mul(&of_type(weight, x)?)
}

/// As [`crate::swiglu`].
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
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
