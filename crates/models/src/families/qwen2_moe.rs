//! Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671; `Qwen2MoeForCausalLM`): a shared expert behind a
//! sigmoid gate beside the routed ones, biases on queries, keys and values.

use super::keys::Keys;
use super::{Facts, Family};
use crate::Result;
use crate::config::{Attention, MoeConfig, ProjectionBias, QkNorm};

pub(super) fn read(keys: &Keys<'_>) -> Result<Facts> {
    keys.uniform_layers()?;
    let attention = Attention::GroupedQuery {
        qk_norm: QkNorm::None,
        bias: match keys.flag("qkv_bias", true)? {
            true => ProjectionBias::QueryKeyValue,
            false => ProjectionBias::None,
        },
        clip_qkv: None,
        sliding_window: None,
    };
    let moe = MoeConfig {
        shared_intermediate_size: keys.size("shared_expert_intermediate_size", None)?,
        shared_gate: true,
        ..keys.routed("num_experts", "moe_intermediate_size")?
    };
    Ok(Facts {
        max_position_embeddings: Some(32_768),
        ..Facts::of(Family::Qwen2Moe, attention, moe)
    })
}
