//! The way from a model to what was made of it.

use super::settings;
use crate::benchmarks::{fewshot_seed, prompts};
use crate::cli::{BenchmarkArgs, DivergenceArgs, TextArgs};
use crate::divergence::{Named, Text, divergence_stage, tables};
use crate::preflight::Refused;
use crate::recipe::Recipe;
use crate::settings::Settings;
use crate::source::{BUILT_IN, TaskData, open_model};
use anyhow::Result;
use lightmoe_data::harness::{Benchmark, Catalogue};
use lightmoe_data::read_text;
use lightmoe_eval::divergence::{Swaps, text_rows};
use lightmoe_eval::harness::{HarnessOptions, reference_rows};
use lightmoe_models::{Checkpoint, ModelTokenizer};
use std::path::Path;

/// `divergence`
///
/// # Errors
/// [`Refused`] for models and texts that cannot be compared; what the measuring brings.
pub fn run_divergence(args: DivergenceArgs) -> Result<String> {
    if !args.recipe.settings.verdict.is_empty() {
        let message = "`divergence` measures and gives no verdict; leave the thresholds out";
        return Err(Refused(message.into()).into());
    }
    let settings = settings(args.recipe)?;
    let name = settings.model.clone().unwrap_or_else(|| BUILT_IN.into());
    let (original, compressed) = (open_model(&args.against)?, open_model(&name)?);
    let tokenizer = same_tokenizer(&original, &compressed)?;
    let texts = texts(&args.text, settings, &original, &tokenizer)?;
    let file = divergence_stage(
        Named {
            name: &args.against,
            checkpoint: &original,
        },
        Named {
            name: &name,
            checkpoint: &compressed,
        },
        &texts,
        match args.by_layer {
            true => Swaps::EachLayer,
            false => Swaps::None,
        },
        args.batch_tokens,
        args.out.as_deref(),
    )?;
    let place = args
        .out
        .map(|out| format!("\n\ndivergence  {}", out.display()));
    Ok(tables(&file) + &place.unwrap_or_default())
}

/// The tokenizer of both models.
fn same_tokenizer(original: &Checkpoint, compressed: &Checkpoint) -> Result<ModelTokenizer> {
    let of = |model: &Checkpoint| ModelTokenizer::load(model.dir(), model.config().eos_token_id);
    let (one, other) = (of(original)?, of(compressed)?);
    match one.inner.get_vocab(true) == other.inner.get_vocab(true) {
        true => Ok(one),
        false => {
            let message = format!(
                "`{}` and `{}` have tokenizers of different tokens, so their predictions cannot be \
                 compared; compare a model with the one that it was made from",
                original.dir().display(),
                compressed.dir().display()
            );
            Err(Refused(message).into())
        }
    }
}

/// What is to be predicted.
fn texts(
    args: &TextArgs,
    settings: Settings,
    original: &Checkpoint,
    tokenizer: &ModelTokenizer,
) -> Result<Vec<Text>> {
    let context = original.config().max_position_embeddings;
    let max_length = settings.max_length.unwrap_or(context).min(context);
    if let Some(path) = &args.text {
        let text = read_text(path).map_err(Refused::of)?;
        return Ok(vec![Text {
            name: file_name(path),
            rows: text_rows(tokenizer, &text, max_length, args.stride).map_err(Refused::of)?,
        }]);
    }
    if !args.tasks.is_empty() {
        return benchmarks(args, &settings, tokenizer, max_length);
    }
    if args.stride.is_some() {
        let message = "`--stride` is of the windows of `--text` and `--tasks`; the recipe's examples \
                       are read whole";
        return Err(Refused(message.into()).into());
    }
    let recipe = Recipe::resolve(settings, original.config()).map_err(Refused::of)?;
    let data = TaskData::load(&recipe, tokenizer)?;
    Ok(vec![Text {
        name: data.name,
        rows: data.test.encoded(tokenizer, recipe.max_length)?,
    }])
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// The right answers of each task, those of groups task by task.
fn benchmarks(
    args: &TextArgs,
    settings: &Settings,
    tokenizer: &ModelTokenizer,
    max_length: usize,
) -> Result<Vec<Text>> {
    let selected: Vec<Benchmark> = Catalogue::built_in()?
        .select(&args.tasks)
        .map_err(Refused::of)?;
    let of_tasks = BenchmarkArgs {
        tasks: args.tasks.clone(),
        documents: args.documents.clone(),
        ..BenchmarkArgs::default()
    };
    let options = HarnessOptions {
        stride: args.stride,
        ..HarnessOptions::default()
    };
    let tasks = prompts(&of_tasks, &selected, tokenizer, fewshot_seed(settings)?)?;
    tasks
        .iter()
        .map(|task| {
            let rows = reference_rows(task, tokenizer, max_length, &options);
            Ok(Text {
                name: task.task.name().to_owned(),
                rows: rows.map_err(Refused::of)?,
            })
        })
        .collect()
}
