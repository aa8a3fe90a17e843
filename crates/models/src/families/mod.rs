//! The model families: one small file each, which maps the keys of the family's published
//! `config.json` onto [`ModelConfig`]. A family holds facts and no forward pass.
//!
//! Two spellings are read: the published one (`rope_theta`, `rope_scaling`, `torch_dtype`) and
//! that of transformers 5 (`rope_parameters`, `dtype`, `num_local_experts`). Where a file has
//! both, they must agree. A key that nobody here knows is an error: it may change the computation.

mod deepseek;
mod deepseek_v2;
mod deepseek_v3;
mod keys;
mod mixtral;
mod olmoe;
mod phimoe;
mod qwen2_moe;
mod qwen3_moe;
mod scaling;

use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::config::{Attention, ModelConfig, MoeConfig, NormKind};
use crate::rotary::RopeScaling;
use crate::{Error, Result};
use keys::Keys;

/// A model family that we can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// OLMoE (arXiv 2409.02060).
    Olmoe,
    /// Mixtral (arXiv 2401.04088).
    Mixtral,
    /// Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671).
    Qwen2Moe,
    /// Qwen3-MoE (arXiv 2505.09388).
    Qwen3Moe,
    /// DeepSeekMoE (arXiv 2401.06066).
    Deepseek,
    /// DeepSeek-V2 and DeepSeek-V2-Lite (arXiv 2405.04434).
    DeepseekV2,
    /// DeepSeek-V3 and R1 (arXiv 2412.19437).
    DeepseekV3,
    /// Phi-3.5-MoE (arXiv 2404.14219).
    Phimoe,
}

impl Family {
    /// Every family, in the order in which messages list them.
    pub const ALL: [Self; 8] = [
        Self::Olmoe,
        Self::Mixtral,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::Deepseek,
        Self::DeepseekV2,
        Self::DeepseekV3,
        Self::Phimoe,
    ];

    /// The family's `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Olmoe => "olmoe",
            Self::Mixtral => "mixtral",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Deepseek => "deepseek",
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
            Self::Phimoe => "phimoe",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Finds the family that `value` names and lets it read the rest.
pub(crate) fn read(value: &Value, path: &Path) -> Result<ModelConfig> {
    let Some(map) = value.as_object() else {
        let message = "expected a JSON object; give a Hugging Face `config.json`";
        return Err(Error::config(path, message));
    };
    let keys = Keys::new(map, path);
    let model_type = keys.text("model_type", None)?;
    let model = match Family::ALL.into_iter().find(|f| f.name() == model_type) {
        Some(Family::Olmoe) => olmoe::read(&keys),
        Some(Family::Mixtral) => mixtral::read(&keys),
        Some(Family::Qwen2Moe) => qwen2_moe::read(&keys),
        Some(Family::Qwen3Moe) => qwen3_moe::read(&keys),
        Some(Family::Deepseek) => deepseek::read(&keys),
        Some(Family::DeepseekV2) => deepseek_v2::read(&keys),
        Some(Family::DeepseekV3) => deepseek_v3::read(&keys),
        Some(Family::Phimoe) => phimoe::read(&keys),
        None => {
            let names = Family::ALL.map(|family| format!("`{family}`"));
            Err(keys.error(format!(
                "`model_type` is `{model_type}`; use a model of one of the supported types: {}",
                names.join(", ")
            )))
        }
    }?;
    let config = model.finish(&keys, value)?;
    keys.all_known()?;
    Ok(config)
}

/// What a family says of a model; defaults are what `transformers` takes where the file does not
/// say.
struct Facts {
    family: Family,
    attention: Attention,
    moe: MoeConfig,
    norm: NormKind,
    norm_eps: f64,
    /// Base of the rotary frequencies.
    rope_theta: f64,
    /// The kinds of `rope_scaling` that pass.
    rope_scaling: &'static [&'static str],
    max_position_embeddings: Option<usize>,
    /// Width of a head, where it is not under `head_dim`.
    head_dim: Option<usize>,
    head_bias: bool,
    /// How many layers at the start are dense, and how wide.
    dense: (usize, usize),
}

impl Facts {
    /// A model with grouped-query attention and experts in every layer.
    fn of(family: Family, attention: Attention, moe: MoeConfig) -> Self {
        Self {
            family,
            attention,
            moe,
            norm: NormKind::Rms,
            norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: &["yarn"],
            max_position_embeddings: None,
            head_dim: None,
            head_bias: false,
            dense: (0, 0),
        }
    }

    /// Reads what the families do not differ in.
    fn finish(self, keys: &Keys<'_>, raw: &Value) -> Result<ModelConfig> {
        keys.one_of("hidden_act", &["silu"])?;
        let hidden_size = keys.size("hidden_size", None)?;
        let (num_heads, num_kv_heads) = keys.heads()?;
        let max_position_embeddings =
            keys.size("max_position_embeddings", self.max_position_embeddings)?;
        let (rope_theta, rope_scaling) =
            keys.rope(self.rope_theta, self.rope_scaling, max_position_embeddings)?;
        let head_dim = match self.head_dim {
            Some(width) => width,
            None => keys.head_dim(hidden_size, num_heads)?,
        };
        if let RopeScaling::Long(long) = &rope_scaling {
            let pairs = head_dim / 2;
            if long.short.len() != pairs || long.long.len() != pairs {
                return Err(keys.error(format!(
                    "`short_factor` and `long_factor` need {pairs} numbers each, one for each \
                     rotated pair of a head; correct them"
                )));
            }
        }
        Ok(ModelConfig {
            family: self.family,
            vocab_size: keys.size("vocab_size", None)?,
            hidden_size,
            num_layers: keys.size("num_hidden_layers", None)?,
            num_heads,
            num_kv_heads,
            head_dim,
            attention: self.attention,
            norm: self.norm,
            norm_eps: keys.norm_eps(self.norm_eps)?,
            rope_theta,
            rope_scaling,
            max_position_embeddings,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            head_bias: self.head_bias,
            moe: self.moe,
            first_dense_layers: self.dense.0,
            dense_intermediate_size: self.dense.1,
            fp8_block: keys.fp8_block()?,
            eos_token_id: keys.token("eos_token_id")?,
            pad_token_id: keys.token("pad_token_id")?,
            bos_token_id: keys.token("bos_token_id")?,
            raw: raw.clone(),
        })
    }
}
