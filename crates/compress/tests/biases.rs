//! Biases: what a slot misses of its expert on average, given back by a vector.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::predictions::{built, divergence, log_probabilities, samples, with};
use common::{observed, options, random_checkpoint, small, upcycled};
use lightmoe_compress::methods::{AdapterInit, MethodName, PlanOptions, Target, plan};
use lightmoe_compress::observations::{Damage, Observations};
use lightmoe_compress::plan::{Plan, SlotForm};
use lightmoe_compress::{BuildInputs, Sensitivity, Statistics, build};
use lightmoe_kernels::{linear, swiglu};
use lightmoe_models::{Checkpoint, Decoder, LanguageModel, Tokens, names};
use tempfile::TempDir;

fn biased(how: Sensitivity) -> Statistics {
    Statistics {
        bias: true,
        ..with(how)
    }
}

/// Models whose experts have nothing in common, and something.
fn models(folders: &[TempDir; 2]) -> [Checkpoint; 2] {
    let [apart, related] = folders;
    [
        random_checkpoint(&small(2, 8), DType::BF16, 3, apart),
        upcycled(&small(2, 8), 0.3, related),
    ]
}

fn folders() -> [TempDir; 2] {
    [(), ()].map(|()| tempfile::tempdir().unwrap())
}

fn budgeted(checkpoint: &Checkpoint, seen: &Observations, target: Target, bias: bool) -> Plan {
    let options = PlanOptions {
        bias,
        ..options(1, 1)
    };
    common::budgeted(checkpoint.config(), seen, target, &options)
}

/// A bias takes at most the largest component that is left of down, and never costs: the spectrum without the
/// mean lies between the whole one and the same without its first component.
#[test]
fn a_bias_takes_one_component_at_most() {
    let folders = folders();
    for (checkpoint, folder) in models(&folders).iter().zip(&folders) {
        let seen = observed(checkpoint, &samples(1), biased(Sensitivity::Fisher), folder);
        let mut saved: f64 = 0.0;
        let mut between = |plain: &[f64], biased: &[f64]| {
            let most = plain[0];
            for (rank, &loss) in biased.iter().enumerate() {
                // Both are damped, by a share of what they are of.
                let next = plain.get(rank + 1).copied().unwrap_or(0.0);
                assert!(loss <= plain[rank] + 1e-9 * most);
                assert!(loss >= next - 1e-9 * most - 0.01 * plain[rank]);
                saved = saved.max(1.0 - loss / plain[rank].max(f64::MIN_POSITIVE));
            }
        };
        let tails = |of: &dyn Fn(&Damage, usize) -> Option<Vec<f64>>| -> Vec<Vec<f64>> {
            let layers = seen
                .layers
                .iter()
                .map(|layer| layer.damage.as_ref().unwrap());
            let all = layers.flat_map(|damage| (0..8).map(move |expert| (damage, expert)));
            all.filter_map(|(damage, expert)| of(damage, expert))
                .collect()
        };
        let own = tails(&|damage, expert| Some(damage.of_ranks(expert)));
        let with_bias = tails(&Damage::of_biased);
        assert_eq!(own.len(), with_bias.len());
        for (plain, biased) in own.iter().zip(&with_bias) {
            between(plain, biased);
        }
        let (plain, biased) = (
            tails(&Damage::of_differences),
            tails(&Damage::of_biased_differences),
        );
        assert_eq!(plain.len(), biased.len());
        for (plain, biased) in plain.iter().zip(&biased) {
            between(plain, biased);
        }
        assert!(saved > 0.01, "{saved}");
    }
}

/// With biases on the menu less is lost at the same size, as expected, what is expected is about what is
/// measured, and the bytes are those of the file.
#[test]
fn the_planner_gives_biases_where_they_pay() {
    let folders = folders();
    for (checkpoint, folder) in models(&folders).iter().zip(&folders) {
        let samples = samples(1);
        let seen = observed(checkpoint, &samples, biased(Sensitivity::Fisher), folder);
        let path = folder.path().join("again.safetensors");
        seen.save(&path).unwrap();
        assert_eq!(Observations::load(&path).unwrap().layers, seen.layers);
        let original = log_probabilities(&Decoder::load(checkpoint).unwrap(), &samples);
        for ratio in [0.4, 0.6] {
            let target = Target::Ratio(ratio);
            let [without, ours] =
                [false, true].map(|bias| budgeted(checkpoint, &seen, target, bias));
            let expected = |plan: &Plan| plan.damage.as_ref().unwrap().predicted;
            assert!(without.layers.iter().all(|layer| !layer.has_biases()));
            assert!(ours.layers.iter().any(|layer| layer.has_biases()));
            assert!(expected(&ours) < expected(&without));
            assert!(ours.ratio.achieved > ratio - 1e-3);
            let built = built(checkpoint, &ours, &seen, folder);
            assert_eq!(built.parameters(), ours.parameters.after);
            assert_eq!(ours.damage.as_ref().unwrap().bytes, built.bytes());
            let now = log_probabilities(&Decoder::load(&built).unwrap(), &samples);
            let share = divergence(&original, &now) / expected(&ours);
            assert!((0.4..2.5).contains(&share), "{ratio}: {share}");
        }
    }
}

/// A bias of a fitted slot is the mean of what its down matrix leaves out: `(D − B·A)·μ`.
#[test]
fn a_fitted_bias_gives_back_what_down_misses_on_average() {
    let folders = folders();
    let (checkpoint, folder) = (&models(&folders)[0], &folders[0]);
    let config = checkpoint.config();
    let (h, f) = (config.hidden_size, config.moe.intermediate_size);
    let seen = observed(checkpoint, &samples(1), biased(Sensitivity::Fisher), folder);
    let ours = budgeted(checkpoint, &seen, Target::Ratio(0.6), true);
    let built = built(checkpoint, &ours, &seen, folder);
    let mut found = 0;
    for layer in &ours.layers {
        let damage = seen.damage(config, layer.layer).unwrap();
        for slot in &layer.slots {
            let SlotForm::Adapted {
                rank, bias: true, ..
            } = slot.form
            else {
                continue;
            };
            let name = |part: &str| names::expert(layer.layer, slot.expert, part);
            let down = checkpoint.tensor(&name("down_proj"), &[h, f]).unwrap();
            let a = built.tensor(&name("down_proj.lora_A"), &[rank, f]).unwrap();
            let b = built.tensor(&name("down_proj.lora_B"), &[h, rank]).unwrap();
            let missed = (down - b.matmul(&a).unwrap()).unwrap();
            let expected = damage.constant(slot.expert, &missed).unwrap();
            let bias = built
                .tensor(&names::bias(layer.layer, slot.expert), &[h])
                .unwrap();
            let most = |of: Tensor| {
                of.abs()
                    .unwrap()
                    .max(0)
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap()
            };
            // Factors and bias are rounded to bf16 in the file.
            let apart = most((bias - &expected).unwrap());
            assert!(apart < 0.02 * most(expected), "{apart}");
            found += 1;
        }
    }
    assert!(found > 0);
}

/// The rows of one expert's inputs in a model, beside the gates, layer by layer: `[n, H]` and `[n]`.
fn inputs_of(model: &Decoder, samples: &[Vec<u32>], place: (usize, usize)) -> (Tensor, Vec<f32>) {
    struct Look {
        expert: u32,
        rows: Vec<Tensor>,
        gates: Vec<f32>,
    }
    impl lightmoe_models::LayerObserver for Look {
        fn block(
            &mut self,
            _: &lightmoe_models::Bank,
            x: &Tensor,
            routing: &lightmoe_models::Routing,
        ) -> lightmoe_models::Result<()> {
            let k = routing.chosen.len() / x.dim(0)?;
            let gates = routing.gates.to_vec1::<f32>()?;
            for (pair, &expert) in routing.chosen.iter().enumerate() {
                if expert == self.expert {
                    self.rows.push(x.narrow(0, pair / k, 1)?);
                    self.gates.push(gates[pair]);
                }
            }
            Ok(())
        }
    }
    let (layer, expert) = place;
    let mut look = Look {
        expert: expert as u32,
        rows: Vec::new(),
        gates: Vec::new(),
    };
    let rotary = lightmoe_models::Rotary::new(model.config());
    for sample in samples {
        let tokens = Tokens {
            ids: sample,
            rows: 1,
        };
        let mut x = model.ends().embed(tokens).unwrap();
        for of in &model.layers[..layer] {
            x = of.forward(&x, model.config(), &rotary, None).unwrap().0;
        }
        model.layers[layer]
            .forward_observed(&x, model.config(), &rotary, None, &mut look)
            .unwrap();
    }
    (Tensor::cat(&look.rows, 0).unwrap(), look.gates)
}

/// The bias of a slot of LightMoE goes the way of the mean of what the slot misses on all tokens of its expert,
/// however its adapters begin, and the model is nearer to the original by it.
#[test]
fn lightmoe_gets_the_mean_of_what_its_slots_miss() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(2, 8), DType::F32, 5, &folder);
    let config = checkpoint.config();
    let (h, f) = (config.hidden_size, config.moe.intermediate_size);
    let samples = samples(1);
    let seen = observed(&checkpoint, &samples, biased(Sensitivity::Fisher), &folder);
    let decoder = Decoder::load(&checkpoint).unwrap();
    let original = log_probabilities(&decoder, &samples);
    for (adapters, groups) in [
        (AdapterInit::Fresh, 2),
        (AdapterInit::Fresh, 0),
        (AdapterInit::Fitted, 2),
    ] {
        let method = match groups {
            0 => MethodName::Replace,
            _ => MethodName::Lightmoe,
        };
        let planned = |bias| {
            let options = PlanOptions {
                bias,
                adapters,
                ..options(2, groups)
            };
            plan(config, &seen, Target::Ratio(0.2), method, &options).unwrap()
        };
        let lost = |plan: &Plan| {
            let built = built(&checkpoint, plan, &seen, &folder);
            assert_eq!(built.parameters(), plan.parameters.after);
            let now = log_probabilities(&Decoder::load(&built).unwrap(), &samples);
            (built, divergence(&original, &now))
        };
        let (plain, ours) = (planned(false), planned(true));
        let (_, without) = lost(&plain);
        let (built, lost) = lost(&ours);
        assert!(lost < without, "{adapters:?}: {lost}, without {without}");
        let layer = &ours.layers[1];
        let (mut along, mut sizes) = (0.0, [0.0, 0.0]);
        for slot in layer.slots.iter().filter(|slot| slot.form.has_bias()) {
            let (x, gates) = inputs_of(&decoder, &samples, (1, slot.expert));
            let whole = |built: &Checkpoint, name: String, shape: [usize; 2]| {
                built.tensor(&name, &shape).unwrap()
            };
            let gives = |of: [Tensor; 3]| {
                let [gate, up, down] = of;
                let hidden =
                    swiglu(&linear(&x, &gate).unwrap(), &linear(&x, &up).unwrap()).unwrap();
                linear(&hidden, &down).unwrap()
            };
            let shapes = [
                ("gate_proj", [f, h]),
                ("up_proj", [f, h]),
                ("down_proj", [h, f]),
            ];
            let own = shapes.map(|(p, s)| whole(&checkpoint, names::expert(1, slot.expert, p), s));
            let instead = shapes.map(|(p, [out, width])| {
                let part = |side: &str, shape| {
                    whole(
                        &built,
                        names::expert(1, slot.expert, &format!("{p}.{side}")),
                        shape,
                    )
                };
                let adapter = part("lora_B", [out, 2])
                    .matmul(&part("lora_A", [2, width]))
                    .unwrap();
                match slot.form.group() {
                    Some(g) => {
                        (adapter + whole(&built, names::base(1, g, p), [out, width])).unwrap()
                    }
                    None => adapter,
                }
            });
            let missed = (gives(own) - gives(instead)).unwrap();
            let weights: Vec<f32> = gates.iter().map(|g| g * g).collect();
            let total: f32 = weights.iter().sum();
            let weights = Tensor::from_vec(weights, (gates.len(), 1), &Device::Cpu).unwrap();
            let mean = (missed.broadcast_mul(&weights).unwrap().sum(0).unwrap() / f64::from(total))
                .unwrap();
            let bias = built.tensor(&names::bias(1, slot.expert), &[h]).unwrap();
            let dot = |a: &Tensor, b: &Tensor| {
                let product = (a * b).unwrap().sum_all().unwrap();
                f64::from(product.to_scalar::<f32>().unwrap())
            };
            along += dot(&mean, &bias);
            sizes[0] += dot(&mean, &mean);
            sizes[1] += dot(&bias, &bias);
        }
        assert!(sizes[1] > 0.0 && sizes[1] < 1.1 * sizes[0], "{sizes:?}");
        let cosine = along / (sizes[0] * sizes[1]).sqrt();
        assert!(cosine > 0.9, "{adapters:?}: {cosine}");
    }
}

#[test]
fn what_cannot_have_a_bias_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(2, 8), DType::F32, 5, &folder);
    let config = checkpoint.config();
    let seen = observed(&checkpoint, &samples(1), with(Sensitivity::Fisher), &folder);
    let with_bias = PlanOptions {
        bias: true,
        ..options(1, 1)
    };
    let refused = |method, options: &PlanOptions| {
        let refused = plan(config, &seen, Target::Ratio(0.3), method, options);
        refused.unwrap_err().to_string()
    };
    let message = refused(MethodName::Budget, &with_bias);
    assert!(message.contains("`--bias true`"), "{message}");
    let message = refused(MethodName::Svd, &with_bias);
    assert!(message.contains("`bias` is for"), "{message}");
    let uniform = PlanOptions {
        ranks: lightmoe_compress::ranks::RankRule::Uniform,
        ..with_bias
    };
    let message = refused(MethodName::Budget, &uniform);
    assert!(message.contains("rule"), "{message}");
    // A plan may be made without what its biases come from; a build may not.
    let method = MethodName::Lightmoe;
    let plan = plan(config, &seen, Target::Ratio(0.2), method, &with_bias).unwrap();
    for observations in [None, Some(&seen)] {
        let inputs = BuildInputs {
            checkpoint: &checkpoint,
            plan: &plan,
            observations,
            seed: 0,
        };
        let target = folder.path().join("refused");
        let refused = build(&inputs, &target, &mut |_, _| true).unwrap_err();
        assert!(refused.to_string().contains("bias"), "{refused}");
        assert!(!target.exists());
    }
}
