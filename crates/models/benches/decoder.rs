//! Our decoder against candle-transformers' Qwen3-MoE with the same weights, which compute the same
//! (`tests/candle.rs`): a prompt at once, and one token behind it. Both run as their users run them,
//! candle's on its own number of threads. Throughput is counted in tokens.

#![allow(clippy::unwrap_used)]
#![allow(missing_docs)] // criterion's macros write undocumented functions

#[path = "../tests/support/qwen3_moe.rs"]
mod qwen3_moe;

use candle_core::{Device, Tensor};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use lightmoe_models::{Decoder, LanguageModel, ModelConfig, Tokens};
use qwen3_moe::qwen3_moe;
use serde_json::json;
use std::hint::black_box;
use std::path::Path;

const PROMPT: usize = 512;

/// Two layers of OLMoE-1B-7B at half its widths: 64 experts, top 8.
fn model() -> Decoder {
    let config = json!({
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu",
        "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 64,
        "num_experts_per_tok": 8, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "norm_topk_prob": false, "tie_word_embeddings": false, "eos_token_id": 0,
    });
    let config = ModelConfig::from_json(&config, Path::new("bench")).unwrap();
    Decoder::random(&config, 0).unwrap()
}

fn decoder(c: &mut Criterion) {
    lightmoe_kernels::keep_freed_memory();
    let model = model();
    let mut theirs = qwen3_moe(&model);
    let ids: Vec<u32> = (0..PROMPT as u32).map(|i| i * 7919 % 1024).collect();
    let prompt = Tensor::new(&ids[..], &Device::Cpu).unwrap();
    let prompt = prompt.unsqueeze(0).unwrap();
    let token = prompt.narrow(1, 0, 1).unwrap();

    let ours = |ids: &[u32], cache: &mut lightmoe_models::Cache| {
        let hidden = model
            .forward(Tokens::one(ids), Some(cache), &mut |_, _, _| Ok(()))
            .unwrap();
        let last = hidden.narrow(0, ids.len() - 1, 1).unwrap();
        black_box(model.logits(&last).unwrap())
    };
    let mut group = c.benchmark_group("prompt");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(PROMPT as u64));
    group.bench_function("lightmoe", |b| b.iter(|| ours(&ids, &mut model.cache())));
    group.bench_function("candle-qwen3-moe", |b| {
        b.iter(|| {
            theirs.clear_kv_cache();
            black_box(theirs.forward(&prompt, 0).unwrap())
        })
    });
    group.finish();

    // Every measured token follows the same prompt.
    let mut group = c.benchmark_group("token");
    group.sample_size(20).sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(1));
    let mut filled = model.cache();
    ours(&ids, &mut filled);
    group.bench_function("lightmoe", |b| {
        b.iter_batched_ref(
            || filled.select(&[0]).unwrap(),
            |cache| ours(&ids[..1], cache),
            criterion::BatchSize::SmallInput,
        )
    });
    theirs.clear_kv_cache();
    theirs.forward(&prompt, 0).unwrap();
    group.bench_function("candle-qwen3-moe", |b| {
        b.iter_batched_ref(
            || theirs.clone(),
            |model| black_box(model.forward(&token, PROMPT).unwrap()),
            criterion::BatchSize::SmallInput,
        )
    });
    group.finish();
}

criterion_group!(benches, decoder);
criterion_main!(benches);
