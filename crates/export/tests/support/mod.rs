//! A small compressed model with random weights.
#![allow(dead_code, reason = "every test binary uses its own part")]

use candle_core::{DType, Device, Tensor};
use lightmoe_models::random::{gaussian, stream};
use lightmoe_models::{
    BankLayout, Checkpoint, CheckpointWriter, Decoder, FactoredBases, Family, Format,
    LanguageModel, LayerLayout, Manifest, ModelConfig, Scheme, SlotLayout, Tokens, names,
};
use std::path::Path;

const EXPERTS: usize = 6;
const RANK: usize = 3;

pub fn config() -> ModelConfig {
    let raw = serde_json::json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 40,
        "hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2,
        "num_hidden_layers": 3, "num_experts": EXPERTS, "num_experts_per_tok": 2,
        "max_position_embeddings": 64, "torch_dtype": "bfloat16", "task_specific_params": [1, 2],
    });
    ModelConfig::from_json(&raw, Path::new("config.json")).unwrap()
}

/// Layer 0: two groups. Layer 1: adapters without bases. Layer 2: as it was.
pub fn layout() -> BankLayout {
    use SlotLayout::Dense;
    let adapted = |group| SlotLayout::adapted(group, RANK);
    let slots = [
        vec![
            adapted(Some(1)),
            Dense,
            adapted(Some(0)),
            adapted(Some(1)),
            Dense,
            adapted(Some(0)),
        ],
        vec![Dense, adapted(None), Dense, Dense, adapted(None), Dense],
        vec![Dense; EXPERTS],
    ];
    let mut layout = BankLayout::dense(&config());
    for (layer, slots) in slots.into_iter().enumerate() {
        layout.layers.insert(layer, LayerLayout::from(slots));
    }
    layout
}

/// A layer with factored bases, beside dense slots, and two as they were.
pub fn factored() -> BankLayout {
    let mut layout = BankLayout::dense(&config());
    let on = |group| SlotLayout::adapted(Some(group), 0);
    let slots = [on(0), on(1), SlotLayout::Dense, on(1), on(1), on(0)];
    let shape = FactoredBases {
        rank: RANK,
        gate_up_rows: 2,
        down_rows: 4,
    };
    let layer = LayerLayout {
        factored: Some(shape),
        ..LayerLayout::from(slots.to_vec())
    };
    layout.layers.insert(1, layer);
    layout
}

/// A random tensor that depends on its name; places of rows are the first ones.
pub fn random(name: &str, shape: &[usize]) -> Tensor {
    if names::is_index(name) {
        return Tensor::arange(0, shape[0] as u32, &Device::Cpu).unwrap();
    }
    gaussian(&mut stream(2, name), 0.3, shape).unwrap()
}

/// The compressed model as a checkpoint of `dtype` with side files.
pub fn compressed(dir: &Path, dtype: DType) -> Checkpoint {
    of_layout(dir, dtype, &layout())
}

/// The same of any layout.
pub fn of_layout(dir: &Path, dtype: DType, layout: &BankLayout) -> Checkpoint {
    let format = Format::new(dtype, Scheme::published(Family::Olmoe));
    let manifest = Manifest::of(&config(), layout).unwrap();
    written(dir, &format, &manifest, random)
}

/// A checkpoint of the tensors that `make` makes of their names and shapes, with side files.
pub fn written(
    dir: &Path,
    format: &Format,
    manifest: &Manifest,
    make: impl Fn(&str, &[usize]) -> Tensor,
) -> Checkpoint {
    let mut writer = CheckpointWriter::new(dir, format, manifest, &[]).unwrap();
    for (name, shape) in &manifest.tensors {
        writer.push(name, &make(name, shape)).unwrap();
    }
    for (name, text) in [
        ("tokenizer.json", "{}"),
        ("generation_config.json", "{\"a\": 1}"),
        ("LICENSE", "Do what you like."),
        (
            "README.md",
            "---\nlicense: apache-2.0\n---\n# The original\n",
        ),
    ] {
        writer.side_file(name, text.as_bytes()).unwrap();
    }
    let raw = manifest.layout.annotate(&config()).unwrap();
    writer.finish(&raw).unwrap();
    Checkpoint::open(dir).unwrap()
}

pub fn logits(checkpoint: &Checkpoint) -> Tensor {
    const IDS: [u32; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];
    let model = Decoder::load(checkpoint).unwrap();
    let hidden = model
        .forward(Tokens { ids: &IDS, rows: 2 }, None, &mut |_, _, _| Ok(()))
        .unwrap();
    model.logits(&hidden).unwrap()
}

pub fn largest(tensor: &Tensor) -> f32 {
    let all = tensor.abs().unwrap().flatten_all().unwrap();
    all.max(0).unwrap().to_scalar().unwrap()
}
