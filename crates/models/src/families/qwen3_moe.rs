//! Qwen3-MoE (arXiv 2505.09388; `Qwen3MoeForCausalLM`): norms over each query and key head, heads of
//! a width of their own, no shared expert.

use serde_json::Value;

use super::{Family, Keys, Uniform};
use crate::Result;
use crate::config::{Attention, ModelConfig, QkNorm};

pub(super) fn read(keys: &Keys<'_>, raw: &Value) -> Result<ModelConfig> {
    keys.uniform_layers()?;
    let model = Uniform {
        family: Family::Qwen3Moe,
        attention: Attention::GroupedQuery {
            qk_norm: QkNorm::PerHead,
            bias: keys.attention_bias()?,
            clip_qkv: None,
            sliding_window: None,
        },
        moe: keys.routed("num_experts", "moe_intermediate_size")?,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        max_position_embeddings: 32_768,
    };
    model.read(keys, raw)
}
