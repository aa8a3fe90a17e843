//! What a user may set, on the command line or in a recipe file, before any choice is made.

use crate::verdict::Thresholds;
use anyhow::{Context, Result, anyhow};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What a user may set, on the command line or in a recipe file.
#[derive(Debug, Clone, Default, clap::Args, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Model folder (Hugging Face layout), `org/name` or `org/name@revision` on the Hugging Face Hub, or `olmoe-nano`, the model in the repository [default: olmoe-nano]
    #[arg(long)]
    pub model: Option<String>,
    /// Built-in task: math, code, commonsense, intent or translation [default: math, or the data of `--train`]
    #[arg(long)]
    pub task: Option<String>,
    /// Data to train on: records, JSON lines of prompt/completion or messages, of which every tenth is held out; or text (`.txt`, or documents as JSON lines with `text`), of which the last tenth is (the last twentieth with `eval_text`)
    #[arg(long, value_name = "FILE")]
    pub train: Option<PathBuf>,
    /// Text to test on instead of a part of `--train`: a `.txt` file, or documents as JSON lines with `text`
    #[arg(long, value_name = "FILE")]
    pub eval_text: Option<PathBuf>,
    /// lightmoe, replace (adapters alone, or with one base), lora (nothing is replaced); reap, frequency, ean, aimer or random (pruned); mone (mean outputs); msmoe, hcsmoe or ream (merged); mcsmoe (merged, the rest factorised); svd, d2moe or mobe (factorised); moei2 (pruned, the rest factorised); budget (each expert in the form that costs least for its bytes); compressed (fewer experts run, none is removed) [default: lightmoe]
    #[arg(long)]
    pub method: Option<String>,
    /// Share of all parameters to save, between 0 and 1 [default: 0.5]
    #[arg(long)]
    pub ratio: Option<f64>,
    /// Gate mass to replace in a layer, instead of a ratio
    #[arg(long)]
    pub threshold: Option<f64>,
    /// Bytes of weights to leave, such as 6GiB, instead of a ratio
    #[arg(long, value_name = "SIZE")]
    pub bytes: Option<String>,
    /// Loss that may be added, in nats for each predicted token as `budget` expects it, instead of a ratio
    #[arg(long, value_name = "NATS")]
    pub max_damage: Option<f64>,
    /// Rank of the adapters [default: 16, at most a sixteenth of an expert's smaller side; for replace and lora the rank of equal trainable parameters]
    #[arg(long)]
    pub rank: Option<usize>,
    /// Shared bases per layer; of budget 1: one where it pays, 0: none [default: 3, for replace 0, for budget 1]
    #[arg(long)]
    pub groups: Option<usize>,
    /// By what lightmoe and replace choose the experts to replace: gate (their share of the gate mass), reap (what they gave), or damage (what errors cost) [default: gate]
    #[arg(long)]
    pub select: Option<String>,
    /// How the bases start: gate-weighted, reap-weighted or fisher-weighted means (by what errors cost), aligned (neurons in the order of the dominant's), least-squares (on what the members were given), or random [default: gate-weighted]
    #[arg(long)]
    pub base: Option<String>,
    /// How the adapters of lightmoe and replace start: fresh (nothing yet), or factors of what the base lacks of the expert, which fade in as the originals fade out: whitened (by its inputs), fitted (by what errors cost) or truncated (by the weights alone) [default: fresh]
    #[arg(long)]
    pub adapters: Option<String>,
    /// Let slots of lightmoe and replace have a bias, the mean of what they miss of their expert, and those of `budget` where it pays [default: false]
    #[arg(long, value_name = "BOOL")]
    pub bias: Option<bool>,
    /// How `budget` learns what errors cost: fisher (by gradients, a second pass over the weights) or relative (by the size of what goes into their layer) [default: fisher]
    #[arg(long)]
    pub sensitivity: Option<String>,
    /// How `svd` and `budget` share what there is: uniform, importance or budget (where it saves most loss) [default: budget]
    #[arg(long)]
    pub ranks: Option<String>,
    /// How many components of a factorised expert are trained, the last ones; 0 for all [default: as many as `rank`, for budget all]
    #[arg(long)]
    pub trained_rank: Option<usize>,
    /// Steps of the fit of `mobe` [default: 1000]
    #[arg(long)]
    pub fit_steps: Option<usize>,
    /// How many of the chosen experts run in `compressed` [default: half of them]
    #[arg(long)]
    pub main_experts: Option<usize>,
    /// How much the router norm moves a layer's threshold (eq. 8) [default: 0.3]
    #[arg(long)]
    pub alpha: Option<f64>,
    /// Greatest relative distance of a layer's threshold from the mean [default: 0.2]
    #[arg(long)]
    pub max_delta: Option<f64>,
    /// What to observe instead of the training data, with weights: built-in tasks and files of records or text, such as math,code=2,notes.jsonl=0.5
    #[arg(long, value_name = "MIX")]
    pub calibrate: Option<String>,
    /// Further built-in tasks to score beside the run's own, with commas between them
    #[arg(long, value_name = "TASKS")]
    pub also: Option<String>,
    /// Tokens to observe [default: 131072]
    #[arg(long)]
    pub calibration_tokens: Option<usize>,
    /// Training steps of the recovery; 0 for none [default: 500]
    #[arg(long)]
    pub steps: Option<usize>,
    /// What a run ends with: recovered, or better (the built model where the recovered one is worse on the validation examples) [default: recovered, for budget better]
    #[arg(long)]
    pub keep: Option<String>,
    /// Sequences of a batch [default: 16]
    #[arg(long)]
    pub batch_size: Option<usize>,
    /// Sequences of a batch that run at once, their gradients added up: less memory, and but for rounding the same steps [default: all]
    #[arg(long)]
    pub micro_batch_size: Option<usize>,
    /// Run the layers again on the way back, so that the activations of one at a time are in memory [default: false]
    #[arg(long, value_name = "BOOL")]
    pub gradient_checkpointing: Option<bool>,
    /// Highest learning rate [default: 1e-4 · 2048 / hidden size]
    #[arg(long)]
    pub lr: Option<f64>,
    /// Share of the steps that warm up [default: 0.03]
    #[arg(long)]
    pub warmup: Option<f64>,
    /// How the learning rate falls: linear, cosine or constant [default: linear]
    #[arg(long)]
    pub decay: Option<String>,
    /// Weight decay [default: 0]
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// Largest norm of the gradient [default: 1]
    #[arg(long)]
    pub clip_norm: Option<f64>,
    /// lightmoe, replace and budget: how the share β of the originals falls: linear, exponential or none [default: linear, of budget none]
    #[arg(long)]
    pub annealing: Option<String>,
    /// Share of the steps after which β is zero [default: 0.2]
    #[arg(long)]
    pub end_ratio: Option<f64>,
    /// γ of the exponential annealing [default: 3]
    #[arg(long)]
    pub gamma: Option<f64>,
    /// Weight of the distance to the uncompressed model's predictions beside the loss; that model is then in memory too [default: 0, for mcsmoe 0.2]
    #[arg(long)]
    pub distill: Option<f64>,
    /// Temperature of that distance [default: 2]
    #[arg(long)]
    pub distill_temperature: Option<f64>,
    /// Keep the uncompressed model's so many likeliest tokens of every prediction on disk before the recovery, instead of the model in memory beside it [default: 0: the model in memory, all tokens]
    #[arg(long)]
    pub distill_top_k: Option<usize>,
    /// Whether the router is trained too [default: false]
    #[arg(long, value_name = "BOOL")]
    pub train_router: Option<bool>,
    /// Distinct training examples of a built-in task [default: 8000]
    #[arg(long)]
    pub train_examples: Option<usize>,
    /// Test examples, of text windows [default: 500]
    #[arg(long)]
    pub eval_examples: Option<usize>,
    /// Longest sequence in tokens [default: 512, at most the model's context]
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Test tokens on which the original and the result are held beside each other for the report: the load of every expert, the divergence by layer, some answers; 0 for none [default: 8192]
    #[arg(long)]
    pub contrast_tokens: Option<usize>,
    /// Seed of every random choice [default: 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// auto, cpu, or cuda (cuda:N for another than the first GPU) in a program with CUDA [default: auto]
    #[arg(long)]
    pub device: Option<String>,
    /// The numbers that models compute with: auto (on the CPU f32, on a GPU the model's own), f32, bf16, and on a GPU f16; what is trained is f32, and files keep the model's own [default: auto]
    #[arg(long)]
    pub dtype: Option<String>,
    /// What the result must meet: in a recipe file the keys of the table `verdict`
    #[command(flatten)]
    #[serde(default, skip_serializing_if = "Thresholds::is_empty")]
    pub verdict: Thresholds,
}

/// Takes each key from the first side that has it.
macro_rules! first_of {
    ($a:expr, $b:expr, $($key:ident),+ $(,)?) => { Settings { $($key: $a.$key.or($b.$key)),+ } };
}

impl Settings {
    /// Reads a recipe file.
    ///
    /// # Errors
    /// If it cannot be read, or has keys that are not settings.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the recipe `{}`", path.display()))?;
        Self::parse(&text)
            .map_err(|message| anyhow!("in the recipe `{}`, {message}", path.display()))
    }

    /// Reads the text of a recipe file.
    ///
    /// # Errors
    /// What is wrong in which line, as part of a sentence.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        // The parser's own form draws the line over several lines of ours.
        toml::from_str(text).map_err(|e: toml::de::Error| {
            let line = e
                .span()
                .map_or(1, |s| 1 + text[..s.start].matches('\n').count());
            let message = e.message();
            format!("line {line}: {message}; see docs/reference.md for its keys")
        })
    }

    /// How many settings say how much to save.
    pub fn amounts(&self) -> usize {
        let numbers = [self.ratio, self.threshold, self.max_damage];
        numbers.iter().flatten().count() + usize::from(self.bytes.is_some())
    }

    /// These settings, and those of `other` where these are silent.
    pub fn or(self, other: Self) -> Self {
        // A ratio here overrules a threshold there, and so with every two that say how much.
        let other = match self.amounts() {
            0 => other,
            _ => Self {
                ratio: None,
                threshold: None,
                bytes: None,
                max_damage: None,
                ..other
            },
        };
        first_of!(
            self,
            other,
            model,
            task,
            train,
            eval_text,
            method,
            ratio,
            threshold,
            bytes,
            max_damage,
            rank,
            groups,
            select,
            base,
            adapters,
            bias,
            sensitivity,
            ranks,
            trained_rank,
            fit_steps,
            main_experts,
            alpha,
            max_delta,
            calibrate,
            also,
            calibration_tokens,
            steps,
            keep,
            batch_size,
            micro_batch_size,
            gradient_checkpointing,
            lr,
            warmup,
            decay,
            weight_decay,
            clip_norm,
            annealing,
            end_ratio,
            gamma,
            distill,
            distill_temperature,
            distill_top_k,
            train_router,
            train_examples,
            eval_examples,
            max_length,
            contrast_tokens,
            seed,
            device,
            dtype,
            verdict,
        )
    }
}
