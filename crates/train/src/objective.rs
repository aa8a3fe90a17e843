//! The loss: next-token cross entropy on target tokens, plus load balancing and the distance to a
//! teacher where they are asked for.

use crate::{Error, Result};
use candle_core::{D, Tensor};
use candle_nn::ops::log_softmax;
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

/// A model that another one learns from: the uncompressed one, as MC-SMoE recovers
/// (arXiv 2310.01334, section 3.2).
#[derive(Clone, Copy)]
pub struct Teacher<'a> {
    /// The model; nothing of it is trained.
    pub model: &'a Decoder,
    /// Weight of the distance to it beside the cross entropy.
    pub weight: f64,
    /// What the logits of both are divided by.
    pub temperature: f64,
}

/// The parts of the objective.
#[derive(Debug, Clone)]
pub struct Losses {
    /// Mean cross entropy over the batch's targets, nats. `[]`
    pub task: Tensor,
    /// Load-balancing loss, if asked for. `[]`
    pub balance: Option<Tensor>,
    /// Distance to the teacher, if there is one: see [`distance`]. `[]`
    pub distance: Option<Tensor>,
}

/// `τ² · KL(softmax(teacher / τ) ‖ softmax(student / τ))`, the mean over rows, nats; both `[rows, V]`.
/// `τ²` keeps the size of the gradient whatever the temperature `τ` (Hinton, arXiv 1503.02531).
pub fn distance(student: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    let log_probability = |logits: &Tensor| -> Result<Tensor> {
        Ok(log_softmax(&(logits / temperature)?, D::Minus1)?)
    };
    let (own, other) = (
        log_probability(student)?,
        log_probability(&teacher.detach())?,
    );
    let gap = (other.exp()? * (other - own)?)?
        .sum(D::Minus1)?
        .mean_all()?;
    Ok((gap * temperature.powi(2))?)
}

/// The objective's parts on a batch.
pub fn objective(
    model: &Decoder,
    batch: &TrainBatch,
    balance: bool,
    teacher: Option<&Teacher<'_>>,
) -> Result<Losses> {
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
    let at = Tensor::new(at, hidden.device())?;
    let logits = model.logits(&hidden.index_select(&at, 0)?)?;
    let of_teacher = |teacher: &Teacher<'_>| -> Result<Tensor> {
        let hidden = teacher.model.forward(tokens, None, &mut |_, _, _| Ok(()))?;
        let theirs = teacher.model.logits(&hidden.index_select(&at, 0)?)?;
        distance(&logits, &theirs, teacher.temperature)
    };
    Ok(Losses {
        task: cross_entropy(&logits, &targets)?.mean_all()?,
        balance: balance.then(|| load_balance(&routing)).transpose()?,
        distance: teacher.map(of_teacher).transpose()?,
    })
}
