//! The subcommand that scores a model.

use super::{Opened, settings};
use crate::benchmarks;
use crate::cli::{EvalSplit, EvaluateArgs};
use crate::pipeline::evaluate_stage;
use crate::preflight::Refused;
use crate::results::TaskScores;
use crate::verdict::{Measured, Thresholds, judge};
use anyhow::{Context, Result};
use lightmoe_models::folder;
use std::path::Path;

/// `evaluate`
///
/// # Errors
/// [`Refused`] for flags that would have no effect; what the stage brings.
pub fn run_evaluate(args: EvaluateArgs) -> Result<String> {
    let asked = args.recipe.settings.verdict.clone();
    check(&args, &asked)?;
    if !args.benchmarks.tasks.is_empty() {
        let settings = settings(args.recipe)?;
        return benchmarks::run(&args.benchmarks, &settings, args.out.as_deref());
    }
    let original = args.against.as_deref().map(scores_of).transpose()?;
    let opened = Opened::new(args.recipe)?;
    let items = match args.split {
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
        items,
        opened.recipe.max_length,
        samples.as_deref(),
    )?;
    let text = serde_json::to_string_pretty(&scores)?;
    if let Some(path) = &args.out {
        folder::write_file(path, (text.clone() + "\n").as_bytes())?;
    }
    // Those of a recipe file may be of the run that it was written for: without an original they wait.
    let thresholds = match original {
        Some(_) => &opened.recipe.verdict,
        None => &asked,
    };
    if original.is_none() && thresholds.is_empty() {
        return Ok(text);
    }
    let measured = Measured {
        original: original.as_ref(),
        result: Some(&scores),
        kl: None,
        bytes: opened.checkpoint.bytes(),
    };
    let verdict = judge(&measured, thresholds)?;
    let all = serde_json::json!({"scores": scores, "verdict": verdict});
    Ok(serde_json::to_string_pretty(&all)?)
}

/// Refuses thresholds `asked` for on the command line, and scores to hold against, that nothing would
/// come of.
fn check(args: &EvaluateArgs, asked: &Thresholds) -> Result<(), Refused> {
    let of_benchmarks = !args.benchmarks.tasks.is_empty();
    let of_original = asked.min_score.is_some() || asked.max_nll_increase.is_some();
    let message = match of_benchmarks {
        true if args.against.is_some() => {
            "`--against` takes the scores of the recipe's task, not of `--tasks`; compare two \
             evaluations of benchmarks by `lightmoe compare-results`"
        }
        true if !asked.is_empty() => {
            "there is no verdict on `--tasks`; leave the thresholds out, and compare two evaluations of \
             benchmarks by `lightmoe compare-results`"
        }
        false if asked.max_kl.is_some() => {
            "`evaluate` measures no divergence to hold against `--max-kl`; `lightmoe divergence` does"
        }
        false if of_original && args.against.is_none() => {
            "`--min-score` and `--max-nll-increase` ask for the original's scores; give them by \
             `--against FILE.json`"
        }
        _ => return Ok(()),
    };
    Err(Refused(message.to_owned()))
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
