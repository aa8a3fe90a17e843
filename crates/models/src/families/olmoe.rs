//! OLMoE (arXiv 2409.02060; `OlmoeForCausalLM`): every layer has experts, softmax over all of
//! them and then top-k, RMS norms over the whole query and key projections.

use super::keys::Keys;
use super::{Facts, Family};
use crate::Result;
use crate::config::{Attention, MoeConfig, QkNorm};

pub(super) fn read(keys: &Keys<'_>) -> Result<Facts> {
    keys.absent("sliding_window", "use a model with full attention")?;
    whole_heads(keys)?;
    let clip_qkv = keys.get("clip_qkv");
    let attention = Attention::GroupedQuery {
        qk_norm: QkNorm::WholeProjection,
        bias: keys.attention_bias(false)?,
        clip_qkv: clip_qkv
            .map(|_| keys.positive("clip_qkv", None))
            .transpose()?,
        sliding_window: None,
    };
    let moe = MoeConfig {
        router_aux_loss_coef: keys.non_negative("router_aux_loss_coef", Some(0.01))?,
        ..keys.routed("num_experts", "intermediate_size")?
    };
    Ok(Facts {
        norm_eps: 1e-5,
        max_position_embeddings: Some(4096),
        ..Facts::of(Family::Olmoe, attention, moe)
    })
}

/// The heads tile the hidden size exactly: the query norm spans all of it.
fn whole_heads(keys: &Keys<'_>) -> Result<()> {
    let hidden_size = keys.size("hidden_size", None)?;
    let (num_heads, _) = keys.heads()?;
    let width = hidden_size / num_heads;
    if width * num_heads != hidden_size || !width.is_multiple_of(2) {
        return Err(keys.error(format!(
            "`hidden_size` ({hidden_size}) over `num_attention_heads` ({num_heads}) must be \
             an even whole number; correct one of them"
        )));
    }
    match keys.size("head_dim", Some(width))? {
        found if found == width => Ok(()),
        found => Err(keys.error(format!(
            "`head_dim` is {found}, expected `hidden_size` over `num_attention_heads` \
             ({width}); remove it"
        ))),
    }
}
