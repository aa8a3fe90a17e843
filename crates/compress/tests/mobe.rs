//! MoBE: what its plan leaves and trains, and what its fit reaches.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{observations, olmoe, options, small};
use lightmoe_compress::estimate;
use lightmoe_compress::factor::{Gram, Metric, singular_values};
use lightmoe_compress::methods::{MethodName, Target, plan};
use lightmoe_compress::mixture::{STEPS, fit};
use lightmoe_compress::plan::SlotForm;
use lightmoe_compress::size::{active_parameters, adapter_parameters};
use lightmoe_models::{BankLayout, ExpertPacking, LayerLayout, Scheme, SlotLayout, names};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

const METHOD: MethodName = MethodName::Mobe;

/// From ratios that leave most experts dense to nearly all that gate and up hold.
#[test]
fn a_plan_meets_ratio_and_budget() {
    let config = olmoe();
    let seen = observations(&config, 1);
    let slots = (config.moe.num_experts * config.num_moe_layers()) as u64;
    for ratio in [0.01, 0.1, 0.2, 0.4, 0.6] {
        for rank in [4, 48] {
            let plan = plan(
                &config,
                &seen,
                Target::Ratio(ratio),
                METHOD,
                &options(rank, 0),
            );
            let plan = plan.unwrap();
            plan.check_model(&config).unwrap();
            assert!(
                (plan.ratio.achieved - ratio).abs() < 0.001,
                "{}",
                plan.ratio.achieved
            );
            let budget = slots * adapter_parameters(&config, rank);
            let trained = plan.parameters.trained;
            assert!(
                trained <= budget && trained >= budget * 9 / 10,
                "{trained} of {budget}"
            );
            let dense = plan.layers.iter().map(|l| l.slots.len() - l.replaced());
            assert_eq!(dense.sum::<usize>() > 0, ratio < 0.15, "{ratio}");
        }
    }
}

#[test]
fn what_cannot_be_reached_is_refused_before_and_after_observing() {
    let config = olmoe();
    let options = options(4, 0);
    let before = estimate(&config, 0.7, METHOD, &options).unwrap_err();
    let seen = observations(&config, 1);
    let after = plan(&config, &seen, Target::Ratio(0.7), METHOD, &options).unwrap_err();
    assert_eq!(before.to_string(), after.to_string());
    let message = before.to_string();
    assert!(
        message.contains("only up to 0.62") && message.contains("lower ratio"),
        "{message}"
    );
}

#[test]
fn damaged_plans_are_refused() {
    let config = small(2, 8);
    let seen = observations(&config, 1);
    let good = plan(&config, &seen, Target::Ratio(0.3), METHOD, &options(1, 0)).unwrap();
    let (bases, rank) = good.layers[0].mixture().unwrap();
    for (b, r) in [
        (0, rank),
        (9, rank),
        (bases, 0),
        (bases, 17),
        (bases, rank - 1),
        (usize::MAX, rank),
    ] {
        let mut plan = good.clone();
        plan.layers[0].slots[3].form = SlotForm::Mixed { bases: b, rank: r };
        let message = plan.validate().unwrap_err().to_string();
        assert!(
            message.contains("layer 0, slot") && message.contains("mixed"),
            "{message}"
        );
    }
}

/// Of the bases all work on a token, once; of the slots those that were chosen.
#[test]
fn active_parameters_count_the_bases_once() {
    let config = small(2, 8);
    let seen = observations(&config, 1);
    let plan = plan(&config, &seen, Target::Ratio(0.3), METHOD, &options(1, 0)).unwrap();
    let (h, f, k) = (32, 16, config.moe.top_k as u64);
    let layer = |rank: u64| 2 * 2 * rank * h + k * (h * f + 2 * (f * rank + 2));
    let layers = plan
        .layers
        .iter()
        .map(|l| layer(l.mixture().unwrap().1 as u64));
    let rest = config.active_parameters() - 2 * k * config.expert_parameters();
    let active = active_parameters(&config, &plan.layers, &seen);
    assert_eq!(active, rest + layers.sum::<u64>());
}

/// Where experts are stacked, only dense ones are.
#[test]
fn a_mixed_slot_stands_beside_the_stack() {
    let config = small(1, 8);
    let mut slots = vec![SlotLayout::Dense; 8];
    slots[1] = SlotLayout::Mixed { bases: 2, rank: 3 };
    let mut layout = BankLayout::dense(&config);
    layout.layers.insert(0, LayerLayout::from(slots));
    let scheme = Scheme {
        family: config.family,
        packing: ExpertPacking::Fused,
    };
    let place = |expert| {
        let name = names::expert(0, expert, "down_proj");
        scheme.place(&name, &[32, 16], &layout)
    };
    assert_eq!(place(1).name, names::expert(0, 1, "down_proj"));
    assert_eq!(
        (place(2).shape, place(2).offset),
        (vec![7, 32, 16], 32 * 16)
    );
}

/// Matrices made by the form itself, for which its rank and number of bases are enough.
fn mixtures(n: usize, bases: usize, rank: usize, [f, h]: [usize; 2]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let stack = random(&mut rng, &[bases, rank, h]);
    let weights = (random(&mut rng, &[n, bases]) * 2.0)
        .unwrap()
        .exp()
        .unwrap();
    let shares = weights.broadcast_div(&weights.sum_keepdim(1).unwrap());
    let sums = shares
        .unwrap()
        .matmul(&(stack.reshape((bases, rank * h)).unwrap() * 3.0).unwrap());
    let inner = sums.unwrap().reshape((n, rank, h)).unwrap().silu().unwrap();
    random(&mut rng, &[n, f, rank]).matmul(&inner).unwrap()
}

#[test]
fn matrices_of_the_form_are_fitted() {
    let made = mixtures(8, 2, 4, [16, 32]);
    let fitted = fit(&made, 2, 4, STEPS).unwrap();
    assert_eq!(fitted.bases.dims(), [2, 4, 32]);
    assert_eq!(fitted.weights.dims(), [8, 2]);
    assert_eq!(fitted.transforms.dims(), [8, 16, 4]);
    assert!(fitted.loss < 0.01, "{}", fitted.loss);
    let again = fit(&made, 2, 4, STEPS).unwrap();
    assert_eq!(values(&fitted.transforms), values(&again.transforms));
    assert_eq!(values(&fitted.bases), values(&again.bases));
}

/// One basis is enough for copies of one matrix, and loses no more than a tenth beside the best factors.
#[test]
fn equal_experts_share_one_basis() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let own = random(&mut rng, &[12, 20]);
    let copies = Tensor::stack(&[&own; 6], 0).unwrap();
    assert!(fit(&copies, 1, 12, STEPS).unwrap().loss < 1e-3);
    let singular = singular_values(&own, &Metric::of_inputs(Gram::identity())).unwrap();
    let energy = |s: &[f64]| s.iter().map(|s| s * s).sum::<f64>();
    let best = energy(&singular[5..]) / energy(&singular);
    let loss = fit(&copies, 3, 5, STEPS).unwrap().loss;
    assert!(loss < 1.1 * best, "{loss}, {best}");
}

/// More bases than experts, and matrices of zeros.
#[test]
fn degenerate_fits_are_finite() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for matrices in [
        random(&mut rng, &[1, 4, 6]),
        Tensor::zeros((3, 4, 6), DType::F32, &Device::Cpu).unwrap(),
    ] {
        let fitted = fit(&matrices, 2, 4, STEPS).unwrap();
        for tensor in [fitted.bases, fitted.weights, fitted.transforms] {
            assert!(values(&tensor).iter().all(|v| v.is_finite()));
        }
    }
}
