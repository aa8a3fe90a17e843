//! Methods that drop whole experts: worked examples, the ratio, the edges.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::DType;
use common::{observations, options, random_checkpoint, small};
use lightmoe_compress::methods::{MethodName, PlanOptions, Target, plan};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::{Plan, SlotForm};
use lightmoe_compress::{BuildInputs, build};
use lightmoe_models::{Checkpoint, Decoder, LanguageModel, ModelConfig, Tokens, names};

const LAYERS: usize = 3;
const EXPERTS: usize = 8;
const DROPPING: [MethodName; 6] = [
    MethodName::Reap,
    MethodName::Frequency,
    MethodName::Ean,
    MethodName::Random,
    MethodName::Aimer,
    MethodName::Mone,
];

fn planned(
    config: &ModelConfig,
    seen: &Observations,
    ratio: f64,
    method: MethodName,
) -> lightmoe_compress::Result<Plan> {
    plan(config, seen, Target::Ratio(ratio), method, &options(2, 0))
}

/// The experts that a layer of the plan drops.
fn dropped(plan: &Plan, layer: usize) -> Vec<usize> {
    let slots = plan.layers[layer].slots.iter();
    slots
        .filter(|s| s.form.is_replaced())
        .map(|s| s.expert)
        .collect()
}

/// Each method drops the experts that its formula puts last.
#[test]
fn the_scores_are_those_of_the_papers() {
    let config = small(LAYERS, EXPERTS);
    let mut seen = observations(&config, 3);
    // Three experts a layer, by the ratio of the whole.
    let ratio = 9.0 * config.expert_parameters() as f64 / config.parameters().total() as f64;
    let h = config.hidden_size;
    for layer in &mut seen.layers {
        layer.selections = vec![10, 20, 0, 40, 50, 60, 70, 80];
        let outputs = layer.outputs.as_mut().unwrap();
        // Means of gate times norm: 5, .5, 0, 2.5, .2, 10, .1, 1.
        outputs.gated = vec![50.0, 10.0, 0.0, 100.0, 10.0, 600.0, 7.0, 80.0];
        outputs.norm = vec![9.0, 8.0, 0.0, 6.0, 5.0, 4.0, 3.0, 2.0];
        outputs.flatness = vec![0.7, 0.8, 0.71, 0.79, 0.72, 0.81, 0.73, 0.74];
        // Squares of the deviation: 4, 3, 0 (unseen), 2, 1, .5, 6, 7, about means of 1.
        outputs.sum = vec![0.0; EXPERTS * h];
        let deviations = [4.0, 3.0, 0.0, 2.0, 1.0, 0.5, 6.0, 7.0];
        outputs.square = vec![0.0; EXPERTS];
        for (e, deviation) in deviations.into_iter().enumerate() {
            let n = layer.selections[e] as f64;
            outputs.sum[e * h] = n;
            outputs.square[e] = n * (1.0 + deviation);
        }
        layer.gate_mass = vec![1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.1, 1.0];
    }
    for (method, expected) in [
        (MethodName::Reap, [2, 4, 6]),
        (MethodName::Frequency, [0, 1, 2]),
        (MethodName::Ean, [2, 6, 7]),
        (MethodName::Aimer, [1, 3, 5]),
        // The root of .5, of 6 times a tenth, and zero.
        (MethodName::Mone, [2, 5, 6]),
    ] {
        let plan = planned(&config, &seen, ratio, method).unwrap();
        for layer in 0..LAYERS {
            assert_eq!(dropped(&plan, layer), expected, "{method}");
        }
        let form = match method {
            MethodName::Mone => SlotForm::Constant,
            _ => SlotForm::Removed { into: None },
        };
        assert_eq!(
            plan.layers[0].slots[2].form == form,
            method != MethodName::Aimer
        );
    }
    // At random: another seed drops others.
    let random = |seed| {
        let options = PlanOptions {
            seed,
            ..options(2, 0)
        };
        let target = Target::Ratio(ratio);
        let plan = plan(&config, &seen, target, MethodName::Random, &options).unwrap();
        (0..LAYERS).map(|l| dropped(&plan, l)).collect::<Vec<_>>()
    };
    assert_eq!(random(1), random(1));
    assert_ne!(random(1), random(2));
}

/// The ratio is met as closely as whole experts allow, and the layers differ by at most one.
#[test]
fn the_ratio_is_met() {
    let config = small(LAYERS, EXPERTS);
    let seen = observations(&config, 1);
    let step = config.expert_parameters() as f64 / config.parameters().total() as f64;
    for method in DROPPING {
        for ratio in [0.1, 0.23, 0.3, 0.37] {
            let plan = planned(&config, &seen, ratio, method).unwrap();
            plan.check_model(&config).unwrap();
            let distance = (plan.ratio.achieved - ratio).abs();
            assert!(
                distance <= 0.51 * step,
                "{method}: {} of {ratio}",
                plan.ratio.achieved
            );
            let counts: Vec<usize> = (0..LAYERS).map(|l| dropped(&plan, l).len()).collect();
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(most - least <= 1, "{counts:?}");
            // The adapters of all experts, on those that are left.
            let kept = LAYERS * EXPERTS - counts.iter().sum::<usize>();
            assert_eq!(plan.settings.kept_rank, 2 * LAYERS * EXPERTS / kept);
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let config = small(LAYERS, EXPERTS);
    let mut seen = observations(&config, 1);
    let total = config.parameters();
    let all = total.routed_experts as f64 / total.total() as f64;
    let refused = |seen: &Observations, ratio, method, words: &[&str]| {
        let message = planned(&config, seen, ratio, method)
            .unwrap_err()
            .to_string();
        for word in words {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
    };
    // Two of eight experts are needed for a top-k of two.
    let step = config.expert_parameters() as f64 / total.total() as f64;
    planned(&config, &seen, all - 6.0 * step, MethodName::Reap).unwrap();
    refused(
        &seen,
        all - 4.0 * step,
        MethodName::Reap,
        &["7 of 8", "chooses 2"],
    );
    refused(&seen, 0.1 * step, MethodName::Reap, &["drops no expert"]);
    let threshold = Target::Threshold(0.3);
    let message = plan(&config, &seen, threshold, MethodName::Ean, &options(2, 0));
    assert!(message.unwrap_err().to_string().contains("ratio"));
    seen.layers[1].outputs = None;
    refused(&seen, 0.3, MethodName::Reap, &["layer 1", "observe"]);
    planned(&config, &seen, 0.3, MethodName::Frequency).unwrap();
}

fn built(
    checkpoint: &Checkpoint,
    plan: &Plan,
    seen: Option<&Observations>,
) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("built");
    let inputs = BuildInputs {
        checkpoint,
        plan,
        observations: seen,
        seed: 0,
    };
    build(&inputs, &path, &mut |_, _| true).unwrap();
    let built = Checkpoint::open(&path).unwrap();
    (folder, built)
}

/// What is kept is kept byte for byte, what is removed is never chosen, and a constant is the mean.
#[test]
fn a_built_model_has_what_the_plan_says() {
    let folder = tempfile::tempdir().unwrap();
    let config = small(LAYERS, EXPERTS);
    let original = random_checkpoint(&config, DType::BF16, 3, &folder);
    let seen = observations(&config, 2);
    for method in [MethodName::Reap, MethodName::Mone] {
        let plan = planned(&config, &seen, 0.3, method).unwrap();
        let (_folder, built) = built(&original, &plan, Some(&seen));
        assert_eq!(built.parameters(), plan.parameters.after, "{method}");
        let shape = [config.moe.intermediate_size, config.hidden_size];
        for layer in 0..LAYERS {
            for slot in &plan.layers[layer].slots {
                let name = names::expert(layer, slot.expert, "gate_proj");
                let of =
                    |c: &Checkpoint| c.tensor(&name, &shape).map(|t| t.to_vec2::<f32>().unwrap());
                match slot.form {
                    SlotForm::Dense => assert_eq!(of(&built).unwrap(), of(&original).unwrap()),
                    _ => assert!(of(&built).is_err()),
                }
                if slot.form == SlotForm::Constant {
                    let name = names::constant(layer, slot.expert);
                    let ours = built.tensor(&name, &[config.hidden_size]).unwrap();
                    let ours = ours.to_vec1::<f32>().unwrap();
                    let outputs = seen.layers[layer].outputs.as_ref().unwrap();
                    let count = seen.layers[layer].selections[slot.expert].max(1) as f64;
                    let sums = &outputs.sum[slot.expert * config.hidden_size..];
                    for (a, s) in ours.iter().zip(sums) {
                        assert!((f64::from(*a) - s / count).abs() <= 0.005 * (s / count).abs());
                    }
                }
            }
        }
        let model = Decoder::load(&built).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| i * 7 % 64).collect();
        let each = &mut |layer: usize,
                         _: &candle_core::Tensor,
                         routing: Option<&lightmoe_models::Routing>| {
            for &expert in &routing.unwrap().chosen {
                let form = plan.layers[layer].slots[expert as usize].form;
                assert_ne!(form, SlotForm::Removed { into: None }, "{method}");
            }
            Ok(())
        };
        let hidden = model.forward(Tokens::one(&ids), None, each).unwrap();
        let logits = model.logits(&hidden).unwrap().flatten_all().unwrap();
        assert!(
            logits
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .all(|v| v.is_finite())
        );
    }
    // Means are nowhere but in observations.
    let plan = planned(&config, &seen, 0.3, MethodName::Mone).unwrap();
    let inputs = BuildInputs {
        checkpoint: &original,
        plan: &plan,
        observations: None,
        seed: 0,
    };
    let path = folder.path().join("out");
    let refused = build(&inputs, &path, &mut |_, _| true)
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("observations") && !path.exists(),
        "{refused}"
    );
}
