//! Reading a `config.json` key by key, so that every complaint names its key.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::config::{MoeConfig, ProjectionBias, Scoring};
use crate::{Error, Result};

/// Keys that do not change what a model computes: bookkeeping, initial values and noise of
/// training, generation settings that older files carry, and our own entry.
const WITHOUT_EFFECT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_experts_implementation",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "experts_implementation",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "lightmoe",
    "max_length",
    "min_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// A JSON object of a `config.json` under inspection. A key that is `null` counts as missing.
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
    /// Which keys somebody asked for.
    seen: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, path: &'a Path) -> Self {
        Self {
            map,
            path,
            seen: RefCell::default(),
        }
    }

    /// The object under `key`, read by itself.
    pub(super) fn inner(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self::new(map, self.path))),
            Some(_) => Err(self.error(format!("`{key}` must be an object or null; correct it"))),
        }
    }

    /// Declares keys that change nothing here.
    pub(super) fn ignore(&self, keys: &[&str]) {
        let keys = keys.iter().map(|&key| key.to_owned());
        self.seen.borrow_mut().extend(keys);
    }

    /// Refuses keys that nobody asked for: what they mean for the computation is unknown.
    pub(super) fn all_known(&self) -> Result<()> {
        let seen = self.seen.borrow();
        let unknown = self.map.iter().find(|(key, value)| {
            !value.is_null() && !seen.contains(*key) && !WITHOUT_EFFECT.contains(&key.as_str())
        });
        match unknown {
            None => Ok(()),
            Some((key, value)) => {
                let value: String = value.to_string().chars().take(80).collect();
                Err(self.error(format!(
                    "`{key}` ({value}) is not known for this family and might change what the \
                     model computes; remove it if it does not, otherwise use another model"
                )))
            }
        }
    }

    pub(super) fn error(&self, message: impl Into<String>) -> Error {
        Error::config(self.path, message)
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.seen.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// `key` by `parse`, or `default` if it is missing.
    pub(super) fn read<T>(
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
    pub(super) fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        self.read(
            key,
            "a positive whole number below 2^32",
            default,
            |value| whole(value).filter(|&size| size > 0),
        )
    }

    /// A whole number below 2^32, 0 allowed.
    pub(super) fn count(&self, key: &str, default: Option<usize>) -> Result<usize> {
        self.read(key, "a whole number from 0, below 2^32", default, whole)
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|_| self.size(key, None)).transpose()
    }

    pub(super) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        self.read(key, "a number above 0", default, |value| {
            value.as_f64().filter(|x| x.is_finite() && *x > 0.0)
        })
    }

    pub(super) fn non_negative(&self, key: &str, default: Option<f64>) -> Result<f64> {
        self.read(key, "a number from 0", default, |value| {
            value.as_f64().filter(|x| x.is_finite() && *x >= 0.0)
        })
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.read(key, "true or false", Some(default), Value::as_bool)
    }

    pub(super) fn text(&self, key: &str, default: Option<&'a str>) -> Result<&'a str> {
        self.read(key, "a text", default, Value::as_str)
    }

    /// Refuses every value of `key` but those in `supported`, the first being the default.
    pub(super) fn one_of(&self, key: &str, supported: &[&'static str]) -> Result<()> {
        let value = self.text(key, supported.first().copied())?;
        if supported.contains(&value) {
            return Ok(());
        }
        let list = supported.join("`, `");
        Err(self.error(format!(
            "`{key}` is `{value}`, which is not supported; use a model with `{list}`"
        )))
    }

    /// Refuses the other value of a switch that has but one in this family.
    pub(super) fn fixed(&self, key: &str, value: bool) -> Result<()> {
        match self.flag(key, value)? == value {
            true => Ok(()),
            false => Err(self.error(format!(
                "`{key}` is {}, which is not supported; use a model with {value}",
                !value
            ))),
        }
    }

    pub(super) fn absent(&self, key: &str, what_to_do: &str) -> Result<()> {
        match self.get(key) {
            None => Ok(()),
            Some(_) => Err(self.error(format!("`{key}` is not supported; {what_to_do}"))),
        }
    }

    /// Experts and top-k under the given keys.
    pub(super) fn experts(&self, key: &str) -> Result<(usize, usize)> {
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
    pub(super) fn heads(&self) -> Result<(usize, usize)> {
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
    pub(super) fn routed(&self, experts: &str, width: &str) -> Result<MoeConfig> {
        let (num_experts, top_k) = self.experts(experts)?;
        Ok(MoeConfig {
            num_experts,
            top_k,
            intermediate_size: self.size(width, None)?,
            renormalize: self.flag("norm_topk_prob", false)?,
            scoring: Scoring::Softmax,
            groups: None,
            routed_scaling_factor: 1.0,
            shared_intermediate_size: 0,
            shared_gate: false,
            router_aux_loss_coef: self.non_negative("router_aux_loss_coef", Some(0.001))?,
        })
    }

    /// Width of a head: its own key, or the hidden size over the heads.
    pub(super) fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
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
    pub(super) fn attention_bias(&self, default: bool) -> Result<ProjectionBias> {
        Ok(match self.flag("attention_bias", default)? {
            true => ProjectionBias::All,
            false => ProjectionBias::None,
        })
    }

    /// Refuses what Qwen's configs can ask for and no published model does: dense layers among
    /// the others, and windows in some of them.
    pub(super) fn uniform_layers(&self) -> Result<()> {
        if self.size("decoder_sparse_step", Some(1))? != 1 {
            let message =
                "`decoder_sparse_step` must be 1; use a model with experts in every layer";
            return Err(self.error(message));
        }
        let empty = |layers: &Value| layers.as_array().is_some_and(Vec::is_empty);
        if !self.get("mlp_only_layers").is_none_or(empty) {
            let message =
                "`mlp_only_layers` must be empty; use a model with experts in every layer";
            return Err(self.error(message));
        }
        // They matter only for what is refused here.
        self.ignore(&["intermediate_size", "max_window_layers", "sliding_window"]);
        let full = |kind: &Value| kind.as_str() == Some("full_attention");
        let all_full = |kinds: &Value| kinds.as_array().is_some_and(|k| k.iter().all(full));
        if !self.get("layer_types").is_none_or(all_full) {
            let message = "`layer_types` must be `full_attention` alone; use such a model";
            return Err(self.error(message));
        }
        if self.flag("use_sliding_window", false)? {
            let message = "`use_sliding_window` is not supported; use a model with full attention";
            return Err(self.error(message));
        }
        Ok(())
    }

    /// Epsilon of the norms, under either name.
    pub(super) fn norm_eps(&self, default: f64) -> Result<f64> {
        let layer = self.positive("layer_norm_eps", Some(default))?;
        self.positive("rms_norm_eps", Some(layer))
    }

    /// The block of weights that share a scale, `[rows, columns]`, where they are stored as FP8
    /// (DeepSeek-V3, section 3.3.2). Another quantisation is an error.
    pub(super) fn fp8_block(&self) -> Result<Option<[usize; 2]>> {
        let Some(inner) = self.inner("quantization_config")? else {
            return Ok(None);
        };
        let method = inner.text("quant_method", Some("unknown"))?;
        let block = inner.get("weight_block_size").and_then(Value::as_array);
        let block: Option<Vec<usize>> = block.and_then(|b| b.iter().map(whole).collect());
        match (method, block.as_deref()) {
            ("fp8", Some(&[rows, columns])) if rows > 0 && columns > 0 => Ok(Some([rows, columns])),
            _ => Err(self.error(format!(
                "`quantization_config` asks for `{method}`, which is not supported; give an \
                 unquantised checkpoint, or FP8 with a `weight_block_size`"
            ))),
        }
    }

    /// A token id: a number or null; of a list, the first.
    pub(super) fn token(&self, key: &str) -> Result<Option<u32>> {
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

pub(super) fn whole(value: &Value) -> Option<usize> {
    let number = u32::try_from(value.as_u64()?).ok()?;
    usize::try_from(number).ok()
}
