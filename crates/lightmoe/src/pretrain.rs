//! Pre-training of a small OLMoE model from nothing, on the built-in mix, which is how the model that
//! lies in the repository was made, or on text files of the user's own.

mod material;
mod upcycled;

use crate::device;
use crate::preflight::Refused;
use crate::progress::Progress;
use anyhow::{Context, Result, bail, ensure};
use lightmoe_data::text::SMALLEST_VOCABULARY;
use lightmoe_data::tokenizer;
use lightmoe_models::{
    BankLayout, CheckpointWriter, DType, Decoder, Format, ModelConfig, ParameterKind, Scheme,
};
use lightmoe_train::{
    Annealing, AnnealingShape, Folders, Group, LearningRate, Outcome, RowPruning, TrainBatch,
    TrainOptions, train,
};
use material::Material;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use upcycled::Start;

/// The recipe file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainRecipe {
    /// Where the model folder goes.
    pub out: PathBuf,
    /// Seed of weights and text.
    pub seed: u64,
    /// The shape of the model.
    pub model: Shape,
    /// The training.
    pub training: Training,
    /// A model of one expert a layer and otherwise this shape and text: all experts begin as copies of that one
    /// (sparse upcycling), and the rest as its. Without it, weights are random.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upcycle_from: Option<PathBuf>,
    /// The text; without it, the built-in mix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextFiles>,
}

/// The text to train on. Nothing of it is held out: what is to be tested must not be among the files.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextFiles {
    /// Paths or patterns such as `books/*.jsonl`: files of plain text, a document each, or of JSON
    /// lines with a field `text`, a document a line, if they end in `.jsonl` or `.jsonl.gz`.
    pub files: Vec<String>,
    /// The most tokens of the tokenizer that is trained on them, two special ones and all bytes
    /// included.
    pub vocab_size: usize,
}

/// The shape of the model, under the names of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// `H`
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// `F`
    pub intermediate_size: usize,
    /// `E`
    pub num_experts: usize,
    /// `K`
    pub num_experts_per_tok: usize,
    /// Longest context.
    pub max_position_embeddings: usize,
}

/// The training.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Steps.
    pub steps: usize,
    /// Windows of a batch.
    pub rows: usize,
    /// Tokens of a window.
    pub length: usize,
    /// Weight of the load-balancing loss.
    pub balance: f64,
    /// Weight decay of matrices (norms have none).
    pub weight_decay: f64,
    /// Largest norm of the gradient.
    pub clip_norm: f64,
    /// AdamW's first decay.
    pub beta1: f64,
    /// AdamW's second decay.
    pub beta2: f64,
    /// Learning rate.
    pub learning_rate: LearningRate,
}

impl PretrainRecipe {
    /// Reads a recipe file.
    ///
    /// # Errors
    /// If it cannot be read, has other keys, or asks for text that cannot be had.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the recipe `{}`", path.display()))?;
        let recipe: Result<Self, toml::de::Error> = toml::from_str(&text);
        let checked = |recipe: Self| recipe.check().map(|()| recipe);
        let recipe = recipe.map_err(Into::into).and_then(checked);
        recipe.with_context(|| format!("in the recipe `{}`", path.display()))
    }

    fn check(&self) -> Result<()> {
        let Some(text) = &self.text else {
            return Ok(());
        };
        ensure!(
            !text.files.is_empty(),
            "`text.files` names no file; give some, such as [\"books/*.jsonl\"], or leave `[text]` out"
        );
        ensure!(
            text.vocab_size >= SMALLEST_VOCABULARY,
            "`text.vocab_size` is {}; give at least {SMALLEST_VOCABULARY}, two special tokens and all \
             bytes",
            text.vocab_size
        );
        ensure!(
            self.training.length > 1,
            "`training.length` is {}; give at least 2, so that there is a token to predict",
            self.training.length
        );
        Ok(())
    }

    fn model_config(&self, vocab_size: usize) -> Result<ModelConfig> {
        let raw = self.config(vocab_size);
        Ok(ModelConfig::from_json(
            &raw,
            Path::new("the recipe's [model]"),
        )?)
    }

    /// The `config.json` of the model: OLMoE's, in this shape.
    fn config(&self, vocab_size: usize) -> serde_json::Value {
        let m = &self.model;
        serde_json::json!({
            "architectures": ["OlmoeForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": tokenizer::EOS_ID,
            "clip_qkv": null,
            "eos_token_id": tokenizer::EOS_ID,
            "hidden_act": "silu",
            "hidden_size": m.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": m.intermediate_size,
            "max_position_embeddings": m.max_position_embeddings,
            "model_type": "olmoe",
            "norm_topk_prob": false,
            "num_attention_heads": m.num_attention_heads,
            "num_experts": m.num_experts,
            "num_experts_per_tok": m.num_experts_per_tok,
            "num_hidden_layers": m.num_hidden_layers,
            "num_key_value_heads": m.num_attention_heads,
            "output_router_logits": false,
            "pad_token_id": tokenizer::PAD_ID,
            "rms_norm_eps": 1e-5,
            "rope_scaling": null,
            "rope_theta": 10000.0,
            // `transformers` sums over the chosen experts where we take the mean.
            "router_aux_loss_coef": self.training.balance / m.num_experts_per_tok as f64,
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vocab_size": vocab_size,
        })
    }
}

/// Trains the model and writes its folder; an interrupted run continues where it was. Returns the
/// last training losses' mean.
///
/// # Errors
/// If the recipe cannot work, the run is stopped, or files cannot be written.
pub fn pretrain(recipe: &PretrainRecipe) -> Result<f64> {
    let material = Material::of(recipe).map_err(Refused::of)?;
    let config = recipe.model_config(material.vocab_size)?;
    let t = &recipe.training;
    let placement = device::fresh();
    let mut model = Decoder::random(&config, recipe.seed)?;
    let start = recipe.upcycle_from.as_deref();
    let start = start.map(|folder| Start::load(folder, recipe, &material.tokenizer));
    let start = start.transpose().map_err(Refused::of)?;
    let mut fingerprint =
        crate::fingerprint(&(recipe, &material.fingerprint, env!("CARGO_PKG_VERSION")))?;
    if let Some(start) = start {
        fingerprint = crate::fingerprint(&(fingerprint, &start.fingerprint))?;
        start.put(&mut model)?;
    }
    model.visit(&mut |_, _, tensor| {
        *tensor = placement.put(tensor)?;
        Ok(())
    })?;
    let work = recipe.out.with_extension("pretraining");
    let fingerprint = device::fingerprint(&fingerprint, &placement)?;
    let options = TrainOptions {
        steps: t.steps,
        learning_rate: t.learning_rate,
        beta1: t.beta1,
        beta2: t.beta2,
        clip_norm: t.clip_norm,
        micro_batch: 0,
        recompute: false,
        balance: t.balance,
        annealing: Annealing {
            shape: AnnealingShape::None,
            ..Annealing::default()
        },
        pruning: RowPruning::default(),
        groups: vec![
            Group {
                kinds: vec![ParameterKind::Norm],
                weight_decay: 0.0,
            },
            Group {
                kinds: vec![
                    ParameterKind::Embedding,
                    ParameterKind::Attention,
                    ParameterKind::Router,
                    ParameterKind::Expert,
                ],
                weight_decay: t.weight_decay,
            },
        ],
        checkpoint_every: 500,
        fingerprint,
    };
    let bar = Progress::new("pretrain", t.steps);
    let mut recent = 0.0;
    let outcome = train(
        &mut model,
        &options,
        &Folders {
            state: work.clone(),
            logs: work,
        },
        &|step| {
            let batch = material.batch(step).map_err(|e| {
                lightmoe_train::Error::Invalid(format!("the pre-training text fails: {e}"))
            })?;
            Ok(TrainBatch {
                tokens: batch.tokens,
                rows: batch.rows,
                loss_mask: batch.loss_mask,
            })
        },
        None,
        &mut |point| {
            recent = if point.step == 0 {
                point.loss
            } else {
                0.99 * recent + 0.01 * point.loss
            };
            bar.note(format!("loss {recent:.3}"));
            bar.at(point.step + 1)
        },
    )?;
    if outcome == Outcome::Interrupted {
        bail!("interrupted; run the same command again to go on");
    }
    let format = Format::new(DType::BF16, Scheme::published(config.family));
    let layout = BankLayout::dense(&config);
    let mut writer = CheckpointWriter::for_model(&recipe.out, &format, &config, &layout)?;
    model.write(&writer)?;
    let json = |value: &serde_json::Value| serde_json::to_vec_pretty(value);
    writer.side_file("tokenizer.json", material.tokenizer.as_bytes())?;
    writer.side_file("tokenizer_config.json", &json(&material.tokenizer_config)?)?;
    let generation = serde_json::json!({
        "bos_token_id": tokenizer::EOS_ID,
        "eos_token_id": tokenizer::EOS_ID,
        "pad_token_id": tokenizer::PAD_ID,
    });
    writer.side_file("generation_config.json", &json(&generation)?)?;
    writer.finish(&config.raw)?;
    Ok(recent)
}
