//! The subcommand that writes the page of a run again, and verdicts of others.

use super::paint;
use crate::cli::ReportArgs;
use crate::preflight::Refused;
use crate::recipe::Recipe;
use crate::report::{self, table};
use crate::results::{Results, TaskScores};
use crate::verdict::{Measured, Thresholds, judge};
use anyhow::{Context, Result};
use std::path::Path;

/// `report`: what it prints is the verdict and where the page is.
///
/// # Errors
/// If the folder holds no finished run, a threshold is none, or the page cannot be written.
pub fn run_report(args: ReportArgs) -> Result<String> {
    let (run, runs) = (
        &args.run,
        args.runs.unwrap_or_else(|| report::beside(&args.run)),
    );
    args.verdict.check().map_err(Refused::of)?;
    let path = run.join("results.json");
    let mut results = Results::load(&path)?;
    if !args.verdict.is_empty() {
        let recipe = Recipe::load(&run.join("recipe.toml"))?;
        let thresholds = args.verdict.or(recipe.verdict);
        results.verdict = judge(&results.measured(), &thresholds)?;
        results.save(&path)?;
    }
    let target = args.out.unwrap_or_else(|| run.join("report.html"));
    report::write(run, &runs, &target)?;
    Ok(format!(
        "{}\nreport  {}",
        table::verdict(results.verdict.as_ref(), paint()),
        target.display()
    ))
}

/// Scores and the verdict on them, as JSON.
///
/// # Errors
/// If a threshold is none.
pub(super) fn judged(measured: &Measured<'_>, thresholds: &Thresholds) -> Result<String> {
    let verdict = judge(measured, thresholds)?;
    let all = serde_json::json!({"scores": measured.result, "verdict": verdict});
    Ok(serde_json::to_string_pretty(&all)?)
}

/// Scores that `evaluate --out` wrote.
///
/// # Errors
/// If the file cannot be read or holds none.
pub(super) fn scores_of(path: &Path) -> Result<TaskScores> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the scores `{}`", path.display()))?;
    serde_json::from_str(&text).with_context(|| {
        format!(
            "`{}` holds no scores; give what `lightmoe evaluate --out` wrote of the original",
            path.display()
        )
    })
}
