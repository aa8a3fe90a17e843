//! M-SMoE (arXiv 2310.01334): the experts that the model uses most stay apart as dominants; every other
//! one is merged into the dominant of its layer whose router logits are most like its own, after its
//! neurons were brought into the same order. The router keeps its outputs.
//!
//! Usage is scaled so that each layer's most used expert counts 1, and the dominants are the most used
//! of the whole model: so every layer keeps one at least, and layers with even usage keep more. The
//! official code aligns all experts of a layer to its first; here each is aligned to its dominant, which
//! only matters where an assignment is not consistent between three experts.

use lightmoe_models::config::ModelConfig;

use super::{MethodName, PlanOptions, merged, order, usage};
use crate::observations::{LayerObservations, Observations};
use crate::plan::{LayerPlan, Plan};
use crate::{Error, Result};

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    options: &PlanOptions,
) -> Result<Plan> {
    let drop = super::experts_to_save(config, ratio);
    let layers = clustered(config, observations, drop, ratio)?.into_iter();
    let layers = layers.map(|(mut layer, clusters)| {
        layer.merge(&clusters);
        layer
    });
    let layers = layers.collect();
    Ok(merged(config, MethodName::Msmoe, options, layers, ratio))
}

/// Each layer as it is, and its experts by the dominant that they are merged into, which comes first;
/// `drop` experts of the model are none. `ratio` is what errors name.
pub(super) fn clustered(
    config: &ModelConfig,
    observations: &Observations,
    drop: usize,
    ratio: f64,
) -> Result<Vec<(LayerPlan, Vec<Vec<usize>>)>> {
    let scores: Vec<Vec<f64>> = observations.layers.iter().map(usage).collect();
    let (experts, slots) = (
        config.moe.num_experts,
        scores.len() * config.moe.num_experts,
    );
    if slots - drop.min(slots) < scores.len() {
        return Err(Error::Invalid(format!(
            "a ratio of {ratio} leaves {} experts for {} layers, and each needs one; choose a lower \
             ratio",
            slots - drop.min(slots),
            scores.len()
        )));
    }
    let scaled = |layer: &Vec<f64>| {
        let largest = layer.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        layer.iter().map(move |s| s / largest).collect::<Vec<_>>()
    };
    let most_used = order(&scores.iter().flat_map(scaled).collect::<Vec<_>>());
    let mut dominant = vec![false; slots];
    for &slot in &most_used[..slots - drop] {
        dominant[slot] = true;
    }
    let planned = observations.layers.iter().zip(&scores);
    let layers = planned
        .zip(dominant.chunks(experts))
        .map(|((observed, scores), dominant)| {
            let clusters = clusters(observed, scores, dominant)?;
            Ok((LayerPlan::dense(observed, scores), clusters))
        });
    layers.collect()
}

/// The experts of each dominant, which comes first.
fn clusters(
    observed: &LayerObservations,
    scores: &[f64],
    dominant: &[bool],
) -> Result<Vec<Vec<usize>>> {
    let similarity = observed.logit_cosines()?;
    let experts = scores.len();
    let mut clusters: Vec<Vec<usize>> = order(scores)
        .into_iter()
        .filter(|&expert| dominant[expert])
        .map(|expert| vec![expert])
        .collect();
    for expert in (0..experts).filter(|&expert| !dominant[expert]) {
        let alike = |cluster: &Vec<usize>| similarity[expert * experts + cluster[0]];
        let closest = (0..clusters.len()).reduce(|a, b| {
            // Of equals the more used.
            match alike(&clusters[b]) > alike(&clusters[a]) {
                true => b,
                false => a,
            }
        });
        if let Some(closest) = closest {
            clusters[closest].push(expert);
        }
    }
    Ok(clusters)
}
