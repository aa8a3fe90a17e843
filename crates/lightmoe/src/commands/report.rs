//! The subcommand that writes the page of a run again.

use super::paint;
use crate::cli::ReportArgs;
use crate::preflight::Refused;
use crate::recipe::Recipe;
use crate::report::{self, table};
use crate::results::Results;
use crate::verdict::judge;
use anyhow::Result;

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
