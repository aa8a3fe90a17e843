//! Methods that drop whole experts by a score: pruning (the router does as if it had no row for a
//! dropped expert), and MoNE, which puts the mean of its outputs in its place.
//!
//! Every layer drops the same number of experts; what is left over to meet the ratio is dropped one a
//! layer, where the next expert has the smallest share of its layer's score.

use lightmoe_models::config::ModelConfig;
use lightmoe_models::random::stream;
use rand::Rng;

use super::{MethodName, PlanOptions, finish, to_save};
use crate::observations::{LayerObservations, Observations};
use crate::plan::{LayerPlan, Plan, SlotForm};
use crate::select::ascending;
use crate::{Error, Result};

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    method: MethodName,
    options: &PlanOptions,
) -> Result<Plan> {
    let layers = observations.layers.iter();
    let scores: Vec<Vec<f64>> = layers
        .map(|observed| scores(method, observed, options.seed))
        .collect::<Result<_>>()?;
    let gain = config.expert_parameters() - constant(config, method);
    let wanted = to_save(config, ratio) / gain as f64;
    let counts = counts(&scores, wanted.round() as usize);
    let (experts, top_k) = (config.moe.num_experts, config.moe.top_k);
    let most = counts.iter().copied().max().unwrap_or(0);
    // A constant may be chosen like any expert; what is gone may not.
    if most > experts || (method != MethodName::Mone && experts - most < top_k) {
        return Err(Error::Invalid(format!(
            "a ratio of {ratio} drops {most} of {experts} experts in a layer, and a token chooses \
             {top_k}; choose a lower ratio"
        )));
    }
    let layers = observations.layers.iter().zip(&scores).zip(counts);
    let layers: Vec<LayerPlan> = layers
        .map(|((observed, scores), count)| layer(method, observed, scores, count))
        .collect();
    let kept: usize = layers.iter().map(|l| experts - l.replaced()).sum();
    if kept == experts * layers.len() {
        return Err(Error::Invalid(format!(
            "a ratio of {ratio} drops no expert; choose a higher one"
        )));
    }
    let options = options.for_carriers(config, kept);
    let mut plan = finish(config, method, options.settings(), layers);
    plan.ratio.target = Some(ratio);
    Ok(plan)
}

/// Parameters that a dropped expert leaves behind.
fn constant(config: &ModelConfig, method: MethodName) -> u64 {
    match method {
        MethodName::Mone => config.hidden_size as u64,
        _ => 0,
    }
}

/// How much each expert of a layer matters. An expert that no token chose has score zero.
fn scores(method: MethodName, observed: &LayerObservations, seed: u64) -> Result<Vec<f64>> {
    Ok(match method {
        MethodName::Frequency => observed.selections.iter().map(|&n| n as f64).collect(),
        MethodName::Random => {
            let mut rng = stream(seed, &format!("prune/{}", observed.layer));
            observed.gate_mass.iter().map(|_| rng.random()).collect()
        }
        MethodName::Ean => observed.outputs()?.norm.clone(),
        // The flatter the weights, the less they say.
        MethodName::Aimer => {
            let flatness = observed.outputs()?.flatness.iter();
            flatness.map(|f| 1.0 - f.min(1.0)).collect()
        }
        MethodName::Mone => {
            let outputs = observed.outputs()?;
            let width = outputs.sum.len() / outputs.norm.len();
            let sums = outputs.sum.chunks(width).zip(&outputs.square);
            let deviation = sums.zip(counts_of(observed)).map(|((sum, square), n)| {
                let mean: f64 = sum.iter().map(|s| (s / n).powi(2)).sum();
                (square / n - mean).max(0.0).sqrt()
            });
            // The mean gate is the same sum over another count, the tokens of the layer.
            deviation
                .zip(&observed.gate_mass)
                .map(|(d, gate)| d * gate)
                .collect()
        }
        _ => reap_scores(observed)?,
    })
}

/// The mean of gate times output norm over the tokens that chose an expert (REAP).
pub(super) fn reap_scores(observed: &LayerObservations) -> Result<Vec<f64>> {
    let gated = observed.outputs()?.gated.iter();
    Ok(gated
        .zip(counts_of(observed))
        .map(|(sum, n)| sum / n)
        .collect())
}

/// How many tokens chose each expert, at least one.
fn counts_of(observed: &LayerObservations) -> impl Iterator<Item = f64> + '_ {
    observed.selections.iter().map(|&n| n.max(1) as f64)
}

/// How many experts each layer drops, `total` in all.
pub(super) fn counts(scores: &[Vec<f64>], total: usize) -> Vec<usize> {
    let layers = scores.len().max(1);
    let (each, left) = (total / layers, total % layers);
    // The share that the next expert has of its layer.
    let next = |layer: &Vec<f64>| {
        let mut sorted = layer.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let sum: f64 = layer.iter().sum();
        sorted
            .get(each)
            .map_or(f64::INFINITY, |s| s / sum.max(f64::MIN_POSITIVE))
    };
    let shares: Vec<f64> = scores.iter().map(next).collect();
    let mut counts = vec![each; scores.len()];
    ascending(&shares)
        .iter()
        .take(left)
        .for_each(|&layer| counts[layer] += 1);
    counts
}

/// A layer that drops the `count` experts of the smallest scores.
fn layer(
    method: MethodName,
    observed: &LayerObservations,
    scores: &[f64],
    count: usize,
) -> LayerPlan {
    let order = ascending(scores);
    let dropped = match method {
        MethodName::Mone => SlotForm::Constant,
        _ => SlotForm::Removed { into: None },
    };
    let mut plan = LayerPlan::dense(observed, scores);
    for &expert in &order[..count] {
        plan.slots[expert].form = dropped;
    }
    plan
}
