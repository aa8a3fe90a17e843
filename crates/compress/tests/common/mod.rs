//! Models and observations that the tests share.
#![allow(dead_code, reason = "every test binary uses its own part")]

pub mod predictions;

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use lightmoe_compress::methods::{MethodName, PlanOptions, Target, plan};
use lightmoe_compress::observations::{LayerObservations, Observations, OutputObservations};
use lightmoe_compress::plan::Plan;
use lightmoe_compress::{BuildInputs, ObserveOptions, Statistics, observe};
use lightmoe_models::config::ModelConfig;
use lightmoe_models::{
    Bank, BankLayout, Checkpoint, CheckpointWriter, DType, Decoder, Format, Layer, LayerLayout,
    Projections, Scheme, SlotLayout,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

pub fn published(name: &str) -> ModelConfig {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/configs");
    ModelConfig::from_file(&folder.join(name)).unwrap()
}

pub fn olmoe() -> ModelConfig {
    published("olmoe-1b-7b-0924.json")
}

/// OLMoE in small: `layers` x `experts`, `H` 32, `F` 16.
pub fn small(layers: usize, experts: usize) -> ModelConfig {
    let mut raw = olmoe().raw;
    for (key, value) in [
        ("vocab_size", 64),
        ("hidden_size", 32),
        ("intermediate_size", 16),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 2),
        ("num_hidden_layers", layers),
        ("num_experts", experts),
        ("num_experts_per_tok", 2),
        ("eos_token_id", 0),
    ] {
        raw[key] = value.into();
    }
    ModelConfig::from_json(&raw, Path::new("small.json")).unwrap()
}

/// A checkpoint of random weights in `folder`.
pub fn random_checkpoint(
    config: &ModelConfig,
    dtype: DType,
    seed: u64,
    folder: &TempDir,
) -> Checkpoint {
    let model = Decoder::random(config, seed).unwrap();
    written(&model, config, dtype, folder)
}

/// The checkpoint of a model whose experts are all dense.
pub fn written(
    model: &Decoder,
    config: &ModelConfig,
    dtype: DType,
    folder: &TempDir,
) -> Checkpoint {
    let path = folder.path().join("model");
    let format = Format::new(dtype, Scheme::published(config.family));
    let layout = BankLayout::dense(config);
    let writer = CheckpointWriter::for_model(&path, &format, config, &layout).unwrap();
    model.write(&writer).unwrap();
    writer.finish(&config.raw).unwrap();
    Checkpoint::open(&path).unwrap()
}

/// A model in which every expert is the layer's first and `own` times what it was.
pub fn upcycled(config: &ModelConfig, own: f64, folder: &TempDir) -> Checkpoint {
    let mut model = Decoder::random(config, 11).unwrap();
    for bank in model.banks_mut() {
        let dense = bank.dense.as_mut().unwrap();
        for stack in [&mut dense.gate, &mut dense.up, &mut dense.down] {
            let first = stack.narrow(0, 0, 1).unwrap();
            *stack = first.broadcast_add(&(&*stack * own).unwrap()).unwrap();
        }
    }
    written(&model, config, DType::BF16, folder)
}

/// What `budget` plans.
pub fn budgeted(
    config: &ModelConfig,
    seen: &Observations,
    target: Target,
    options: &PlanOptions,
) -> Plan {
    plan(config, seen, target, MethodName::Budget, options).unwrap()
}

/// Observations of `samples`, saved in `folder`.
pub fn observed(
    checkpoint: &Checkpoint,
    samples: &[Vec<u32>],
    statistics: Statistics,
    folder: &TempDir,
) -> Observations {
    let options = ObserveOptions {
        fingerprint: "observed",
        state: &folder.path().join("state"),
        statistics,
        answers: &[],
        successor: None,
        max_memory: 1 << 32,
    };
    let seen = observe(checkpoint, samples, &options, &mut |_, _| true).unwrap();
    seen.save(&folder.path().join("seen.safetensors")).unwrap()
}

/// The layer with these experts removed.
pub fn without(layer: &Layer, removed: &[usize]) -> Layer {
    let mut layer = layer.clone();
    let bank = layer.bank_mut().unwrap();
    let mut layout = LayerLayout::dense(bank.len());
    for &expert in removed {
        layout.slots[expert] = SlotLayout::Removed;
    }
    let kept: Vec<u32> = layout
        .of_form(SlotLayout::Dense)
        .map(|e| e as u32)
        .collect();
    let kept = Tensor::new(kept, &candle_core::Device::Cpu).unwrap();
    let dense = bank.dense.as_ref().unwrap();
    let of = |w: &Tensor| w.index_select(&kept, 0).unwrap();
    let dense = Projections {
        gate: of(&dense.gate),
        up: of(&dense.up),
        down: of(&dense.down),
    };
    *bank = Bank::of_dense(&layout, dense);
    layer
}

pub fn options(rank: usize, groups: usize) -> PlanOptions {
    PlanOptions {
        rank,
        groups,
        ..PlanOptions::default()
    }
}

/// Skewed gate masses, rising router norms and symmetric similarities, from `seed`.
pub fn observations(config: &ModelConfig, seed: u64) -> Observations {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let experts = config.moe.num_experts;
    let layers = config.moe_layers().map(|layer| {
        let mut similarity = vec![1.0; experts * experts];
        for a in 0..experts {
            for b in 0..a {
                let value = rng.random_range(-1.0..1.0);
                similarity[a * experts + b] = value;
                similarity[b * experts + a] = value;
            }
        }
        LayerObservations {
            layer,
            gate_mass: (0..experts)
                .map(|_| (4.0 * rng.random::<f64>()).exp())
                .collect(),
            selections: (0..experts as u64).collect(),
            router_norm: Some(100.0 + 30.0 * layer as f64),
            similarity: Some(similarity),
            logit_gram: None,
            outputs: Some(outputs(experts, config.hidden_size, &mut rng)),
            all_outputs: None,
            spectra: None,
            damage: None,
        }
    });
    Observations {
        layers: layers.collect(),
        tokens: 1024,
        samples: 8,
        fingerprint: format!("seed {seed}"),
        sensitivity: None,
        moments: None,
    }
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// What experts might have given.
fn outputs(experts: usize, hidden_size: usize, rng: &mut ChaCha8Rng) -> OutputObservations {
    let mut draw = |n: usize| (0..n).map(|_| rng.random::<f64>()).collect::<Vec<f64>>();
    OutputObservations {
        gated: draw(experts),
        norm: draw(experts),
        square: draw(experts),
        sum: draw(experts * hidden_size),
        weighted: draw(experts * hidden_size),
        flatness: draw(experts),
    }
}

/// A build without observations.
pub fn inputs<'a>(checkpoint: &'a Checkpoint, plan: &'a Plan, seed: u64) -> BuildInputs<'a> {
    BuildInputs {
        checkpoint,
        plan,
        observations: None,
        seed,
    }
}
