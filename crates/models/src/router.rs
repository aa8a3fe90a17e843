//! The router of a layer: which experts a token uses, and with which weights.

use crate::Result;
use crate::config::{ExpertGroups, GroupScore, ModelConfig, MoeConfig, Scoring};
use crate::decoder::at_least_f32;
use crate::layer::{ParameterKind, Source, Visitor};
use crate::mlp::sigmoid;
use crate::names::CORRECTION;
use candle_core::{D, Tensor};
use lightmoe_kernels::{linear, top_k};

const WEIGHT: &str = "mlp.gate";
/// Added to a logit to take it out of a softmax.
const OUT: f32 = -1e30;
/// What NaN is chosen as where groups limit the choice: after every score, and before what is taken out.
const UNKNOWN: f32 = OUT / 2.0;

/// What the router decided for the tokens of a batch.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Raw router outputs `[T, E]`.
    pub logits: Tensor,
    /// What the family makes of them, before any choice: softmax or logistic, `[T, E]`.
    pub probabilities: Tensor,
    /// Chosen experts `[T · K]`, best first.
    pub chosen: Vec<u32>,
    /// Their gates, the factors of their outputs: `[T · K]`.
    pub gates: Tensor,
}

/// The weights of a router.
#[derive(Debug, Clone)]
pub(crate) struct Router {
    /// `[E, H]`
    weight: Tensor,
    /// `[E]`, added to the scores that choose. Kept as it is: training moves it by a rule of its own,
    /// not by a gradient (DeepSeek-V3, section 2.1.2).
    correction: Option<Tensor>,
}

impl Router {
    /// Takes the weights from `get`.
    pub(crate) fn build(config: &ModelConfig, get: &Source<'_>) -> Result<Self> {
        let experts = config.moe.num_experts;
        let biased = config.moe.scoring == Scoring::Sigmoid;
        Ok(Self {
            weight: get(WEIGHT, &[experts, config.hidden_size])?,
            correction: biased.then(|| get(CORRECTION, &[experts])).transpose()?,
        })
    }

    /// `x: [T, H]`; the experts `removed` are not there, as if the router had no rows for them.
    pub(crate) fn route(&self, x: &Tensor, moe: &MoeConfig, removed: &[usize]) -> Result<Routing> {
        route_logits(self.logits(x)?, self.correction.as_ref(), moe, removed)
    }

    /// Its outputs for `x: [T, H]`: `[T, E]`.
    pub(crate) fn logits(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear(&at_least_f32(x.clone())?, &self.weight)?)
    }

    /// `[E, H]`
    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// What is added to the scores that choose.
    pub(crate) fn correction(&self) -> Option<&Tensor> {
        self.correction.as_ref()
    }

    /// Every parameter.
    pub(crate) fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        f(WEIGHT, ParameterKind::Router, &mut self.weight)?;
        match &mut self.correction {
            Some(correction) => f(CORRECTION, ParameterKind::RouterCorrection, correction),
            None => Ok(()),
        }
    }
}

/// What a router decides that gave these `logits: [T, E]`: which experts, and with which gates.
/// `correction: [E]` is added to the scores that choose, in families that have one; the experts
/// `removed` are not there, as if the router had no rows for them.
///
/// # Errors
/// If the shapes do not fit.
pub fn route_logits(
    logits: Tensor,
    correction: Option<&Tensor>,
    moe: &MoeConfig,
    removed: &[usize],
) -> Result<Routing> {
    let mask = mask(&logits, removed)?;
    let logits = masked(logits, mask.as_ref())?;
    let probabilities = probabilities(&logits, moe)?;
    if let Scoring::SparseMixer { jitter } = moe.scoring {
        let (chosen, gates) = sparse_mixer(&logits, jitter)?;
        return Ok(Routing {
            logits,
            probabilities,
            chosen,
            gates,
        });
    }
    let mut choice = match correction {
        Some(correction) => {
            probabilities.broadcast_add(&correction.to_dtype(probabilities.dtype())?)?
        }
        // The softmax keeps the order of the logits, and rounds.
        None => logits.clone(),
    };
    if let Some(mask) = mask {
        choice = choice.broadcast_add(&mask)?;
    }
    if let Some(groups) = &moe.groups {
        choice = within_groups(&choice, groups)?;
    }
    let chosen = top_k(&choice, moe.top_k)?;
    let gates = gather(&probabilities, &chosen, moe.top_k)?;
    Ok(Routing {
        logits,
        probabilities,
        chosen,
        gates: weighted(gates, moe)?,
    })
}

/// The gates of a router that gave these `logits: [T, E]`, for `experts: [T, K]` that were chosen where the logits
/// are: `[T · K]`.
pub(crate) fn gates_at(
    logits: Tensor,
    experts: &Tensor,
    moe: &MoeConfig,
    removed: &[usize],
) -> Result<Tensor> {
    let mask = mask(&logits, removed)?;
    let probabilities = probabilities(&masked(logits, mask.as_ref())?, moe)?;
    weighted(probabilities.gather(experts, 1)?, moe)
}

/// What takes `removed` experts out of a softmax, if there are any: `[E]`.
fn mask(logits: &Tensor, removed: &[usize]) -> Result<Option<Tensor>> {
    if removed.is_empty() {
        return Ok(None);
    }
    let mut out = vec![0f32; logits.dim(1)?];
    removed.iter().for_each(|&expert| out[expert] = OUT);
    let out = Tensor::new(out, logits.device())?;
    Ok(Some(out.to_dtype(logits.dtype())?))
}

fn masked(logits: Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    Ok(match mask {
        Some(mask) => logits.broadcast_add(mask)?,
        None => logits,
    })
}

fn probabilities(logits: &Tensor, moe: &MoeConfig) -> Result<Tensor> {
    match moe.scoring {
        Scoring::Sigmoid => sigmoid(logits),
        _ => Ok(candle_nn::ops::softmax(logits, D::Minus1)?),
    }
}

/// The gates of chosen experts that have these probabilities `[T, K]`: `[T · K]`.
fn weighted(mut gates: Tensor, moe: &MoeConfig) -> Result<Tensor> {
    if moe.renormalize {
        // As the published model does, against a division by zero.
        gates = gates.broadcast_div(&(gates.sum_keepdim(1)? + 1e-20)?)?;
    }
    if moe.routed_scaling_factor != 1.0 {
        gates = (gates * moe.routed_scaling_factor)?;
    }
    Ok(gates.flatten_all()?)
}

/// The entries of `values: [T, E]` at `chosen: [T · k]`: `[T, k]`.
fn gather(values: &Tensor, chosen: &[u32], k: usize) -> Result<Tensor> {
    let (tokens, experts) = values.dims2()?;
    let each = chosen.iter().enumerate();
    let index: Vec<u32> = each.map(|(i, &e)| (i / k * experts) as u32 + e).collect();
    let index = Tensor::new(index, values.device())?;
    let flat = values.flatten_all()?.index_select(&index, 0)?;
    Ok(flat.reshape((tokens, k))?)
}

/// `scores: [T, E]` with those of all but the best groups at minus infinity, below NaN in the best ones.
fn within_groups(scores: &Tensor, groups: &ExpertGroups) -> Result<Tensor> {
    let (tokens, experts) = scores.dims2()?;
    let size = experts / groups.count;
    let mut values = scores.flatten_all()?.to_vec1::<f32>()?;
    // As on GPUs, NaN is no better for a group than minus infinity.
    let of_group = |group: &[f32]| {
        let group = group.iter().map(|score| score.max(f32::NEG_INFINITY));
        let mut group: Vec<f32> = group.collect();
        group.sort_unstable_by(|a, b| b.total_cmp(a));
        match groups.score {
            GroupScore::Best => group[0],
            GroupScore::TwoBest => group.iter().take(2).sum(),
        }
    };
    let ranks: Vec<f32> = values.chunks_exact(size).map(of_group).collect();
    let ranks = Tensor::from_vec(ranks, (tokens, groups.count), scores.device())?;
    let best = top_k(&ranks, groups.chosen)?;
    for (row, best) in values
        .chunks_exact_mut(experts)
        .zip(best.chunks_exact(groups.chosen))
    {
        for (group, scores) in row.chunks_exact_mut(size).enumerate() {
            match best.contains(&(group as u32)) {
                true => scores
                    .iter_mut()
                    .for_each(|score| *score = score.max(UNKNOWN)),
                false => scores.fill(f32::NEG_INFINITY),
            }
        }
    }
    Ok(Tensor::from_vec(
        values,
        (tokens, experts),
        scores.device(),
    )?)
}

/// Two experts a token of `logits: [T, E]`, the second chosen among the rest as the first was among
/// all; the gate of each is its softmax over the experts of its turn that come near it.
fn sparse_mixer(logits: &Tensor, jitter: f64) -> Result<(Vec<u32>, Tensor)> {
    let (tokens, experts) = logits.dims2()?;
    let chosen = top_k(logits, 2)?;
    let values = logits.flatten_all()?.to_vec1::<f32>()?;
    let near = (2.0 * jitter) as f32;
    let turn = |turn: usize| -> Result<Tensor> {
        let mut mask = vec![0f32; values.len()];
        let rows = mask
            .chunks_exact_mut(experts)
            .zip(values.chunks_exact(experts))
            .zip(chosen.chunks_exact(2));
        for ((mask, row), chosen) in rows {
            let best = row[chosen[turn] as usize];
            for (mask, &logit) in mask.iter_mut().zip(row) {
                let far = (best - logit) / logit.abs().max(best) > near;
                *mask = if far { OUT } else { 0.0 };
            }
            for &gone in &chosen[..turn] {
                mask[gone as usize] = OUT;
            }
        }
        let mask = Tensor::from_vec(mask, (tokens, experts), logits.device())?;
        let shares = candle_nn::ops::softmax(&(logits + mask)?, D::Minus1)?;
        let of_turn: Vec<u32> = chosen.iter().skip(turn).step_by(2).copied().collect();
        gather(&shares, &of_turn, 1)
    };
    let gates = Tensor::cat(&[turn(0)?, turn(1)?], 1)?.flatten_all()?;
    Ok((chosen, gates))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

    use super::*;
    use candle_core::Device;

    /// The rows that kernels for GPUs are held to in `lightmoe-kernels`.
    #[test]
    fn scores_that_are_none_come_last_in_their_groups() {
        use GroupScore::{Best, TwoBest};
        let nan = f32::NAN;
        let known = [1.0, 1.0, nan, 5.0, 3.0, 2.0, nan, nan];
        for (score, row, expected) in [
            (Best, known, [3, 4, 5, 2]),
            (TwoBest, known, [4, 5, 0, 1]),
            (TwoBest, [nan; 8], [0, 1, 2, 3]),
        ] {
            let groups = ExpertGroups {
                count: 4,
                chosen: 2,
                score,
            };
            let scores = Tensor::new(&[row], &Device::Cpu).unwrap();
            let scores = within_groups(&scores, &groups).unwrap();
            assert_eq!(top_k(&scores, 4).unwrap(), expected, "{score:?} of {row:?}");
        }
    }
}
