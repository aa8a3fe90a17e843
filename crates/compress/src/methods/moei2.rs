//! MoE-I² (arXiv 2411.01016): first whole experts go, more of them in layers that miss them less, and
//! which ones a search over sets decides; then those that stay become low-rank factors of their
//! weights, of higher rank where they matter more.
//!
//! How much a set of experts is missed is the distance that the output of its layer moves without it,
//! over a [sample](crate::samples) of tokens; between the best few sets of each layer,
//! [whole blocks of layers](crate::reception) decide.

use lightmoe_models::config::ModelConfig;
use lightmoe_models::random::stream;
use rayon::prelude::*;

use super::svd::form;
use super::{AdapterInit, MethodName, PlanOptions, Weights, experts_to_save, finish};
use crate::Result;
use crate::evolve::least_lossy_sets;
use crate::observations::Observations;
use crate::plan::{LayerPlan, Plan, PlanSettings, SlotForm};
use crate::ranks::{Costs, proportional, smoothed};
use crate::reception::choose;
use crate::samples::Sample;

/// What the pruning saves of the whole.
const PRUNED_SHARE: f64 = 0.5;
/// One of so many experts is pruned at most.
const PRUNED_MOST: usize = 4;
/// Sets of a layer between which its block decides: `K` of the paper.
pub const CANDIDATES: usize = 3;
/// The smallest importance of a layer, as a share of the largest, so that the inverse is finite.
const LEAST_IMPORTANCE: f64 = 1e-9;

/// Plans to save the share `ratio` of all parameters. Without weights no block can decide, and each
/// layer loses the set that is best for itself.
pub(super) fn plan(
    config: &ModelConfig,
    weights: Option<Weights<'_>>,
    observations: &Observations,
    ratio: f64,
    options: &PlanOptions,
) -> Result<Plan> {
    let experts = config.moe.num_experts;
    let importance: Vec<Vec<f64>> = observations
        .layers
        .iter()
        .map(|seen| importance(&observations.sample(config, seen.layer)?, experts))
        .collect::<Result<_>>()?;
    let most = experts.saturating_sub(config.moe.top_k);
    let sums: Vec<f64> = importance.iter().map(|layer| layer.iter().sum()).collect();
    let total = pruned(config, ratio).min(most * sums.len());
    let removed = counts(&sums, total, most);
    let seen = observations.layers.iter();
    let candidates = seen.zip(removed).map(|(seen, count)| {
        let sample = observations.sample(config, seen.layer)?;
        let mut rng = stream(options.seed, &format!("moei2/{}", seen.layer));
        let loss = |set: &[usize]| sample.loss(set);
        least_lossy_sets(experts, count, CANDIDATES, &mut rng, loss)
    });
    let candidates: Vec<Vec<Vec<usize>>> = candidates.collect::<Result<_>>()?;
    let picks = match weights {
        Some(weights) => choose(
            weights.checkpoint,
            observations,
            &candidates,
            weights.progress,
        )?,
        None => {
            tracing::warn!(
                "without the model's weights, `moei2` takes the best set of each layer for itself"
            );
            vec![0; candidates.len()]
        }
    };
    let mut layers = Vec::new();
    let observed = observations.layers.iter().zip(&importance);
    for ((seen, importance), (sets, pick)) in observed.zip(candidates.iter().zip(picks)) {
        let mut layer = LayerPlan::dense(seen, importance);
        for &expert in &sets[pick] {
            layer.slots[expert].form = SlotForm::Removed { into: None };
        }
        layers.push(layer);
    }
    let rank = factorise(config, &mut layers, ratio)?;
    let left = experts * layers.len() - total;
    let options = options.for_carriers(config, left);
    let settings = PlanSettings {
        rank,
        adapters: AdapterInit::Truncated,
        trained_rank: options.trained_rank(),
        ..options.settings()
    };
    let mut plan = finish(config, MethodName::Moei2, settings, layers);
    plan.ratio.target = Some(ratio);
    Ok(plan)
}

/// How much each expert alone is missed.
fn importance(sample: &Sample, experts: usize) -> Result<Vec<f64>> {
    let missed = |expert: usize| sample.loss(&[expert]);
    (0..experts).into_par_iter().map(missed).collect()
}

/// How many experts are pruned.
fn pruned(config: &ModelConfig, ratio: f64) -> usize {
    let all = config.moe.num_experts * config.num_moe_layers();
    experts_to_save(config, PRUNED_SHARE * ratio).min(all / PRUNED_MOST)
}

/// How many experts each layer loses, `total` in all and at most `most` in one: in inverse proportion
/// to the `importance` of the layers, from 0, by largest remainder; `most` in each where `total` is more
/// than that.
pub fn counts(importance: &[f64], total: usize, most: usize) -> Vec<usize> {
    let largest = importance.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let weight = |i: &f64| largest / i.max(LEAST_IMPORTANCE * largest);
    let weights: Vec<f64> = importance.iter().map(weight).collect();
    let mut shares = vec![0.0; weights.len()];
    let mut open: Vec<usize> = (0..weights.len()).collect();
    // What a full layer cannot take goes to the others.
    loop {
        let sum: f64 = open.iter().map(|&layer| weights[layer]).sum();
        let rest = total.saturating_sub(most * (weights.len() - open.len())) as f64;
        for &layer in &open {
            shares[layer] = (rest * weights[layer] / sum).min(most as f64);
        }
        let before = open.len();
        open.retain(|&layer| shares[layer] < most as f64);
        if open.len() == before || open.is_empty() {
            break;
        }
    }
    let mut counts: Vec<usize> = shares.iter().map(|share| *share as usize).collect();
    let mut order = open;
    let remainder = |layer: usize| shares[layer].fract();
    order.sort_by(|&a, &b| remainder(b).total_cmp(&remainder(a)).then(a.cmp(&b)));
    let left = total.saturating_sub(counts.iter().sum());
    order
        .iter()
        .take(left)
        .for_each(|&layer| counts[layer] += 1);
    counts
}

/// Factorises the experts that are left, to save what pruning did not; the highest rank.
fn factorise(config: &ModelConfig, layers: &mut [LayerPlan], ratio: f64) -> Result<usize> {
    let costs = Costs::of_expert(config);
    let weights = layers.iter().map(|layer| {
        let scores: Vec<f64> = layer.slots.iter().map(|slot| slot.score).collect();
        smoothed(&scores)
    });
    let weights: Vec<f64> = weights.collect::<Vec<_>>().concat();
    let slots = layers.iter_mut().flat_map(|layer| &mut layer.slots);
    let (mut left, weights): (Vec<_>, Vec<f64>) = slots
        .zip(weights)
        .filter(|(slot, _)| slot.form == SlotForm::Dense)
        .unzip();
    let after = config.parameters().total() as f64 * (1.0 - ratio);
    let others = config.parameters().total() - config.parameters().routed_experts;
    let budget = (after.round() as u64).saturating_sub(others);
    let levels = proportional(&weights, costs, budget)?;
    for (slot, &level) in left.iter_mut().zip(&levels) {
        slot.form = form(level);
    }
    Ok(levels.into_iter().flatten().max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layers_that_matter_less_lose_more() {
        assert_eq!(counts(&[1.0, 2.0, 4.0], 7, 8), [4, 2, 1]);
        // 5.71, 2.86 and 1.43: the two largest remainders round up.
        assert_eq!(counts(&[1.0, 2.0, 4.0], 10, 8), [6, 3, 1]);
        // What the first cannot take, the others share as they would.
        assert_eq!(counts(&[1.0, 2.0, 4.0], 10, 4), [4, 4, 2]);
        assert_eq!(counts(&[0.0, 1.0], 3, 8), [3, 0]);
        assert_eq!(counts(&[0.0, 0.0], 3, 8), [2, 1]);
        assert_eq!(counts(&[1.0, 1.0], 9, 4), [4, 4]);
    }

    proptest! {
        #[test]
        fn counts_add_up_and_fall_with_importance(
            importance in prop::collection::vec(0.0f64..10.0, 1..9), total in 0usize..40, most in 0usize..9,
        ) {
            let counts = counts(&importance, total, most);
            prop_assert_eq!(counts.iter().sum::<usize>(), total.min(most * importance.len()));
            prop_assert!(counts.iter().all(|&n| n <= most));
            for (a, n) in importance.iter().zip(&counts) {
                for (b, m) in importance.iter().zip(&counts) {
                    prop_assert!(a >= b || n >= m, "{:?} {:?}", importance, counts);
                }
            }
        }
    }
}
