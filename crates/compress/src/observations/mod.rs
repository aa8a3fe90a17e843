//! What the routers did on sample data: the artefact of the observe stage (LightMoE eq. 1-3).
//!
//! One safetensors file. For each layer `l`, by the model's own numbers:
//!
//! | tensor | shape, type | meaning |
//! |---|---|---|
//! | `layers.{l}.gate_mass` | `[E]` f64 | sum of the gate values of an expert where it was chosen |
//! | `layers.{l}.selections` | `[E]` u64 | how often it was chosen |
//! | `layers.{l}.router_norm` | `[1]` f64, optional | mean L2 norm of a token's router logits |
//! | `layers.{l}.similarity` | `[E, E]` f64, optional | cosine of two experts' logit columns within a sample, averaged over samples |
//! | `layers.{l}.logit_gram` | `[E, E]` f64, optional | sum over tokens of the products of two experts' logits |
//! | `layers.{l}.output_gated` | `[E]` f64, optional | sum of gate times norm of an expert's output where it was chosen, the gates of a token scaled to sum to one |
//! | `layers.{l}.output_norm` | `[E]` f64, optional | sum of the norms of its outputs |
//! | `layers.{l}.output_square` | `[E]` f64, optional | sum of their squares |
//! | `layers.{l}.output_sum` | `[E, H]` f64, optional | sum of its outputs |
//! | `layers.{l}.output_weighted` | `[E, H]` f64, optional | sum of its outputs, each times its gate |
//! | `layers.{l}.weight_flatness` | `[E]` f64, optional | `‖w‖₁ / (√n · ‖w‖₂)` of all its weights |
//! | `layers.{l}.all_outputs` | `[E, H]` f64, optional | mean of an expert's outputs over all tokens, chosen or not |
//! | `layers.{l}.spectrum_{gate,up,down}` | `[E, min(H, F)]` f64, optional | singular values of the matrix on the inputs it was given, descending |
//! | `layers.{l}.damage_{gate,up,down}` | `[E, min(H, F)]` f64, optional | what leaving out each component of the matrix, the largest first, costs in nats a predicted token |
//! | `layers.{l}.damage_drop` | `[E]` f64, optional | the same of putting the mean of its outputs in place of the expert |
//! | `layers.{l}.damage_mass` | `[E]` f64, optional | what an error of unit size counts for, and the expert in the mean of all |
//! | `layers.{l}.difference_{gate,up,down}` | `[E, min(H, F)]` f64, optional | as `damage_{gate,up,down}`, of what the matrix differs from that mean by; where the mean tells enough of the experts |
//! | `layers.{l}.damage_bias` | `[E, min(H, F)]` f64, optional | as `damage_down`, beside a bias of the expert's own |
//! | `layers.{l}.difference_bias` | `[E, min(H, F)]` f64, optional | as `difference_down`, beside such a bias |
//!
//! `output_*` and `weight_flatness` come together, and so do the spectra, beside which there are
//! [`moments`](crate::moments), and the damages, beside which there is what they [rest
//! on](crate::damage). Those, [`samples`](crate::samples) and what biases rest on lie in a folder beside the
//! file.
//!
//! The metadata has one key, `observations`: a JSON object of `schema_version`, `tokens`,
//! `samples`, `fingerprint` and, where there are damages, their `sensitivity`. One key, because several would be written in a random order, and
//! the same observations must give the same bytes.

mod components;
mod file;

use std::path::PathBuf;

use components::SPECTRA;
pub use components::{Biased, Components, Damage};
pub(crate) use file::observations_error;
pub use file::{SCHEMA_VERSION, moments_folder};
use lightmoe_models::config::ModelConfig;

use crate::damage::LayerDamage;
use crate::inputs::Inputs;
use crate::moments::Moments;
use crate::observe::Sensitivity;
use crate::samples::{self, Sample};
use crate::{Error, Result};

/// The observations of one layer of `E` experts.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerObservations {
    /// The layer's number in the model.
    pub layer: usize,
    /// `[E]` sums of the gate values of each expert over the tokens that chose it.
    pub gate_mass: Vec<f64>,
    /// `[E]` how many tokens chose each expert; zeros where only scores were given.
    pub selections: Vec<u64>,
    /// Mean over tokens of the L2 norm of the router's logits (`R_j` of eq. 3).
    pub router_norm: Option<f64>,
    /// `[E * E]` row-major: mean over samples of the cosine of two experts' logit columns
    /// (section 3.2).
    pub similarity: Option<Vec<f64>>,
    /// `[E * E]` row-major: sums over tokens of the products of two experts' logits.
    pub logit_gram: Option<Vec<f64>>,
    /// What the experts gave; `None` where only scores were given.
    pub outputs: Option<OutputObservations>,
    /// `[E * H]` row-major: mean of each expert's outputs over all tokens, whether they chose it or not
    /// (HC-SMoE, arXiv 2410.08589); only where it was asked for.
    pub all_outputs: Option<Vec<f64>>,
    /// What a low rank would lose: the singular values of `W·S`, where `S·Sᵀ` is the second moment of what
    /// the matrix `W` was given, a little damped; the root of the sum of squares of the last is what a
    /// lower rank loses, in the norm of the outputs. Only where it was asked for.
    pub spectra: Option<Components>,
    /// What errors of the experts cost the model; only where it was asked for.
    pub damage: Option<Damage>,
}

/// What the experts of a layer gave on the tokens that chose them.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputObservations {
    /// `[E]` sums of gate times L2 norm of the output, the gates of a token scaled to sum to one
    /// (REAP, arXiv 2510.13999, as its code has it since March 2026).
    pub gated: Vec<f64>,
    /// `[E]` sums of the L2 norms of the outputs.
    pub norm: Vec<f64>,
    /// `[E]` sums of their squares.
    pub square: Vec<f64>,
    /// `[E * H]` row-major: sums of the outputs.
    pub sum: Vec<f64>,
    /// `[E * H]` row-major: sums of the outputs, each times its gate.
    pub weighted: Vec<f64>,
    /// `[E]` `‖w‖₁ / (√n · ‖w‖₂)` over the `n` weights of an expert (AIMER, arXiv 2603.18492): what an
    /// expert is, whatever the tokens.
    pub flatness: Vec<f64>,
}

impl OutputObservations {
    /// Nothing seen yet of `experts` experts.
    pub(crate) fn none(experts: usize, hidden_size: usize) -> Self {
        Self {
            gated: vec![0.0; experts],
            norm: vec![0.0; experts],
            square: vec![0.0; experts],
            sum: vec![0.0; experts * hidden_size],
            weighted: vec![0.0; experts * hidden_size],
            flatness: vec![0.0; experts],
        }
    }

    /// By name in the file.
    fn named(&self) -> [(&'static str, &Vec<f64>); 6] {
        [
            ("output_gated", &self.gated),
            ("output_norm", &self.norm),
            ("output_square", &self.square),
            ("output_sum", &self.sum),
            ("output_weighted", &self.weighted),
            ("weight_flatness", &self.flatness),
        ]
    }
}

impl LayerObservations {
    /// `Gbar` (eq. 1-2): each expert's share of the layer's gate mass; sums to one.
    pub fn importance(&self) -> Vec<f64> {
        let total: f64 = self.gate_mass.iter().sum();
        self.gate_mass.iter().map(|mass| mass / total).collect()
    }

    /// What the experts gave.
    ///
    /// # Errors
    /// [`Error::Invalid`] where only scores were given.
    pub fn outputs(&self) -> Result<&OutputObservations> {
        self.outputs.as_ref().ok_or_else(|| {
            Error::Invalid(format!(
                "the method needs what the experts gave, and layer {} was observed without; give \
                 observations that `observe` wrote",
                self.layer
            ))
        })
    }

    /// What errors of the experts of a model like `config` cost.
    ///
    /// # Errors
    /// [`Error::Invalid`] where that was not observed, or of other experts.
    pub fn damage(&self, config: &ModelConfig) -> Result<&Damage> {
        let layer = self.layer;
        let found = self.damage.as_ref().ok_or_else(|| {
            Error::Invalid(format!(
                "the plan goes by what errors of the experts cost, and layer {layer} was observed \
                 without; observe with `--damage fisher`"
            ))
        })?;
        let (experts, width) = (
            config.moe.num_experts,
            config.hidden_size.min(config.moe.intermediate_size),
        );
        if found.wide().any(|values| values.len() != experts * width) {
            return Err(Error::Invalid(format!(
                "layer {layer}: the damages are not of {experts} experts with {width} components each; \
                 observe this model"
            )));
        }
        Ok(found)
    }

    /// `[E * E]` row-major: cosines of two experts' router logits over all tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] where only scores were given.
    pub fn logit_cosines(&self) -> Result<Vec<f64>> {
        let gram = self.logit_gram.as_ref().ok_or_else(|| {
            Error::Invalid(format!(
                "the method compares router logits, and layer {} was observed without; give \
                 observations that `observe` wrote",
                self.layer
            ))
        })?;
        let experts = self.gate_mass.len();
        let cosine = |i: usize| {
            let (a, b) = (i / experts, i % experts);
            let norms = (gram[a * experts + a] * gram[b * experts + b]).sqrt();
            // A column of zeros is like no other.
            if norms > 0.0 { gram[i] / norms } else { 0.0 }
        };
        Ok((0..experts * experts).map(cosine).collect())
    }

    pub(crate) fn validate(&self) -> std::result::Result<(), String> {
        let layer = self.layer;
        let experts = self.gate_mass.len();
        let impossible = |mass: &f64| mass.is_nan() || *mass < 0.0;
        if let Some(expert) = self.gate_mass.iter().position(impossible) {
            return Err(format!(
                "layer {layer}: the gate mass of expert {expert} is {}, expected a number from \
                 0; observe again",
                self.gate_mass[expert]
            ));
        }
        let total: f64 = self.gate_mass.iter().sum();
        if !(total > 0.0 && total.is_finite()) {
            return Err(format!(
                "layer {layer}: the gate mass of its {experts} experts sums to {total}, expected \
                 a positive number; observe more tokens"
            ));
        }
        if self.selections.len() != experts {
            return Err(format!(
                "layer {layer}: {} selection counts for {experts} experts; observe again",
                self.selections.len()
            ));
        }
        if let Some(norm) = self.router_norm.filter(|n| !(n.is_finite() && *n >= 0.0)) {
            return Err(format!(
                "layer {layer}: the router norm is {norm}, expected a number from 0; observe again"
            ));
        }
        for (name, values) in self.tables() {
            let vectors = matches!(name, "output_sum" | "output_weighted" | "all_outputs");
            let signed = vectors || matches!(name, "similarity" | "logit_gram");
            let rows = match name {
                "similarity" | "logit_gram" => experts,
                _ if vectors || is_wide(name) => values.len() / experts.max(1),
                _ => 1,
            };
            let possible = |v: &f64| v.is_finite() && (signed || *v >= 0.0);
            if values.len() != experts * rows || !values.iter().all(possible) {
                let width = match name {
                    "similarity" | "logit_gram" => format!("{experts} x {experts}"),
                    _ => format!("{experts} rows of"),
                };
                return Err(format!(
                    "layer {layer}: `{name}` must hold {width} finite numbers{}; observe again",
                    if signed { "" } else { " from 0" }
                ));
            }
        }
        Ok(())
    }

    /// Every table of f64 beside the gate masses, by its name in the file.
    fn tables(&self) -> impl Iterator<Item = (&'static str, &Vec<f64>)> {
        let own = [
            ("similarity", &self.similarity),
            ("logit_gram", &self.logit_gram),
            ("all_outputs", &self.all_outputs),
        ];
        let own = own
            .into_iter()
            .filter_map(|(name, values)| Some((name, values.as_ref()?)));
        own.chain(self.outputs.iter().flat_map(OutputObservations::named))
            .chain(self.spectra.iter().flat_map(|s| s.named(SPECTRA)))
            .chain(self.damage.iter().flat_map(|damage| damage.named()))
    }
}

/// Whether a table has a number for each component of an expert's matrices.
fn is_wide(name: &str) -> bool {
    let narrow = matches!(name, "damage_drop" | "damage_mass");
    let parts = ["spectrum", "damage", "difference"];
    !narrow && parts.iter().any(|part| name.starts_with(part))
}

/// The observations of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Observations {
    /// The layers that have experts, ascending.
    pub layers: Vec<LayerObservations>,
    /// Tokens seen, padding excluded; 0 where only scores were given.
    pub tokens: u64,
    /// Samples (sequences) seen.
    pub samples: u64,
    /// Names the model and the data that were observed.
    pub fingerprint: String,
    /// What the damages of the layers go by; `None` without damages.
    pub sensitivity: Option<Sensitivity>,
    /// The folder of [`moments`](crate::moments) and [`samples`](crate::samples) that belongs to them;
    /// `None` without.
    pub moments: Option<PathBuf>,
}

impl Observations {
    /// The router norms of all layers, or `None` if one of them has none.
    pub fn router_norms(&self) -> Option<Vec<f64>> {
        self.layers.iter().map(|layer| layer.router_norm).collect()
    }

    /// The second moments of what the experts were given.
    ///
    /// # Errors
    /// [`Error::Invalid`] if they were not asked for.
    pub fn moments(&self) -> Result<Moments> {
        let whole = self.layers.iter().all(|layer| layer.spectra.is_some());
        let folder = self.moments.as_ref().filter(|_| whole).ok_or_else(|| {
            Error::Invalid(
                "whitened factors need the moments of what experts are given, and these \
                 observations have none; observe with `--moments`"
                    .to_owned(),
            )
        })?;
        Ok(Moments::of(folder, &self.fingerprint))
    }

    /// What errors cost in layer `layer`, to fit factors by.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it was not asked for; if the file is damaged or belongs to other
    /// observations.
    pub fn damage(&self, config: &ModelConfig, layer: usize) -> Result<LayerDamage> {
        let folder = self.moments.as_ref().ok_or_else(|| {
            Error::Invalid(
                "fitted factors need to know what errors of experts cost, and these observations do not \
                 tell; observe with `--damage fisher`"
                    .to_owned(),
            )
        })?;
        LayerDamage::open(config, folder, layer, &self.fingerprint)
    }

    /// Some of what the experts of layer `layer` were given.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it was not asked for; if the file is damaged or belongs to other observations.
    pub(crate) fn inputs(&self, config: &ModelConfig, layer: usize) -> Result<Inputs> {
        Inputs::open(config, self.moments.as_deref(), layer, &self.fingerprint)
    }

    /// The sampled tokens of layer `layer`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if they were not asked for; if the file is damaged or belongs to other
    /// observations.
    pub fn sample(&self, config: &ModelConfig, layer: usize) -> Result<Sample> {
        let path = self.moments.as_ref().map(|f| samples::file(f, layer));
        let path = path.filter(|path| path.is_file()).ok_or_else(|| {
            Error::Invalid(format!(
                "the method needs a sample of tokens, and layer {layer} was observed without; \
                 observe with `--samples`"
            ))
        })?;
        Sample::open(path, &self.fingerprint, &config.moe, self.tokens)
    }

    /// Checks that these are observations of a model like `config`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the layer that is missing, has another number of experts, or
    /// holds impossible values.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let found: Vec<usize> = self.layers.iter().map(|layer| layer.layer).collect();
        let expected: Vec<usize> = config.moe_layers().collect();
        if found != expected {
            return Err(Error::Invalid(format!(
                "the observations are of layers {found:?}, the model has experts in layers \
                 {expected:?}; observe this model"
            )));
        }
        let experts = config.moe.num_experts;
        for layer in &self.layers {
            if layer.gate_mass.len() != experts {
                return Err(Error::Invalid(format!(
                    "layer {} of the observations has {} experts, the model {experts}; observe \
                     this model",
                    layer.layer,
                    layer.gate_mass.len()
                )));
            }
            layer.validate().map_err(Error::Invalid)?;
        }
        Ok(())
    }
}
