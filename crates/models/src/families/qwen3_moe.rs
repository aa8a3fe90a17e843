//! Qwen3-MoE (arXiv 2505.09388; `Qwen3MoeForCausalLM`): norms over each query and key head, heads of
//! a width of their own, no shared expert.

use super::keys::Keys;
use super::{Facts, Family};
use crate::Result;
use crate::config::{Attention, QkNorm};

pub(super) fn read(keys: &Keys<'_>) -> Result<Facts> {
    keys.uniform_layers()?;
    // Qwen3-Coder writes down what all of the family do.
    keys.fixed("qkv_bias", false)?;
    keys.fixed("use_qk_norm", true)?;
    if keys.count("shared_expert_intermediate_size", Some(0))? != 0 {
        let message = "`shared_expert_intermediate_size` is not 0, but this family has no shared \
                       expert; correct it";
        return Err(keys.error(message));
    }
    let attention = Attention::GroupedQuery {
        qk_norm: QkNorm::PerHead,
        bias: keys.attention_bias(false)?,
        clip_qkv: None,
        sliding_window: None,
    };
    let moe = keys.routed("num_experts", "moe_intermediate_size")?;
    Ok(Facts {
        max_position_embeddings: Some(32_768),
        ..Facts::of(Family::Qwen3Moe, attention, moe)
    })
}
