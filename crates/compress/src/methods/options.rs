//! What a plan is asked for.

use lightmoe_models::config::ModelConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::compressed::main_experts;
use super::{Kind, MethodName};
use crate::mixture;
use crate::observe::{Sensitivity, Statistics};
use crate::plan::PlanSettings;
use crate::ranks::RankRule;
use crate::size::adapter_parameters;
use crate::{Error, Result};

/// How a group's base starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BaseInit {
    /// The mean of the members' weights, weighted by their scores; for LightMoE `Gbar` (eq. 4).
    GateWeighted,
    /// Random weights: what the weighted mean is worth.
    Random,
    /// The weighted mean after the neurons of all were brought into the order of the dominant's.
    Aligned,
    /// The mean weighted by REAP's score (arXiv 2510.13999): what the experts gave.
    ReapWeighted,
    /// The mean weighted by what errors of the experts were observed to cost.
    FisherWeighted,
    /// What loses least on the inputs that the members were given, with a pull to the weighted mean.
    LeastSquares,
    /// The mean of all experts of the layer, whatever becomes of them, weighted by what errors of them were
    /// observed to cost: what `budget` reckons differences from.
    Common,
}

/// By what LightMoE and its baseline choose experts to replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// Their share of the gate mass (eq. 1-2).
    #[default]
    Gate,
    /// Their share of REAP's scores.
    Reap,
    /// Their share of what it is observed to cost the model if of an expert no more is left than its
    /// adapter can hold.
    Damage,
}

/// How the adapters of replaced experts start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
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
    /// Factors by what errors were observed to cost the model, on either side of the matrix.
    Fitted,
}

/// The settings of [`plan`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanOptions {
    /// Rank of every adapter, on replaced and kept experts alike.
    pub rank: usize,
    /// Shared bases per layer; 0 for adapters alone. Of `budget` 1 where a base may be had, 0 where not.
    pub groups: usize,
    /// `alpha` of eq. 8: how much the router norm moves a layer's threshold.
    pub alpha: f64,
    /// Greatest relative distance of a layer's threshold from `p_hat`; 0 for a uniform one.
    pub max_delta: f64,
    /// By what LightMoE selects.
    pub select: Selection,
    /// How the bases start.
    pub base: BaseInit,
    /// How the adapters of LightMoE start. Others than fresh ones fade in as the originals fade out.
    pub adapters: AdapterInit,
    /// Whether LightMoE gives each slot a bias, the mean of what it misses, and `budget` may.
    pub bias: bool,
    /// How `svd` shares its budget.
    pub ranks: RankRule,
    /// How many of the chosen experts run in `compressed`; `None` for half of them.
    pub main_experts: Option<usize>,
    /// How many components of a factorised expert train, the last ones; `None` for as many as `rank`, of
    /// `budget` for all; 0 for all.
    pub trained_rank: Option<usize>,
    /// Steps of the fit of `mobe`.
    pub fit_steps: usize,
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
            select: Selection::Gate,
            base: BaseInit::GateWeighted,
            adapters: AdapterInit::Fresh,
            bias: false,
            ranks: RankRule::Budget,
            main_experts: None,
            trained_rank: None,
            fit_steps: mixture::STEPS,
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
    /// Leave files of weights of at most so many bytes.
    Bytes(u64),
    /// Lose at most so much, in nats for each predicted token, and save what that allows.
    Damage(f64),
}

impl Target {
    /// The share of all parameters of the model that it saves, where that is known before anything was
    /// observed.
    pub fn ratio(self, config: &ModelConfig) -> Option<f64> {
        match self {
            Self::Ratio(ratio) => Some(ratio),
            Self::Bytes(bytes) => {
                let size = config.file_dtype().size_in_bytes() as f64;
                let left = bytes as f64 / (size * config.parameters().total() as f64);
                Some((1.0 - left).max(0.0))
            }
            Self::Threshold(_) | Self::Damage(_) => None,
        }
    }

    pub(crate) fn check(self) -> Result<()> {
        let (name, value) = match self {
            Self::Ratio(value) => ("ratio", value),
            Self::Threshold(value) => ("threshold", value),
            Self::Bytes(_) => return Ok(()),
            Self::Damage(value) if value >= 0.0 && value.is_finite() => return Ok(()),
            Self::Damage(value) => {
                return Err(Error::Invalid(format!(
                    "the allowed damage is {value}, expected nats from 0; give a number such as 0.01"
                )));
            }
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
    /// How many components of a factorised expert train; `None` for all.
    pub(super) fn trained_rank(&self) -> Option<usize> {
        match self.trained_rank {
            None => Some(self.rank),
            Some(0) => None,
            some => some,
        }
    }

    /// Whether it asks for parts of LightMoE that the paper does not have, aligned and random bases aside.
    fn has_other_parts(&self) -> bool {
        let bases = [
            BaseInit::ReapWeighted,
            BaseInit::FisherWeighted,
            BaseInit::LeastSquares,
        ];
        self.select != Selection::Gate
            || self.adapters != AdapterInit::Fresh
            || bases.contains(&self.base)
    }

    /// What has to be observed beside routing and outputs for a plan by `method`.
    pub fn statistics(&self, method: MethodName) -> Statistics {
        let own = Statistics {
            bias: self.bias,
            ..method.statistics()
        };
        if method.kind() != Kind::Replace {
            return own;
        }
        let whitened = self.adapters == AdapterInit::Whitened;
        let by_cost = self.select == Selection::Damage
            || self.base == BaseInit::FisherWeighted
            || self.adapters == AdapterInit::Fitted;
        Statistics {
            moments: whitened || self.base == BaseInit::LeastSquares,
            damage: by_cost.then_some(Sensitivity::Fisher),
            ..own
        }
    }

    /// The settings that a plan with these options states.
    pub fn settings(&self) -> PlanSettings {
        PlanSettings {
            rank: self.rank,
            kept_rank: self.rank,
            groups: self.groups,
            alpha: self.alpha,
            max_delta: self.max_delta,
            base: self.base,
            adapters: self.adapters,
            base_rank: None,
            trained_rank: None,
            fit_steps: None,
        }
    }

    /// The same budget of trained parameters as adapters of `rank` on all experts, on as many as
    /// `carriers`: of higher rank, without bases.
    pub(super) fn for_carriers(&self, config: &ModelConfig, carriers: usize) -> Self {
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
    pub fn check_method(&self, method: MethodName, config: &ModelConfig) -> Result<()> {
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
            (MethodName::Budget, groups @ 2..) => Err(Error::Invalid(format!(
                "`budget` has one base a layer, where it pays, or none, not {groups}; set `groups` to 0 \
                 or 1"
            ))),
            _ if self.base == BaseInit::Common => Err(Error::Invalid(
                "a `common` base is what `budget` finds by itself; choose another".to_owned(),
            )),
            (MethodName::Budget, _) if self.base != BaseInit::GateWeighted => Err(Error::Invalid(
                "`budget` finds its bases by itself; leave `base` out".to_owned(),
            )),
            (MethodName::Budget, _) if self.bias && self.ranks != RankRule::Budget => {
                Err(Error::Invalid(
                    "ranks that follow a rule of their own have no biases; leave `bias` out, or use the rule \
                     `budget`"
                        .to_owned(),
                ))
            }
            _ if self.bias && method.kind() != Kind::Replace && method != MethodName::Budget => {
                Err(Error::Invalid(format!(
                    "`{method}` has no slots with a bias; `bias` is for `lightmoe`, `replace` and `budget`"
                )))
            }
            _ if method.kind() != Kind::Replace && self.has_other_parts() => {
                Err(Error::Invalid(format!(
                    "`{method}` chooses and starts in its own way; `select`, `adapters` and the bases \
                     reap-weighted, fisher-weighted and least-squares are for `lightmoe` and `replace`"
                )))
            }
            (MethodName::Compressed, _) => main_experts(config, self).map(|_| ()),
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
        if let Some(trained) = self.trained_rank.filter(|&rank| rank > widest) {
            return Err(Error::Invalid(format!(
                "`trained_rank` is {trained}, and no factor has a rank above {widest}; lower it"
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
