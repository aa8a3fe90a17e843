//! The load-balancing loss: worked examples, its gradient, and what the objective feeds it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{DType, Device, Tensor, Var};
use lightmoe_models::{Decoder, LanguageModel, ModelConfig, ParameterKind, Routing, Tokens};
use lightmoe_train::{TrainBatch, distance, load_balance, objective};
use std::path::Path;

/// A routing with these probabilities `[T, E]` and choices `[T · K]`.
fn routing(probabilities: Tensor, chosen: &[u32]) -> Routing {
    Routing {
        logits: probabilities.log().unwrap(),
        gates: Tensor::ones(chosen.len(), DType::F32, &Device::Cpu).unwrap(),
        probabilities,
        chosen: chosen.to_vec(),
    }
}

fn tensor<const T: usize, const E: usize>(rows: [[f32; E]; T]) -> Tensor {
    Tensor::new(&rows, &Device::Cpu).unwrap()
}

fn softmax(logits: &Tensor) -> Tensor {
    let exp = logits.exp().unwrap();
    exp.broadcast_div(&exp.sum_keepdim(1).unwrap()).unwrap()
}

fn value(routing: &[Routing]) -> f32 {
    load_balance(routing).unwrap().to_scalar::<f32>().unwrap()
}

/// `E · Σ_e f_e · p_e` of logits `[T, E]` in f64, the choices fixed.
fn formula(logits: &[Vec<f64>], chosen: &[u32]) -> f64 {
    let experts = logits[0].len();
    let probability = |token: &Vec<f64>, e: usize| {
        let total: f64 = token.iter().map(|v| v.exp()).sum();
        token[e].exp() / total
    };
    let mut sum = 0.0;
    for e in 0..experts {
        let selections = chosen.iter().filter(|&&c| c as usize == e).count();
        let mass: f64 = logits.iter().map(|token| probability(token, e)).sum();
        sum += selections as f64 / chosen.len() as f64 * mass / logits.len() as f64;
    }
    experts as f64 * sum
}

/// The `k` largest of every row, best first.
fn choose(logits: &[Vec<f64>], k: usize) -> Vec<u32> {
    let mut chosen = Vec::new();
    for token in logits {
        let mut order: Vec<u32> = (0..token.len() as u32).collect();
        order.sort_by(|&a, &b| token[b as usize].total_cmp(&token[a as usize]));
        chosen.extend(&order[..k]);
    }
    chosen
}

/// All powers of two, so that nothing is rounded.
#[test]
fn an_even_load_is_one() {
    let even = tensor([[0.25; 4]; 4]);
    let certain = tensor([[0.5, 0.25, 0.125, 0.125]; 4]);
    let each_twice = [0, 1, 2, 3, 1, 0, 3, 2];
    assert_eq!(value(&[routing(even.clone(), &each_twice)]), 1.0);
    // It is enough that either the choices or the probabilities are even.
    assert_eq!(value(&[routing(certain, &each_twice)]), 1.0);
    assert_eq!(value(&[routing(even, &[0, 1, 0, 1, 0, 1, 0, 1])]), 1.0);
}

/// `f` is ½ for each of two experts, and `p` is 1 for one of them: `8 · ½ · 1`, that is `E / K`.
#[test]
fn a_collapsed_router_costs_experts_over_choices() {
    let mut token = [0.0; 8];
    (token[1], token[3]) = (20.0, 10.0);
    let collapsed = routing(softmax(&tensor([token; 5])), &[1_u32, 3].repeat(5));
    // Both are chosen, so both probabilities count; the other six are e⁻²⁰.
    let near = (-10.0_f64).exp();
    let expected = 4.0 * (1.0 + near) / (1.0 + near + 6.0 * (-20.0_f64).exp());
    let loss = f64::from(value(std::slice::from_ref(&collapsed)));
    assert!((loss - expected).abs() < 4e-6, "{loss} is not {expected}");
    assert!((loss - 4.0).abs() < 4e-6, "{loss}");
    // The mean over layers: one that collapsed is not hidden by one that did not.
    let even = routing(tensor([[0.125; 8]; 4]), &[0, 1, 2, 3, 4, 5, 6, 7]);
    let both = f64::from(value(&[collapsed, even]));
    assert!((both - 2.5).abs() < 4e-6, "{both}");
}

/// `f = [¾, ¼, 0, 0]` and `p = [7/16, 5/16, 1/8, 1/8]`: `4 · (21/64 + 5/64)`.
#[test]
fn an_uneven_load_has_the_value_computed_by_hand() {
    let first = [0.5, 0.25, 0.125, 0.125];
    let second = [0.25, 0.5, 0.125, 0.125];
    let rows = tensor([first, first, second, first]);
    assert_eq!(value(&[routing(rows, &[0, 0, 1, 0])]), 1.625);
}

#[test]
fn no_layers_are_refused() {
    let message = load_balance(&[]).unwrap_err().to_string();
    assert!(message.contains("MoE"), "{message}");
}

/// The loss works in f32, too coarse for differences; they are taken of the formula in f64.
#[test]
fn the_gradient_is_the_slope_of_the_formula() {
    const STEP: f64 = 1e-4;
    let (tokens, experts, k) = (6, 5, 2);
    let logits = |layer: usize| -> Vec<Vec<f64>> {
        let at = |t: usize, e: usize| (1 + 7 * t + 3 * e + 5 * layer) as f64;
        (0..tokens)
            .map(|t| (0..experts).map(|e| 2.0 * at(t, e).sin()).collect())
            .collect()
    };
    let layers = [logits(0), logits(1)];
    let vars = layers.each_ref().map(|rows| {
        let values: Vec<f32> = rows.concat().into_iter().map(|v| v as f32).collect();
        Var::from_vec(values, (tokens, experts), &Device::Cpu).unwrap()
    });
    let chosen = layers.each_ref().map(|rows| choose(rows, k));
    let routings = [0_usize, 1].map(|l| routing(softmax(vars[l].as_tensor()), &chosen[l]));
    let loss = load_balance(&routings).unwrap();
    let expected = (formula(&layers[0], &chosen[0]) + formula(&layers[1], &chosen[1])) / 2.0;
    let ours = f64::from(loss.to_scalar::<f32>().unwrap());
    assert!((ours - expected).abs() < 1e-5, "{ours} is not {expected}");
    let grads = loss.backward().unwrap();
    for layer in [0_usize, 1] {
        let grad = grads.get(&vars[layer]).unwrap();
        let grad: Vec<f32> = grad.flatten_all().unwrap().to_vec1().unwrap();
        let slope = |i: usize| {
            let at = |step: f64| {
                let mut moved = layers[layer].clone();
                moved[i / experts][i % experts] += step;
                // Half: the mean over two layers.
                formula(&moved, &chosen[layer]) / 2.0
            };
            (at(STEP) - at(-STEP)) / (2.0 * STEP)
        };
        let slopes: Vec<f64> = (0..tokens * experts).map(slope).collect();
        let steepest = slopes.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        assert!(steepest > 1e-3, "the gradient vanishes");
        for (i, (&ours, slope)) in grad.iter().zip(&slopes).enumerate() {
            let error = (f64::from(ours) - slope).abs();
            assert!(error <= 1e-4 * steepest, "{i}: {ours} is not {slope}");
        }
    }
}

/// The objective takes the routing of every layer, and its gradient reaches every router.
#[test]
fn the_objective_balances_every_router() {
    let config = serde_json::json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu",
        "vocab_size": 24, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
        "norm_topk_prob": false, "tie_word_embeddings": false, "eos_token_id": 0,
    });
    let config = ModelConfig::from_json(&config, Path::new("config.json")).unwrap();
    let mut model = Decoder::random(&config, 5).unwrap();
    let mut routers = Vec::new();
    model
        .visit(&mut |_, kind, tensor| {
            if kind == ParameterKind::Router {
                let var = Var::from_tensor(tensor)?;
                *tensor = var.as_tensor().clone();
                routers.push(var);
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(routers.len(), 3);
    let batch = TrainBatch {
        tokens: (0..40).map(|i| i * 7 % 24).collect(),
        rows: 4,
        loss_mask: vec![true; 40],
    };
    let mut values = Vec::new();
    let tokens = Tokens {
        ids: &batch.tokens,
        rows: batch.rows,
    };
    model
        .forward(tokens, None, &mut |_, _, routing| {
            let rows = routing
                .unwrap()
                .logits
                .to_dtype(DType::F64)?
                .to_vec2::<f64>()?;
            values.push(formula(&rows, &routing.unwrap().chosen));
            Ok(())
        })
        .unwrap();
    assert_eq!(values.len(), 3);
    let expected = values.iter().sum::<f64>() / 3.0;
    let losses = objective(&model, (0, &batch), true, None).unwrap();
    let (loss, balance) = (losses.task, losses.balance);
    let balance = balance.unwrap();
    let ours = f64::from(balance.to_scalar::<f32>().unwrap());
    assert!((ours - expected).abs() < 1e-5, "{ours} is not {expected}");
    let grads = balance.backward().unwrap();
    for (layer, router) in routers.iter().enumerate() {
        let grad = grads.get(router).expect("a router without a gradient");
        let size = grad.abs().unwrap().max_all().unwrap();
        assert!(size.to_scalar::<f32>().unwrap() > 1e-5, "layer {layer}");
    }
    // Without balancing the loss on the tokens is the same and nothing else is there.
    let losses = objective(&model, (0, &batch), false, None).unwrap();
    let (alone, none) = (losses.task, losses.balance);
    assert!(none.is_none());
    let losses = [loss, alone].map(|l| l.to_scalar::<f32>().unwrap());
    assert_eq!(losses[0], losses[1]);
}

/// Against the formula, and by finite differences: a student moves towards its teacher.
#[test]
fn the_distance_to_a_teacher() {
    let (rows, width, temperature) = (3, 5, 2.0);
    let numbers = |start: f64| -> Vec<f64> {
        (0..rows * width)
            .map(|i| (start + i as f64 * 1.7).sin() * 2.0)
            .collect()
    };
    let tensor = |v: &[f64]| Tensor::from_vec(v.to_vec(), (rows, width), &Device::Cpu).unwrap();
    let (own, other) = (numbers(0.3), numbers(1.1));
    let expected = |own: &[f64]| -> f64 {
        let log_softmax = |row: &[f64]| -> Vec<f64> {
            let sum: f64 = row.iter().map(|v| (v / temperature).exp()).sum();
            row.iter().map(|v| v / temperature - sum.ln()).collect()
        };
        let of_row = |(own, other): (&[f64], &[f64])| -> f64 {
            let (p, q) = (log_softmax(other), log_softmax(own));
            p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
        };
        let sum: f64 = own.chunks(width).zip(other.chunks(width)).map(of_row).sum();
        temperature * temperature * sum / rows as f64
    };
    let student = Var::from_tensor(&tensor(&own)).unwrap();
    let found = distance(student.as_tensor(), &tensor(&other), temperature).unwrap();
    let value = found.to_scalar::<f64>().unwrap();
    assert!((value - expected(&own)).abs() < 1e-12 && value > 0.0);
    let grads = found.backward().unwrap();
    let grad = grads.get(&student).unwrap().flatten_all().unwrap();
    for (i, grad) in grad.to_vec1::<f64>().unwrap().into_iter().enumerate() {
        let moved = |step: f64| {
            let mut own = own.clone();
            own[i] += step;
            expected(&own)
        };
        let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        assert!((slope - grad).abs() < 1e-8, "{i}: {grad} is not {slope}");
    }
    let same = distance(&tensor(&own), &tensor(&own), temperature).unwrap();
    assert!(same.to_scalar::<f64>().unwrap().abs() < 1e-12);
}
