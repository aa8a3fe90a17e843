//! The loss: next-token cross entropy on target tokens, plus load balancing where it is asked for.

use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_kernels::cross_entropy;
use lightmoe_models::{Decoder, LanguageModel, Routing, Tokens};

/// A batch of right-padded sequences.
#[derive(Debug, Clone)]
pub struct TrainBatch {
    /// `[rows, len]` ids, row-major.
    pub tokens: Vec<u32>,
    /// Number of sequences.
    pub rows: usize,
    /// `[rows, len]`: whether this token is a target.
    pub loss_mask: Vec<bool>,
}

/// The load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4): `E · Σ_e f_e · p_e`,
/// the mean over layers, with `f_e` the share of selections and `p_e` the mean router probability.
/// One when the load is even; `transformers` counts selections per token instead of shares, which is
/// `K` times as much, and pools the layers. `[]`
pub fn load_balance(routing: &[Routing]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for r in routing {
        let experts = r.probabilities.dim(1)?;
        let mut counts = vec![0f32; experts];
        for &e in &r.chosen {
            counts[e as usize] += experts as f32 / r.chosen.len() as f32;
        }
        let shares = Tensor::new(counts, r.probabilities.device())?;
        let loss = (r.probabilities.mean(0)? * shares)?.sum_all()?;
        sum = Some(match sum {
            Some(sum) => (sum + loss)?,
            None => loss,
        });
    }
    let sum = sum.ok_or_else(|| Error::Invalid("a model without MoE layers has no load".into()))?;
    Ok((sum / routing.len() as f64)?)
}

/// Mean cross entropy in nats over the batch's targets, and the load-balancing loss if `balance`.
pub fn objective(
    model: &Decoder,
    batch: &TrainBatch,
    balance: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let len = batch.tokens.len() / batch.rows.max(1);
    let at: Vec<u32> = (0..batch.tokens.len())
        .filter(|i| i % len + 1 < len && batch.loss_mask[i + 1])
        .map(|i| i as u32)
        .collect();
    if at.is_empty() {
        return Err(Error::Invalid(
            "a batch has no target tokens; check the training data".into(),
        ));
    }
    let targets: Vec<u32> = at.iter().map(|&i| batch.tokens[i as usize + 1]).collect();
    let mut routing = Vec::new();
    let tokens = Tokens {
        ids: &batch.tokens,
        rows: batch.rows,
    };
    let hidden = model.forward(tokens, None, &mut |_, _, r| {
        if balance {
            routing.extend(r.cloned());
        }
        Ok(())
    })?;
    let hidden = hidden.index_select(&Tensor::new(at, hidden.device())?, 0)?;
    let loss = cross_entropy(&model.logits(&hidden)?, &targets)?.mean_all()?;
    let balance = if balance {
        Some(load_balance(&routing)?)
    } else {
        None
    };
    Ok((loss, balance))
}
