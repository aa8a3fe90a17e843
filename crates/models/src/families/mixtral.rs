//! Mixtral (arXiv 2401.04088; `MixtralForCausalLM`): the gates of the chosen experts sum to one (a
//! softmax over the chosen logits alone is the same), and attention may have a window.

use super::keys::Keys;
use super::{Facts, Family};
use crate::Result;
use crate::config::{Attention, MoeConfig, ProjectionBias, QkNorm};

pub(super) fn read(keys: &Keys<'_>) -> Result<Facts> {
    // Noise on the router, while training only.
    keys.ignore(&["router_jitter_noise"]);
    let attention = Attention::GroupedQuery {
        qk_norm: QkNorm::None,
        bias: ProjectionBias::None,
        clip_qkv: None,
        sliding_window: keys.optional_size("sliding_window")?,
    };
    let moe = MoeConfig {
        renormalize: true,
        ..keys.routed("num_local_experts", "intermediate_size")?
    };
    Ok(Facts {
        norm_eps: 1e-5,
        rope_theta: 1e6,
        max_position_embeddings: Some(131_072),
        ..Facts::of(Family::Mixtral, attention, moe)
    })
}
