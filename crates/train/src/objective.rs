//! The loss: next-token cross entropy on target tokens, plus load balancing and the distance to a
//! teacher where they are asked for.

use crate::teacher::Teacher;
use crate::{Error, Result};
use candle_core::{D, Tensor};
use candle_nn::ops::log_softmax;
use lightmoe_kernels::cross_entropy;
use lightmoe_models::{Decoder, LanguageModel, Routing, Tokens};
use std::ops::Range;

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

impl TrainBatch {
    /// Tokens of a row, padding included.
    pub(crate) fn length(&self) -> usize {
        self.tokens.len() / self.rows.max(1)
    }

    /// As a model reads them.
    pub(crate) fn tokens(&self) -> Tokens<'_> {
        Tokens {
            ids: &self.tokens,
            rows: self.rows,
        }
    }

    /// The same in parts of at most `rows` sequences, each with the places of its targets among all; those
    /// without a target are left out. Zero rows make one part.
    ///
    /// # Errors
    /// If there is no target.
    pub(crate) fn parts(&self, rows: usize) -> Result<Vec<Part>> {
        let (len, mut targets) = (self.length(), 0);
        let rows = if rows == 0 { self.rows.max(1) } else { rows };
        let parts = (0..self.rows).step_by(rows).map(|first| {
            let rows = rows.min(self.rows - first);
            let tokens = first * len..(first + rows) * len;
            let batch = Self {
                tokens: self.tokens[tokens.clone()].to_vec(),
                rows,
                loss_mask: self.loss_mask[tokens].to_vec(),
            };
            let begin = targets;
            targets += batch.predicting().len();
            Part {
                batch,
                targets: begin..targets,
            }
        });
        let parts: Vec<Part> = parts.filter(|part| !part.targets.is_empty()).collect();
        match parts.is_empty() {
            true => Err(Error::Invalid(
                "a batch has no target tokens; check the training data".into(),
            )),
            false => Ok(parts),
        }
    }

    /// Where of `[rows · len]` the targets are predicted, `[A]`: at the token before each.
    pub(crate) fn predicting(&self) -> Vec<u32> {
        let len = self.length();
        let places = (0..self.tokens.len()).filter(|i| i % len + 1 < len && self.loss_mask[i + 1]);
        places.map(|i| i as u32).collect()
    }
}

/// Some sequences of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) batch: TrainBatch,
    /// Its targets among those of the whole batch.
    pub(crate) targets: Range<usize>,
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

/// The objective's parts on the batch of `step`.
///
/// # Errors
/// If the batch has no targets, or the model fails.
pub fn objective(
    model: &Decoder,
    (step, batch): (usize, &TrainBatch),
    balance: bool,
    teacher: Option<&Teacher<'_>>,
) -> Result<Losses> {
    let whole = &batch.parts(0)?[0];
    objective_of(model, (step, whole), balance, teacher)
}

/// The same on a part of it.
pub(crate) fn objective_of(
    model: &Decoder,
    (step, part): (usize, &Part),
    balance: bool,
    teacher: Option<&Teacher<'_>>,
) -> Result<Losses> {
    let mut routing = Vec::new();
    let tokens = part.batch.tokens();
    let hidden = match balance {
        true => model.forward(tokens, None, &mut |_, _, r| {
            routing.extend(r.cloned());
            Ok(())
        })?,
        false => model.hidden_states(tokens, None)?,
    };
    let at = Tensor::new(part.batch.predicting(), hidden.device())?;
    let logits = model.logits(&hidden.index_select(&at, 0)?)?;
    let (task, distance) = losses(&logits, (step, part), teacher)?;
    Ok(Losses {
        task,
        balance: balance.then(|| load_balance(&routing)).transpose()?,
        distance,
    })
}

/// Cross entropy, and distance to the teacher, of the logits of the targets, `[A, V]`.
pub(crate) fn losses(
    logits: &Tensor,
    (step, part): (usize, &Part),
    teacher: Option<&Teacher<'_>>,
) -> Result<(Tensor, Option<Tensor>)> {
    let at = part.batch.predicting().into_iter();
    let targets: Vec<u32> = at.map(|i| part.batch.tokens[i as usize + 1]).collect();
    let distance = teacher.map(|teacher| teacher.distance(logits, step, part));
    Ok((
        cross_entropy(logits, &targets)?.mean_all()?,
        distance.transpose()?,
    ))
}
