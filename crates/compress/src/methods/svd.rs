//! Activation-whitened SVD: every expert becomes low-rank factors that lose least on the inputs it was
//! given, without a base (SVD-LLM, arXiv 2403.07378, expert by expert).

use lightmoe_models::config::ModelConfig;

use super::{AdapterInit, MethodName, PlanOptions, finish, order, to_save};
use crate::observations::Observations;
use crate::plan::{LayerPlan, Plan, PlanSettings, SlotForm};
use crate::ranks::{Costs, Level, RankRule, least_loss, proportional, smoothed, uniform};
use crate::{Error, Result};

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    options: &PlanOptions,
) -> Result<Plan> {
    let importance: Vec<Vec<f64>> = observations.layers.iter().map(|l| l.importance()).collect();
    let experts = config.moe.num_experts;
    let slots = experts * importance.len();
    let costs = Costs::of_expert(config);
    let saved = to_save(config, ratio).round() as u64;
    let budget = (slots as u64 * costs.dense).saturating_sub(saved);
    let levels = match by_rule(options.ranks, &importance, costs, budget)? {
        Some(levels) => levels,
        None => least_loss(&losses(observations, experts)?, costs, budget)?,
    };
    let planned = observations.layers.iter().zip(&importance);
    let layers = planned
        .zip(levels.chunks(experts))
        .map(|((observed, scores), levels)| {
            let mut layer = LayerPlan::dense(observed, scores);
            for (slot, &level) in layer.slots.iter_mut().zip(levels) {
                slot.form = form(level);
            }
            layer
        });
    let settings = PlanSettings {
        rank: levels.iter().flatten().copied().max().unwrap_or(0),
        groups: 0,
        adapters: AdapterInit::Whitened,
        trained_rank: options.trained_rank(),
        ..options.settings()
    };
    let mut plan = finish(config, MethodName::Svd, settings, layers.collect());
    plan.ratio.target = Some(ratio);
    Ok(plan)
}

/// How experts share a budget by their `importance`, which is known layer by layer; `None` where the rule
/// asks for losses.
pub(super) fn by_rule(
    rule: RankRule,
    importance: &[Vec<f64>],
    costs: Costs,
    budget: u64,
) -> Result<Option<Vec<Level>>> {
    match rule {
        RankRule::Uniform => uniform(&order(&importance.concat()), costs, budget).map(Some),
        RankRule::Importance => {
            let weights: Vec<f64> = importance.iter().flat_map(|i| smoothed(i)).collect();
            proportional(&weights, costs, budget).map(Some)
        }
        RankRule::Budget => Ok(None),
    }
}

/// What an expert becomes.
pub(super) fn form(level: Level) -> SlotForm {
    level.map_or(SlotForm::Dense, |rank| SlotForm::adapted(None, rank, false))
}

/// What each rank of each expert loses: the share of the energy of its three matrices that is cut off,
/// times what the expert adds to the outputs of its layer, squared and summed over tokens.
fn losses(observations: &Observations, experts: usize) -> Result<Vec<Vec<f64>>> {
    let mut losses = Vec::new();
    for layer in &observations.layers {
        let seen = layer.spectra.as_ref().zip(layer.outputs.as_ref());
        let (spectra, outputs) = seen.ok_or_else(|| {
            Error::Invalid(format!(
                "ranks by budget need the spectra of the experts, and layer {} was observed \
                 without; observe with `--moments`",
                layer.layer
            ))
        })?;
        for expert in 0..experts {
            let count = layer.selections[expert].max(1) as f64;
            let weight = outputs.gated[expert].powi(2) / count;
            let of_expert = spectra.losses(expert, experts).into_iter();
            losses.push(of_expert.map(|loss| weight * loss).collect());
        }
    }
    Ok(losses)
}
