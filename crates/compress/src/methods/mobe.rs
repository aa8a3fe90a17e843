//! MoBE (arXiv 2508.05257): gate and up of every expert become a transform of its own times a mix of the
//! layer's bases; the down projection stays. Fitted to the weights alone.
//!
//! Where the ratio is low, the ranks end at the smaller side of the matrices, and the most used experts
//! stay as they are.

use lightmoe_models::config::ModelConfig;

use super::drop::counts;
use super::{MethodName, PlanOptions, finish, usage};
use crate::observations::Observations;
use crate::plan::{LayerPlan, Plan, PlanSettings, SlotForm};
use crate::select::ascending;
use crate::{Error, Result};

/// Bases of a layer with as many experts: a quarter, as the paper's 64 of 256, and no more than those.
fn bases(experts: usize) -> usize {
    (experts / 4).clamp(2, 64).min(experts)
}

/// What a ratio makes of a model.
pub(crate) struct Shape {
    bases: usize,
    /// By layer with experts.
    ranks: Vec<usize>,
    /// Mixed slots, of all layers.
    slots: usize,
}

impl Shape {
    /// Meets the ratio as closely as it can be.
    ///
    /// # Errors
    /// [`Error::Invalid`] saying what can be reached, if this cannot.
    pub(crate) fn of(config: &ModelConfig, ratio: f64) -> Result<Self> {
        let (h, f) = (
            config.hidden_size as f64,
            config.moe.intermediate_size as f64,
        );
        let (experts, layers) = (config.moe.num_experts, config.num_moe_layers());
        let (bases, slots) = (bases(experts), experts * layers);
        let total = config.parameters().total() as f64;
        let saved = ratio * total;
        // Of a slot without any rank, and of a rank in a layer.
        let gain = 2.0 * (f * h - bases as f64);
        let unit = 2.0 * (experts as f64 * f + bases as f64 * h);
        let units = ((slots as f64 * gain - saved) / unit).round().max(0.0) as usize;
        if units < layers {
            let most = (slots as f64 * gain - layers as f64 * unit) / total;
            return Err(Error::Invalid(format!(
                "a ratio of {ratio} cannot be reached, only up to {:.4} of all parameters, because \
                 the down projections stay; choose a lower ratio",
                most.max(0.0)
            )));
        }
        let widest = config.hidden_size.min(config.moe.intermediate_size);
        if units <= layers * widest {
            let (rank, more) = (units / layers, units % layers);
            let ranks = (0..layers).map(|i| rank + usize::from(i < more));
            return Ok(Self {
                bases,
                ranks: ranks.collect(),
                slots,
            });
        }
        let shared = 2.0 * (layers * bases * widest) as f64 * h;
        let mixed = (saved + shared) / (gain - 2.0 * f * widest as f64);
        Ok(Self {
            bases,
            ranks: vec![widest; layers],
            slots: (mixed.round() as usize).min(slots),
        })
    }

    /// How many components of a mixed slot train, and the rank of the adapters of down projections and of
    /// dense experts: no more parameters than adapters of `rank` on all experts have. Components come
    /// first, as far as adapters on gate and up would reach; what is left goes to the adapters.
    fn trained(&self, config: &ModelConfig, rank: usize) -> (usize, usize) {
        let (h, f) = (config.hidden_size, config.moe.intermediate_size);
        let dense = config.moe.num_experts * self.ranks.len() - self.slots;
        let weights = 2 * self.bases * self.slots;
        let component = 2 * (f * self.slots + self.ranks.len() * self.bases * h);
        let left = (2 * rank * (h + f) * self.slots).saturating_sub(weights);
        let most = self.ranks.iter().copied().max().unwrap_or(0);
        let components = (left / component.max(1)).min(most);
        let budget = 3 * rank * (h + f) * (self.slots + dense);
        let left = budget.saturating_sub(weights + components * component);
        let adapters = left / ((h + f) * (self.slots + 3 * dense)).max(1);
        (components, adapters.min(h.min(f)))
    }
}

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    options: &PlanOptions,
) -> Result<Plan> {
    let shape = Shape::of(config, ratio)?;
    let scores: Vec<Vec<f64>> = observations.layers.iter().map(usage).collect();
    let planned = observations.layers.iter().zip(&scores);
    let layers = planned
        .zip(counts(&scores, shape.slots))
        .zip(&shape.ranks)
        .map(|(((observed, scores), count), &rank)| {
            let mut layer = LayerPlan::dense(observed, scores);
            for &expert in &ascending(scores)[..count] {
                let bases = shape.bases;
                layer.slots[expert].form = SlotForm::Mixed { bases, rank };
            }
            layer
        });
    let (components, adapters) = shape.trained(config, options.rank);
    let settings = PlanSettings {
        rank: shape.ranks.iter().copied().max().unwrap_or(0),
        kept_rank: adapters,
        groups: 0,
        trained_rank: Some(components),
        fit_steps: Some(options.fit_steps),
        ..options.settings()
    };
    let mut plan = finish(config, MethodName::Mobe, settings, layers.collect());
    plan.ratio.target = Some(ratio);
    Ok(plan)
}
