//! Methods that drop whole experts by a score: pruning (the router does as if it had no row for a
//! dropped expert), and MoNE, which puts the mean of its outputs in its place.
//!
//! Every layer drops the same number of experts; what is left over to meet the ratio is dropped one a
//! layer, where the next expert has the smallest share of its layer's score.

use lightmoe_models::config::ModelConfig;
use lightmoe_models::random::stream;
use rand::Rng;

use super::{LightmoeOptions, MethodName, finish};
use crate::observations::{LayerObservations, Observations};
use crate::plan::{LayerPlan, Plan, SlotForm, SlotPlan};
use crate::{Error, Result};

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    method: MethodName,
    options: &LightmoeOptions,
) -> Result<Plan> {
    let scores = observations.layers.iter().map(|observed| {
        scores(method, observed, options.seed).ok_or_else(|| {
            Error::Invalid(format!(
                "`{method}` needs what the experts gave, and layer {} was observed without; give \
                 observations that `observe` wrote",
                observed.layer
            ))
        })
    });
    let scores: Vec<Vec<f64>> = scores.collect::<Result<_>>()?;
    let gain = config.expert_parameters() - constant(config, method);
    let wanted = ratio * config.parameters().total() as f64 / gain as f64;
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
    // The trainable parameters of adapters on all experts, on those that are left.
    let widest = config.hidden_size.min(config.moe.intermediate_size);
    let rank = options.rank * experts * layers.len() / kept.max(1);
    let options = LightmoeOptions {
        rank: rank.min(widest),
        groups: 0,
        ..*options
    };
    let mut plan = finish(config, method, &options, layers);
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

/// How much each expert of a layer matters; `None` where that was not observed. An expert that no
/// token chose has score zero.
fn scores(method: MethodName, observed: &LayerObservations, seed: u64) -> Option<Vec<f64>> {
    let outputs = observed.outputs.as_ref();
    let counts = || observed.selections.iter().map(|&n| n.max(1) as f64);
    Some(match method {
        MethodName::Frequency => observed.selections.iter().map(|&n| n as f64).collect(),
        MethodName::Random => {
            let mut rng = stream(seed, &format!("prune/{}", observed.layer));
            observed.gate_mass.iter().map(|_| rng.random()).collect()
        }
        MethodName::Ean => outputs?.norm.clone(),
        // The flatter the weights, the less they say.
        MethodName::Aimer => outputs?.flatness.iter().map(|f| 1.0 - f.min(1.0)).collect(),
        MethodName::Mone => {
            let outputs = outputs?;
            let width = outputs.sum.len() / outputs.norm.len();
            let deviation = outputs.sum.chunks(width).zip(&outputs.square).zip(counts());
            let deviation = deviation.map(|((sum, square), n)| {
                let mean: f64 = sum.iter().map(|s| (s / n).powi(2)).sum();
                (square / n - mean).max(0.0).sqrt()
            });
            // The mean gate is the same sum over another count, the tokens of the layer.
            deviation
                .zip(&observed.gate_mass)
                .map(|(d, gate)| d * gate)
                .collect()
        }
        _ => outputs?
            .gated
            .iter()
            .zip(counts())
            .map(|(sum, n)| sum / n)
            .collect(),
    })
}

/// How many experts each layer drops, `total` in all.
fn counts(scores: &[Vec<f64>], total: usize) -> Vec<usize> {
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
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| shares[a].total_cmp(&shares[b]).then(a.cmp(&b)));
    let mut counts = vec![each; scores.len()];
    order
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
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(a.cmp(&b)));
    let dropped = match method {
        MethodName::Mone => SlotForm::Constant,
        _ => SlotForm::Removed,
    };
    let slot = |(expert, &score): (usize, &f64)| SlotPlan {
        expert,
        form: match order[..count].contains(&expert) {
            true => dropped,
            false => SlotForm::Dense,
        },
        score,
    };
    LayerPlan {
        layer: observed.layer,
        threshold: None,
        router_norm: observed.router_norm,
        groups: 0,
        slots: scores.iter().enumerate().map(slot).collect(),
    }
}
