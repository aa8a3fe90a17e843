//! candle-transformers' Qwen3-MoE on the weights of an OLMoE model: another implementation of the
//! same function. Qwen3 normalises queries and keys per head and OLMoE over the whole projection, so
//! the two agree for models of one attention head, to which this is limited.
//!
//! Shared by a test and a bench.

use candle_core::{DType, Device};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::qwen3_moe::{Config, ModelForCausalLM};
use lightmoe_models::{Decoder, LanguageModel, ModelConfig};

/// The baseline with the weights of `model`.
pub fn qwen3_moe(model: &Decoder) -> ModelForCausalLM {
    let ours: &ModelConfig = model.config();
    assert_eq!(
        ours.num_heads, 1,
        "per head is not over the whole projection"
    );
    let config = Config {
        vocab_size: ours.vocab_size,
        hidden_size: ours.hidden_size,
        intermediate_size: ours.moe.intermediate_size,
        num_hidden_layers: ours.num_layers,
        num_attention_heads: 1,
        head_dim: ours.head_dim,
        attention_bias: false,
        num_key_value_heads: 1,
        max_position_embeddings: ours.max_position_embeddings,
        sliding_window: None,
        max_window_layers: 0,
        tie_word_embeddings: false,
        rope_theta: ours.rope_theta,
        rms_norm_eps: ours.norm_eps,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
        decoder_sparse_step: 1,
        moe_intermediate_size: ours.moe.intermediate_size,
        num_experts_per_tok: ours.moe.top_k,
        num_experts: ours.moe.num_experts,
        norm_topk_prob: ours.moe.renormalize,
    };
    let tensors = model.tensors().unwrap().into_iter().collect();
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    ModelForCausalLM::new(&config, weights).unwrap()
}
