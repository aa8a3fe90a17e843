//! LightMoE (arXiv 2603.12645, section 3) and its two bounds: the baseline "Replace", which is
//! the same selection with at most one base, and LoRA, which keeps every expert.

use lightmoe_models::config::ModelConfig;

use super::{BaseInit, MethodName, PlanOptions, Selection, Target, finish, ratio_of};
use crate::group::Selected;
use crate::merge::shares;
use crate::observations::{LayerObservations, Observations};
use crate::plan::{LayerPlan, Plan, SlotForm};
use crate::search::{LayerChoices, search};
use crate::select::{ascending, layer_thresholds, prefix, threshold_factors};
use crate::size::LayerSize;
use crate::{Error, Result};

/// One layer, ready to be planned.
struct Layer<'a> {
    config: &'a ModelConfig,
    options: &'a PlanOptions,
    observed: &'a LayerObservations,
    scores: Vec<f64>,
    /// What each expert counts for in a base, where that is not its score.
    weights: Option<Vec<f64>>,
}

impl Layer<'_> {
    /// Replaces the experts `selected`, or leaves the layer as it is where that saves nothing.
    fn replace(&self, selected: &[usize], threshold: Option<f64>) -> LayerPlan {
        let mut plan = self.untouched(threshold);
        let (rank, bias) = (self.options.rank, self.options.bias);
        if self.options.groups == 0 {
            for &expert in selected {
                plan.slots[expert].form = SlotForm::Adapted {
                    group: None,
                    rank,
                    bias,
                    dominant: false,
                };
            }
            return plan;
        }
        let selection = Selected {
            selected,
            scores: &self.scores,
            similarity: self.observed.similarity.as_deref(),
        };
        let groups = selection.groups(self.options.groups);
        plan.groups = groups.len();
        for (number, group) in groups.iter().enumerate() {
            for &expert in &group.members {
                plan.slots[expert].form = SlotForm::Adapted {
                    group: Some(number),
                    rank,
                    bias,
                    dominant: expert == group.dominant,
                };
            }
        }
        if LayerSize::of(self.config, &plan, &self.options.settings()).saved() == 0 {
            return self.untouched(threshold);
        }
        plan
    }

    fn untouched(&self, threshold: Option<f64>) -> LayerPlan {
        let mut plan = LayerPlan::dense(self.observed, &self.scores);
        plan.threshold = threshold;
        for (slot, weight) in plan.slots.iter_mut().zip(self.weights.iter().flatten()) {
            slot.weight = Some(*weight);
        }
        plan
    }

    /// What every prefix of the layer's experts would save.
    fn choices(&self, factor: f64) -> LayerChoices {
        let order = ascending(&self.scores);
        let saved = (0..=order.len())
            .map(|count| self.replace(&order[..count], None))
            .map(|plan| LayerSize::of(self.config, &plan, &self.options.settings()).saved())
            .collect();
        LayerChoices {
            scores: self.scores.clone(),
            factor,
            saved,
        }
    }
}

/// Selects by threshold, groups and counts.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    target: Target,
    method: MethodName,
    options: &PlanOptions,
) -> Result<Plan> {
    let layers = layers(config, observations, options)?;
    let norms = observations.router_norms();
    let factors = threshold_factors(
        norms.as_deref(),
        layers.len(),
        options.alpha,
        options.max_delta,
    );
    let (p_hat, ratio) = match target {
        Target::Threshold(p_hat) => (p_hat, None),
        target => {
            let ratio = ratio_of(target, method)?;
            let choices: Vec<LayerChoices> = layers
                .iter()
                .zip(&factors)
                .map(|(layer, &factor)| layer.choices(factor))
                .collect();
            let before = config.parameters().total();
            (search(before, &choices, ratio)?, Some(ratio))
        }
    };
    let planned: Vec<LayerPlan> = layers
        .iter()
        .zip(layer_thresholds(p_hat, &factors))
        .map(|(layer, threshold)| layer.replace(&prefix(&layer.scores, threshold), Some(threshold)))
        .collect();
    let mut plan = finish(config, method, options.settings(), planned);
    plan.p_hat = Some(p_hat);
    plan.ratio.target = ratio;
    if plan.mean_replaced() == 0.0 {
        return Err(Error::Invalid(format!(
            "the threshold {p_hat} replaces no expert in any layer; raise it, or lower `groups` \
             or `rank`"
        )));
    }
    tracing::info!(
        p_hat,
        achieved = plan.ratio.achieved,
        replaced_per_layer = plan.mean_replaced(),
        "planned"
    );
    Ok(plan)
}

/// Keeps every expert, each with an adapter to train.
pub(super) fn uncompressed(
    config: &ModelConfig,
    observations: &Observations,
    options: &PlanOptions,
) -> Result<Plan> {
    if options.rank == 0 {
        return Err(Error::Invalid(
            "rank 0 leaves `lora` nothing to train; raise `rank`".to_owned(),
        ));
    }
    let layers = layers(config, observations, options)?;
    let layers = layers.iter().map(|layer| layer.untouched(None)).collect();
    let without_bases = PlanOptions {
        groups: 0,
        ..*options
    };
    Ok(finish(
        config,
        MethodName::Lora,
        without_bases.settings(),
        layers,
    ))
}

fn layers<'a>(
    config: &'a ModelConfig,
    observations: &'a Observations,
    options: &'a PlanOptions,
) -> Result<Vec<Layer<'a>>> {
    let layer = |observed: &'a LayerObservations| {
        let scores = match options.select {
            Selection::Gate => observed.importance(),
            Selection::Reap => shares(&observed.outputs()?.gated),
            Selection::Damage => {
                let damage = observed.damage(config)?;
                let experts = 0..observed.gate_mass.len();
                let lost: Vec<f64> = experts
                    .map(|expert| damage.of_ranks(expert)[options.rank])
                    .collect();
                shares(&lost)
            }
        };
        let weights = match options.base {
            BaseInit::ReapWeighted => Some(shares(&observed.outputs()?.gated)),
            BaseInit::FisherWeighted => Some(shares(&observed.damage(config)?.mass)),
            _ if options.select != Selection::Gate => Some(observed.importance()),
            _ => None,
        };
        Ok(Layer {
            config,
            options,
            observed,
            scores,
            weights,
        })
    };
    observations.layers.iter().map(layer).collect()
}
