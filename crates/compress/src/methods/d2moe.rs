//! D²-MoE (arXiv 2502.17298): one base for all experts of a layer, their mean weighted by how often
//! they are used, and for each expert whitened low-rank factors of what it differs by.
//!
//! The paper weights by Fisher information, for which usage is its second best; it prunes columns of the
//! base on top, which is left out here, as the bank has no form for it.

use lightmoe_models::config::ModelConfig;

use super::{AdapterInit, MethodName, PlanOptions, finish, order, to_save, usage};
use crate::observations::Observations;
use crate::plan::{LayerPlan, Plan, PlanSettings, SlotForm};
use crate::ranks::{Costs, uniform};
use crate::size::adapter_parameters;
use crate::{Error, Result};

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    options: &PlanOptions,
) -> Result<Plan> {
    let scores: Vec<Vec<f64>> = observations.layers.iter().map(usage).collect();
    let (experts, layers) = (config.moe.num_experts, scores.len());
    // A difference may have any rank; beside a base there are no matrices of its own.
    let costs = Costs {
        unit: adapter_parameters(config, 1),
        dense: u64::MAX,
    };
    let expert = config.expert_parameters();
    let saved = to_save(config, ratio).round() as u64;
    let budget = ((experts - 1) * layers) as u64 * expert;
    let budget = budget.checked_sub(saved).ok_or_else(|| {
        Error::Invalid(format!(
            "a ratio of {ratio} leaves nothing beside one base a layer; choose a lower ratio"
        ))
    })?;
    let levels = uniform(&order(&scores.concat()), costs, budget)?;
    let widest = config.hidden_size.min(config.moe.intermediate_size);
    let planned = observations.layers.iter().zip(&scores);
    let layers = planned
        .zip(levels.chunks(experts))
        .map(|((observed, scores), levels)| {
            let mut layer = LayerPlan::dense(observed, scores);
            layer.merge(&[order(scores)]);
            for (slot, level) in layer.slots.iter_mut().zip(levels) {
                if let SlotForm::Adapted { rank, .. } = &mut slot.form {
                    *rank = level.unwrap_or(widest).min(widest);
                }
            }
            layer
        });
    let settings = PlanSettings {
        rank: levels
            .iter()
            .flatten()
            .copied()
            .max()
            .unwrap_or(0)
            .min(widest),
        groups: 1,
        adapters: AdapterInit::Whitened,
        base_rank: Some(options.rank),
        trained_rank: options.trained_rank(),
        ..options.settings()
    };
    let mut plan = finish(config, MethodName::D2moe, settings, layers.collect());
    plan.ratio.target = Some(ratio);
    Ok(plan)
}
