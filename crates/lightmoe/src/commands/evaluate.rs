//! The subcommand that scores a model.

use super::{Opened, settings};
use crate::benchmarks;
use crate::cli::{EvalSplit, EvaluateArgs};
use crate::pipeline::evaluate_stage;
use crate::results::TaskScores;
use crate::verdict::{Measured, judge};
use anyhow::{Context, Result};
use lightmoe_models::folder;
use std::path::Path;

/// `evaluate`
///
/// # Errors
/// What the stage brings.
pub fn run_evaluate(args: EvaluateArgs) -> Result<String> {
    if !args.benchmarks.tasks.is_empty() {
        let settings = settings(args.recipe)?;
        return benchmarks::run(&args.benchmarks, &settings, args.out.as_deref());
    }
    let original = args.against.as_deref().map(scores_of).transpose()?;
    let opened = Opened::new(args.recipe)?;
    let examples = match args.split {
        EvalSplit::Test => &opened.data.test,
        EvalSplit::Validation => &opened.data.validation,
    };
    let samples = args
        .out
        .as_ref()
        .map(|path| path.with_extension("samples.jsonl"));
    let scores = evaluate_stage(
        "evaluate",
        &opened.checkpoint,
        &opened.data,
        examples,
        opened.recipe.max_length,
        samples.as_deref(),
    )?;
    let text = serde_json::to_string_pretty(&scores)?;
    if let Some(path) = &args.out {
        folder::write_file(path, (text.clone() + "\n").as_bytes())?;
    }
    let Some(original) = original else {
        return Ok(text);
    };
    let measured = Measured {
        original: Some(&original),
        result: Some(&scores),
        kl: None,
        bytes: opened.checkpoint.bytes(),
    };
    let verdict = judge(&measured, &opened.recipe.verdict)?;
    let all = serde_json::json!({"scores": scores, "verdict": verdict});
    Ok(serde_json::to_string_pretty(&all)?)
}

/// Scores that `evaluate --out` wrote.
///
/// # Errors
/// If the file cannot be read or holds none.
fn scores_of(path: &Path) -> Result<TaskScores> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the scores `{}`", path.display()))?;
    serde_json::from_str(&text).with_context(|| {
        format!(
            "`{}` holds no scores; give what `lightmoe evaluate --out` wrote of the original",
            path.display()
        )
    })
}
