//! The plan: what every expert of every layer becomes, with the scores that led there.
//!
//! Plain JSON, to be read, edited and compared. A slot is one output of a layer's router:
//!
//! ```json
//! {"expert": 5, "form": "adapted", "group": 1, "rank": 16, "dominant": false, "score": 0.01}
//! {"expert": 6, "form": "dense", "score": 0.07}
//! ```

mod rules;

use std::path::Path;

use lightmoe_models::config::ModelConfig;
use lightmoe_models::{FactoredBases, folder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::methods::{AdapterInit, BaseInit, MethodName};
use crate::observations::LayerObservations;
use crate::observe::Sensitivity;
use crate::{Error, Result, read};

/// Version of the plan's layout.
pub const SCHEMA_VERSION: u32 = 1;

/// A whole plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// Version of this layout.
    #[schemars(extend("const" = SCHEMA_VERSION))]
    pub schema_version: u32,
    /// The method that made it.
    pub method: MethodName,
    /// The model it is for.
    pub model: ModelSummary,
    /// The settings it was made with.
    pub settings: PlanSettings,
    /// How much smaller the model becomes.
    pub ratio: Ratio,
    /// The global threshold `p_hat`, a share of the gate mass; null where the method has none.
    pub p_hat: Option<f64>,
    /// What it leaves and what is trained.
    pub parameters: Parameters,
    /// What it is expected to cost the model; only of methods that plan by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<PlanDamage>,
    /// Every layer that has experts, ascending.
    pub layers: Vec<LayerPlan>,
}

/// What errors of the experts are expected to cost, to second order and as if they did not meet: good to choose
/// by, and no forecast of what will be measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlanDamage {
    /// What it goes by: all damages are in nats for each predicted token where that is `fisher`.
    pub sensitivity: Sensitivity,
    /// Bytes of the files of weights that the plan leaves, headers included.
    pub bytes: u64,
    /// Its damage.
    pub predicted: f64,
    /// What other sizes would have cost, from the smallest to the original.
    pub curve: Vec<CurvePoint>,
}

/// A size and its damage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CurvePoint {
    /// Of the files of weights.
    pub bytes: u64,
    /// In the plan's unit.
    pub damage: f64,
}

/// The facts of the model that a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ModelSummary {
    /// The family's `model_type`.
    pub family: String,
    /// `H`, the size of a hidden state.
    pub hidden_size: usize,
    /// `F`, the neurons of a routed expert.
    pub intermediate_size: usize,
    /// `E`, the routed experts of a layer.
    pub num_experts: usize,
    /// Experts chosen for a token.
    pub top_k: usize,
    /// Decoder layers, dense ones included.
    pub layers: usize,
}

impl ModelSummary {
    /// The smaller side of an expert's matrices, which no rank exceeds.
    fn widest_rank(&self) -> usize {
        self.hidden_size.min(self.intermediate_size)
    }
}

impl From<&ModelConfig> for ModelSummary {
    fn from(config: &ModelConfig) -> Self {
        Self {
            family: config.family.to_string(),
            hidden_size: config.hidden_size,
            intermediate_size: config.moe.intermediate_size,
            num_experts: config.moe.num_experts,
            top_k: config.moe.top_k,
            layers: config.num_layers,
        }
    }
}

/// The settings of the method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlanSettings {
    /// Rank of the adapter of each replaced expert.
    pub rank: usize,
    /// Rank of the adapter that each kept expert, and the down matrix of each mixed one, has while
    /// training; merged at the end.
    pub kept_rank: usize,
    /// Shared bases wanted per layer; 0 for adapters alone.
    pub groups: usize,
    /// `alpha` of eq. 8.
    pub alpha: f64,
    /// Greatest relative distance of a layer's threshold from `p_hat`.
    pub max_delta: f64,
    /// How the bases start, and what experts that others are merged into become.
    pub base: BaseInit,
    /// How the adapters of the replaced experts start.
    #[serde(default)]
    pub adapters: AdapterInit,
    /// Rank of the adapter that each base has while training, merged at the end; absent where the
    /// base itself trains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_rank: Option<usize>,
    /// How many components of each replaced expert's adapter, or mixture, train, the last ones; absent
    /// where all do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_rank: Option<usize>,
    /// Steps of the fit of mixed slots; absent without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fit_steps: Option<usize>,
}

/// How much smaller the model becomes, as a share of all its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Ratio {
    /// What was asked for; null where it was something else than a ratio.
    pub target: Option<f64>,
    /// What the plan gives.
    pub achieved: f64,
}

/// Parameter counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Parameters {
    /// Of the original model.
    pub before: u64,
    /// Of the exported model, the adapters of kept experts merged.
    pub after: u64,
    /// Trained during recovery.
    pub trained: u64,
}

/// What becomes of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LayerPlan {
    /// The layer's number in the model.
    pub layer: usize,
    /// The layer's threshold `p_j`, a share of its gate mass; null where the method has none.
    pub threshold: Option<f64>,
    /// The layer's mean router norm `R_j`; null where it was not observed.
    pub router_norm: Option<f64>,
    /// Shared bases in this layer.
    pub groups: usize,
    /// How many of the chosen experts run, where the others only scale their inputs; absent where all
    /// run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main: Option<usize>,
    /// How the shared bases are stored, all alike; absent where they are whole matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factored: Option<FactoredBases>,
    /// One slot per expert, ascending, `[E]`.
    pub slots: Vec<SlotPlan>,
}

impl LayerPlan {
    /// A layer that stays as it is, its experts with these scores.
    pub(crate) fn dense(observed: &LayerObservations, scores: &[f64]) -> Self {
        let slot = |(expert, &score): (usize, &f64)| SlotPlan {
            expert,
            form: SlotForm::Dense,
            score,
            weight: None,
            bytes: None,
            damage: None,
        };
        Self {
            layer: observed.layer,
            threshold: None,
            router_norm: observed.router_norm,
            groups: 0,
            main: None,
            factored: None,
            slots: scores.iter().enumerate().map(slot).collect(),
        }
    }

    /// Lets the experts of each of `clusters`, its dominant first, share a base; one alone stays as it
    /// is.
    pub(crate) fn merge(&mut self, clusters: &[Vec<usize>]) {
        self.share(clusters.iter().filter(|members| members.len() > 1));
    }

    /// Lets the experts of each of `clusters`, its dominant first, share a base, one alone too.
    pub(crate) fn share<'a>(&mut self, clusters: impl IntoIterator<Item = &'a Vec<usize>>) {
        for members in clusters {
            for (i, &expert) in members.iter().enumerate() {
                self.slots[expert].form = SlotForm::adapted(Some(self.groups), 0, i == 0);
            }
            self.groups += 1;
        }
    }

    /// The experts of group `group`, ascending.
    pub fn members(&self, group: usize) -> impl Iterator<Item = usize> + '_ {
        self.slots
            .iter()
            .filter(move |slot| slot.form.group() == Some(group))
            .map(|slot| slot.expert)
    }

    /// The experts whose weights become those of the dense slot `expert`: itself first, then those
    /// that were merged into it.
    pub fn sources(&self, expert: usize) -> Vec<usize> {
        let merged = |slot: &&SlotPlan| slot.form == SlotForm::Removed { into: Some(expert) };
        let others = self.slots.iter().filter(merged).map(|slot| slot.expert);
        std::iter::once(expert).chain(others).collect()
    }

    /// Bases and rank of the mixed slots; `None` without such slots.
    pub fn mixture(&self) -> Option<(usize, usize)> {
        self.slots.iter().find_map(|slot| match slot.form {
            SlotForm::Mixed { bases, rank } => Some((bases, rank)),
            _ => None,
        })
    }

    /// Whether a slot has a bias.
    pub fn has_biases(&self) -> bool {
        self.slots.iter().any(|slot| slot.form.has_bias())
    }

    /// How many experts are replaced.
    pub fn replaced(&self) -> usize {
        self.slots.iter().filter(|s| s.form.is_replaced()).count()
    }
}

/// What becomes of one expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SlotPlan {
    /// The expert's number.
    pub expert: usize,
    /// The form it takes.
    #[serde(flatten)]
    pub form: SlotForm,
    /// What it was chosen by; of LightMoE `Gbar`, its share of the layer's gate mass.
    pub score: f64,
    /// The weight it has in its group's base, where that is not the score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Bytes of the form; only of methods that plan by them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// What the form is expected to cost the model, in nats for each predicted token; likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damage: Option<f64>,
}

impl SlotPlan {
    /// The weight that the expert has in a mean.
    pub fn weight(&self) -> f64 {
        self.weight.unwrap_or(self.score)
    }
}

/// The form of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "form", rename_all = "lowercase")]
pub enum SlotForm {
    /// The expert's own matrices.
    Dense,
    /// The base of a group plus an adapter of the slot's own.
    Adapted {
        /// The group whose base it uses; absent for the adapter alone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        group: Option<usize>,
        /// Rank of the adapter; 0 for the base alone.
        rank: usize,
        /// Whether a vector is added to what it gives.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        bias: bool,
        /// Whether the others of its group were drawn to this expert.
        dominant: bool,
    },
    /// Gate and up mixed from bases that all such slots of the layer share (MoBE).
    Mixed {
        /// How many bases.
        bases: usize,
        /// Rows of each.
        rank: usize,
    },
    /// The mean of the expert's outputs (MoNE).
    Constant,
    /// Nothing; the router does as if it had no row for it.
    Removed {
        /// The dense slot that its weights were merged into, if any (REAM).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        into: Option<usize>,
    },
}

impl SlotForm {
    /// An adapted slot without a bias.
    pub fn adapted(group: Option<usize>, rank: usize, dominant: bool) -> Self {
        Self::Adapted {
            group,
            rank,
            bias: false,
            dominant,
        }
    }

    /// Whether a vector is added to what the slot gives.
    pub fn has_bias(&self) -> bool {
        matches!(self, Self::Adapted { bias: true, .. })
    }

    /// Whether the expert's own matrices go.
    pub fn is_replaced(&self) -> bool {
        *self != Self::Dense
    }

    /// The group whose base the slot uses.
    pub fn group(&self) -> Option<usize> {
        match self {
            Self::Adapted { group, .. } => *group,
            _ => None,
        }
    }
}

impl Plan {
    /// Writes the plan as indented JSON, atomically.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written, [`Error::Plan`] if it breaks a rule of
    /// [`Plan::validate`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut text = self
            .rules()
            .and_then(|()| {
                serde_json::to_vec_pretty(self)
                    .map_err(|e| format!("cannot be encoded ({e}); report it"))
            })
            .map_err(|message| plan_error(path, message))?;
        text.push(b'\n');
        Ok(folder::write_file(path, &text)?)
    }

    /// Reads and checks a plan.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Plan`] if it is no plan, of another version,
    /// or breaks a rule of [`Plan::validate`].
    pub fn load(path: &Path) -> Result<Self> {
        let text = read(path)?;
        Self::decode(&text).map_err(|message| plan_error(path, message))
    }

    /// Reads and checks the text of a plan.
    ///
    /// # Errors
    /// What is wrong with it and what to do.
    pub fn decode(text: &[u8]) -> std::result::Result<Self, String> {
        let plan: Self = serde_json::from_slice(text)
            .map_err(|e| format!("not a plan ({e}); correct it or plan again"))?;
        plan.rules()?;
        Ok(plan)
    }

    /// Checks the plan in itself: the slots of each layer are its experts, each once; group
    /// numbers run from 0 without a gap and each group has one dominant; ranks fit.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the layer and the slot.
    pub fn validate(&self) -> Result<()> {
        self.rules().map_err(Error::Invalid)
    }

    /// Checks the plan in itself and that it is for a model like `config`.
    ///
    /// # Errors
    /// [`Error::Invalid`] saying which rule of [`Plan::validate`] is broken or what differs.
    pub fn check_model(&self, config: &ModelConfig) -> Result<()> {
        self.validate()?;
        let expected = ModelSummary::from(config);
        if self.model != expected {
            return Err(Error::Invalid(format!(
                "the plan is for {:?}, the model is {expected:?}; plan again for this model",
                self.model
            )));
        }
        if !config.moe_layers().eq(self.layers.iter().map(|l| l.layer)) {
            return Err(Error::Invalid(
                "the plan does not list the layers that have experts in this model; plan again"
                    .to_owned(),
            ));
        }
        // What the bank has no form for, such as two ranks in one layer.
        self.layout(config)
            .check(config)
            .map_err(|message| Error::Invalid(format!("the plan: {message}; correct it")))
    }

    /// Experts replaced per layer, on average.
    pub fn mean_replaced(&self) -> f64 {
        let replaced: usize = self.layers.iter().map(LayerPlan::replaced).sum();
        replaced as f64 / self.layers.len().max(1) as f64
    }
}

fn plan_error(path: &Path, message: String) -> Error {
    Error::Plan {
        path: path.to_owned(),
        message,
    }
}
