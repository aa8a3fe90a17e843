//! DeepSeek-V2 (arXiv 2405.04434; `DeepseekV2ForCausalLM`): latent attention, shared experts
//! beside the routed ones, dense layers at the start, routing limited to groups.

use super::deepseek::{beside_shared, dense_layers};
use super::keys::Keys;
use super::{Facts, Family};
use crate::Result;
use crate::config::{Attention, ExpertGroups, GroupScore, MoeConfig};

pub(super) fn read(keys: &Keys<'_>) -> Result<Facts> {
    keys.one_of("scoring_func", &["softmax"])?;
    keys.one_of("topk_method", &["greedy", "group_limited_greedy"])?;
    let moe = beside_shared(keys)?;
    let groups = keys.groups(moe.num_experts, moe.top_k, GroupScore::Best)?;
    if moe.renormalize {
        // The published model code then leaves the scaling factor away, `transformers` the norm.
        let message = "`norm_topk_prob` is true, which implementations of this family read \
                       differently; use a model without";
        return Err(keys.error(message));
    }
    let limited = keys.text("topk_method", Some("greedy"))? == "group_limited_greedy";
    let moe = MoeConfig {
        groups: groups.filter(|_| limited),
        routed_scaling_factor: keys.positive("routed_scaling_factor", Some(1.0))?,
        ..moe
    };
    latent(keys, Family::DeepseekV2, moe)
}

/// What the families with latent attention have in common.
pub(super) fn latent(keys: &Keys<'_>, family: Family, moe: MoeConfig) -> Result<Facts> {
    keys.fixed("attention_bias", false)?;
    keys.fixed("mlp_bias", false)?;
    // How many machines shared the experts in training; and what `transformers` derives from others.
    keys.ignore(&["ep_size", "head_dim", "qk_head_dim"]);
    let qk_rope_head_dim = keys.size("qk_rope_head_dim", None)?;
    let qk_nope_head_dim = keys.size("qk_nope_head_dim", None)?;
    if !qk_rope_head_dim.is_multiple_of(2) {
        return Err(keys.error(format!(
            "`qk_rope_head_dim` is {qk_rope_head_dim}, expected an even number; correct it"
        )));
    }
    let (heads, kv_heads) = keys.heads()?;
    if heads != kv_heads {
        return Err(keys.error(format!(
            "`num_key_value_heads` ({kv_heads}) must be `num_attention_heads` ({heads}) for \
             latent attention; correct one of them"
        )));
    }
    let attention = Attention::MultiHeadLatent {
        q_lora_rank: keys.optional_size("q_lora_rank")?,
        kv_lora_rank: keys.size("kv_lora_rank", None)?,
        qk_rope_head_dim,
        qk_nope_head_dim,
        v_head_dim: keys.size("v_head_dim", None)?,
    };
    Ok(Facts {
        head_dim: Some(qk_rope_head_dim + qk_nope_head_dim),
        max_position_embeddings: Some(2048),
        dense: dense_layers(keys)?,
        ..Facts::of(family, attention, moe)
    })
}

impl Keys<'_> {
    /// The groups of experts that a token may not leave; `None` where all may be chosen.
    pub(super) fn groups(
        &self,
        experts: usize,
        top_k: usize,
        score: GroupScore,
    ) -> Result<Option<ExpertGroups>> {
        let count = self.size("n_group", Some(1))?;
        let chosen = self.size("topk_group", Some(count))?;
        if !experts.is_multiple_of(count) || chosen > count || chosen * (experts / count) < top_k {
            return Err(self.error(format!(
                "`topk_group` ({chosen}) of `n_group` ({count}) groups of {experts} experts leave \
                 no choice of {top_k}; correct one of them"
            )));
        }
        Ok((chosen < count).then_some(ExpertGroups {
            count,
            chosen,
            score,
        }))
    }
}
