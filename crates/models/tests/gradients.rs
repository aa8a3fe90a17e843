//! Finite differences in f64 through the whole model, for every kind of parameter, with originals
//! attached at several shares (LightMoE checklist 8).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Device, Tensor, Var};
use lightmoe_kernels::cross_entropy;
use lightmoe_models::{
    Adapters, Decoder, LanguageModel, LayerLayout, ParameterKind, Projections, Tokens,
};
use rand::Rng;
use serde_json::json;
use support::{
    Folder, Form, Random, annealing, config, config_with, factored_layers, mixtures, stacks, values,
};

const STEP: f64 = 1e-5;
/// Relative to the largest gradient of the tensor: the truncation error of a central difference.
const TOLERANCE: f64 = 1e-6;
/// Random entries of each tensor that are compared, besides the one of the largest gradient.
const ENTRIES: usize = 4;

/// The model as f64 variables with adapters on its dense slots, and the variables' names.
fn variables(mut model: Decoder) -> (Decoder, Vec<(String, ParameterKind, Var)>) {
    let mut random = Random::new(5);
    let config = model.config().clone();
    for (l, bank) in model.banks_mut().enumerate() {
        let experts = bank.dense_experts().to_vec();
        bank.dense_adapters = Adapters::fresh(&config, l, &experts, (2, 3), &Device::Cpu).unwrap();
        // A fresh `lora_B` is zero, which hides the gradient of `lora_A`.
        for (_, b) in bank.dense_adapters.iter_mut().flat_map(|a| a.b.named_mut()) {
            *b = random.tensor(b.dims(), 0.0, 0.5);
        }
        for stack in stacks(bank) {
            *stack = stack.map(|t| Ok(t.to_dtype(DType::F64)?)).unwrap();
        }
    }
    let mut vars = Vec::new();
    model
        .visit(&mut |name, kind, tensor| {
            let var = Var::from_tensor(&tensor.to_dtype(DType::F64)?)?;
            *tensor = var.as_tensor().clone();
            vars.push((name.to_owned(), kind, var));
            Ok(())
        })
        .unwrap();
    (model, vars)
}

/// Loss of the next token, and every choice of the routers.
fn loss(model: &Decoder, ids: &[u32]) -> (Tensor, Vec<u32>) {
    let mut chosen = Vec::new();
    let tokens = Tokens { ids, rows: 2 };
    let hidden = model
        .forward(tokens, None, &mut |_, _, routing| {
            chosen.extend(&routing.unwrap().chosen);
            Ok(())
        })
        .unwrap();
    let targets: Vec<u32> = ids.iter().map(|id| (id * 7 + 3) % 24).collect();
    let nll = cross_entropy(&model.logits(&hidden).unwrap(), &targets).unwrap();
    (nll.mean_all().unwrap(), chosen)
}

fn check(model: Decoder, beta: f64) -> Vec<ParameterKind> {
    let (model, vars) = variables(model);
    let mut random = Random::new(8);
    let ids = random.ids(20);
    let (whole, routed) = loss(&model, &ids);
    let grads = whole.backward().unwrap();
    for (name, kind, var) in &vars {
        let original = values(var);
        let difference = |entry: usize| {
            let at = |step: f64| {
                let mut moved = original.clone();
                moved[entry] += step;
                let moved = Tensor::from_vec(moved, var.shape(), var.device()).unwrap();
                var.set(&moved).unwrap();
                let (loss, chosen) = loss(&model, &ids);
                assert_eq!(chosen, routed, "{name}: the step changed the routing");
                loss.to_scalar::<f64>().unwrap()
            };
            let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            at(0.0);
            slope
        };
        let mut entries: Vec<usize> = (0..ENTRIES)
            .map(|_| random.0.random_range(0..original.len()))
            .collect();
        let Some(grad) = grads.get(var) else {
            // At β = 1 a base has no share; every other parameter takes part.
            assert!(
                beta == 1.0 && *kind == ParameterKind::Base,
                "{name} at {beta}: no gradient"
            );
            for entry in entries {
                assert_eq!(difference(entry), 0.0, "{name}");
            }
            continue;
        };
        let grad = values(grad);
        let steepest = (0..grad.len()).max_by(|&a, &b| grad[a].abs().total_cmp(&grad[b].abs()));
        entries.extend(steepest);
        let scale = steepest.map_or(0.0, |e| grad[e].abs());
        assert!(scale > 1e-6, "{name} at {beta}: gradient vanishes");
        for entry in entries {
            let (slope, grad) = (difference(entry), grad[entry]);
            assert!(
                (slope - grad).abs() <= TOLERANCE * scale + 1e-10,
                "{name}[{entry}] at {beta}: gradient {grad}, slope {slope}"
            );
        }
    }
    vars.into_iter().map(|(_, kind, _)| kind).collect()
}

#[test]
fn every_parameter_of_a_mixed_bank() {
    use ParameterKind::{Adapter, Attention, Base, Embedding, Expert, Norm, Router};
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixed.slots());
    for beta in [1.0, 0.5, 0.0] {
        let kinds = check(annealing(&compressed, &original, beta), beta);
        // 2 of the ends and a norm; in each layer 4, 4, 1 and 3 of attention, norms, router and
        // dense experts, 3 of bases, and 2 · 6 of adapters.
        let count = |kind| kinds.iter().filter(|k| **k == kind).count();
        let counts = [Embedding, Attention, Norm, Router, Expert, Base, Adapter].map(count);
        assert_eq!(counts, [2, 8, 9, 2, 6, 6, 24]);
    }
}

#[test]
fn every_parameter_of_the_other_banks() {
    let folder = Folder::new();
    let original = folder.original(&config());
    for form in [Form::NoBases, Form::Merge, Form::Extremes] {
        let compressed = folder.compressed(&original, form.slots());
        for beta in [0.5, 0.0] {
            check(annealing(&compressed, &original, beta), beta);
        }
    }
}

#[test]
fn grouped_queries_a_tied_head_and_renormalised_gates() {
    let folder = Folder::new();
    let original = folder.original(&config_with(json!({
        "num_key_value_heads": 2, "tie_word_embeddings": true, "norm_topk_prob": true,
        "num_experts_per_tok": 3,
    })));
    let compressed = folder.compressed(&original, Form::Mixed.slots());
    check(annealing(&compressed, &original, 0.5), 0.5);
}

#[test]
fn every_form_beside_every_other() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Every.slots());
    check(annealing(&compressed, &original, 0.5), 0.5);
}

/// Bases that train through adapters; β above zero, so that they have a share.
#[test]
fn adapters_of_bases() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixed.slots());
    let mut model = annealing(&compressed, &original, 0.5);
    let (config, mut random) = (model.config().clone(), Random::new(6));
    for (l, bank) in model.banks_mut().enumerate() {
        let bases: Vec<usize> = (0..bank.base_count()).collect();
        bank.base_adapters = Adapters::fresh(&config, l, &bases, (2, 4), &Device::Cpu).unwrap();
        for (_, b) in bank.base_adapters.iter_mut().flat_map(|a| a.b.named_mut()) {
            *b = random.tensor(b.dims(), 0.0, 0.5);
        }
    }
    let kinds = check(model, 0.5);
    assert!(!kinds.contains(&ParameterKind::Base));
}

#[test]
fn experts_that_only_scale() {
    let folder = Folder::new();
    let original = folder.original(&config_with(json!({ "num_experts_per_tok": 3 })));
    let experts = original.config().moe.num_experts;
    for main in [1, 2] {
        let layer = LayerLayout {
            main: Some(main),
            ..LayerLayout::dense(experts)
        };
        let compressed = folder.of_layers(&original, [layer.clone(), layer]);
        let kinds = check(Decoder::load(&compressed).unwrap(), 0.0);
        let scales = kinds.iter().filter(|k| **k == ParameterKind::Scale);
        assert_eq!(scales.count(), 6);
    }
}

/// Mixed slots, with adapters on their down matrices and some components frozen.
#[test]
fn every_parameter_of_mixed_slots() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixture.slots());
    check(annealing(&compressed, &original, 0.5), 0.5);
    let mut model = annealing(&compressed, &original, 0.0);
    let config = model.config().clone();
    for (l, bank) in model.banks_mut().enumerate() {
        // Whole here, since what is frozen stays in f32.
        for tensor in mixtures(bank) {
            *tensor = tensor.to_dtype(DType::F64).unwrap();
        }
        let fresh =
            Adapters::fresh(&config, l, bank.mixed_experts(), (2, 3), &Device::Cpu).unwrap();
        bank.freeze_components(2).unwrap();
        let b = Random::new(6).tensor(fresh.as_ref().unwrap().b.down.dims(), 0.0, 0.5);
        bank.mixed.as_mut().unwrap().down_adapters = fresh.map(|fresh| (fresh.a.down, b));
    }
    check(model, 0.0);
}

/// Factored bases as they are stored, and as they train.
#[test]
fn every_parameter_of_factored_bases() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.of_layers(&original, factored_layers());
    for beta in [0.5, 0.0] {
        let mut model = annealing(&compressed, &original, beta);
        let stored = check(model.clone(), beta);
        let mut random = Random::new(6);
        for bank in model.banks_mut() {
            let n = bank.base_count();
            let mut whole = |out, width| random.tensor(&[n, out, width], 0.0, 0.5);
            let bases = Projections {
                gate: whole(12, 16),
                up: whole(12, 16),
                down: whole(16, 12),
            };
            bank.unfold_bases(&bases).unwrap();
        }
        let training = check(model, beta);
        for kinds in [stored, training] {
            // Rows, or all of S, of three projections in two layers.
            let bases = kinds.iter().filter(|kind| **kind == ParameterKind::Base);
            assert_eq!(bases.count(), 6);
        }
    }
}

#[test]
fn the_originals_are_frozen() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixed.slots());
    let (model, vars) = variables(annealing(&compressed, &original, 0.5));
    let grads = loss(&model, &Random::new(8).ids(20)).0.backward().unwrap();
    let mut known = 0;
    for bank in model.banks() {
        for (_, tensor) in bank.originals.as_ref().unwrap().named() {
            assert!(grads.get(tensor).is_none());
            assert!(vars.iter().all(|(_, _, var)| var.id() != tensor.id()));
            known += 1;
        }
    }
    assert_eq!(known, 6);
}
