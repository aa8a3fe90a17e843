//! The recipe: everything that decides the result of a run. The same keys stand in a TOML file and
//! on the command line; the command line wins, then the file, then the defaults.

mod check;
mod file;

pub(crate) use file::differences;

use crate::calibration::Mix;
use crate::keep::Keep;
use crate::settings::Settings;
use crate::verdict::Thresholds;
use anyhow::{Context, Result, anyhow, bail, ensure};
use lightmoe_compress::methods::{
    AdapterInit, BaseInit, MethodName, PlanOptions, Selection, Target,
};
use lightmoe_compress::ranks::RankRule;
use lightmoe_compress::size::equal_trainable_rank;
use lightmoe_compress::{Sensitivity, Statistics, mixture};
use lightmoe_data::Task;
use lightmoe_models::ModelConfig;
use lightmoe_train::{Annealing, AnnealingShape, Decay, LearningRate};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

/// The paper's learning rate (§4.1), at the hidden size of OLMoE-1B-7B.
const PAPER_LR: f64 = 1e-4;
const PAPER_HIDDEN: f64 = 2048.0;
/// Bases per layer of the paper.
const PAPER_GROUPS: usize = 3;

/// A recipe with every choice made. Written as `recipe.toml` beside the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the keys of `Settings`
pub struct Recipe {
    pub model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_text: Option<PathBuf>,
    pub method: MethodName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_damage: Option<f64>,
    pub rank: usize,
    pub groups: usize,
    #[serde(default)]
    pub select: Selection,
    pub base: BaseInit,
    #[serde(default)]
    pub adapters: AdapterInit,
    #[serde(default, skip_serializing_if = "is_default")]
    pub bias: bool,
    #[serde(default = "fisher")]
    pub sensitivity: Sensitivity,
    pub ranks: RankRule,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_rank: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fit_steps: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub main_experts: Option<usize>,
    pub alpha: f64,
    pub max_delta: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibrate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub also: Option<String>,
    pub calibration_tokens: usize,
    pub steps: usize,
    #[serde(default = "recovered")]
    pub keep: Keep,
    pub batch_size: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    pub micro_batch_size: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    pub gradient_checkpointing: bool,
    pub lr: f64,
    pub warmup: f64,
    pub decay: Decay,
    pub weight_decay: f64,
    pub clip_norm: f64,
    pub annealing: AnnealingShape,
    pub end_ratio: f64,
    pub gamma: f64,
    pub distill: f64,
    pub distill_temperature: f64,
    pub distill_top_k: usize,
    pub train_router: bool,
    pub train_examples: usize,
    pub eval_examples: usize,
    pub max_length: usize,
    #[serde(default = "contrast_tokens")]
    pub contrast_tokens: usize,
    pub seed: u64,
    pub device: String,
    pub dtype: String,
    #[serde(default, skip_serializing_if = "Thresholds::is_empty")]
    pub verdict: Thresholds,
}

/// What later versions added and nobody asked for: runs of earlier ones go on.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn contrast_tokens() -> usize {
    8192
}

fn recovered() -> Keep {
    Keep::Recovered
}

fn fisher() -> Sensitivity {
    Sensitivity::Fisher
}

fn one_of<T: FromStr<Err: Display>>(text: Option<String>, default: T) -> Result<T> {
    text.map_or(Ok(default), |t| {
        t.parse().map_err(|e: T::Err| anyhow!("{e}"))
    })
}

/// Reads a value with the names that serde gives it.
fn named<T: for<'a> Deserialize<'a>>(
    key: &str,
    text: Option<String>,
    default: T,
    names: &str,
) -> Result<T> {
    let Some(text) = text else { return Ok(default) };
    serde_json::from_value(serde_json::Value::String(text.clone()))
        .map_err(|_| anyhow!("`{key}` is `{text}`; use one of {names}"))
}

impl Recipe {
    /// Makes every choice that the settings leave open, for the model of `config`.
    ///
    /// # Errors
    /// If a setting has a value that cannot work for this model: one line that says what to do.
    pub fn resolve(settings: Settings, config: &ModelConfig) -> Result<Self> {
        let s = settings;
        let amounts = s.amounts();
        if amounts > 1 {
            bail!("`ratio`, `threshold`, `bytes` and `max_damage` say the same; give one of them");
        }
        let method = one_of(s.method, MethodName::Lightmoe)?;
        let task = s.task.map(|t| t.parse::<Task>()).transpose()?;
        let smaller = config.hidden_size.min(config.moe.intermediate_size);
        let paper_rank = (smaller / 16).clamp(1, 16);
        let groups = s.groups.unwrap_or(match method {
            MethodName::Lightmoe => PAPER_GROUPS,
            MethodName::Budget => 1,
            _ => 0,
        });
        // Bases that need not be there train nothing to be counted.
        let trained_groups = match method {
            MethodName::Budget => 0,
            _ => groups,
        };
        // The baselines train as many parameters as LightMoE does, as in the paper's table.
        let rank = s.rank.unwrap_or_else(|| match method {
            MethodName::Lightmoe => paper_rank,
            _ => {
                equal_trainable_rank(config, paper_rank, PAPER_GROUPS, trained_groups).min(smaller)
            }
        });
        let max_length = s
            .max_length
            .unwrap_or(512)
            .min(config.max_position_embeddings);
        let recipe = Self {
            model: s
                .model
                .unwrap_or_else(|| crate::source::BUILT_IN.to_owned()),
            task: task.or(s.train.is_none().then_some(Task::Math)),
            train: s.train,
            eval_text: s.eval_text,
            method,
            ratio: s.ratio.or((amounts == 0).then_some(0.5)),
            threshold: s.threshold,
            bytes: s.bytes,
            max_damage: s.max_damage,
            rank,
            groups,
            select: named("select", s.select, Selection::Gate, "gate, reap, damage")?,
            base: named(
                "base",
                s.base,
                BaseInit::GateWeighted,
                "gate-weighted, reap-weighted, fisher-weighted, aligned, least-squares, random",
            )?,
            adapters: named(
                "adapters",
                s.adapters,
                AdapterInit::Fresh,
                "fresh, whitened, fitted, truncated",
            )?,
            bias: s.bias.unwrap_or(false),
            sensitivity: named("sensitivity", s.sensitivity, fisher(), "fisher, relative")?,
            ranks: named(
                "ranks",
                s.ranks,
                RankRule::Budget,
                "uniform, importance, budget",
            )?,
            trained_rank: s.trained_rank,
            fit_steps: s.fit_steps,
            main_experts: s.main_experts,
            alpha: s.alpha.unwrap_or(0.3),
            max_delta: s.max_delta.unwrap_or(0.2),
            calibrate: s.calibrate,
            also: s.also,
            calibration_tokens: s.calibration_tokens.unwrap_or(1 << 17),
            steps: s.steps.unwrap_or(500),
            keep: named(
                "keep",
                s.keep,
                match method {
                    MethodName::Budget => Keep::Better,
                    _ => Keep::Recovered,
                },
                "recovered, better",
            )?,
            batch_size: s.batch_size.unwrap_or(16),
            micro_batch_size: s.micro_batch_size.unwrap_or(0),
            gradient_checkpointing: s.gradient_checkpointing.unwrap_or(false),
            lr: s
                .lr
                .unwrap_or(PAPER_LR * PAPER_HIDDEN / config.hidden_size as f64),
            warmup: s.warmup.unwrap_or(0.03),
            decay: named("decay", s.decay, Decay::Linear, "linear, cosine, constant")?,
            weight_decay: s.weight_decay.unwrap_or(0.0),
            clip_norm: s.clip_norm.unwrap_or(1.0),
            annealing: named(
                "annealing",
                s.annealing,
                match method {
                    // Its factors stand for the originals from the first step on.
                    MethodName::Budget => AnnealingShape::None,
                    _ => AnnealingShape::Linear,
                },
                "linear, exponential, none",
            )?,
            end_ratio: s.end_ratio.unwrap_or(0.2),
            gamma: s.gamma.unwrap_or(3.0),
            distill: s.distill.unwrap_or(match method {
                // Its paper's own recipe.
                MethodName::Mcsmoe => 0.2,
                _ => 0.0,
            }),
            distill_temperature: s.distill_temperature.unwrap_or(2.0),
            distill_top_k: s.distill_top_k.unwrap_or(0),
            train_router: s.train_router.unwrap_or(false),
            train_examples: s.train_examples.unwrap_or(8000),
            eval_examples: s.eval_examples.unwrap_or(500),
            max_length,
            contrast_tokens: s.contrast_tokens.unwrap_or_else(contrast_tokens),
            seed: s.seed.unwrap_or(0),
            device: s.device.unwrap_or_else(|| "auto".into()),
            dtype: s.dtype.unwrap_or_else(|| "auto".into()),
            verdict: s.verdict,
        };
        recipe.check()?;
        Ok(recipe)
    }

    /// The options of plan.
    pub fn plan_options(&self) -> PlanOptions {
        PlanOptions {
            rank: self.rank,
            groups: self.groups,
            alpha: self.alpha,
            max_delta: self.max_delta,
            select: self.select,
            base: self.base,
            adapters: self.adapters,
            bias: self.bias,
            ranks: self.ranks,
            main_experts: self.main_experts,
            trained_rank: self.trained_rank,
            fit_steps: self.fit_steps.unwrap_or(mixture::STEPS),
            seed: self.seed,
        }
    }

    /// What its method needs to be observed beside routing and outputs.
    pub fn statistics(&self) -> Statistics {
        let of_method = self.plan_options().statistics(self.method);
        Statistics {
            damage: of_method.damage.map(|_| self.sensitivity),
            ..of_method
        }
    }

    /// What plan aims at.
    pub fn target(&self) -> Target {
        match (self.threshold, self.max_damage, self.bytes()) {
            (Some(p), ..) => Target::Threshold(p),
            (_, Some(most), _) => Target::Damage(most),
            (.., Ok(Some(bytes))) => Target::Bytes(bytes),
            _ => Target::Ratio(self.ratio.unwrap_or(0.5)),
        }
    }

    /// Whether a plan looks at the weights, or at how large they are.
    pub fn plans_by_weights(&self) -> bool {
        let looks = matches!(self.method, MethodName::Moei2 | MethodName::Budget);
        looks || matches!(self.target(), Target::Bytes(_))
    }

    /// Bytes of weights to leave, if they are given so.
    fn bytes(&self) -> Result<Option<u64>> {
        let size = |text: &String| {
            let size: Result<bytesize::ByteSize, String> = text.parse();
            let size =
                size.map_err(|e| anyhow!("`bytes` is `{text}` ({e}); give a size such as 6GiB"))?;
            ensure!(size.0 > 0, "`bytes` is `{text}`; give a size such as 6GiB");
            Ok(size.0)
        };
        self.bytes.as_ref().map(size).transpose()
    }

    /// What is observed instead of the training data.
    ///
    /// # Errors
    /// If it names what is no task and no file of records or text.
    pub fn calibrate(&self) -> Result<Option<Mix>> {
        self.calibrate.as_deref().map(str::parse).transpose()
    }

    /// Further tasks that are scored.
    ///
    /// # Errors
    /// If one is unknown.
    pub fn also(&self) -> Result<Vec<Task>> {
        let names = self.also.iter().flat_map(|names| names.split(','));
        let mut tasks = Vec::new();
        for name in names {
            let task: Task = name.trim().parse().context("in `also`")?;
            // Its own is scored anyway.
            if Some(task) != self.task && !tasks.contains(&task) {
                tasks.push(task);
            }
        }
        Ok(tasks)
    }

    /// How much is to be saved, as a folder may be named by it.
    pub fn amount(&self) -> String {
        let number = self.ratio.or(self.threshold).or(self.max_damage);
        let bytes = || self.bytes.clone().unwrap_or_default();
        number.map_or_else(bytes, |number| number.to_string())
    }

    /// β by step.
    pub fn annealing(&self) -> Annealing {
        Annealing {
            shape: self.annealing,
            end_ratio: self.end_ratio,
            gamma: self.gamma,
        }
    }

    /// Learning rate by step.
    pub fn learning_rate(&self) -> LearningRate {
        LearningRate {
            peak: self.lr,
            warmup: self.warmup,
            flat_until: 0.0,
            decay: self.decay,
            final_share: 0.0,
        }
    }
}
