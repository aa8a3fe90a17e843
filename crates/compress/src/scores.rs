//! Importance scores that another tool made, as observations: a plan needs no more than these.

use std::collections::BTreeMap;
use std::path::Path;

use lightmoe_models::config::ModelConfig;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::observations::{LayerObservations, Observations, observations_error};
use crate::{Result, read};

#[derive(Deserialize)]
struct ScoreFile {
    gate_scores: BTreeMap<String, BTreeMap<String, serde_json::Value>>,
}

impl Observations {
    /// Reads importance scores that another tool made: JSON of the form
    /// `{"gate_scores": {"<layer>": {"<expert>": score}}}`, other keys ignored.
    ///
    /// Layers have the model's own numbers. There are no router norms and no similarities in
    /// such a file, so thresholds will be uniform and groups dealt out.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io) if it cannot be read; [`Observations`](crate::Error::Observations)
    /// naming the layer and expert that is missing, unknown, negative or not a number.
    pub fn from_scores(path: &Path, config: &ModelConfig) -> Result<Self> {
        let bytes = read(path)?;
        decode_scores(&bytes, config).map_err(|message| observations_error(path, message))
    }
}

fn decode_scores(bytes: &[u8], config: &ModelConfig) -> std::result::Result<Observations, String> {
    let mut file: ScoreFile = serde_json::from_slice(bytes).map_err(|e| {
        format!("expected JSON `{{\"gate_scores\": {{layer: {{expert: score}}}}}}` ({e})")
            + "; give a file of that form"
    })?;
    let experts = config.moe.num_experts;
    let mut layers = Vec::new();
    for layer in config.moe_layers() {
        let mut scores = file.gate_scores.remove(&layer.to_string()).ok_or_else(|| {
            format!("layer {layer} has no gate scores; give scores for every layer with experts")
        })?;
        let mut gate_mass = Vec::with_capacity(experts);
        for expert in 0..experts {
            let score = scores.remove(&expert.to_string()).ok_or_else(|| {
                format!(
                    "layer {layer} has no gate score for expert {expert}; give one for each of \
                     the {experts} experts"
                )
            })?;
            gate_mass.push(score.as_f64().filter(|s| *s >= 0.0).ok_or_else(|| {
                format!(
                    "layer {layer}, expert {expert}: the gate score is {score}, expected a number \
                     from 0; correct it"
                )
            })?);
        }
        if let Some((expert, _)) = scores.pop_first() {
            return Err(format!(
                "layer {layer} scores an expert `{expert}`, the model has {experts}; give the \
                 scores of this model"
            ));
        }
        let observed = LayerObservations {
            layer,
            gate_mass,
            selections: vec![0; experts],
            router_norm: None,
            similarity: None,
            logit_gram: None,
            outputs: None,
            all_outputs: None,
            spectra: None,
            damage: None,
        };
        observed.validate()?;
        layers.push(observed);
    }
    if let Some((layer, _)) = file.gate_scores.pop_first() {
        return Err(format!(
            "scores are given for layer `{layer}`, which has no experts in this model; give the \
             scores of this model"
        ));
    }
    let digest = Sha256::digest(bytes);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Observations {
        layers,
        tokens: 0,
        samples: 0,
        sensitivity: None,
        moments: None,
        fingerprint: format!("scores:{digest}"),
    })
}
