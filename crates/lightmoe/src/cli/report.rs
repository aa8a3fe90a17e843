//! The command line of `report`.

use crate::verdict::Thresholds;
use clap::Args;
use std::path::PathBuf;

/// `report`
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The folder of a finished run
    #[arg(long, value_name = "DIR")]
    pub run: PathBuf,
    /// The folder of the runs that it is to stand among [default: the one that it lies in]
    #[arg(long, value_name = "DIR")]
    pub runs: Option<PathBuf>,
    /// The page to write; in another place than the default one, a verdict by other thresholds goes into
    /// the page alone and not into `results.json` [default: `report.html` in the folder of the run]
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
    /// Thresholds instead of the recipe's
    #[command(flatten)]
    pub verdict: Thresholds,
}
