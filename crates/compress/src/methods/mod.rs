//! The methods, one file each (those that only differ by a score share one): each turns observations
//! into a plan. All share observation, recovery and evaluation, so that what differs between them is
//! what the comparison is about.

mod budget;
mod bytes;
mod compressed;
mod d2moe;
mod drop;
pub mod hcsmoe;
mod lightmoe;
pub(crate) mod mcsmoe;
pub(crate) mod mobe;
pub mod moei2;
mod msmoe;
mod name;
mod options;
pub mod ream;
mod svd;

use bytes::Files;
use lightmoe_models::Checkpoint;
use lightmoe_models::config::ModelConfig;
pub use name::{Kind, MethodName};
pub use options::{AdapterInit, BaseInit, PlanOptions, Selection, Target};

use crate::observations::{LayerObservations, Observations};
use crate::observe::Successor;
use crate::plan::{LayerPlan, ModelSummary, Parameters, Plan, PlanSettings, Ratio, SCHEMA_VERSION};
use crate::{Error, Result};

/// What `method` does to each layer while it is observed, if it compresses layer after layer; `target`
/// is that of the plan.
pub fn successor(
    method: MethodName,
    config: &ModelConfig,
    target: Target,
) -> Option<Box<Successor<'static>>> {
    match (method, target.ratio(config)) {
        (MethodName::Ream, Some(ratio)) => Some(Box::new(ream::successor(config, ratio))),
        _ => None,
    }
}

/// What a plan is for: a model's configuration, and its weights where they are at hand. `moei2` looks at
/// them, and `budget` at how many bytes they are.
#[derive(Clone, Copy)]
pub struct PlanModel<'a> {
    config: &'a ModelConfig,
    weights: Option<Weights<'a>>,
}

/// A model that plans may run, and what is told of that: `progress(done, total)` counts layers, and may
/// stop the work by `false`.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// The original.
    pub checkpoint: &'a Checkpoint,
    /// Sees every layer that ran.
    pub progress: &'a dyn Fn(usize, usize) -> bool,
}

impl<'a> From<&'a ModelConfig> for PlanModel<'a> {
    fn from(config: &'a ModelConfig) -> Self {
        Self {
            config,
            weights: None,
        }
    }
}

impl<'a> From<Weights<'a>> for PlanModel<'a> {
    fn from(weights: Weights<'a>) -> Self {
        Self {
            config: weights.checkpoint.config(),
            weights: Some(weights),
        }
    }
}

/// Plans the compression of `model` by `method`.
///
/// `Lora` replaces nothing, so `target` does not concern it, and its ratio is 0. `Replace` takes
/// 0 or 1 groups.
///
/// # Errors
/// [`Error::Invalid`] at once, saying what to change: observations of another model, a rank above
/// `min(H, F)`, more groups than experts, a ratio that cannot be reached, a threshold that
/// replaces no expert.
pub fn plan<'a>(
    model: impl Into<PlanModel<'a>>,
    observations: &Observations,
    target: Target,
    method: MethodName,
    options: &PlanOptions,
) -> Result<Plan> {
    let model = model.into();
    let config = model.config;
    options.check_method(method, config)?;
    options.check(config)?;
    observations.check(config)?;
    if method == MethodName::Lora {
        return lightmoe::uncompressed(config, observations, options);
    }
    if method == MethodName::Compressed {
        return compressed::plan(config, observations, options);
    }
    target.check()?;
    warn_of_silent(observations);
    let planned = |target| aimed(model, observations, target, method, options);
    match target {
        // Where nothing is chosen by bytes, they only say how much is to be saved.
        Target::Bytes(most) if method != MethodName::Budget => {
            let files = Files::of(model)?;
            files.within(most, false, |bytes| {
                planned(Target::Ratio(files.ratio(bytes)?))
            })
        }
        _ => planned(target),
    }
}

/// A plan by a method that replaces, prunes, merges or factorises.
fn aimed(
    model: PlanModel<'_>,
    observations: &Observations,
    target: Target,
    method: MethodName,
    options: &PlanOptions,
) -> Result<Plan> {
    let PlanModel { config, weights } = model;
    if target == Target::Ratio(0.0) {
        let layers = observations.layers.iter();
        let layers = layers.map(|seen| LayerPlan::dense(seen, &seen.importance()));
        let mut plan = finish(config, method, options.settings(), layers.collect());
        plan.ratio.target = Some(0.0);
        return Ok(plan);
    }
    if method.kind() == Kind::Replace {
        options.check_replacing(config)?;
        return lightmoe::plan(config, observations, target, method, options);
    }
    if method == MethodName::Budget {
        return budget::plan(model, observations, target, options);
    }
    let ratio = ratio_of(target, method)?;
    match method {
        MethodName::Msmoe => msmoe::plan(config, observations, ratio, options),
        MethodName::Mcsmoe => mcsmoe::plan(config, observations, ratio, options),
        MethodName::Hcsmoe => hcsmoe::plan(config, observations, ratio, options),
        MethodName::Ream => ream::plan(config, observations, ratio, options),
        MethodName::Svd => svd::plan(config, observations, ratio, options),
        MethodName::D2moe => d2moe::plan(config, observations, ratio, options),
        MethodName::Mobe => mobe::plan(config, observations, ratio, options),
        MethodName::Moei2 => moei2::plan(config, weights, observations, ratio, options),
        _ => drop::plan(config, observations, ratio, method, options),
    }
}

/// The ratio of a target, for the methods that ask for one.
fn ratio_of(target: Target, method: MethodName) -> Result<f64> {
    match target {
        Target::Ratio(ratio) => Ok(ratio),
        _ => Err(Error::Invalid(format!(
            "`{method}` plans for a ratio or for bytes; give one of them"
        ))),
    }
}

pub(crate) fn check_ratio(ratio: f64) -> Result<()> {
    Target::Ratio(ratio).check()
}

/// Lists the experts that no token chose: nothing was seen of them, so what becomes of them is a guess.
fn warn_of_silent(observations: &Observations) {
    for layer in &observations.layers {
        let chosen = layer.selections.iter().any(|&n| n > 0);
        let silent = layer.selections.iter().enumerate();
        let silent: Vec<usize> = silent.filter(|(_, n)| **n == 0).map(|(e, _)| e).collect();
        if chosen && !silent.is_empty() {
            tracing::warn!(layer = layer.layer, experts = ?silent, "no observed token chose these experts");
        }
    }
}

/// How many parameters are the share `ratio` of all.
fn to_save(config: &ModelConfig, ratio: f64) -> f64 {
    ratio * config.parameters().total() as f64
}

/// How many whole experts are worth the share `ratio` of all parameters.
fn experts_to_save(config: &ModelConfig, ratio: f64) -> usize {
    (to_save(config, ratio) / config.expert_parameters() as f64).round() as usize
}

/// How often each expert was chosen, as a share of its layer; the gate mass where that is not known.
fn usage(observed: &LayerObservations) -> Vec<f64> {
    let total: u64 = observed.selections.iter().sum();
    match total {
        0 => observed.importance(),
        _ => {
            let share = |&n: &u64| n as f64 / total as f64;
            observed.selections.iter().map(share).collect()
        }
    }
}

/// The numbers of `scores` from the highest on; of equals the lower number first.
fn order(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order
}

/// A plan of merged experts: kept ones and bases train adapters, with the same budget as everywhere.
fn merged(
    config: &ModelConfig,
    method: MethodName,
    options: &PlanOptions,
    layers: Vec<LayerPlan>,
    ratio: f64,
) -> Plan {
    let carriers = |layer: &LayerPlan| layer.slots.len() - layer.replaced() + layer.groups;
    let options = options.for_carriers(config, layers.iter().map(carriers).sum());
    let settings = PlanSettings {
        base: match method {
            MethodName::Msmoe => BaseInit::Aligned,
            _ => BaseInit::GateWeighted,
        },
        base_rank: Some(options.rank),
        ..options.settings()
    };
    let mut plan = finish(config, method, settings, layers);
    plan.ratio.target = Some(ratio);
    plan
}

/// A plan of these layers, counted.
fn finish(
    config: &ModelConfig,
    method: MethodName,
    settings: PlanSettings,
    layers: Vec<LayerPlan>,
) -> Plan {
    let mut plan = Plan {
        schema_version: SCHEMA_VERSION,
        method,
        model: ModelSummary::from(config),
        settings,
        ratio: Ratio {
            target: None,
            achieved: 0.0,
        },
        p_hat: None,
        parameters: Parameters {
            before: 0,
            after: 0,
            trained: 0,
        },
        damage: None,
        layers,
    };
    plan.recount(config);
    plan
}
