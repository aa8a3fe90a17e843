//! Mixtral (arXiv 2401.04088; `MixtralForCausalLM`): the gates of the chosen experts sum to one (a
//! softmax over the chosen logits alone is the same), and attention may have a window.

use serde_json::Value;

use super::{Family, Keys, Uniform};
use crate::Result;
use crate::config::{Attention, ModelConfig, MoeConfig, ProjectionBias, QkNorm};

pub(super) fn read(keys: &Keys<'_>, raw: &Value) -> Result<ModelConfig> {
    let model = Uniform {
        family: Family::Mixtral,
        attention: Attention::GroupedQuery {
            qk_norm: QkNorm::None,
            bias: ProjectionBias::None,
            clip_qkv: None,
            sliding_window: keys.optional_size("sliding_window")?,
        },
        moe: MoeConfig {
            renormalize: true,
            ..keys.routed("num_local_experts", "intermediate_size")?
        },
        rms_norm_eps: 1e-5,
        rope_theta: 1e6,
        max_position_embeddings: 131_072,
    };
    model.read(keys, raw)
}
