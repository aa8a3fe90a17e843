//! The byte-budget planner: what must hold whatever the damages, and on small models.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::predictions::{built, divergence, log_probabilities, samples, with};
use common::{observations, observed, options, random_checkpoint, small};
use lightmoe_compress::factor::{Gram, Metric, fitted, singular_values};
use lightmoe_compress::methods::{MethodName, PlanOptions, Target, Weights, plan};
use lightmoe_compress::observations::{Components, Damage, Observations};
use lightmoe_compress::plan::Plan;
use lightmoe_compress::ranks::{Limit, Point, RankRule, spend};
use lightmoe_compress::{ObserveOptions, Sensitivity, observe};
use lightmoe_models::{Decoder, ModelConfig};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const METHOD: MethodName = MethodName::Budget;

/// Observations with damages that fall with the rank, from `seed`.
fn damaged(config: &ModelConfig, seed: u64) -> Observations {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (experts, width) = (
        config.moe.num_experts,
        config.hidden_size.min(config.moe.intermediate_size),
    );
    let mut seen = observations(config, seed);
    seen.sensitivity = Some(Sensitivity::Fisher);
    for layer in &mut seen.layers {
        let mut spectrum = || -> Vec<f64> {
            let of_expert = |_| {
                let (scale, fall) = (rng.random::<f64>(), rng.random_range(0.5..0.99f64));
                (0..width).map(move |r| scale * fall.powi(r as i32))
            };
            (0..experts).flat_map(of_expert).collect()
        };
        let mut damage = Damage {
            own: Components {
                gate: spectrum(),
                up: spectrum(),
                down: spectrum(),
            },
            difference: None,
            biased: None,
            drop: vec![0.0; experts],
            mass: vec![1.0; experts],
        };
        for expert in 0..experts {
            damage.drop[expert] = rng.random_range(0.3..0.9) * damage.of_ranks(expert)[0];
        }
        layer.damage = Some(damage);
    }
    seen
}

fn budgeted(config: &ModelConfig, seen: &Observations, target: Target) -> Plan {
    common::budgeted(config, seen, target, &options(1, 0))
}

proptest! {
    /// In any metric a rank loses the sum of squares that it cuts off, wide or tall; the full rank loses
    /// nothing.
    #[test]
    fn fitted_factors_lose_what_the_spectrum_says(
        seed: u64, out in 1usize..8, width in 1usize..8, seen in 1usize..12,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = |shape: &[usize]| {
            let numbers = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0f32));
            Tensor::from_vec(numbers.collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
        };
        let mut moment = |n: usize| {
            let x = random(&[seen, n]);
            let sums = x.t().unwrap().matmul(&x).unwrap();
            Gram::new(n, &sums.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        };
        let metric = Metric { out: moment(out), input: moment(width) };
        let w = random(&[out, width]);
        let spectrum = singular_values(&w, &metric).unwrap();
        let whole: f64 = spectrum.iter().map(|s| s * s).sum();
        for rank in 1..=out.min(width) {
            let factors = fitted(&w, &metric, rank).unwrap();
            let error = (&w - factors.b.matmul(&factors.a).unwrap()).unwrap();
            let lost = singular_values(&error, &metric).unwrap();
            let lost: f64 = lost.iter().map(|s| s * s).sum();
            let said: f64 = spectrum[rank..].iter().map(|s| s * s).sum();
            prop_assert!((lost - said).abs() <= 1e-5 * whole, "{rank}: {lost}, not {said}");
        }
    }

    /// A larger budget never loses more, and none is exceeded.
    #[test]
    fn damage_never_rises_with_the_budget(
        slots in proptest::collection::vec(
            proptest::collection::vec((1u64..9, 0.0f64..5.0), 1..6), 1..6,
        ),
    ) {
        let menu = |steps: &Vec<(u64, f64)>| {
            let mut points = vec![Point { cost: 1, loss: 20.0 }];
            for (cost, loss) in steps {
                let last = points[points.len() - 1].cost;
                points.push(Point { cost: last + cost, loss: *loss });
            }
            points[steps.len()].loss = 0.0;
            points
        };
        let menus: Vec<Vec<Point>> = slots.iter().map(menu).collect();
        let most: u64 = menus.iter().map(|menu| menu[menu.len() - 1].cost).sum();
        let of = |places: &[usize]| {
            let points = menus.iter().zip(places).map(|(menu, &place)| menu[place]);
            points.fold((0, 0.0), |sum, point| (sum.0 + point.cost, sum.1 + point.loss))
        };
        let mut before = f64::INFINITY;
        for budget in menus.len() as u64..=most {
            let (cost, loss) = of(&spend(&menus, Limit::Cost(budget)).unwrap());
            prop_assert!(cost <= budget);
            prop_assert!(loss <= before + 1e-9, "{budget}: {loss} after {before}");
            before = loss;
            // The least that is spent for no more loss is no more than this budget.
            let (_, allowed) = of(&spend(&menus, Limit::Loss(loss)).unwrap());
            prop_assert!(allowed <= loss + 1e-9);
        }
        prop_assert_eq!(before, 0.0);
        prop_assert!(spend(&menus, Limit::Cost(menus.len() as u64 - 1)).is_err());
    }
}

#[test]
fn nothing_depends_on_the_order_of_experts() {
    let config = small(2, 8);
    let seen = damaged(&config, 4);
    let order = [3usize, 0, 6, 1, 7, 2, 5, 4];
    let mut shuffled = seen.clone();
    for (layer, before) in shuffled.layers.iter_mut().zip(&seen.layers) {
        let (damage, before) = (
            layer.damage.as_mut().unwrap(),
            before.damage.as_ref().unwrap(),
        );
        let (new, old) = (&mut damage.own, &before.own);
        let width = old.gate.len() / 8;
        for (to, &from) in order.iter().enumerate() {
            for (new, old) in [
                (&mut new.gate, &old.gate),
                (&mut new.up, &old.up),
                (&mut new.down, &old.down),
            ] {
                new[to * width..][..width].copy_from_slice(&old[from * width..][..width]);
            }
            damage.drop[to] = before.drop[from];
        }
    }
    let (one, other) = (
        budgeted(&config, &seen, Target::Ratio(0.4)),
        budgeted(&config, &shuffled, Target::Ratio(0.4)),
    );
    assert!(one.mean_replaced() > 0.0);
    for (layer, before) in other.layers.iter().zip(&one.layers) {
        for (to, &from) in order.iter().enumerate() {
            assert_eq!(layer.slots[to].form, before.slots[from].form);
        }
    }
}

#[test]
fn a_plan_meets_each_kind_of_target() {
    let config = small(2, 8);
    let seen = damaged(&config, 5);
    let whole = config.parameters().total();
    let half = budgeted(&config, &seen, Target::Ratio(0.4));
    let damage = half.damage.as_ref().unwrap();
    assert!(
        (half.ratio.achieved - 0.4).abs() < 0.005,
        "{:?}",
        half.ratio
    );
    assert!(half.parameters.after as f64 <= 0.6 * whole as f64);
    // bf16, as the configuration says; what is more is the header.
    let head = damage.bytes - 2 * half.parameters.after;
    assert!(head > 0 && head.is_multiple_of(8), "{head}");
    let by_bytes = budgeted(&config, &seen, Target::Bytes(damage.bytes));
    let found = by_bytes.damage.as_ref().unwrap();
    // Forms of fewer tensors leave more of the same bytes to numbers.
    assert!(found.bytes <= damage.bytes, "{found:?}");
    assert!(
        found.predicted <= damage.predicted,
        "{} {}",
        found.predicted,
        damage.predicted
    );
    let by_damage = budgeted(&config, &seen, Target::Damage(damage.predicted));
    let found = by_damage.damage.as_ref().unwrap();
    assert!(found.predicted <= damage.predicted);
    // It stops at the first step that is good enough.
    assert!(found.bytes <= damage.bytes + 2 * config.expert_parameters());
    let sums = |of: fn(&lightmoe_compress::plan::SlotPlan) -> f64| -> f64 {
        half.layers.iter().flat_map(|l| &l.slots).map(of).sum()
    };
    assert!((sums(|slot| slot.damage.unwrap()) - damage.predicted).abs() < 1e-9);
    let rest = whole - config.parameters().routed_experts;
    assert_eq!(
        sums(|slot| slot.bytes.unwrap() as f64),
        (damage.bytes - head - 2 * rest) as f64
    );
    let (first, last) = (damage.curve[0], damage.curve[damage.curve.len() - 1]);
    assert_eq!((last.bytes, last.damage), (2 * whole + head, 0.0));
    assert!(first.bytes < damage.bytes && first.damage > damage.predicted);
    assert!(
        damage
            .curve
            .is_sorted_by(|a, b| a.bytes < b.bytes && a.damage >= b.damage)
    );
    let text = serde_json::to_vec(&half).unwrap();
    assert_eq!(Plan::decode(&text).unwrap(), half);
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let config = small(2, 8);
    let seen = damaged(&config, 6);
    let ask = |seen: &Observations, target, ranks| {
        let options = PlanOptions {
            ranks,
            ..options(1, 0)
        };
        let refused = plan(&config, seen, target, METHOD, &options);
        refused.unwrap_err().to_string()
    };
    let budget = RankRule::Budget;
    for (message, word) in [
        (ask(&seen, Target::Ratio(0.99), budget), "lower ratio"),
        (ask(&seen, Target::Bytes(9), budget), "more bytes"),
        (ask(&seen, Target::Damage(-1.0), budget), "nats"),
        (
            ask(&seen, Target::Damage(0.1), RankRule::Uniform),
            "`budget`",
        ),
        (ask(&seen, Target::Threshold(0.5), budget), "threshold"),
        (
            ask(&observations(&config, 1), Target::Ratio(0.4), budget),
            "--damage",
        ),
    ] {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
    let mut narrow = seen.clone();
    narrow.layers[1].damage.as_mut().unwrap().own.up.truncate(8);
    let message = ask(&narrow, Target::Ratio(0.4), budget);
    assert!(message.contains("layer 1: the damages"), "{message}");
    let refused = plan(
        &config,
        &seen,
        Target::Damage(0.1),
        MethodName::Svd,
        &options(1, 0),
    );
    assert!(refused.unwrap_err().to_string().contains("ratio"));
}

/// Bytes for the whole model leave every bit, and fewer leave as many as the file has.
#[test]
fn bytes_are_those_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(2, 8), DType::BF16, 3, &folder);
    let seen = observed(&checkpoint, &samples(1), with(Sensitivity::Fisher), &folder);
    let config = checkpoint.config();
    let of_experts = 2 * config.parameters().routed_experts;
    for bytes in [checkpoint.bytes(), checkpoint.bytes() - of_experts / 2] {
        let plan = budgeted(config, &seen, Target::Bytes(bytes));
        let built = built(&checkpoint, &plan, &seen, &folder);
        assert_eq!(plan.damage.as_ref().unwrap().bytes, built.bytes());
        assert!(built.bytes() <= bytes && bytes - built.bytes() < of_experts / 100);
        let whole = bytes == checkpoint.bytes();
        assert_eq!(plan.mean_replaced() == 0.0, whole);
        if whole {
            let model = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
            assert_eq!(
                model("built/model.safetensors"),
                model("model/model.safetensors")
            );
        }
    }
}

/// A configuration may be silent about the element type, or wrong; the weights are not.
#[test]
fn bytes_go_by_the_weights_where_they_are_at_hand() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(2, 8), DType::F32, 3, &folder);
    let seen = observed(&checkpoint, &samples(1), with(Sensitivity::Fisher), &folder);
    let bytes = checkpoint.bytes() * 2 / 3;
    let weights = Weights {
        checkpoint: &checkpoint,
        progress: &|_, _| true,
    };
    let plan = plan(weights, &seen, Target::Bytes(bytes), METHOD, &options(1, 0)).unwrap();
    let built = built(&checkpoint, &plan, &seen, &folder);
    assert_eq!(plan.damage.as_ref().unwrap().bytes, built.bytes());
    assert!(built.bytes() <= bytes && built.bytes() > bytes * 9 / 10);
}

/// The expected damage of small errors is what the model loses by them: the divergence of its
/// predictions, in nats a token.
#[test]
fn the_expected_damage_is_that_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(3, 8), DType::F32, 3, &folder);
    let (config, samples) = (checkpoint.config(), samples(2));
    let seen = observed(&checkpoint, &samples, with(Sensitivity::Fisher), &folder);
    let original = log_probabilities(&Decoder::load(&checkpoint).unwrap(), &samples);
    for share in [0.1, 0.3] {
        let plan = budgeted(config, &seen, Target::Ratio(share));
        let built = built(&checkpoint, &plan, &seen, &folder);
        let now = log_probabilities(&Decoder::load(&built).unwrap(), &samples);
        let measured = divergence(&original, &now);
        let expected = plan.damage.as_ref().unwrap().predicted;
        let ratio = measured / expected;
        assert!(
            (0.5..2.0).contains(&ratio),
            "{share}: {measured}, expected {expected}"
        );
    }
}

/// Of the same size, ranks by damage keep the predictions better than the same rank everywhere, also where
/// the damage is reckoned without gradients.
#[test]
fn ranks_by_damage_keep_the_predictions_best() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(3, 8), DType::F32, 7, &folder);
    let (config, samples) = (checkpoint.config(), samples(3));
    let original = log_probabilities(&Decoder::load(&checkpoint).unwrap(), &samples);
    for how in [Sensitivity::Fisher, Sensitivity::Relative] {
        let seen = observed(&checkpoint, &samples, with(how), &folder);
        let lost = |ranks| {
            let options = PlanOptions {
                ranks,
                ..options(1, 0)
            };
            let plan = plan(config, &seen, Target::Ratio(0.3), METHOD, &options).unwrap();
            let built = built(&checkpoint, &plan, &seen, &folder);
            let now = log_probabilities(&Decoder::load(&built).unwrap(), &samples);
            divergence(&original, &now)
        };
        let [budget, uniform, importance] =
            [RankRule::Budget, RankRule::Uniform, RankRule::Importance].map(lost);
        assert!(budget < uniform, "{how:?}: {budget}, {uniform}");
        assert!(importance.is_finite());
    }
}

/// What a sample is to predict is what counts, and it goes with its sample, whatever their order.
#[test]
fn answers_go_with_their_samples() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(2, 8), DType::F32, 3, &folder);
    // Of different lengths, by which they are sorted.
    let mut samples: Vec<Vec<u32>> = samples(4).into_iter().take(16).collect();
    for (i, sample) in samples.iter_mut().enumerate() {
        sample.truncate(6 + i * 7 % 16);
    }
    let drop = |samples: &[Vec<u32>], answers: &[usize]| -> Vec<f64> {
        let options = ObserveOptions {
            fingerprint: "answers",
            state: &folder.path().join("state"),
            statistics: with(Sensitivity::Fisher),
            answers,
            successor: None,
            max_memory: 1 << 32,
        };
        let seen = observe(&checkpoint, samples, &options, &mut |_, _| true).unwrap();
        let seen = seen.save(&folder.path().join("seen.safetensors")).unwrap();
        seen.layers[1].damage.as_ref().unwrap().drop.clone()
    };
    let all = drop(&samples, &[]);
    assert_eq!(all, drop(&samples, &vec![1; samples.len()]));
    let mut late: Vec<usize> = samples.iter().map(|s| s.len() - 1 - s.len() % 3).collect();
    let ours = drop(&samples, &late);
    let apart: f64 = all.iter().zip(&ours).map(|(a, b)| (a - b).abs()).sum();
    assert!(apart > 0.1 * all.iter().sum::<f64>());
    samples.reverse();
    assert_ne!(ours, drop(&samples, &late));
    late.reverse();
    assert_eq!(ours, drop(&samples, &late));
    // A sample without an answer says nothing, and one is needed.
    let none = vec![usize::MAX; samples.len()];
    let options = ObserveOptions {
        fingerprint: "none",
        state: &folder.path().join("none"),
        statistics: with(Sensitivity::Fisher),
        answers: &none,
        successor: None,
        max_memory: 1 << 32,
    };
    let refused = observe(&checkpoint, &samples, &options, &mut |_, _| true);
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("token to predict")
    );
}

#[test]
fn as_many_components_train_as_was_asked() {
    let config = small(2, 8);
    let seen = damaged(&config, 5);
    let trained = |trained_rank| {
        let options = PlanOptions {
            trained_rank,
            ..options(2, 0)
        };
        let plan = plan(&config, &seen, Target::Ratio(0.4), METHOD, &options);
        plan.map(|plan| plan.parameters.trained)
    };
    let all = trained(None).unwrap();
    assert_eq!(all, trained(Some(0)).unwrap());
    let [one, two] = [1, 2].map(|rank| trained(Some(rank)).unwrap());
    assert!(one < two && two < all, "{one}, {two}, {all}");
    let message = trained(Some(17)).unwrap_err().to_string();
    assert!(message.contains("`trained_rank` is 17"), "{message}");
}

/// A few tokens leave some experts without any: these are given what the layer saw, and become small
/// before those that are used.
#[test]
fn experts_without_tokens_become_the_smallest() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(2, 8), DType::F32, 3, &folder);
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let sample = |_| (0..20).map(|_| rng.random_range(5..7)).collect();
    let silent: Vec<Vec<u32>> = (0..6).map(sample).collect();
    let seen = observed(&checkpoint, &silent, with(Sensitivity::Fisher), &folder);
    let plan = budgeted(checkpoint.config(), &seen, Target::Ratio(0.3));
    for (layer, observed) in plan.layers.iter().zip(&seen.layers) {
        assert!(observed.selections.contains(&0));
        let mean = |chosen: bool| {
            let of = |slot: &&lightmoe_compress::plan::SlotPlan| {
                (observed.selections[slot.expert] > 0) == chosen
            };
            let bytes: Vec<u64> = layer
                .slots
                .iter()
                .filter(of)
                .map(|s| s.bytes.unwrap())
                .collect();
            bytes.iter().sum::<u64>() as f64 / bytes.len() as f64
        };
        assert!(mean(false) < mean(true));
    }
    let built = built(&checkpoint, &plan, &seen, &folder);
    let rows = log_probabilities(&Decoder::load(&built).unwrap(), &silent);
    assert!(rows.iter().flatten().all(|v| v.is_finite()));
}
