//! What a plan leaves, in parameters (LightMoE eq. 5 and the totals of its Table 8).
//!
//! The exported model has the original's parameters, less the replaced experts, plus the bases
//! and the adapters of the replaced slots. Adapters of kept experts, and of bases, are merged and cost
//! nothing. Trained is an adapter on *every* expert, kept or replaced, and the bases or an adapter of
//! each.

use lightmoe_models::FactoredBases;
use lightmoe_models::config::ModelConfig;

use crate::observations::{LayerObservations, Observations};
use crate::plan::{LayerPlan, Parameters, Plan, PlanSettings, SlotForm};

/// Parameters of the adapters of one expert: rank `R` on gate, up and down, `3 R (H + F)`.
pub fn adapter_parameters(config: &ModelConfig, rank: usize) -> u64 {
    3 * rank as u64 * (config.hidden_size as u64 + config.moe.intermediate_size as u64)
}

/// Parameters of one shared base: a whole expert, or its factors, its rows and the place of each row.
pub fn base_parameters(config: &ModelConfig, factored: Option<&FactoredBases>) -> u64 {
    let Some(shape) = factored else {
        return config.expert_parameters();
    };
    let (h, f) = (config.hidden_size, config.moe.intermediate_size);
    let rows = 2 * shape.gate_up_rows * (h + 1) + shape.down_rows * (f + 1);
    adapter_parameters(config, shape.rank) + rows as u64
}

/// Parameters of the vectors of an expert that scale the inputs of three projections.
pub fn scale_parameters(config: &ModelConfig) -> u64 {
    2 * config.hidden_size as u64 + config.moe.intermediate_size as u64
}

/// Parameters of a bias, if there is one.
fn bias_parameters(config: &ModelConfig, bias: bool) -> u64 {
    match bias {
        true => config.hidden_size as u64,
        false => 0,
    }
}

/// Parameters of what a mixed slot has of its own: transforms `[F, R]` and mixing weights `[M]` of gate and
/// up, and the down matrix.
fn mixed_parameters(config: &ModelConfig, bases: usize, rank: usize) -> u64 {
    let f = config.moe.intermediate_size as u64;
    config.expert_parameters() / 3 + 2 * (f * rank as u64 + bases as u64)
}

/// Parameters of the bases that the mixed slots of a layer share, `[M, R, H]` for gate and for up.
fn basis_parameters(config: &ModelConfig, bases: usize, rank: usize) -> u64 {
    2 * bases as u64 * rank as u64 * config.hidden_size as u64
}

/// What one layer of a plan adds to and takes from the model, in parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerSize {
    /// Experts that go.
    pub removed: u64,
    /// Shared bases that come.
    pub bases: u64,
    /// Adapters of the replaced slots that come, and what mixed slots have of their own.
    pub adapters: u64,
    /// Vectors that stand for outputs, are added to them, or scale inputs.
    pub vectors: u64,
    /// What trains.
    pub trained: u64,
}

impl LayerSize {
    /// Counts `layer`, which trains as `settings` say.
    pub fn of(config: &ModelConfig, layer: &LayerPlan, settings: &PlanSettings) -> Self {
        let expert = config.expert_parameters();
        let adapter = |rank| adapter_parameters(config, rank);
        let groups = layer.groups as u64;
        // All rows of a factored base train before they are pruned.
        let factors = layer.factored.map_or(0, |shape| adapter(shape.rank));
        let mut size = Self {
            bases: groups * base_parameters(config, layer.factored.as_ref()),
            trained: groups * settings.base_rank.map_or(expert + factors, adapter),
            ..Self::default()
        };
        if layer.main.is_some() {
            size.vectors = layer.slots.len() as u64 * scale_parameters(config);
            size.trained += size.vectors;
        }
        for slot in &layer.slots {
            match slot.form {
                SlotForm::Dense => size.trained += adapter(settings.kept_rank),
                SlotForm::Adapted { rank, bias, .. } => {
                    let vector = bias_parameters(config, bias);
                    size.removed += expert;
                    size.adapters += adapter(rank);
                    size.vectors += vector;
                    size.trained +=
                        vector + adapter(settings.trained_rank.map_or(rank, |t| t.min(rank)));
                }
                SlotForm::Mixed { bases, rank } => {
                    let own = |rank| mixed_parameters(config, bases, rank);
                    let trained = settings.trained_rank.map_or(rank, |t| t.min(rank));
                    size.removed += expert;
                    size.adapters += own(rank);
                    // In place of the down matrix an adapter trains.
                    size.trained += own(trained) - expert / 3 + adapter(settings.kept_rank) / 3;
                }
                SlotForm::Constant => {
                    size.removed += expert;
                    size.vectors += config.hidden_size as u64;
                }
                SlotForm::Removed { .. } => size.removed += expert,
            }
        }
        if let Some((bases, rank)) = layer.mixture() {
            let trained = settings.trained_rank.map_or(rank, |t| t.min(rank));
            size.bases += basis_parameters(config, bases, rank);
            size.trained += basis_parameters(config, bases, trained);
        }
        size
    }

    /// Parameters saved; 0 where the layer would grow.
    pub fn saved(&self) -> u64 {
        self.removed
            .saturating_sub(self.bases + self.adapters + self.vectors)
    }
}

/// Counts a plan of `layers`, which train as `settings` say.
pub fn parameters(
    config: &ModelConfig,
    layers: &[LayerPlan],
    settings: &PlanSettings,
) -> Parameters {
    let before = config.parameters().total();
    let mut counts = Parameters {
        before,
        after: before,
        trained: 0,
    };
    for layer in layers {
        let size = LayerSize::of(config, layer, settings);
        let comes = size.bases + size.adapters + size.vectors;
        counts.after = counts.after + comes - size.removed;
        counts.trained += size.trained;
    }
    counts
}

/// Parameters that work on one token of the model that a plan of `layers` leaves, on average over the
/// tokens of `observations`: those of [`ModelConfig::active_parameters`], with what the slots of its
/// choices hold in place of whole experts.
///
/// A dense slot holds an expert; an adapted one its base and its bias, if it has them, and its adapter; a constant
/// one `H` values. The average over the slots of a layer is weighted by how often the original
/// router chose them. Removed slots have no weight: the router then chooses among the others, as many
/// as before. A base counts for each chosen slot that uses it; the bases that mixed slots share count
/// once, and all of them, because each slot mixes all.
pub fn active_parameters(
    config: &ModelConfig,
    layers: &[LayerPlan],
    observations: &Observations,
) -> u64 {
    let expert = config.expert_parameters() as f64;
    let mut active = config.active_parameters() as f64;
    for (layer, seen) in layers.iter().zip(&observations.layers) {
        let left = layer
            .slots
            .iter()
            .filter(|s| !matches!(s.form, SlotForm::Removed { .. }));
        let choices = config.moe.top_k.min(left.count());
        let run = layer.main.unwrap_or(choices);
        let basis = layer.mixture();
        active += basis.map_or(0.0, |(bases, rank)| {
            basis_parameters(config, bases, rank) as f64
        });
        active += run as f64 * mean_slot(config, layer, seen) - config.moe.top_k as f64 * expert;
        active += (choices - run) as f64 * scale_parameters(config) as f64;
    }
    active.round() as u64
}

/// Parameters of the slot that a choice of the router falls on, on average.
fn mean_slot(config: &ModelConfig, layer: &LayerPlan, seen: &LayerObservations) -> f64 {
    let expert = config.expert_parameters();
    let base = base_parameters(config, layer.factored.as_ref());
    let held = |form| match form {
        SlotForm::Dense => Some(expert),
        SlotForm::Adapted {
            group, rank, bias, ..
        } => {
            let own = adapter_parameters(config, rank) + bias_parameters(config, bias);
            Some(group.map_or(0, |_| base) + own)
        }
        SlotForm::Mixed { bases, rank } => Some(mixed_parameters(config, bases, rank)),
        SlotForm::Constant => Some(config.hidden_size as u64),
        SlotForm::Removed { .. } => None,
    };
    let slots = layer.slots.iter().zip(&seen.selections);
    let left: Vec<(f64, f64)> = slots
        .filter_map(|(slot, &n)| Some((held(slot.form)? as f64, n as f64)))
        .collect();
    let chosen: f64 = left.iter().map(|slot| slot.1).sum();
    if chosen > 0.0 {
        left.iter().map(|(held, n)| held * n).sum::<f64>() / chosen
    } else {
        // Scores made elsewhere come without selections; then every slot counts alike.
        left.iter().map(|slot| slot.0).sum::<f64>() / left.len().max(1) as f64
    }
}

impl Plan {
    /// Counts the plan again, after its layers were edited: sets `parameters` and
    /// `ratio.achieved`.
    pub fn recount(&mut self, config: &ModelConfig) {
        let counts = parameters(config, &self.layers, &self.settings);
        self.ratio.achieved = 1.0 - counts.after as f64 / counts.before as f64;
        self.parameters = counts;
    }
}

/// The adapter rank that, with `other_groups` bases per layer, trains as many parameters as rank
/// `rank` with `groups` bases; rounded down, 0 where the bases alone exceed them.
///
/// Rivals are compared at equal trainable parameters: for OLMoE-1B-7B, rank 16 with 3 bases
/// equals rank 48 without (plain LoRA). May exceed `min(H, F)`, which a plan then refuses.
pub fn equal_trainable_rank(
    config: &ModelConfig,
    rank: usize,
    groups: usize,
    other_groups: usize,
) -> usize {
    let expert = i128::from(config.expert_parameters());
    let per_rank = i128::from(adapter_parameters(config, 1)) * config.moe.num_experts as i128;
    let bases = (groups as i128 - other_groups as i128) * expert;
    let total = rank as i128 * per_rank + bases;
    usize::try_from(total.div_euclid(per_rank)).unwrap_or(0)
}
