//! The methods, one file each (those that only differ by a score share one): each turns observations
//! into a plan. All share observation, recovery and evaluation, so that what differs between them is
//! what the comparison is about.

mod compressed;
mod d2moe;
mod drop;
pub mod hcsmoe;
mod lightmoe;
pub(crate) mod mobe;
pub mod moei2;
mod msmoe;
pub mod ream;
mod svd;

use std::fmt;
use std::str::FromStr;

use lightmoe_models::config::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::observations::{LayerObservations, Observations};
use crate::observe::{Statistics, Successor};
use crate::plan::{LayerPlan, ModelSummary, Parameters, Plan, PlanSettings, Ratio, SCHEMA_VERSION};
use crate::ranks::RankRule;
use crate::size::adapter_parameters;
use crate::{Error, Result};

/// A method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    /// LightMoE: replaced experts become a shared base of their group plus an adapter.
    Lightmoe,
    /// The paper's baseline "Replace": an adapter alone, or with one base for the whole layer.
    Replace,
    /// The uncompressed reference: every expert is kept and trains an adapter.
    Lora,
    /// Pruning by the mean of gate times output norm (REAP, arXiv 2510.13999).
    Reap,
    /// Pruning by how often an expert is chosen.
    Frequency,
    /// Pruning by the sum of output norms (expert activation norm).
    Ean,
    /// Pruning at random: what a score is worth.
    Random,
    /// Pruning by the weights alone (AIMER, arXiv 2603.18492).
    Aimer,
    /// Dropped experts become the mean of their outputs (MoNE, arXiv 2507.00390).
    Mone,
    /// Merging by router logits, neurons aligned (M-SMoE, arXiv 2310.01334).
    Msmoe,
    /// Merging by clusters of mean outputs (HC-SMoE, arXiv 2410.08589).
    Hcsmoe,
    /// Merging by REAP scores and gated similarity (REAM, arXiv 2604.04356).
    Ream,
    /// Low-rank factors of every expert, whitened by what it is given.
    Svd,
    /// One base for all experts of a layer, and whitened factors of the differences (D²-MoE,
    /// arXiv 2502.17298).
    D2moe,
    /// Fewer experts run, the others scale their inputs (Compressed Experts, arXiv 2503.00634).
    Compressed,
    /// Gate and up mixed from the layer's bases (MoBE, arXiv 2508.05257).
    Mobe,
    /// Pruning by a search over sets, then low-rank factors of those that stay (MoE-I²,
    /// arXiv 2411.01016).
    Moei2,
}

/// What a method does to experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Keeps all of them, whatever the ratio.
    Keep,
    /// Replaces some by a base and an adapter, and fades the originals out while it recovers.
    Replace,
    /// Drops some, by a ratio.
    Drop,
    /// Merges some into others, by a ratio.
    Merge,
    /// Factorises all of them, or all that it does not drop, by a ratio.
    Factorise,
}

impl MethodName {
    /// Every method, in the order in which messages list them.
    pub const ALL: [Self; 17] = [
        Self::Lightmoe,
        Self::Replace,
        Self::Lora,
        Self::Reap,
        Self::Frequency,
        Self::Ean,
        Self::Random,
        Self::Aimer,
        Self::Mone,
        Self::Msmoe,
        Self::Hcsmoe,
        Self::Ream,
        Self::Svd,
        Self::D2moe,
        Self::Compressed,
        Self::Mobe,
        Self::Moei2,
    ];

    /// The name in recipes, plans and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lightmoe => "lightmoe",
            Self::Replace => "replace",
            Self::Lora => "lora",
            Self::Reap => "reap",
            Self::Frequency => "frequency",
            Self::Ean => "ean",
            Self::Random => "random",
            Self::Aimer => "aimer",
            Self::Mone => "mone",
            Self::Msmoe => "msmoe",
            Self::Hcsmoe => "hcsmoe",
            Self::Ream => "ream",
            Self::Svd => "svd",
            Self::D2moe => "d2moe",
            Self::Compressed => "compressed",
            Self::Mobe => "mobe",
            Self::Moei2 => "moei2",
        }
    }

    /// What it does to experts.
    pub fn kind(self) -> Kind {
        match self {
            Self::Lora | Self::Compressed => Kind::Keep,
            Self::Lightmoe | Self::Replace => Kind::Replace,
            Self::Msmoe | Self::Hcsmoe | Self::Ream => Kind::Merge,
            Self::Svd | Self::D2moe | Self::Mobe | Self::Moei2 => Kind::Factorise,
            _ => Kind::Drop,
        }
    }

    /// Whether each layer is observed behind the compressed layers before it, so that observations serve
    /// one ratio alone; see [`successor`].
    pub fn is_sequential(self) -> bool {
        self == Self::Ream
    }

    /// What it needs to be observed beside routing and outputs.
    pub fn statistics(self) -> Statistics {
        Statistics {
            // MoBE asks the weights alone.
            moments: matches!(self, Self::Svd | Self::D2moe),
            all_outputs: self == Self::Hcsmoe,
            samples: self == Self::Moei2,
        }
    }
}

/// What `method` does to each layer while it is observed, if it compresses layer after layer; `target`
/// is that of the plan.
pub fn successor(
    method: MethodName,
    config: &ModelConfig,
    target: Target,
) -> Option<Box<Successor<'static>>> {
    match (method, target) {
        (MethodName::Ream, Target::Ratio(ratio)) => Some(Box::new(ream::successor(config, ratio))),
        _ => None,
    }
}

impl fmt::Display for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for MethodName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|method| method.name() == text)
            .ok_or_else(|| {
                let names = Self::ALL.map(|method| format!("`{method}`")).join(", ");
                Error::Invalid(format!("unknown method `{text}`; use one of {names}"))
            })
    }
}

/// How a group's base starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BaseInit {
    /// The mean of the members' weights, weighted by their scores; for LightMoE `Gbar` (eq. 4).
    GateWeighted,
    /// Random weights: what the weighted mean is worth.
    Random,
    /// The weighted mean after the neurons of all were brought into the order of the dominant's.
    Aligned,
}

/// How the adapters of replaced experts start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterInit {
    /// Gaussian times zero: nothing yet.
    #[default]
    Fresh,
    /// Factors of what the expert differs from its base by, those that lose least on the inputs it was
    /// given.
    Whitened,
    /// The same factors of the weights alone, whatever the inputs: the truncated SVD.
    Truncated,
}

/// The settings of [`plan`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanOptions {
    /// Rank of every adapter, on replaced and kept experts alike.
    pub rank: usize,
    /// Shared bases per layer; 0 for adapters alone.
    pub groups: usize,
    /// `alpha` of eq. 8: how much the router norm moves a layer's threshold.
    pub alpha: f64,
    /// Greatest relative distance of a layer's threshold from `p_hat`; 0 for a uniform one.
    pub max_delta: f64,
    /// How the bases start.
    pub base: BaseInit,
    /// How `svd` shares its budget.
    pub ranks: RankRule,
    /// How many of the chosen experts run in `compressed`; `None` for half of them.
    pub main_experts: Option<usize>,
    /// Seed of `random`, and of the search of `moei2`.
    pub seed: u64,
}

impl Default for PlanOptions {
    /// The paper's settings: rank 16, 3 bases, alpha 0.3, delta 0.2, gate-weighted bases.
    fn default() -> Self {
        Self {
            rank: 16,
            groups: 3,
            alpha: 0.3,
            max_delta: 0.2,
            base: BaseInit::GateWeighted,
            ranks: RankRule::Budget,
            main_experts: None,
            seed: 0,
        }
    }
}

/// How much to replace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Save this share of all the model's parameters; 0 leaves the model as it is.
    Ratio(f64),
    /// Use this global threshold `p_hat`.
    Threshold(f64),
}

impl Target {
    fn check(self) -> Result<()> {
        let (name, value) = match self {
            Self::Ratio(value) => ("ratio", value),
            Self::Threshold(value) => ("threshold", value),
        };
        let none = matches!(self, Self::Ratio(0.0));
        if none || (value > 0.0 && value < 1.0) {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "the {name} is {value}, expected a number between 0 and 1; give one such as 0.3"
        )))
    }
}

impl PlanOptions {
    /// The settings that a plan with these options states.
    pub fn settings(&self) -> PlanSettings {
        PlanSettings {
            rank: self.rank,
            kept_rank: self.rank,
            groups: self.groups,
            alpha: self.alpha,
            max_delta: self.max_delta,
            base: self.base,
            adapters: AdapterInit::Fresh,
            base_rank: None,
            trained_rank: None,
        }
    }

    /// The same budget of trained parameters as adapters of `rank` on all experts, on as many as
    /// `carriers`: of higher rank, without bases.
    fn for_carriers(&self, config: &ModelConfig, carriers: usize) -> Self {
        let widest = config.hidden_size.min(config.moe.intermediate_size);
        let all = config.moe.num_experts * config.num_moe_layers();
        Self {
            rank: (self.rank * all / carriers.max(1)).min(widest),
            groups: 0,
            ..*self
        }
    }

    /// What the method has no form for.
    ///
    /// # Errors
    /// [`Error::Invalid`], saying what to change.
    pub fn check_method(&self, method: MethodName) -> Result<()> {
        match (method, self.groups) {
            (MethodName::Lightmoe, 0) => Err(Error::Invalid(
                "`lightmoe` needs at least one group; raise `groups`, or use the method `replace` \
                 for adapters alone"
                    .to_owned(),
            )),
            (MethodName::Replace, groups @ 2..) => Err(Error::Invalid(format!(
                "`replace` has no base or one, not {groups}; set `groups` to 0 or 1, or use the \
                 method `lightmoe`"
            ))),
            _ => Ok(()),
        }
    }

    /// What cannot work for this model, whatever the observations.
    ///
    /// # Errors
    /// [`Error::Invalid`], saying what to change.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let widest = config.hidden_size.min(config.moe.intermediate_size);
        if self.rank > widest {
            return Err(Error::Invalid(format!(
                "rank {} exceeds the smaller side of an expert's matrices ({widest}); lower it",
                self.rank
            )));
        }
        if self.groups > config.moe.num_experts {
            return Err(Error::Invalid(format!(
                "{} groups for {} experts per layer; lower `groups`",
                self.groups, config.moe.num_experts
            )));
        }
        for (name, value) in [("alpha", self.alpha), ("max_delta", self.max_delta)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::Invalid(format!(
                    "`{name}` is {value}, expected a number from 0; correct it"
                )));
            }
        }
        Ok(())
    }

    /// What cannot replace anything in this model, whatever the observations.
    ///
    /// # Errors
    /// [`Error::Invalid`], saying what to change.
    pub fn check_replacing(&self, config: &ModelConfig) -> Result<()> {
        self.check(config)?;
        if self.rank == 0 && self.groups == 0 {
            return Err(Error::Invalid(
                "rank 0 without bases would leave nothing of a replaced expert; raise `rank` or \
                 `groups`"
                    .to_owned(),
            ));
        }
        if adapter_parameters(config, self.rank) >= config.expert_parameters() {
            return Err(Error::Invalid(format!(
                "adapters of rank {} are as large as the experts they replace; lower `rank`",
                self.rank
            )));
        }
        Ok(())
    }
}

/// Plans the compression of the model `config` by `method`.
///
/// `Lora` replaces nothing, so `target` does not concern it, and its ratio is 0. `Replace` takes
/// 0 or 1 groups.
///
/// # Errors
/// [`Error::Invalid`] at once, saying what to change: observations of another model, a rank above
/// `min(H, F)`, more groups than experts, a ratio that cannot be reached, a threshold that
/// replaces no expert.
pub fn plan(
    config: &ModelConfig,
    observations: &Observations,
    target: Target,
    method: MethodName,
    options: &PlanOptions,
) -> Result<Plan> {
    options.check_method(method)?;
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
    let Target::Ratio(ratio) = target else {
        return Err(Error::Invalid(format!(
            "`{method}` has no threshold; give a ratio"
        )));
    };
    match method {
        MethodName::Msmoe => msmoe::plan(config, observations, ratio, options),
        MethodName::Hcsmoe => hcsmoe::plan(config, observations, ratio, options),
        MethodName::Ream => ream::plan(config, observations, ratio, options),
        MethodName::Svd => svd::plan(config, observations, ratio, options),
        MethodName::D2moe => d2moe::plan(config, observations, ratio, options),
        MethodName::Mobe => mobe::plan(config, observations, ratio, options),
        MethodName::Moei2 => moei2::plan(config, observations, ratio, options),
        _ => drop::plan(config, observations, ratio, method, options),
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

/// How many whole experts are worth the share `ratio` of all parameters.
fn experts_to_save(config: &ModelConfig, ratio: f64) -> usize {
    let wanted = ratio * config.parameters().total() as f64;
    (wanted / config.expert_parameters() as f64).round() as usize
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
        layers,
    };
    plan.recount(config);
    plan
}
