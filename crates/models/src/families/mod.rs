//! The model families: one small file each, which maps the keys of the family's published
//! `config.json` onto [`ModelConfig`]. A family holds facts and no forward pass.
//!
//! Two spellings are read: the published one (`rope_theta`, `rope_scaling`, `torch_dtype`) and
//! that of transformers 5 (`rope_parameters`, `dtype`, `num_local_experts`). Where a file has
//! both, they must agree.

mod deepseek_v2;
mod mixtral;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;

use std::fmt;
use std::path::Path;

use serde_json::{Map, Value};

use crate::config::{Attention, ModelConfig, MoeConfig, ProjectionBias};
use crate::{Error, Result};

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
    /// DeepSeek-V2 and DeepSeek-V2-Lite (arXiv 2405.04434).
    DeepseekV2,
}

impl Family {
    /// Every family, in the order in which messages list them.
    pub const ALL: [Self; 5] = [
        Self::Olmoe,
        Self::Mixtral,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::DeepseekV2,
    ];

    /// The family's `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Olmoe => "olmoe",
            Self::Mixtral => "mixtral",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::DeepseekV2 => "deepseek_v2",
        }
    }

    /// Whether the decoder can run the family.
    pub fn is_runnable(self) -> bool {
        self != Self::DeepseekV2
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The names of the families that `keep` holds for, as a message lists them.
pub(crate) fn names(keep: impl Fn(Family) -> bool) -> String {
    let names: Vec<String> = Family::ALL
        .into_iter()
        .filter(|&family| keep(family))
        .map(|family| format!("`{family}`"))
        .collect();
    names.join(", ")
}

/// Finds the family that `value` names and lets it read the rest.
pub(crate) fn read(value: &Value, path: &Path) -> Result<ModelConfig> {
    let Some(map) = value.as_object() else {
        let message = "expected a JSON object; give a Hugging Face `config.json`";
        return Err(Error::config(path, message));
    };
    let keys = Keys { map, path };
    keys.absent("quantization_config", "give an unquantised checkpoint")?;
    let model_type = keys.text("model_type", None)?;
    match Family::ALL.into_iter().find(|f| f.name() == model_type) {
        Some(Family::Olmoe) => olmoe::read(&keys, value),
        Some(Family::Mixtral) => mixtral::read(&keys, value),
        Some(Family::Qwen2Moe) => qwen2_moe::read(&keys, value),
        Some(Family::Qwen3Moe) => qwen3_moe::read(&keys, value),
        Some(Family::DeepseekV2) => deepseek_v2::read(&keys, value),
        None => Err(keys.error(format!(
            "`model_type` is `{model_type}`; use a model of one of the supported types: {}",
            names(|_| true)
        ))),
    }
}

/// A model whose layers all have ordinary attention and experts; numbers are what `transformers`
/// takes where the file does not say.
struct Uniform {
    family: Family,
    attention: Attention,
    moe: MoeConfig,
    rms_norm_eps: f64,
    rope_theta: f64,
    max_position_embeddings: usize,
}

impl Uniform {
    /// Reads what the families do not differ in.
    fn read(self, keys: &Keys<'_>, raw: &Value) -> Result<ModelConfig> {
        keys.one_of("hidden_act", &["silu"])?;
        let hidden_size = keys.size("hidden_size", None)?;
        let (num_heads, num_kv_heads) = keys.heads()?;
        let positions = Some(self.max_position_embeddings);
        Ok(ModelConfig {
            family: self.family,
            vocab_size: keys.size("vocab_size", None)?,
            hidden_size,
            num_layers: keys.size("num_hidden_layers", None)?,
            num_heads,
            num_kv_heads,
            head_dim: keys.head_dim(hidden_size, num_heads)?,
            attention: self.attention,
            rms_norm_eps: keys.positive("rms_norm_eps", Some(self.rms_norm_eps))?,
            rope_theta: keys.rope_theta(self.rope_theta, &[])?,
            max_position_embeddings: keys.size("max_position_embeddings", positions)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            moe: self.moe,
            first_dense_layers: 0,
            dense_intermediate_size: 0,
            eos_token_id: keys.token("eos_token_id")?,
            pad_token_id: keys.token("pad_token_id")?,
            bos_token_id: keys.token("bos_token_id")?,
            raw: raw.clone(),
        })
    }
}

/// A `config.json` under inspection. A key that is `null` counts as missing.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
}

impl<'a> Keys<'a> {
    fn error(&self, message: impl Into<String>) -> Error {
        Error::config(self.path, message)
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// `key` by `parse`, or `default` if it is missing.
    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        default: Option<T>,
        parse: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T> {
        match (self.get(key), default) {
            (Some(value), _) => parse(value).ok_or_else(|| {
                self.error(format!(
                    "`{key}` is {value}, expected {expected}; correct it"
                ))
            }),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.error(format!(
                "`{key}` is missing, expected {expected}; add it, or give the model's own file"
            ))),
        }
    }

    /// A positive whole number below 2^32.
    fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        self.read(
            key,
            "a positive whole number below 2^32",
            default,
            |value| whole(value).filter(|&size| size > 0),
        )
    }

    /// A whole number below 2^32, 0 allowed.
    fn count(&self, key: &str, default: Option<usize>) -> Result<usize> {
        self.read(key, "a whole number from 0, below 2^32", default, whole)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|_| self.size(key, None)).transpose()
    }

    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        self.read(key, "a number above 0", default, |value| {
            value.as_f64().filter(|x| x.is_finite() && *x > 0.0)
        })
    }

    fn non_negative(&self, key: &str, default: Option<f64>) -> Result<f64> {
        self.read(key, "a number from 0", default, |value| {
            value.as_f64().filter(|x| x.is_finite() && *x >= 0.0)
        })
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.read(key, "true or false", Some(default), Value::as_bool)
    }

    fn text(&self, key: &str, default: Option<&'a str>) -> Result<&'a str> {
        self.read(key, "a text", default, Value::as_str)
    }

    /// Refuses every value of `key` but those in `supported`, the first being the default.
    fn one_of(&self, key: &str, supported: &[&'static str]) -> Result<()> {
        let value = self.text(key, supported.first().copied())?;
        if supported.contains(&value) {
            return Ok(());
        }
        let list = supported.join("`, `");
        Err(self.error(format!(
            "`{key}` is `{value}`, which is not supported; use a model with `{list}`"
        )))
    }

    fn absent(&self, key: &str, what_to_do: &str) -> Result<()> {
        match self.get(key) {
            None => Ok(()),
            Some(_) => Err(self.error(format!("`{key}` is not supported; {what_to_do}"))),
        }
    }

    /// Experts and top-k under the given keys.
    fn experts(&self, key: &str) -> Result<(usize, usize)> {
        let experts = self.size(key, self.optional_size("num_local_experts")?)?;
        if self.size("num_local_experts", Some(experts))? != experts {
            let message = format!("`num_local_experts` differs from `{key}`; remove one of them");
            return Err(self.error(message));
        }
        let top_k = self.size("num_experts_per_tok", None)?;
        if top_k > experts {
            return Err(self.error(format!(
                "`num_experts_per_tok` ({top_k}) exceeds `{key}` ({experts}); correct one of them"
            )));
        }
        Ok((experts, top_k))
    }

    /// Query heads and key-value heads.
    fn heads(&self) -> Result<(usize, usize)> {
        let heads = self.size("num_attention_heads", None)?;
        let kv_heads = self.size("num_key_value_heads", Some(heads))?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.error(format!(
                "`num_key_value_heads` ({kv_heads}) does not divide `num_attention_heads` \
                 ({heads}); correct one of them"
            )));
        }
        Ok((heads, kv_heads))
    }

    /// Routed experts alone, their number under `experts` and their width under `width`; the chosen
    /// gates as `norm_topk_prob` says.
    fn routed(&self, experts: &str, width: &str) -> Result<MoeConfig> {
        let (num_experts, top_k) = self.experts(experts)?;
        Ok(MoeConfig {
            num_experts,
            top_k,
            intermediate_size: self.size(width, None)?,
            renormalize: self.flag("norm_topk_prob", false)?,
            routed_scaling_factor: 1.0,
            shared_intermediate_size: 0,
            shared_gate: false,
            router_aux_loss_coef: self.non_negative("router_aux_loss_coef", Some(0.001))?,
        })
    }

    /// Width of a head: its own key, or the hidden size over the heads.
    fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        let width = self.size("head_dim", Some((hidden_size / heads).max(1)))?;
        if !width.is_multiple_of(2) {
            return Err(self.error(format!(
                "a head of {width} numbers cannot be rotated; correct `head_dim`, or \
                 `hidden_size` and `num_attention_heads`"
            )));
        }
        Ok(width)
    }

    /// `attention_bias`: all four projections or none.
    fn attention_bias(&self) -> Result<ProjectionBias> {
        Ok(match self.flag("attention_bias", false)? {
            true => ProjectionBias::All,
            false => ProjectionBias::None,
        })
    }

    /// Refuses what Qwen's configs can ask for and no published model does: dense layers among
    /// the others, and windows in some of them.
    fn uniform_layers(&self) -> Result<()> {
        if self.size("decoder_sparse_step", Some(1))? != 1 {
            let message =
                "`decoder_sparse_step` must be 1; use a model with experts in every layer";
            return Err(self.error(message));
        }
        let dense = self.get("mlp_only_layers").and_then(Value::as_array);
        if dense.is_some_and(|layers| !layers.is_empty()) {
            let message =
                "`mlp_only_layers` must be empty; use a model with experts in every layer";
            return Err(self.error(message));
        }
        if self.flag("use_sliding_window", false)? {
            let message = "`use_sliding_window` is not supported; use a model with full attention";
            return Err(self.error(message));
        }
        Ok(())
    }

    /// The rotary base, from either spelling, `default` where neither is there. The kinds of
    /// scaling in `allowed` pass.
    fn rope_theta(&self, default: f64, allowed: &[&str]) -> Result<f64> {
        let mut inner_theta = None;
        for key in ["rope_parameters", "rope_scaling"] {
            let Some(value) = self.get(key) else { continue };
            let Some(map) = value.as_object() else {
                return Err(self.error(format!("`{key}` must be an object or null; correct it")));
            };
            let inner = Keys { map, ..*self };
            let kind = inner.text("rope_type", Some(inner.text("type", Some("default"))?))?;
            if kind != "default" && !allowed.contains(&kind) {
                return Err(self.error(format!(
                    "`{key}` asks for `{kind}`, which is not supported for this family; \
                     use a model with plain rotary embeddings"
                )));
            }
            if inner.positive("partial_rotary_factor", Some(1.0))? != 1.0 {
                return Err(self.error(format!(
                    "`{key}` has a `partial_rotary_factor` other than 1, which is not \
                     supported; use a model that rotates whole heads"
                )));
            }
            if let Some(theta) = inner.get("rope_theta") {
                inner_theta = Some(inner.positive("rope_theta", theta.as_f64())?);
            }
        }
        let theta = self.positive("rope_theta", Some(inner_theta.unwrap_or(default)))?;
        if inner_theta.is_some_and(|inner| inner != theta) {
            let message = "`rope_theta` differs from the one in `rope_parameters`; remove one";
            return Err(self.error(message));
        }
        Ok(theta)
    }

    /// A token id: a number or null; of a list, the first.
    fn token(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let first = match value {
            Value::Array(ids) if ids.is_empty() => return Ok(None),
            Value::Array(ids) => &ids[0],
            one => one,
        };
        match first.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(self.error(format!(
                "`{key}` is {value}, expected a token id, a list of them or null; correct it"
            ))),
        }
    }
}

fn whole(value: &Value) -> Option<usize> {
    let number = u32::try_from(value.as_u64()?).ok()?;
    usize::try_from(number).ok()
}
