//! The methods: each turns observations into a plan. All share observation, selection, recovery
//! and evaluation, so that what differs between them is what the comparison is about.

mod drop;
mod lightmoe;

use std::fmt;
use std::str::FromStr;

use lightmoe_models::config::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::observations::Observations;
use crate::plan::{LayerPlan, ModelSummary, Parameters, Plan, PlanSettings, Ratio, SCHEMA_VERSION};
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
}

impl MethodName {
    /// Every method, in the order in which messages list them.
    pub const ALL: [Self; 9] = [
        Self::Lightmoe,
        Self::Replace,
        Self::Lora,
        Self::Reap,
        Self::Frequency,
        Self::Ean,
        Self::Random,
        Self::Aimer,
        Self::Mone,
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
        }
    }

    /// Whether it drops whole experts, by a ratio and without bases or adapters of their own.
    pub fn drops(self) -> bool {
        !matches!(self, Self::Lightmoe | Self::Replace | Self::Lora)
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
    /// The mean of the members' weights, weighted by `Gbar` (eq. 4).
    GateWeighted,
    /// Random weights: what the weighted mean is worth.
    Random,
}

/// The settings of [`plan`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LightmoeOptions {
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
    /// Seed of the method `random`.
    pub seed: u64,
}

impl Default for LightmoeOptions {
    /// The paper's settings: rank 16, 3 bases, alpha 0.3, delta 0.2, gate-weighted bases.
    fn default() -> Self {
        Self {
            rank: 16,
            groups: 3,
            alpha: 0.3,
            max_delta: 0.2,
            base: BaseInit::GateWeighted,
            seed: 0,
        }
    }
}

/// How much to replace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Save this share of all the model's parameters.
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
        if value > 0.0 && value < 1.0 {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "the {name} is {value}, expected a number between 0 and 1; give one such as 0.3"
        )))
    }
}

impl LightmoeOptions {
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
    options: &LightmoeOptions,
) -> Result<Plan> {
    options.check_method(method)?;
    options.check(config)?;
    observations.check(config)?;
    if method == MethodName::Lora {
        return lightmoe::uncompressed(config, observations, options);
    }
    target.check()?;
    if method.drops() {
        let Target::Ratio(ratio) = target else {
            return Err(Error::Invalid(format!(
                "`{method}` has no threshold; give a ratio"
            )));
        };
        return drop::plan(config, observations, ratio, method, options);
    }
    options.check_replacing(config)?;
    lightmoe::plan(config, observations, target, method, options)
}

pub(crate) fn check_ratio(ratio: f64) -> Result<()> {
    Target::Ratio(ratio).check()
}

/// A plan of these layers, counted.
fn finish(
    config: &ModelConfig,
    method: MethodName,
    options: &LightmoeOptions,
    layers: Vec<LayerPlan>,
) -> Plan {
    let mut plan = Plan {
        schema_version: SCHEMA_VERSION,
        method,
        model: ModelSummary::from(config),
        settings: PlanSettings {
            rank: options.rank,
            kept_rank: options.rank,
            groups: options.groups,
            alpha: options.alpha,
            max_delta: options.max_delta,
            base: options.base,
        },
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
