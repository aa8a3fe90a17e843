//! A Hugging Face `config.json` as a typed description of the model.
//!
//! The types here are *facts about the computation*, the same for all families; the files of
//! [`crate::families`] translate each family's keys into them. A value that would change the
//! computation and that we do not carry is an error, never ignored. Dropout and initialiser
//! ranges are choices of training, and so are not read.

use std::path::Path;

use candle_core::DType;
use serde_json::Value;

pub use crate::families::Family;
use crate::rotary::Rotary;
pub use crate::rotary::{LongRope, RopeScaling, Yarn};
use crate::{Error, Result, families};

/// More parameters than this are taken for a damaged file.
const IMPLAUSIBLE_PARAMETERS: u64 = 1_000_000_000_000_000;
/// And so are more layers × experts; the largest published models have a tenth of it.
const IMPLAUSIBLE_EXPERTS: usize = 1 << 18;
/// And wider heads.
const IMPLAUSIBLE_HEAD: usize = 1 << 16;

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
    /// The norms of the residual stream.
    pub norm: NormKind,
    /// Their epsilon.
    pub norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How they are stretched.
    pub rope_scaling: RopeScaling,
    /// Longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the head has a bias.
    pub head_bias: bool,
    /// The expert layers.
    pub moe: MoeConfig,
    /// This many layers at the start have a plain MLP instead of experts.
    pub first_dense_layers: usize,
    /// Intermediate size of those plain MLPs; 0 where there are none.
    pub dense_intermediate_size: usize,
    /// `[rows, columns]` of weights that share a scale, where the files are FP8.
    pub fp8_block: Option<[usize; 2]>,
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
    /// `K`: experts chosen for a token.
    pub top_k: usize,
    /// What the router makes of its logits.
    pub scoring: Scoring,
    /// Groups of experts that a token may not leave.
    pub groups: Option<ExpertGroups>,
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

/// What a router makes of its logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scoring {
    /// Gates are a softmax over all experts; the largest are chosen.
    Softmax,
    /// Gates are logistic; what is chosen is decided after a bias of each expert is added
    /// (DeepSeek-V3, section 2.1.2).
    Sigmoid,
    /// Two experts one after the other, each with its share of a softmax over those experts whose
    /// logits come near it (arXiv 2409.12136, as inference uses it).
    SparseMixer {
        /// Half the relative distance that counts as near.
        jitter: f64,
    },
}

/// Experts in groups of equal size, of which a token uses only some (DeepSeek-V2, section 2.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// How many groups there are.
    pub count: usize,
    /// How many of them a token may use.
    pub chosen: usize,
    /// What ranks them.
    pub score: GroupScore,
}

/// What ranks a group of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best score.
    Best,
    /// The sum of its two best scores.
    TwoBest,
}

/// The norms of the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square, a weight.
    Rms,
    /// Mean and variance, a weight and a bias.
    Layer,
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

/// The element type in the words of `config.json`.
pub fn torch_dtype(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F64 => "float64",
        _ => "float32",
    }
}

impl ModelConfig {
    /// The element type that the configuration names for its files; bf16 where it names none.
    pub fn file_dtype(&self) -> DType {
        let named = ["dtype", "torch_dtype"].map(|key| self.raw.get(key)?.as_str());
        let named = named.into_iter().flatten().next();
        let known = [DType::F64, DType::F32, DType::F16].into_iter();
        let mut known = known.filter(|&dtype| Some(torch_dtype(dtype)) == named);
        known.next().unwrap_or(DType::BF16)
    }

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
        match config.implausible() {
            Some(message) => Err(Error::config(origin, message)),
            None => Ok(config),
        }
    }

    /// What no model has. Everything that is computed from a configuration may rely on its
    /// absence: on counts that fit, and on lists of layers, experts and angles that fit memory.
    fn implausible(&self) -> Option<String> {
        let experts = self.num_layers.saturating_mul(self.moe.num_experts);
        if self.parameters().total() > IMPLAUSIBLE_PARAMETERS {
            return Some(
                "the sizes describe a model above 10^15 parameters; check `hidden_size`, \
                 `vocab_size` and the expert sizes"
                    .into(),
            );
        }
        if experts > IMPLAUSIBLE_EXPERTS {
            return Some(format!(
                "{} layers of {} experts are more than {IMPLAUSIBLE_EXPERTS} experts together; \
                 check `num_hidden_layers` and the number of experts",
                self.num_layers, self.moe.num_experts
            ));
        }
        if self.head_dim > IMPLAUSIBLE_HEAD {
            return Some(format!(
                "heads of {} numbers, expected at most {IMPLAUSIBLE_HEAD}; check the sizes of the \
                 attention heads",
                self.head_dim
            ));
        }
        if !self.attention_scale().is_finite() || !Rotary::new(self).is_finite() {
            return Some(
                "the angles that `rope_theta`, `rope_scaling` and `max_position_embeddings` \
                 describe are not finite numbers; correct them"
                    .into(),
            );
        }
        None
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

    /// Factor on the attention scores: `1/sqrt(head_dim)`, and DeepSeek's temperature of YaRN.
    pub fn attention_scale(&self) -> f64 {
        let plain = 1.0 / (self.head_dim as f64).sqrt();
        match (&self.attention, &self.rope_scaling) {
            (Attention::MultiHeadLatent { .. }, RopeScaling::Yarn(yarn))
                if yarn.mscale_all_dim > 0.0 =>
            {
                plain * Yarn::mscale(yarn.factor, yarn.mscale_all_dim).powi(2)
            }
            _ => plain,
        }
    }
}

#[cfg(test)]
mod tests;
