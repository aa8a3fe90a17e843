//! DeepSeekMoE (arXiv 2401.06066; `DeepseekForCausalLM` of the published model code): shared
//! experts beside the routed ones, dense layers at the start, ordinary attention.

use super::keys::Keys;
use super::{Facts, Family};
use crate::Result;
use crate::config::{Attention, MoeConfig, QkNorm};

pub(super) fn read(keys: &Keys<'_>) -> Result<Facts> {
    keys.one_of("scoring_func", &["softmax"])?;
    let attention = Attention::GroupedQuery {
        qk_norm: QkNorm::None,
        bias: keys.attention_bias(false)?,
        clip_qkv: None,
        sliding_window: None,
    };
    Ok(Facts {
        rope_scaling: &[],
        max_position_embeddings: Some(2048),
        dense: dense_layers(keys)?,
        ..Facts::of(Family::Deepseek, attention, beside_shared(keys)?)
    })
}

/// Routed experts, and the shared ones that DeepSeek's files count in widths of a routed one.
pub(super) fn beside_shared(keys: &Keys<'_>) -> Result<MoeConfig> {
    // The balance loss over sequences, while training only.
    keys.ignore(&["seq_aux"]);
    let routed = keys.routed("n_routed_experts", "moe_intermediate_size")?;
    let shared = keys.count("n_shared_experts", Some(0))?;
    Ok(MoeConfig {
        shared_intermediate_size: routed.intermediate_size.saturating_mul(shared),
        router_aux_loss_coef: keys.non_negative("aux_loss_alpha", Some(0.001))?,
        ..routed
    })
}

/// How many layers at the start are dense, and how wide they are.
pub(super) fn dense_layers(keys: &Keys<'_>) -> Result<(usize, usize)> {
    if keys.size("moe_layer_freq", Some(1))? != 1 {
        let message = "`moe_layer_freq` must be 1; use a model with experts in every later layer";
        return Err(keys.error(message));
    }
    let layers = keys.size("num_hidden_layers", None)?;
    let dense = keys.count("first_k_dense_replace", Some(0))?;
    if dense >= layers {
        return Err(keys.error(format!(
            "`first_k_dense_replace` ({dense}) leaves no layer with experts of \
             `num_hidden_layers` ({layers}); correct one of them"
        )));
    }
    keys.ignore(&["intermediate_size"]);
    Ok(match dense {
        0 => (0, 0),
        _ => (dense, keys.size("intermediate_size", None)?),
    })
}
