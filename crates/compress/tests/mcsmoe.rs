//! MC-SMoE: what its plan leaves and trains, and what is built of it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{DType, Tensor};
use common::{inputs, observations, olmoe, options, random_checkpoint, small};
use lightmoe_compress::methods::{MethodName, Target, plan};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::{Plan, SlotForm};
use lightmoe_compress::size::{active_parameters, adapter_parameters, base_parameters};
use lightmoe_compress::{build, estimate, whole_bases};
use lightmoe_models::{Checkpoint, FactoredBases, ModelConfig, multiplied_out, names};
use tempfile::TempDir;

const METHOD: MethodName = MethodName::Mcsmoe;

/// Observations that merging can do with.
fn seen(config: &ModelConfig) -> Observations {
    let mut seen = observations(config, 1);
    for layer in &mut seen.layers {
        layer.logit_gram = layer.similarity.clone();
    }
    seen
}

fn planned(config: &ModelConfig, ratio: f64) -> lightmoe_compress::Result<Plan> {
    plan(
        config,
        &seen(config),
        Target::Ratio(ratio),
        METHOD,
        &options(4, 0),
    )
}

/// Half of the saving is merged, the rest is low rank; every expert has a base, and those of a layer are
/// alike.
#[test]
fn a_plan_meets_the_ratio_by_both_stages() {
    for config in [olmoe(), small(3, 8)] {
        let slots = config.moe.num_experts * config.num_moe_layers();
        let expert = config.expert_parameters();
        for ratio in [0.1, 0.25, 0.5] {
            let plan = planned(&config, ratio).unwrap();
            plan.check_model(&config).unwrap();
            let off = (plan.ratio.achieved - ratio).abs();
            // Half of a rank of a layer without any merged expert.
            let step = adapter_parameters(&config, config.moe.num_experts) as f64;
            assert!(
                off <= 0.5 * step / config.parameters().total() as f64,
                "{ratio}: off by {off}"
            );
            let bases: usize = plan.layers.iter().map(|layer| layer.groups).sum();
            let merged = (slots - bases) as f64 * expert as f64;
            let half = 0.5 * ratio * config.parameters().total() as f64;
            assert!(merged <= half && merged > half - expert as f64, "{ratio}");
            let mut trained = 0;
            for layer in &plan.layers {
                let shape = layer.factored.unwrap();
                let form = |slot: &SlotForm| {
                    matches!(
                        slot,
                        SlotForm::Adapted {
                            group: Some(_),
                            rank: 0,
                            ..
                        }
                    )
                };
                assert!(layer.slots.iter().all(|slot| form(&slot.form)));
                assert!(shape.rank.abs_diff(plan.settings.rank) <= 1);
                trained += layer.groups as u64 * (expert + adapter_parameters(&config, shape.rank));
            }
            assert_eq!(plan.parameters.trained, trained);
            let forecast = estimate(&config, ratio, METHOD, &options(4, 0)).unwrap();
            let relative = forecast.parameters_trained as f64 / trained as f64;
            assert!((relative - 1.0).abs() < 0.02, "{relative}");
        }
    }
}

/// A tenth of the rows, by hand for small sizes: 2 of 16 of gate and up, 3 of 32 of down.
#[test]
fn a_base_counts_factors_rows_and_places() {
    let config = small(2, 8);
    let plan = planned(&config, 0.5).unwrap();
    let shape = plan.layers[0].factored.unwrap();
    assert_eq!((shape.gate_up_rows, shape.down_rows), (2, 3));
    let by_hand = 3 * shape.rank as u64 * (32 + 16) + 2 * (2 * 32 + 2) + (3 * 16 + 3);
    assert_eq!(base_parameters(&config, Some(&shape)), by_hand);
    let bases = plan
        .layers
        .iter()
        .map(|layer| layer.groups as u64 * base_parameters(&config, layer.factored.as_ref()));
    let rest = config.parameters().total() - config.parameters().routed_experts;
    assert_eq!(plan.parameters.after, rest + bases.sum::<u64>());
    let active = active_parameters(&config, &plan.layers, &seen(&config));
    let rest = config.active_parameters() - 2 * 2 * config.expert_parameters();
    let bases = plan
        .layers
        .iter()
        .map(|layer| 2 * base_parameters(&config, layer.factored.as_ref()));
    assert_eq!(active, rest + bases.sum::<u64>());
}

#[test]
fn what_cannot_be_reached_is_refused_before_and_after_observing() {
    let config = olmoe();
    let before = estimate(&config, 0.95, METHOD, &options(4, 0)).unwrap_err();
    let message = before.to_string();
    assert_eq!(message, planned(&config, 0.95).unwrap_err().to_string());
    for word in ["no rank", "lower ratio"] {
        assert!(message.contains(word), "{message}");
    }
    // What the message names is the edge.
    let most: f64 = message
        .split_whitespace()
        .find_map(|word| word.parse().ok().filter(|most| (0.5..0.95).contains(most)))
        .unwrap();
    estimate(&config, most - 0.001, METHOD, &options(4, 0)).unwrap();
    estimate(&config, most + 0.001, METHOD, &options(4, 0)).unwrap_err();
}

#[test]
fn damaged_plans_are_refused() {
    let config = small(2, 8);
    let good = planned(&config, 0.5).unwrap();
    let shape = good.layers[1].factored.unwrap();
    for factored in [
        FactoredBases { rank: 0, ..shape },
        FactoredBases { rank: 17, ..shape },
        FactoredBases {
            gate_up_rows: 17,
            ..shape
        },
        FactoredBases {
            down_rows: usize::MAX,
            ..shape
        },
    ] {
        let mut plan = good.clone();
        plan.layers[1].factored = Some(factored);
        let message = plan.validate().unwrap_err().to_string();
        assert!(message.contains("layer 1: factored bases"), "{message}");
    }
    let mut plan = good.clone();
    plan.layers[0].groups = 0;
    for slot in &mut plan.layers[0].slots {
        slot.form = SlotForm::Dense;
    }
    let message = plan.check_model(&config).unwrap_err().to_string();
    assert!(message.contains("without a slot"), "{message}");
}

fn built(checkpoint: &Checkpoint, plan: &Plan, folder: &TempDir) -> Checkpoint {
    let path = folder.path().join("built");
    let _ = std::fs::remove_dir_all(&path);
    build(&inputs(checkpoint, plan, 0), &path, &mut |_, _| true).unwrap();
    Checkpoint::open(&path).unwrap()
}

/// The largest difference, as a share of the largest number.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let largest = |t: &Tensor| {
        t.abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
    };
    largest(&(a - b).unwrap()) / largest(b)
}

/// With full rank, or all rows, the built model is the merged one; in bf16 too, where places of rows stay
/// whole numbers.
#[test]
fn all_ranks_or_all_rows_reproduce_the_merge() {
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 0.02)] {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = random_checkpoint(&small(2, 8), dtype, 3, &folder);
        let mut plan = planned(checkpoint.config(), 0.3).unwrap();
        let matrices = |plan: &Plan| -> Vec<Tensor> {
            let built = built(&checkpoint, plan, &folder);
            let shapes = [[16, 32], [16, 32], [32, 16]];
            let each = names::PROJECTIONS.into_iter().zip(shapes);
            each.flat_map(|(p, shape)| [0, 5].map(|e| multiplied_out(&built, (1, e), p, shape)))
                .collect::<Result<_, _>>()
                .unwrap()
        };
        let furthest = |a: &[Tensor], b: &[Tensor]| {
            let each = a.iter().zip(b).map(|(a, b)| distance(a, b));
            each.fold(0.0, f32::max)
        };
        let built = built(&checkpoint, &plan, &folder);
        assert_eq!(built.parameters(), plan.parameters.after);
        built.check().unwrap();
        let low = matrices(&plan);
        let shape = plan.layers[1].factored.take().unwrap();
        let merged = matrices(&plan);
        assert!(furthest(&low, &merged) > 0.1);
        for factored in [
            FactoredBases { rank: 16, ..shape },
            FactoredBases {
                rank: 1,
                gate_up_rows: 16,
                down_rows: 32,
            },
        ] {
            plan.layers[1].factored = Some(factored);
            let off = furthest(&matrices(&plan), &merged);
            assert!(off < tolerance, "{dtype:?}, {factored:?}: {off}");
        }
    }
}

/// What recovery begins with is what a plain merge would hold, and what is built is the best factors of it
/// with the rows that these leave most of.
#[test]
fn bases_are_merged_and_then_factored() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(2, 8), DType::F32, 3, &folder);
    let plan = planned(checkpoint.config(), 0.5).unwrap();
    let low = built(&checkpoint, &plan, &folder);
    let whole = whole_bases(&inputs(&checkpoint, &plan, 0), 1).unwrap();
    let mut merged = plan.clone();
    merged.layers[1].factored = None;
    let merged = built(&checkpoint, &merged, &folder);
    for (projection, stack) in whole.named() {
        let (_, out, width) = stack.dims3().unwrap();
        for group in 0..plan.layers[1].groups {
            let base = stack.get(group).unwrap();
            let name = names::base(1, group, projection);
            let plain = merged.tensor(&name, &[out, width]).unwrap();
            assert!(distance(&base, &plain) < 1e-6);
        }
        // Rows that are kept are exact, the others are not.
        let expert = plan.layers[1].members(0).next().unwrap();
        let made = multiplied_out(&low, (1, expert), projection, [out, width]).unwrap();
        let rest = (stack.get(0).unwrap() - made).unwrap().abs().unwrap();
        let rest = rest.sum(1).unwrap().to_vec1::<f32>().unwrap();
        let exact = rest.iter().filter(|sum| **sum < 1e-4).count();
        assert_eq!(exact, plan.layers[1].factored.unwrap().rows(projection));
    }
    let message = whole_bases(&inputs(&checkpoint, &plan, 0), 7).unwrap_err();
    assert!(message.to_string().contains("layer 7"));
}
