//! Merging and factorising: what must hold whatever the weights, and at the edges.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{options, random_checkpoint, small};
use lightmoe_compress::align::{permutation, permuted};
use lightmoe_compress::factor::{Gram, Metric, singular_values, whitened};
use lightmoe_compress::merge::merge;
use lightmoe_compress::methods::{MethodName, PlanOptions, Target, plan, successor};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::{Plan, SlotForm};
use lightmoe_compress::ranks::RankRule;
use lightmoe_compress::size::active_parameters;
use lightmoe_compress::{BuildInputs, ObserveOptions, Statistics, build, observe};
use lightmoe_models::{Checkpoint, Decoder, LanguageModel, Tokens};
use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const RIVALS: [MethodName; 9] = [
    MethodName::Msmoe,
    MethodName::Mcsmoe,
    MethodName::Hcsmoe,
    MethodName::Ream,
    MethodName::Svd,
    MethodName::D2moe,
    MethodName::Mobe,
    MethodName::Moei2,
    MethodName::Budget,
];

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn expert(rng: &mut ChaCha8Rng, h: usize, f: usize) -> [Tensor; 3] {
    [
        random(rng, &[f, h]),
        random(rng, &[f, h]),
        random(rng, &[h, f]),
    ]
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, as a share of the largest number.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let (a, b) = (values(a), values(b));
    let scale = b.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let differences = a.iter().zip(&b).map(|(x, y)| (x - y).abs());
    differences.fold(0.0, f32::max) / scale
}

fn run([gate, up, down]: &[Tensor; 3], x: &Tensor) -> Tensor {
    let project = |x: &Tensor, w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
    let h = (project(x, gate).silu().unwrap() * project(x, up)).unwrap();
    project(&h, down)
}

proptest! {
    #[test]
    fn an_aligned_expert_computes_the_same(seed: u64, h in 1usize..6, f in 1usize..9) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (reference, own) = (expert(&mut rng, h, f), expert(&mut rng, h, f));
        let aligned = permuted(&own, &permutation(&reference, &own).unwrap()).unwrap();
        let x = random(&mut rng, &[5, h]);
        prop_assert!(distance(&run(&aligned, &x), &run(&own, &x)) < 1e-5);
    }

    /// Copies of an expert, their neurons in any order, merge into that expert.
    #[test]
    fn a_merge_of_equal_experts_is_that_expert(seed: u64, f in 1usize..9, n in 1usize..5) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let own = expert(&mut rng, 7, f);
        let copies: Vec<[Tensor; 3]> = (0..n)
            .map(|i| {
                let mut order: Vec<u32> = (0..f as u32).collect();
                if i > 0 {
                    order.shuffle(&mut rng);
                }
                permuted(&own, &order).unwrap()
            })
            .collect();
        let scores: Vec<f64> = (0..n).map(|_| rng.random()).collect();
        let members: Vec<usize> = (0..n).collect();
        for (weights, align) in [(&copies, true), (&vec![own.clone(); n], false)] {
            let merged = merge(&|i| Ok(weights[i].clone()), &members, &scores, align).unwrap();
            for (ours, expected) in merged.iter().zip(&own) {
                prop_assert!(distance(ours, expected) < 1e-5);
            }
        }
    }

    /// Full rank reproduces the matrix; any rank loses the root of the sum of squares of the singular
    /// values it cuts off, wide or tall, also on inputs that leave directions out.
    #[test]
    fn factors_lose_what_the_spectrum_says(
        seed: u64, out in 1usize..8, width in 1usize..8, tokens in 0usize..12,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let w = random(&mut rng, &[out, width]);
        let moment: Vec<f32> = match tokens {
            0 => vec![0.0; width * width],
            _ => {
                let x = random(&mut rng, &[tokens, width]);
                values(&x.t().unwrap().matmul(&x).unwrap())
            }
        };
        let gram = Gram::new(width, &moment);
        let singular = singular_values(&w, &Metric::of_inputs(gram.clone())).unwrap();
        let scale: f64 = singular.iter().map(|s| s * s).sum();
        for rank in 1..=out.min(width) {
            let factors = whitened(&w, &gram, rank).unwrap();
            prop_assert_eq!(factors.a.dims(), &[rank, width]);
            let product = factors.b.matmul(&factors.a).unwrap();
            let lost = singular_values(&(&w - &product).unwrap(), &Metric::of_inputs(gram.clone())).unwrap();
            let lost: f64 = lost.iter().map(|s| s * s).sum();
            let cut: f64 = singular[rank..].iter().map(|s| s * s).sum();
            prop_assert!((lost - cut).abs() <= 1e-5 * scale, "{} is not {}", lost, cut);
            if rank == out.min(width) {
                prop_assert!(distance(&product, &w) < 1e-3);
            }
        }
    }
}

struct Model {
    folder: TempDir,
    checkpoint: Checkpoint,
}

impl Model {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = random_checkpoint(&small(3, 8), DType::F32, 3, &folder);
        Self { folder, checkpoint }
    }

    fn observe(&self, method: MethodName, ratio: f64, ids: std::ops::Range<u32>) -> Observations {
        let config = self.checkpoint.config();
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let samples: Vec<Vec<u32>> = (0..6)
            .map(|_| (0..20).map(|_| rng.random_range(ids.clone())).collect())
            .collect();
        let successor = successor(method, config, Target::Ratio(ratio));
        let options = ObserveOptions {
            fingerprint: "rivals",
            state: &self.folder.path().join("state"),
            answers: &[],
            statistics: Statistics {
                moments: true,
                all_outputs: true,
                samples: method.statistics().samples,
                damage: method.statistics().damage,
                bias: false,
            },
            successor: successor.as_deref(),
            max_memory: 1 << 32,
        };
        let seen = observe(&self.checkpoint, &samples, &options, &mut |_, _| true).unwrap();
        let path = self.folder.path().join("seen.safetensors");
        seen.save(&path).unwrap();
        Observations::load(&path).unwrap()
    }

    fn build(&self, plan: &Plan, seen: &Observations) -> Checkpoint {
        let path = self.folder.path().join("built");
        let _ = std::fs::remove_dir_all(&path);
        let inputs = BuildInputs {
            checkpoint: &self.checkpoint,
            plan,
            observations: Some(seen),
            seed: 0,
        };
        build(&inputs, &path, &mut |_, _| true).unwrap();
        Checkpoint::open(&path).unwrap()
    }
}

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let model = Decoder::load(checkpoint).unwrap();
    let ids: Vec<u32> = (3..23).collect();
    let out = model.forward(Tokens::one(&ids), None, &mut |_, _, _| Ok(()));
    values(&out.unwrap())
}

#[test]
fn every_rival_meets_the_ratio_and_builds_what_it_planned() {
    let model = Model::new();
    let config = model.checkpoint.config();
    let step = config.expert_parameters() as f64 / config.parameters().total() as f64;
    for method in RIVALS {
        for ratio in [0.1, 0.3] {
            let seen = model.observe(method, ratio, 0..64);
            let plan = plan(config, &seen, Target::Ratio(ratio), method, &options(1, 0)).unwrap();
            let off = (plan.ratio.achieved - ratio).abs();
            assert!(
                off <= 0.5 * step + 1e-9,
                "{method}: {}",
                plan.ratio.achieved
            );
            let built = model.build(&plan, &seen);
            assert_eq!(built.parameters(), plan.parameters.after, "{method}");
            assert!(logits(&built).iter().all(|v| v.is_finite()), "{method}");
        }
    }
}

#[test]
fn ratio_zero_changes_no_bit() {
    let model = Model::new();
    // A ratio does not concern compressed experts.
    let methods = MethodName::ALL.into_iter();
    for method in methods.filter(|&method| method != MethodName::Compressed) {
        let seen = model.observe(method, 0.0, 0..64);
        let config = model.checkpoint.config();
        let plan = plan(config, &seen, Target::Ratio(0.0), method, &options(1, 1)).unwrap();
        assert_eq!(plan.ratio.achieved, 0.0);
        assert_eq!(
            logits(&model.build(&plan, &seen)),
            logits(&model.checkpoint),
            "{method}"
        );
    }
}

/// One token alone leaves most experts without any.
#[test]
fn experts_without_tokens_make_no_nan() {
    let model = Model::new();
    for method in RIVALS {
        let seen = model.observe(method, 0.3, 5..6);
        assert!(seen.layers.iter().all(|l| l.selections.contains(&0)));
        let config = model.checkpoint.config();
        for ranks in [RankRule::Uniform, RankRule::Importance, RankRule::Budget] {
            let options = PlanOptions {
                ranks,
                ..options(1, 0)
            };
            let plan = plan(config, &seen, Target::Ratio(0.3), method, &options).unwrap();
            let built = model.build(&plan, &seen);
            assert!(logits(&built).iter().all(|v| v.is_finite()), "{method}");
        }
    }
}

/// What observe let each layer become is what build makes of it.
#[test]
fn layers_that_were_merged_one_after_the_other_are_built_so() {
    let model = Model::new();
    let (method, ratio) = (MethodName::Ream, 0.3);
    let seen = model.observe(method, ratio, 0..64);
    let apart = model.observe(MethodName::Reap, ratio, 0..64);
    assert_eq!(seen.layers[0], apart.layers[0]);
    assert_ne!(seen.layers[1], apart.layers[1]);
    let config = model.checkpoint.config();
    // Bytes mean the ratio that leaves them.
    let left = 2.0 * (1.0 - ratio) * config.parameters().total() as f64;
    let by_bytes = Target::Bytes(left.round() as u64);
    assert!(successor(method, config, by_bytes).is_some());
    let plan = plan(config, &seen, Target::Ratio(ratio), method, &options(1, 0)).unwrap();
    let merged = |slot: &&lightmoe_compress::plan::SlotPlan| {
        matches!(slot.form, SlotForm::Removed { into: Some(_) })
    };
    assert!(
        plan.layers
            .iter()
            .all(|l| l.slots.iter().any(|s| merged(&s)))
    );
    // In the built model the layers before give what they gave then, so the router sees the same.
    let built = Model {
        checkpoint: model.build(&plan, &seen),
        folder: tempfile::tempdir().unwrap(),
    };
    let again = built.observe(MethodName::Reap, ratio, 0..64);
    for ((layer, then), now) in plan.layers.iter().zip(&seen.layers).zip(&again.layers) {
        let slots = layer.slots.iter();
        let kept: Vec<usize> = slots
            .filter(|slot| slot.form == SlotForm::Dense)
            .map(|slot| slot.expert)
            .collect();
        let (then, now) = (
            then.logit_gram.as_ref().unwrap(),
            now.logit_gram.as_ref().unwrap(),
        );
        for &a in &kept {
            for &b in &kept {
                let (x, y) = (then[a * 8 + b], now[a * 8 + b]);
                assert!(
                    (x - y).abs() <= 1e-4 * then[a * 8 + a],
                    "{a}, {b}: {x} is not {y}"
                );
            }
        }
    }
}

#[test]
fn compressed_experts_run_fewer_and_keep_all() {
    let model = Model::new();
    let config = model.checkpoint.config();
    let seen = model.observe(MethodName::Compressed, 0.5, 0..64);
    let ask = |main_experts| {
        let options = PlanOptions {
            main_experts,
            ..options(1, 0)
        };
        plan(
            config,
            &seen,
            Target::Ratio(0.5),
            MethodName::Compressed,
            &options,
        )
    };
    let half = ask(None).unwrap();
    assert!(
        half.layers
            .iter()
            .all(|l| l.main == Some(config.moe.top_k / 2))
    );
    let built = model.build(&half, &seen);
    assert_eq!(built.parameters(), half.parameters.after);
    assert!(half.parameters.after > half.parameters.before);
    // The vectors start as ones, so the model is the original with fewer experts.
    assert_ne!(logits(&built), logits(&model.checkpoint));
    let active = active_parameters(config, &half.layers, &seen);
    let vectors = 3 * (2 * config.hidden_size + config.moe.intermediate_size) as u64;
    let saved = 3 * config.expert_parameters();
    assert_eq!(active, config.active_parameters() - saved + vectors);
    for main in [0, config.moe.top_k] {
        let message = ask(Some(main)).unwrap_err().to_string();
        assert!(message.contains("main_experts"), "{message}");
    }
}
