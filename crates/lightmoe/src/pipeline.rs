//! The stages as functions from artefact to artefact. The subcommands call them one by one,
//! `compress` in a row.

mod recover;

use crate::calibration::Calibration;
use crate::device;
use crate::items::Items;
use crate::machine;
use crate::preflight::check_original;
use crate::progress::{Progress, stopped};
use crate::recipe::Recipe;
use crate::results::{Score, TaskScores, nll};
use crate::source::TaskData;
use anyhow::{Context, Result};
use lightmoe_compress::methods::{PlanModel, Weights};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::plan::Plan;
use lightmoe_compress::{
    BuildInputs, ObserveOptions, Statistics, Successor, build, methods, observe,
};
use lightmoe_eval::{EvalOptions, write_samples};
use lightmoe_models::{
    Checkpoint, Decoder, LanguageModel, ModelConfig, ModelTokenizer, StreamedDecoder,
};
pub use recover::{RecoverInputs, recover_stage};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

/// What the user is told when a run ends early by request.
pub(crate) const INTERRUPTED: &str =
    "interrupted; run the same command again to go on, `compress` with `--resume`";

/// Stage observe: what the recipe's method needs to know of its calibration tokens → `target`,
/// and `more` beside it.
///
/// # Errors
/// If there is too little text, the model is damaged, or the work was stopped.
pub fn observe_stage(
    checkpoint: &Checkpoint,
    found: &Calibration,
    recipe: &Recipe,
    more: Statistics,
    fingerprint: &str,
    target: &Path,
) -> Result<()> {
    let successor = methods::successor(recipe.method, checkpoint.config(), recipe.target());
    let what = Observing {
        // What was asked for beside the recipe comes first.
        statistics: more.and(recipe.statistics()),
        answers: &found.answers,
        successor: successor.as_deref(),
    };
    observe_samples(checkpoint, &found.samples, &what, fingerprint, target)
}

/// What is observed.
#[derive(Clone, Copy, Default)]
pub struct Observing<'a> {
    /// Beside routing and outputs.
    pub statistics: Statistics,
    /// Where the answer of each sample begins; empty: behind the first token.
    pub answers: &'a [usize],
    /// What becomes of each layer before the samples go on.
    pub successor: Option<&'a Successor<'a>>,
}

/// Stage observe on samples of token ids → `target`; what an interrupted run left in
/// `.<stem of target>.partial` beside it is continued.
///
/// # Errors
/// If the model is damaged, the memory is too little for a layer, or the work was stopped.
pub fn observe_samples(
    checkpoint: &Checkpoint,
    samples: &[Vec<u32>],
    what: &Observing<'_>,
    fingerprint: &str,
    target: &Path,
) -> Result<()> {
    let bar = Progress::new("observe", checkpoint.config().num_layers);
    let mut name = OsString::from(".");
    name.push(target.file_stem().unwrap_or_default());
    name.push(".partial");
    let options = ObserveOptions {
        fingerprint,
        state: &target.with_file_name(name),
        statistics: what.statistics,
        answers: what.answers,
        successor: what.successor,
        max_memory: device::max_memory().min(machine::max_memory()),
    };
    let checkpoint = &checkpoint.on(&device::placement(checkpoint));
    let seen = observe(checkpoint, samples, &options, &mut |done, all| {
        bar.of(done, all)
    })?;
    seen.save(target)?;
    Ok(())
}

/// Stage plan: observations and recipe → `target`. A method that would look at the `weights` does
/// without where only the `config` is at hand.
///
/// # Errors
/// If the recipe cannot work for these observations, or the work was stopped.
pub fn plan_stage(
    config: &ModelConfig,
    weights: Option<&Checkpoint>,
    observations: &Observations,
    recipe: &Recipe,
    target: &Path,
) -> Result<Plan> {
    let bar = Progress::new("plan", config.num_moe_layers());
    let progress = &|done, all| bar.of(done, all);
    let model: PlanModel<'_> = match weights {
        Some(checkpoint) => Weights {
            checkpoint,
            progress,
        }
        .into(),
        None => config.into(),
    };
    let plan = methods::plan(
        model,
        observations,
        recipe.target(),
        recipe.method,
        &recipe.plan_options(),
    )?;
    plan.save(target)?;
    Ok(plan)
}

/// Stage build: plan and checkpoint → the model folder `target`.
///
/// # Errors
/// If the plan is for another model, the model is damaged, or the work was stopped.
pub fn build_stage(inputs: &BuildInputs<'_>, target: &Path) -> Result<()> {
    check_original(inputs.checkpoint)?;
    let bar = Progress::new("build", inputs.checkpoint.config().num_layers);
    Ok(build(inputs, target, &mut |done, all| bar.of(done, all))?)
}

/// A model to run: in memory if it fits there, else read layer by layer in every pass.
///
/// # Errors
/// If it cannot be read.
pub fn load_model(checkpoint: &Checkpoint) -> Result<Box<dyn LanguageModel>> {
    load(checkpoint, fit(&[checkpoint]))
}

/// Two models to run side by side: in memory if both fit there, else read layer by layer.
///
/// # Errors
/// If one cannot be read.
pub fn load_pair(
    one: &Checkpoint,
    other: &Checkpoint,
) -> Result<(Box<dyn LanguageModel>, Box<dyn LanguageModel>)> {
    let fit = fit(&[one, other]);
    Ok((load(one, fit)?, load(other, fit)?))
}

/// How models run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fit {
    /// In memory.
    Whole,
    /// Read layer by layer in every pass.
    ByLayer,
}

/// In memory, if all of the models fit there at once.
pub(crate) fn fit(checkpoints: &[&Checkpoint]) -> Fit {
    let bytes = |c: &&Checkpoint| {
        let each = device::placement(c).dtype.size_in_bytes() as u64;
        let weights = c.parameters().saturating_mul(each);
        // Beside them caches and activations want some room, and a layer as f32 while it is read.
        let layer = c.parameters().saturating_mul(4) / c.config().num_layers.max(1) as u64;
        weights.saturating_add(layer.max(weights / 4))
    };
    let bytes = checkpoints.iter().map(bytes).fold(0, u64::saturating_add);
    match bytes <= device::max_memory() {
        true => Fit::Whole,
        false => Fit::ByLayer,
    }
}

fn load(checkpoint: &Checkpoint, fit: Fit) -> Result<Box<dyn LanguageModel>> {
    let checkpoint = checkpoint.on(&device::placement(checkpoint));
    Ok(match fit {
        Fit::Whole => Box::new(Decoder::load(&checkpoint)?),
        Fit::ByLayer => Box::new(StreamedDecoder::new(&checkpoint)?),
    })
}

/// The mean NLL of the answers to examples, or of text, in nats per token; infinite if the model gives
/// no numbers.
///
/// # Errors
/// If an example does not fit the model's context or the work was stopped.
pub fn mean_nll(checkpoint: &Checkpoint, items: &Items, max_length: usize) -> Result<f64> {
    let model = load_model(checkpoint)?;
    let tokenizer = ModelTokenizer::load(checkpoint.dir(), checkpoint.config().eos_token_id)?;
    let options = EvalOptions {
        metrics: Vec::new(),
        max_len: Some(max_length),
        ..EvalOptions::default()
    };
    match items.score(&*model, &tokenizer, &options, &mut |_, _| !stopped()) {
        Ok((scores, _)) => Ok(nll(&scores).map_or(f64::INFINITY, |score| score.value)),
        Err(lightmoe_eval::Error::NotFinite { .. }) => Ok(f64::INFINITY),
        Err(e) => Err(e.into()),
    }
}

/// Stage evaluate: the scores of a model on the test (or validation) items. Samples go to
/// `samples`, if given.
///
/// # Errors
/// If an example does not fit the model's context or the work was stopped.
pub fn evaluate_stage(
    what: &str,
    checkpoint: &Checkpoint,
    data: &TaskData,
    items: &Items,
    max_length: usize,
    samples: Option<&Path>,
) -> Result<TaskScores> {
    let model = load_model(checkpoint)?;
    let tokenizer = ModelTokenizer::load(checkpoint.dir(), checkpoint.config().eos_token_id)?;
    let bar = Progress::new(what, items.len());
    let options = data.eval_options(max_length);
    let each = &mut |done, all| bar.of(done, all);
    let scored = items.score(&*model, &tokenizer, &options, each);
    let (scores, details) = scored.map_err(|e| match stopped() {
        true => anyhow::anyhow!(INTERRUPTED),
        false => e.into(),
    })?;
    if let Some(path) = samples {
        write_samples(path, &details)
            .with_context(|| format!("cannot write the samples to `{}`", path.display()))?;
    }
    let scores = scores
        .into_iter()
        .map(|(name, s)| {
            (
                name,
                Score {
                    value: s.value,
                    stderr: s.stderr,
                    n: s.n as u64,
                },
            )
        })
        .collect();
    Ok(BTreeMap::from([(data.name.clone(), scores)]))
}
