//! A Hugging Face `config.json` as a typed description of the model.
//!
//! The types here are *facts about the computation*, the same for all families; the files of
//! [`crate::families`] translate each family's keys into them. A value that would change the
//! computation and that we do not carry is an error, never ignored. Dropout and initialiser
//! ranges are choices of training, and so are not read.

use std::path::Path;

use serde_json::Value;

pub use crate::families::Family;
use crate::{Error, Result, families};

/// More parameters than this are taken for a damaged file.
const IMPLAUSIBLE_PARAMETERS: u64 = 1_000_000_000_000_000;

/// Everything the decoder and the counters need to know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family that `model_type` names.
    pub family: Family,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// `H`: width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers, dense ones included.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one query head: for latent attention, its two parts together.
    pub head_dim: usize,
    /// How the layers attend.
    pub attention: Attention,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// The expert layers.
    pub moe: MoeConfig,
    /// This many layers at the start have a plain MLP instead of experts.
    pub first_dense_layers: usize,
    /// Intermediate size of those plain MLPs; 0 where there are none.
    pub dense_intermediate_size: usize,
    /// End of sequence; where the file lists several, the first.
    pub eos_token_id: Option<u32>,
    /// Padding.
    pub pad_token_id: Option<u32>,
    /// Start of sequence.
    pub bos_token_id: Option<u32>,
    /// The file as read, so that it can be written back whole.
    pub raw: Value,
}

/// The shape and routing of the expert layers.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// `E`: routed experts per layer.
    pub num_experts: usize,
    /// `K`: experts chosen for a token, after a softmax over all.
    pub top_k: usize,
    /// `F`: intermediate size of a routed expert.
    pub intermediate_size: usize,
    /// Whether the chosen gate values are scaled to sum to one.
    pub renormalize: bool,
    /// Factor on the gate values.
    pub routed_scaling_factor: f64,
    /// Intermediate size of the shared experts together; 0 means none.
    pub shared_intermediate_size: usize,
    /// Whether the shared expert's output is scaled by a sigmoid gate of its own (Qwen2-MoE).
    pub shared_gate: bool,
    /// Weight of the load-balancing loss in the model's own training.
    pub router_aux_loss_coef: f64,
}

/// The attention of every layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// Separate query, key and value projections; groups of query heads share a key head.
    GroupedQuery {
        /// Normalisation of queries and keys before the rotation.
        qk_norm: QkNorm,
        /// Which projections have a bias.
        bias: ProjectionBias,
        /// Queries, keys and values are clamped to `[-clip, clip]`.
        clip_qkv: Option<f64>,
        /// A query sees this many keys, its own the last; all before it where there is no window.
        sliding_window: Option<usize>,
    },
    /// Keys and values from one low-rank latent (DeepSeek-V2, section 2.1).
    MultiHeadLatent {
        /// Rank of the query latent; `None` means one full projection.
        q_lora_rank: Option<usize>,
        /// Rank of the key-value latent.
        kv_lora_rank: usize,
        /// Rotated part of a query or key head.
        qk_rope_head_dim: usize,
        /// Unrotated part of a query or key head.
        qk_nope_head_dim: usize,
        /// Width of a value head.
        v_head_dim: usize,
    },
}

/// Normalisation of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// One RMS norm over the whole projection, all heads together (OLMoE).
    WholeProjection,
    /// An RMS norm over each head, with one weight for all heads (Qwen3).
    PerHead,
}

/// Which attention projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProjectionBias {
    /// None.
    None,
    /// Query, key and value (Qwen2).
    QueryKeyValue,
    /// These and the output.
    All,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, otherwise as [`ModelConfig::from_json`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let value = serde_json::from_str(&text).map_err(|e| {
            let message = format!("not valid JSON ({e}); give a Hugging Face `config.json`");
            Error::config(path, message)
        })?;
        Self::from_json(&value, path)
    }

    /// Reads the content of a `config.json`; `origin` is the file that errors name.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key: an unknown `model_type`, a missing key, a wrong type,
    /// values that contradict each other, or a setting that is not supported.
    pub fn from_json(value: &Value, origin: &Path) -> Result<Self> {
        let config = families::read(value, origin)?;
        for (key, id) in [
            ("eos_token_id", config.eos_token_id),
            ("pad_token_id", config.pad_token_id),
            ("bos_token_id", config.bos_token_id),
        ] {
            if id.is_some_and(|id| id as usize >= config.vocab_size) {
                let message = format!(
                    "`{key}` must be below `vocab_size` ({}); correct one of them",
                    config.vocab_size
                );
                return Err(Error::config(origin, message));
            }
        }
        if config.parameters().total() > IMPLAUSIBLE_PARAMETERS {
            return Err(Error::config(
                origin,
                "the sizes describe a model above 10^15 parameters; check `hidden_size`, \
                 `vocab_size` and the expert sizes",
            ));
        }
        Ok(config)
    }

    /// Whether layer `layer` (from 0) has experts.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        (self.first_dense_layers..self.num_layers).contains(&layer)
    }

    /// The layers with experts, ascending, by the model's own numbers.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + use<> {
        self.first_dense_layers..self.num_layers
    }

    /// How many layers have experts.
    pub fn num_moe_layers(&self) -> usize {
        self.num_layers - self.first_dense_layers
    }

    /// Whether the decoder can run this model, and not only count and plan it.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the family or the setting, if it cannot.
    pub fn check_runnable(&self) -> Result<()> {
        if let Attention::GroupedQuery {
            clip_qkv: Some(_), ..
        } = self.attention
        {
            return Err(Error::Invalid(
                "a model with `clip_qkv` can be counted and planned but not run yet; use \
                 `--dry-run`, or a model without it"
                    .into(),
            ));
        }
        if self.family.is_runnable() {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "a model of family `{}` can be counted and planned but not run yet; \
             use `--dry-run`, or a model of one of: {}",
            self.family,
            families::names(|family| family.is_runnable())
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fixture(name: &str) -> Value {
        let path = format!("{}/../../fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn olmoe_with(key: &str, value: Value) -> Result<ModelConfig> {
        changed("configs/olmoe-1b-7b-0924.json", key, value)
    }

    fn changed(name: &str, key: &str, value: Value) -> Result<ModelConfig> {
        let mut config = fixture(name);
        config[key] = value;
        ModelConfig::from_json(&config, Path::new("here/config.json"))
    }

    #[track_caller]
    fn assert_refused(result: Result<ModelConfig>, words: &[&str]) {
        let message = result.unwrap_err().to_string();
        for word in words.iter().chain(&["here/config.json"]) {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
    }

    #[test]
    fn reads_the_published_olmoe() {
        let raw = fixture("configs/olmoe-1b-7b-0924.json");
        let config = ModelConfig::from_json(&raw, Path::new("c")).unwrap();
        assert_eq!(config.family, Family::Olmoe);
        assert_eq!((config.hidden_size, config.vocab_size), (2048, 50304));
        assert_eq!((config.num_layers, config.num_heads), (16, 16));
        assert_eq!((config.num_kv_heads, config.head_dim), (16, 128));
        assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-5, 1e4));
        assert_eq!((config.moe.num_experts, config.moe.top_k), (64, 8));
        assert_eq!(config.moe.intermediate_size, 1024);
        assert!(!config.moe.renormalize && !config.tie_word_embeddings);
        assert_eq!(config.moe.shared_intermediate_size, 0);
        assert_eq!(config.moe_layers().collect::<Vec<_>>().len(), 16);
        assert_eq!(config.eos_token_id, Some(50279));
        assert_eq!((config.pad_token_id, config.bos_token_id), (Some(1), None));
        let attention = Attention::GroupedQuery {
            qk_norm: QkNorm::WholeProjection,
            bias: ProjectionBias::None,
            clip_qkv: None,
            sliding_window: None,
        };
        assert_eq!(config.attention, attention);
        assert_eq!(config.raw, raw);
        config.check_runnable().unwrap();
    }

    #[test]
    fn reads_both_spellings() {
        let mut new = fixture("parity/olmoe/config.json");
        for key in ["rope_theta", "rope_scaling", "torch_dtype"] {
            new.as_object_mut().unwrap().remove(key);
        }
        new["rope_parameters"] = json!({"rope_theta": 500.0, "rope_type": "default"});
        let new = ModelConfig::from_json(&new, Path::new("c")).unwrap();
        assert_eq!((new.rope_theta, new.hidden_size), (500.0, 48));
        let mut old = fixture("configs/olmoe-1b-7b-0924.json");
        old["rope_theta"] = json!(500.0);
        let old = ModelConfig::from_json(&old, Path::new("c")).unwrap();
        assert_eq!(old.rope_theta, 500.0);
    }

    #[test]
    fn reads_deepseek_v2_lite_to_plan_but_not_to_run() {
        let raw = fixture("configs/deepseek-v2-lite.json");
        let config = ModelConfig::from_json(&raw, Path::new("c")).unwrap();
        assert_eq!(config.moe_layers().collect::<Vec<_>>()[..2], [1, 2]);
        assert!(!config.is_moe_layer(0) && config.is_moe_layer(26) && !config.is_moe_layer(27));
        assert_eq!(config.moe.shared_intermediate_size, 2816);
        assert_eq!(config.dense_intermediate_size, 10944);
        let message = config.check_runnable().unwrap_err().to_string();
        assert!(message.contains("deepseek_v2") && message.contains("olmoe"));
    }

    #[test]
    fn what_the_decoder_would_ignore_is_not_run() {
        let refused = olmoe_with("clip_qkv", json!(8.0)).unwrap().check_runnable();
        assert!(refused.unwrap_err().to_string().contains("clip_qkv"));
    }

    #[test]
    fn the_facts_of_the_families() {
        let facts = |name: &str| {
            let raw = fixture(&format!("parity/{name}/config.json"));
            let config = ModelConfig::from_json(&raw, Path::new("c")).unwrap();
            config.check_runnable().unwrap();
            let Attention::GroupedQuery {
                qk_norm,
                bias,
                sliding_window,
                ..
            } = config.attention
            else {
                panic!("{name} has latent attention");
            };
            let shared = (config.moe.shared_intermediate_size, config.moe.shared_gate);
            let renormalize = config.moe.renormalize;
            (qk_norm, bias, sliding_window, renormalize, shared)
        };
        let (plain, qkv) = (ProjectionBias::None, ProjectionBias::QueryKeyValue);
        let mixtral = (QkNorm::None, plain, Some(6), true, (0, false));
        assert_eq!(facts("mixtral"), mixtral);
        // A window that is written down but not used.
        let qwen2 = (QkNorm::None, qkv, None, false, (40, true));
        assert_eq!(facts("qwen2_moe"), qwen2);
        let qwen3 = (QkNorm::PerHead, plain, None, true, (0, false));
        assert_eq!(facts("qwen3_moe"), qwen3);
        for (key, value) in [
            ("decoder_sparse_step", json!(2)),
            ("mlp_only_layers", json!([1])),
            ("use_sliding_window", json!(true)),
            ("head_dim", json!(15)),
            ("hidden_act", json!("gelu")),
        ] {
            let refused = changed("parity/qwen3_moe/config.json", key, value);
            assert_refused(refused, &[key]);
        }
    }

    #[test]
    fn end_tokens_may_be_one_many_or_none() {
        for (value, expected) in [
            (json!(7), Some(7)),
            (json!([9, 7]), Some(9)),
            (json!([]), None),
            (Value::Null, None),
        ] {
            let config = olmoe_with("eos_token_id", value).unwrap();
            assert_eq!(config.eos_token_id, expected);
        }
        assert_refused(olmoe_with("eos_token_id", json!("</s>")), &["eos_token_id"]);
        assert_refused(olmoe_with("pad_token_id", json!(50304)), &["pad_token_id"]);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let words = ["model_type", "llama", "olmoe", "deepseek_v2"];
        assert_refused(olmoe_with("model_type", json!("llama")), &words);
        assert_refused(olmoe_with("hidden_act", json!("gelu")), &["hidden_act"]);
        let yarn = json!({"type": "yarn", "factor": 40});
        assert_refused(olmoe_with("rope_scaling", yarn), &["rope_scaling", "yarn"]);
        let linear = json!({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0});
        assert_refused(olmoe_with("rope_parameters", linear), &["rope_parameters"]);
        let partial = json!({"rope_type": "default", "partial_rotary_factor": 0.5});
        assert_refused(olmoe_with("rope_parameters", partial), &["partial_rotary"]);
        let quantized = json!({"quant_method": "gptq"});
        assert_refused(
            olmoe_with("quantization_config", quantized),
            &["quantization_config"],
        );
    }

    #[test]
    fn refuses_missing_and_contradictory_keys() {
        for key in ["hidden_size", "num_experts", "vocab_size", "model_type"] {
            assert_refused(olmoe_with(key, Value::Null), &[key]);
        }
        for key in ["hidden_size", "num_hidden_layers", "num_experts_per_tok"] {
            assert_refused(olmoe_with(key, json!(0)), &[key]);
            assert_refused(olmoe_with(key, json!("2048")), &[key]);
        }
        let too_many = olmoe_with("num_experts_per_tok", json!(65));
        assert_refused(too_many, &["num_experts_per_tok", "num_experts", "64"]);
        let heads = olmoe_with("num_attention_heads", json!(48));
        assert_refused(heads, &["num_attention_heads", "hidden_size"]);
        let kv = olmoe_with("num_key_value_heads", json!(5));
        assert_refused(kv, &["num_key_value_heads"]);
        assert_refused(olmoe_with("head_dim", json!(64)), &["head_dim", "128"]);
        assert_refused(olmoe_with("rms_norm_eps", json!(0.0)), &["rms_norm_eps"]);
        assert_refused(olmoe_with("clip_qkv", json!(-1.0)), &["clip_qkv"]);
        let twice = json!({"rope_theta": 5e5, "rope_type": "default"});
        assert_refused(olmoe_with("rope_parameters", twice), &["rope_theta"]);
        assert_refused(olmoe_with("num_local_experts", json!(8)), &["num_experts"]);
        let deepseek = "configs/deepseek-v2-lite.json";
        let layers = changed(deepseek, "first_k_dense_replace", json!(27));
        assert_refused(layers, &["first_k_dense_replace"]);
        let frequency = changed(deepseek, "moe_layer_freq", json!(2));
        assert_refused(frequency, &["moe_layer_freq"]);
        let scoring = changed(deepseek, "scoring_func", json!("sigmoid"));
        assert_refused(scoring, &["scoring_func"]);
    }

    #[test]
    fn absurd_sizes_are_an_error_and_no_overflow() {
        let huge = json!(u64::MAX / 2);
        assert_refused(olmoe_with("hidden_size", huge), &["hidden_size"]);
        let big = json!(1u64 << 31);
        let mut config = fixture("configs/olmoe-1b-7b-0924.json");
        for key in ["hidden_size", "num_experts", "intermediate_size"] {
            config[key] = big.clone();
        }
        let read = ModelConfig::from_json(&config, Path::new("here/config.json"));
        assert_refused(read, &["parameters"]);
    }

    #[test]
    fn a_file_that_is_missing_or_no_json_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let missing = ModelConfig::from_file(&path).unwrap_err();
        assert!(matches!(missing, Error::Io { .. }));
        for text in ["{", "[]", "3"] {
            std::fs::write(&path, text).unwrap();
            let message = ModelConfig::from_file(&path).unwrap_err().to_string();
            assert!(message.contains("config.json"), "{message}");
        }
    }
}
