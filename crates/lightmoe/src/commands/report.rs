//! The subcommand that writes the page of a run again.

use super::paint;
use crate::cli::ReportArgs;
use crate::preflight::Refused;
use crate::report::{self, Evidence, table};
use crate::verdict::judge;
use anyhow::Result;
use lightmoe_models::folder::write_file;

/// `report`: what it prints is the verdict and where the page is.
///
/// # Errors
/// [`Refused`] if the folder holds no finished run or a threshold is none; if a file of the run is
/// damaged, or one cannot be written.
pub fn run_report(args: ReportArgs) -> Result<String> {
    let (run, runs) = (
        &args.run,
        args.runs.unwrap_or_else(|| report::beside(&args.run)),
    );
    args.verdict.check().map_err(Refused::of)?;
    let mut evidence = Evidence::read(run, &runs)?;
    let own = run.join("report.html");
    let target = args.out.unwrap_or_else(|| own.clone());
    let anew = !args.verdict.is_empty();
    if anew {
        let thresholds = args.verdict.or(evidence.recipe.verdict.clone());
        evidence.results.verdict = judge(&evidence.results.measured(), &thresholds)?;
    }
    let page = report::render(&evidence)?;
    write_file(&target, page.as_bytes())?;
    // The run's own page and its results say the same.
    if anew && target == own {
        evidence.results.save(&run.join("results.json"))?;
    }
    Ok(format!(
        "{}\nreport  {}",
        table::verdict(evidence.results.verdict.as_ref(), paint()),
        target.display()
    ))
}
