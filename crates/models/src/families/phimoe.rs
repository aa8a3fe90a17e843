//! Phi-3.5-MoE (arXiv 2404.14219, routing arXiv 2409.12136; `PhimoeForCausalLM`): two experts a
//! token by sparsemixer as inference uses it, layer norms with biases, LongRoPE.

use super::keys::Keys;
use super::{Facts, Family};
use crate::Result;
use crate::config::{Attention, MoeConfig, NormKind, QkNorm, Scoring};

pub(super) fn read(keys: &Keys<'_>) -> Result<Facts> {
    // Noise on the router's input, while training only.
    keys.ignore(&["input_jitter_noise"]);
    let attention = Attention::GroupedQuery {
        qk_norm: QkNorm::None,
        // Every published model has biases in the attention and in the head, and a file that
        // `transformers` wrote says so either way; only shortened files leave the keys away.
        bias: keys.attention_bias(true)?,
        clip_qkv: None,
        sliding_window: keys.optional_size("sliding_window")?,
    };
    let moe = MoeConfig {
        scoring: Scoring::SparseMixer {
            jitter: keys.non_negative("router_jitter_noise", Some(0.01))?,
        },
        ..keys.routed("num_local_experts", "intermediate_size")?
    };
    if moe.top_k != 2 {
        return Err(keys.error(format!(
            "`num_experts_per_tok` is {}, but sparsemixer chooses 2; correct it",
            moe.top_k
        )));
    }
    Ok(Facts {
        norm: NormKind::Layer,
        norm_eps: 1e-5,
        rope_theta: 1e6,
        rope_scaling: &["longrope"],
        max_position_embeddings: Some(131_072),
        head_bias: keys.flag("lm_head_bias", true)?,
        ..Facts::of(Family::Phimoe, attention, moe)
    })
}
