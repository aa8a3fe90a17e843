//! OLMoE (arXiv 2409.02060; `OlmoeForCausalLM`): every layer has experts, softmax over all of
//! them and then top-k, RMS norms over the whole query and key projections.

use serde_json::Value;

use super::{Family, Keys};
use crate::Result;
use crate::config::{Attention, ModelConfig, MoeConfig, QkNorm};

pub(super) fn read(keys: &Keys<'_>, raw: &Value) -> Result<ModelConfig> {
    keys.one_of("hidden_act", &["silu"])?;
    keys.absent("sliding_window", "use a model with full attention")?;
    let hidden_size = keys.size("hidden_size", None)?;
    let (num_heads, num_kv_heads) = keys.heads()?;
    let (num_experts, top_k) = keys.experts("num_experts")?;
    let clip_qkv = keys.get("clip_qkv");
    Ok(ModelConfig {
        family: Family::Olmoe,
        vocab_size: keys.size("vocab_size", None)?,
        hidden_size,
        num_layers: keys.size("num_hidden_layers", None)?,
        num_heads,
        num_kv_heads,
        head_dim: head_dim(keys, hidden_size, num_heads)?,
        attention: Attention::GroupedQuery {
            qk_norm: QkNorm::WholeProjection,
            bias: keys.flag("attention_bias", false)?,
            clip_qkv: clip_qkv
                .map(|_| keys.positive("clip_qkv", None))
                .transpose()?,
        },
        rms_norm_eps: keys.positive("rms_norm_eps", Some(1e-5))?,
        rope_theta: keys.rope_theta(&[])?,
        max_position_embeddings: keys.size("max_position_embeddings", Some(4096))?,
        tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
        moe: MoeConfig {
            num_experts,
            top_k,
            intermediate_size: keys.size("intermediate_size", None)?,
            renormalize: keys.flag("norm_topk_prob", false)?,
            routed_scaling_factor: 1.0,
            shared_intermediate_size: 0,
            router_aux_loss_coef: keys.non_negative("router_aux_loss_coef", Some(0.01))?,
        },
        first_dense_layers: 0,
        dense_intermediate_size: 0,
        eos_token_id: keys.token("eos_token_id")?,
        pad_token_id: keys.token("pad_token_id")?,
        bos_token_id: keys.token("bos_token_id")?,
        raw: raw.clone(),
    })
}

/// The heads tile the hidden size exactly: the query norm spans all of it.
fn head_dim(keys: &Keys<'_>, hidden_size: usize, num_heads: usize) -> Result<usize> {
    let width = hidden_size / num_heads;
    if width * num_heads != hidden_size || !width.is_multiple_of(2) {
        return Err(keys.error(format!(
            "`hidden_size` ({hidden_size}) over `num_attention_heads` ({num_heads}) must be \
             an even whole number; correct one of them"
        )));
    }
    match keys.size("head_dim", Some(width))? {
        found if found == width => Ok(width),
        found => Err(keys.error(format!(
            "`head_dim` is {found}, expected `hidden_size` over `num_attention_heads` \
             ({width}); remove it"
        ))),
    }
}
