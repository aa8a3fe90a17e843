//! Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671; `Qwen2MoeForCausalLM`): a shared expert behind a
//! sigmoid gate beside the routed ones, biases on queries, keys and values.

use serde_json::Value;

use super::{Family, Keys, Uniform};
use crate::Result;
use crate::config::{Attention, ModelConfig, MoeConfig, ProjectionBias, QkNorm};

pub(super) fn read(keys: &Keys<'_>, raw: &Value) -> Result<ModelConfig> {
    keys.uniform_layers()?;
    let model = Uniform {
        family: Family::Qwen2Moe,
        attention: Attention::GroupedQuery {
            qk_norm: QkNorm::None,
            bias: match keys.flag("qkv_bias", true)? {
                true => ProjectionBias::QueryKeyValue,
                false => ProjectionBias::None,
            },
            clip_qkv: None,
            sliding_window: None,
        },
        moe: MoeConfig {
            shared_intermediate_size: keys.size("shared_expert_intermediate_size", None)?,
            shared_gate: true,
            ..keys.routed("num_experts", "moe_intermediate_size")?
        },
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        max_position_embeddings: 32_768,
    };
    model.read(keys, raw)
}
