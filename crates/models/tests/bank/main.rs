//! The expert bank against the formula of LightMoE, token by token and slot by slot, with the
//! weights read by name from the checkpoints.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod formula;
mod routing;
#[path = "../support/mod.rs"]
mod support;

use candle_core::{DType, Device, Tensor};
use formula::{check, slot};
use lightmoe_models::{Bank, Decoder, LanguageModel, LayerLayout, SlotLayout, load_experts, names};
use serde_json::json;
use support::{
    DENSE, FORMS, Folder, Form, PROJECTIONS, Random, adapted, annealing, assert_close, bank_of,
    config, config_with, factored_layers, logits, values,
};

const F32: f64 = 1e-5;
const F64: f64 = 1e-12;

#[test]
fn the_bank_computes_the_formula() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let forms = FORMS.into_iter().chain([Form::Every, Form::Mixture]);
    let layers = forms.map(|form| form.slots().map(LayerLayout::from));
    for layers in layers.chain([factored_layers()]) {
        let compressed = folder.of_layers(&original, layers);
        let both = (&compressed, &original);
        for layer in 0..2 {
            for beta in [1.0, 0.7, 0.0] {
                let mut random = Random::new(3);
                for k in [1, 2, 8] {
                    let chosen = random.choices(9, 8, k);
                    check(both, (layer, beta), &chosen, k);
                    // One token, so that all slots but K are idle.
                    check(both, (layer, beta), &chosen[..k], k);
                }
                // Each slot by itself: everything else of the bank is idle.
                let slots = &compressed.layout().layers[&layer].slots;
                let there = |e: &u32| slots[*e as usize] != SlotLayout::Removed;
                for expert in (0..8).filter(there) {
                    check(both, (layer, beta), &[expert; 3], 1);
                }
                // A token whose slots share a base, beside tokens that do not.
                check(both, (layer, beta), &[0, 4, 5, 7, 3, 1, 2, 6], 2);
            }
        }
    }
}

#[test]
fn a_bank_without_tokens_is_an_error() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let model = Decoder::load(&original).unwrap();
    let bank = model.layers[0].bank().unwrap();
    let x = Tensor::zeros((0, 16), DType::F32, &Device::Cpu).unwrap();
    let gates = Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap();
    let message = bank.forward(&x, &gates, &[]).unwrap_err().to_string();
    assert!(message.contains("no tokens"), "{message}");
}

fn zero_adapters(model: &mut Decoder) {
    for bank in model.banks_mut() {
        let b = bank.adapters.iter_mut().flat_map(|a| a.b.named_mut());
        for (_, tensor) in b {
            *tensor = tensor.zeros_like().unwrap();
        }
    }
}

#[test]
fn training_starts_at_the_original_model() {
    for k in [1, 2, 8] {
        let folder = Folder::new();
        let original = folder.original(&config_with(json!({"num_experts_per_tok": k})));
        let ids = Random::new(2).ids(12);
        let expected = logits(&Decoder::load(&original).unwrap(), &ids, 1);
        for form in FORMS {
            let compressed = folder.compressed(&original, form.slots());
            let mut model = annealing(&compressed, &original, 1.0);
            if form.has_adapters() {
                let changed = values(&logits(&model, &ids, 1));
                assert_ne!(changed, values(&expected), "the adapters do nothing");
            }
            zero_adapters(&mut model);
            assert_close(&logits(&model, &ids, 1), &expected, F32);
        }
    }
}

#[test]
fn adapters_that_fade_in_have_the_share_that_the_originals_lack() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let ids = Random::new(2).ids(12);
    for form in FORMS {
        let compressed = folder.compressed(&original, form.slots());
        for beta in [1.0, 0.7, 0.0] {
            let mut scaled = annealing(&compressed, &original, beta);
            let mut fading = annealing(&compressed, &original, beta);
            for bank in scaled.banks_mut() {
                for (_, b) in bank.adapters.iter_mut().flat_map(|a| a.b.named_mut()) {
                    *b = (&*b * (1.0 - beta)).unwrap();
                }
            }
            fading
                .banks_mut()
                .for_each(|bank| bank.adapters_fade_in = true);
            assert_close(&logits(&fading, &ids, 1), &logits(&scaled, &ids, 1), F32);
        }
    }
}

#[test]
fn training_ends_without_the_originals() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let ids = Random::new(2).ids(12);
    for form in FORMS {
        let compressed = folder.compressed(&original, form.slots());
        let expected = logits(&Decoder::load(&compressed).unwrap(), &ids, 1);
        let mut model = annealing(&compressed, &original, 0.5);
        for bank in model.banks_mut() {
            let poison = |t: &Tensor| Ok((t * f64::NAN)?);
            bank.originals = bank.originals.as_ref().map(|w| w.map(poison).unwrap());
        }
        assert!(values(&logits(&model, &ids, 1)).iter().any(|v| v.is_nan()));
        for bank in model.banks_mut() {
            bank.anneal(0.0);
            assert!(bank.originals.is_none());
        }
        assert_eq!(values(&logits(&model, &ids, 1)), values(&expected));
    }
}

#[test]
fn a_share_outside_its_range_is_brought_into_it() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixed.slots());
    for (asked, beta) in [(1.5, 1.0), (-0.5, 0.0), (-0.0, 0.0), (0.25, 0.25)] {
        let model = annealing(&compressed, &original, asked);
        let bank = model.layers[0].bank().unwrap();
        assert_eq!(bank.beta, beta);
        assert_eq!(bank.originals.is_some(), beta > 0.0);
    }
}

#[test]
fn originals_that_are_needed_and_not_there_are_an_error() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixed.slots());
    let mut model = Decoder::load(&compressed).unwrap();
    bank_of(&mut model, 0).anneal(0.5);
    let tokens = lightmoe_models::Tokens::one(&[1, 2, 3, 4, 5, 6, 7]);
    let message = model
        .forward(tokens, None, &mut |_, _, _| Ok(()))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("no originals") && message.contains("load"),
        "{message}"
    );
    model.tensors().unwrap_err();
    // Where nothing is replaced there is nothing to miss.
    let mut model = Decoder::load(&original).unwrap();
    bank_of(&mut model, 0).anneal(0.5);
    model.tensors().unwrap();
    model.forward(tokens, None, &mut |_, _, _| Ok(())).unwrap();
}

/// One base, rank zero: the plain merge of M-SMoE (checklist 10).
#[test]
fn a_merge_is_the_model_whose_experts_all_hold_the_base() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let merged = vec![adapted(0, 0); 8];
    let compressed = folder.compressed(&original, [merged.clone(), merged]);
    let mut expected = Decoder::load(&original).unwrap();
    for (l, bank) in expected.banks_mut().enumerate() {
        let dense = bank.dense.as_mut().unwrap();
        for (p, stack) in dense.named_mut() {
            let shape = &stack.dims()[1..];
            let base = compressed.tensor(&names::base(l, 0, p), shape).unwrap();
            *stack = Tensor::stack(&[&base; 8], 0).unwrap();
        }
    }
    let (model, ids) = (Decoder::load(&compressed).unwrap(), Random::new(2).ids(12));
    assert!(
        model
            .banks()
            .all(|bank| bank.adapters.is_none() && bank.dense.is_none())
    );
    assert_close(&logits(&model, &ids, 1), &logits(&expected, &ids, 1), F32);
}

/// Positions and numbers: dense first, then by group, then by number.
#[test]
fn positions_are_sorted_by_form_and_group() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let mixed = folder.compressed(&original, Form::Mixed.slots());
    let layout = mixed.layout().layers[&1].clone();
    let bank = Bank::load(&mixed, 1, &layout).unwrap();
    assert_eq!(bank.dense_experts(), [0, 4, 6]);
    assert_eq!(bank.adapted_experts(), [2, 3, 1, 5, 7]);
    assert_eq!(bank.groups(), [0, 1, 2, 2, 2]);
    assert_eq!((bank.len(), bank.is_empty()), (8, false));
    assert!(load_experts(&original, 0, &[]).unwrap().is_none());
    let slots = [vec![adapted(None, 1); 8], vec![DENSE; 8]];
    let compressed = folder.compressed(&original, slots);
    let model = Decoder::load(&compressed).unwrap();
    let banks: Vec<&Bank> = model.banks().collect();
    assert!(banks[0].dense_experts().is_empty() && banks[0].groups().is_empty());
    assert!(banks[1].adapted_experts().is_empty());
}

/// Of three chosen experts one runs, and the others only scale what it computes with, each input by a
/// vector of its own; token by token.
#[test]
fn compressed_experts_scale_what_the_main_ones_are_given() {
    let folder = Folder::new();
    let original = folder.original(&config_with(json!({ "num_experts_per_tok": 3 })));
    let (h, f, k) = (16, 12, 3);
    let experts = original.config().moe.num_experts;
    let mut random = Random::new(4);
    for main in [1, 2] {
        let layer = LayerLayout {
            main: Some(main),
            ..LayerLayout::dense(experts)
        };
        let compressed = folder.of_layers(&original, [layer.clone(), layer.clone()]);
        let bank = Bank::load(&compressed, 0, &layer).unwrap();
        let chosen = [0u32, 1, 2, 2, 0, 1, 1, 2, 0, 0, 2, 1];
        let tokens = chosen.len() / k;
        let x = random.tensor(&[tokens, h], 0.0, 1.0);
        let gates = random.tensor(&[tokens * k], 0.5, 0.4);
        let vectors = PROJECTIONS.map(|p| {
            let width = if p == "down_proj" { f } else { h };
            values(
                &compressed
                    .tensor(&names::scales(0, p), &[experts, width])
                    .unwrap(),
            )
        });
        let (xs, gs) = (values(&x), values(&gates));
        let mut expected = vec![0.0; tokens * h];
        for token in 0..tokens {
            let row = token * k..(token + 1) * k;
            let (of, gate) = (&chosen[row.clone()], &gs[row]);
            let total: f64 = gate[main..].iter().sum();
            let scale = |vectors: &[f64], width: usize| -> Vec<f64> {
                let at = |i: usize| {
                    let others = of[main..].iter().zip(&gate[main..]);
                    let terms = others.map(|(&e, g)| g / total * vectors[e as usize * width + i]);
                    terms.sum::<f64>()
                };
                (0..width).map(at).collect()
            };
            let [on_gate, on_up, on_down] =
                [(&vectors[0], h), (&vectors[1], h), (&vectors[2], f)].map(|(v, w)| scale(v, w));
            let times = |a: &[f64], b: &[f64]| -> Vec<f64> {
                a.iter().zip(b).map(|(a, b)| a * b).collect()
            };
            let input = &xs[token * h..(token + 1) * h];
            for (&expert, g) in of[..main].iter().zip(gate) {
                let [gate, up, down] = slot(&compressed, &original, (0, expert as usize), 0.0);
                let silu = |v: f64| v / (1.0 + (-v).exp());
                let gate: Vec<f64> = gate
                    .times(&times(input, &on_gate))
                    .into_iter()
                    .map(silu)
                    .collect();
                let inner = times(&gate, &up.times(&times(input, &on_up)));
                let out = down.times(&times(&inner, &on_down));
                for (sum, v) in expected[token * h..].iter_mut().zip(out) {
                    *sum += g * v;
                }
            }
        }
        let expected = Tensor::from_vec(expected, (tokens, h), &Device::Cpu).unwrap();
        assert_close(&bank.forward(&x, &gates, &chosen).unwrap(), &expected, F32);
    }
}

/// Frozen components compute as before, and come back in their place.
#[test]
fn mixtures_compute_the_same_while_they_train() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixture.slots());
    let ids = Random::new(2).ids(12);
    let mut model = Decoder::load(&compressed).unwrap();
    let (expected, written) = (logits(&model, &ids, 1), model.tensors().unwrap());
    for trained in [0, 1, 3, 9] {
        for bank in model.banks_mut() {
            bank.freeze_components(trained).unwrap();
            let rank = bank.mixed.as_ref().unwrap().gate.transforms.dim(2).unwrap();
            assert!(rank <= trained);
        }
        assert_close(&logits(&model, &ids, 1), &expected, F32);
        if trained < 4 {
            let message = model.tensors().unwrap_err().to_string();
            assert!(message.contains("finish the recovery"), "{message}");
        }
        model
            .banks_mut()
            .for_each(|bank| bank.join_components().unwrap());
        for ((name, ours), (_, before)) in model.tensors().unwrap().iter().zip(&written) {
            assert_eq!(values(ours), values(before), "{name}");
        }
    }
}
