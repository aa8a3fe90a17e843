//! DeepSeek-V2 (arXiv 2405.04434; `DeepseekV2ForCausalLM`): latent attention, shared experts
//! beside the routed ones, and dense layers at the start.
//!
//! Counted and planned only. Its YaRN scaling and group-limited routing do not change a count,
//! so they are accepted here; the decoder does not run the family.

use serde_json::Value;

use super::{Family, Keys};
use crate::Result;
use crate::config::{Attention, ModelConfig, MoeConfig};

pub(super) fn read(keys: &Keys<'_>, raw: &Value) -> Result<ModelConfig> {
    keys.one_of("hidden_act", &["silu"])?;
    keys.one_of("scoring_func", &["softmax"])?;
    keys.one_of("topk_method", &["greedy", "group_limited_greedy"])?;
    if keys.flag("attention_bias", false)? {
        let message = "`attention_bias` is not supported for this family; use a model without";
        return Err(keys.error(message));
    }
    if keys.size("moe_layer_freq", Some(1))? != 1 {
        let message = "`moe_layer_freq` must be 1; use a model with experts in every later layer";
        return Err(keys.error(message));
    }
    let num_layers = keys.size("num_hidden_layers", None)?;
    let first_dense_layers = keys.count("first_k_dense_replace", Some(0))?;
    if first_dense_layers >= num_layers {
        return Err(keys.error(format!(
            "`first_k_dense_replace` ({first_dense_layers}) leaves no layer with experts of \
             `num_hidden_layers` ({num_layers}); correct one of them"
        )));
    }
    let (num_heads, num_kv_heads) = keys.heads()?;
    let (num_experts, top_k) = keys.experts("n_routed_experts")?;
    let intermediate_size = keys.size("moe_intermediate_size", None)?;
    let qk_rope_head_dim = keys.size("qk_rope_head_dim", None)?;
    let qk_nope_head_dim = keys.size("qk_nope_head_dim", None)?;
    Ok(ModelConfig {
        family: Family::DeepseekV2,
        vocab_size: keys.size("vocab_size", None)?,
        hidden_size: keys.size("hidden_size", None)?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim: qk_rope_head_dim + qk_nope_head_dim,
        attention: Attention::MultiHeadLatent {
            q_lora_rank: keys.optional_size("q_lora_rank")?,
            kv_lora_rank: keys.size("kv_lora_rank", None)?,
            qk_rope_head_dim,
            qk_nope_head_dim,
            v_head_dim: keys.size("v_head_dim", None)?,
        },
        rms_norm_eps: keys.positive("rms_norm_eps", Some(1e-6))?,
        rope_theta: keys.rope_theta(10_000.0, &["yarn"])?,
        max_position_embeddings: keys.size("max_position_embeddings", None)?,
        tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
        moe: MoeConfig {
            num_experts,
            top_k,
            intermediate_size,
            renormalize: keys.flag("norm_topk_prob", false)?,
            routed_scaling_factor: keys.positive("routed_scaling_factor", Some(1.0))?,
            shared_intermediate_size: intermediate_size
                .saturating_mul(keys.count("n_shared_experts", Some(0))?),
            shared_gate: false,
            router_aux_loss_coef: keys.non_negative("aux_loss_alpha", Some(0.001))?,
        },
        first_dense_layers,
        dense_intermediate_size: if first_dense_layers > 0 {
            keys.size("intermediate_size", None)?
        } else {
            0
        },
        eos_token_id: keys.token("eos_token_id")?,
        pad_token_id: keys.token("pad_token_id")?,
        bos_token_id: keys.token("bos_token_id")?,
        raw: raw.clone(),
    })
}
