//! REAM (arXiv 2604.04356): the experts of highest REAP score stay, and the others are merged into
//! those that are most like them by what they give and by when they are chosen; the router forgets
//! those that were merged.
//!
//! Few large groups: the best expert takes its most similar others first, up to a limit, then the next
//! best, until none is left. Neurons are aligned by the weights alone (the official code adds their
//! activations); scores weight the mean. Layers are compressed one after the other, each on what the
//! compressed ones before it give, where `observe` is told so ([`successor`]).

use candle_core::Tensor;
use lightmoe_models::config::ModelConfig;
use lightmoe_models::{Bank, Layer, Projections};

use super::drop::reap_scores;
use super::{BaseInit, MethodName, PlanOptions, finish, order};
use crate::merge::merge;
use crate::observations::{LayerObservations, Observations};
use crate::plan::{LayerPlan, Plan, PlanSettings, SlotForm};
use crate::{Error, Result};

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    options: &PlanOptions,
) -> Result<Plan> {
    let layers = observations.layers.iter().enumerate();
    let layers = layers.map(|(i, observed)| layer(observed, dropped(config, ratio, i)?));
    let layers: Vec<LayerPlan> = layers.collect::<Result<_>>()?;
    let left: usize = layers.iter().map(|l| l.slots.len() - l.replaced()).sum();
    let options = options.for_carriers(config, left);
    let settings = PlanSettings {
        base: BaseInit::Aligned,
        ..options.settings()
    };
    let mut plan = finish(config, MethodName::Ream, settings, layers);
    plan.ratio.target = Some(ratio);
    Ok(plan)
}

/// How many experts the `i`-th layer with experts drops: known before any layer was observed, so what
/// is left over to meet the ratio falls on the first layers.
fn dropped(config: &ModelConfig, ratio: f64, i: usize) -> Result<usize> {
    let layers = config.num_moe_layers();
    let total = super::experts_to_save(config, ratio);
    let count = total / layers + usize::from(i < total % layers);
    match config.moe.num_experts < config.moe.top_k + count {
        true => Err(Error::Invalid(format!(
            "a ratio of {ratio} drops {count} of {} experts in a layer, and a token chooses {}; \
             choose a lower ratio",
            config.moe.num_experts, config.moe.top_k
        ))),
        false => Ok(count),
    }
}

/// Merges all but the best experts of a layer into those.
fn layer(observed: &LayerObservations, count: usize) -> Result<LayerPlan> {
    let scores = reap_scores(observed)?;
    let experts = scores.len();
    let outputs = observed.outputs()?;
    let counts = observed.selections.iter().map(|&n| n.max(1) as f64);
    let width = outputs.weighted.len() / experts;
    let mean: Vec<f64> = outputs
        .weighted
        .chunks(width)
        .zip(counts)
        .flat_map(|(sum, n)| sum.iter().map(move |s| s / n))
        .collect();
    let similarity = similarity(&mean, &observed.logit_cosines()?, experts);
    // The paper's groups of 16 where 32 experts go, and of 32 where 64 go.
    let owners = owners(&similarity, &scores, experts - count, (count / 2).max(2));
    let mut layer = LayerPlan::dense(observed, &scores);
    for (slot, owner) in layer.slots.iter_mut().zip(owners) {
        if slot.expert != owner {
            slot.form = SlotForm::Removed { into: Some(owner) };
        }
    }
    Ok(layer)
}

/// How alike experts are, from 0 to 1: the mean of the cosine of their `mean` gated outputs
/// (`[E * H]`), and of how near the directions of their router logits are.
pub fn similarity(mean: &[f64], logit_cosines: &[f64], experts: usize) -> Vec<f64> {
    let width = mean.len() / experts.max(1);
    let row = |i: usize| &mean[i * width..(i + 1) * width];
    let dot = |a: usize, b: usize| row(a).iter().zip(row(b)).map(|(x, y)| x * y).sum::<f64>();
    let output = |a: usize, b: usize| {
        let norms = (dot(a, a) * dot(b, b)).sqrt();
        let cosine = if norms > 0.0 { dot(a, b) / norms } else { 0.0 };
        0.5 * (cosine + 1.0)
    };
    // Of unit columns, the distance follows from the cosine.
    let apart: Vec<f64> = logit_cosines
        .iter()
        .map(|c| (2.0 - 2.0 * c).max(0.0).sqrt())
        .collect();
    let furthest = apart.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    (0..experts * experts)
        .map(|i| {
            let gate = 1.0 - apart[i] / furthest;
            0.5 * (output(i / experts, i % experts) + gate)
        })
        .collect()
}

/// The expert that each expert is merged into: itself for the `keep` of highest score. From the best
/// on, each takes its `group - 1` most similar free others; any left at the end join the most similar.
pub fn owners(similarity: &[f64], scores: &[f64], keep: usize, group: usize) -> Vec<usize> {
    let experts = scores.len();
    let best = order(scores);
    let (kept, mut free) = (&best[..keep], best[keep..].to_vec());
    free.sort_unstable();
    let alike = |a: usize, b: usize| similarity[a * experts + b];
    let mut owner: Vec<usize> = (0..experts).collect();
    for &centroid in kept {
        free.sort_by(|&a, &b| {
            let nearer = alike(centroid, b).total_cmp(&alike(centroid, a));
            nearer.then(a.cmp(&b))
        });
        let taken = free.len().min(group - 1);
        free.drain(..taken)
            .for_each(|expert| owner[expert] = centroid);
    }
    for expert in free {
        let nearest = kept.iter().copied().reduce(|a, b| {
            if alike(expert, b) > alike(expert, a) {
                b
            } else {
                a
            }
        });
        owner[expert] = nearest.unwrap_or(expert);
    }
    owner
}

/// Merges the experts of each layer once it was observed, as [`plan`] of the same observations does:
/// for [`crate::ObserveOptions::successor`].
pub fn successor(
    config: &ModelConfig,
    ratio: f64,
) -> impl Fn(&LayerObservations, &mut Layer) -> Result<()> + use<> {
    let config = config.clone();
    move |observed, of_model| {
        let place = config.moe_layers().position(|l| l == observed.layer);
        let plan = layer(observed, dropped(&config, ratio, place.unwrap_or(0))?)?;
        let Some(bank) = of_model.bank_mut() else {
            return Ok(());
        };
        let dense = bank.dense.as_ref().ok_or_else(|| {
            Error::Invalid("only dense experts can be merged; give the original model".to_owned())
        })?;
        let weights = |expert: usize| -> Result<[Tensor; 3]> {
            let [gate, up, down] = [&dense.gate, &dense.up, &dense.down].map(|w| w.get(expert));
            Ok([gate?, up?, down?])
        };
        let layout = plan.layout();
        let kept = layout.of_form(lightmoe_models::SlotLayout::Dense);
        let merged = kept.map(|expert| {
            let sources = plan.sources(expert);
            let scores: Vec<f64> = sources.iter().map(|&e| plan.slots[e].score).collect();
            merge(&weights, &sources, &scores, true)
        });
        let merged: Vec<[Tensor; 3]> = merged.collect::<Result<_>>()?;
        let stack = |i: usize| Tensor::stack(&merged.iter().map(|m| &m[i]).collect::<Vec<_>>(), 0);
        *bank = Bank::of_dense(
            &layout,
            Projections {
                gate: stack(0)?,
                up: stack(1)?,
                down: stack(2)?,
            },
        );
        Ok(())
    }
}
