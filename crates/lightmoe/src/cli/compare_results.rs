//! What `compare-results` takes.

use clap::Args;
use std::path::PathBuf;

/// `compare-results`
#[derive(Debug, Args)]
pub struct CompareResultsArgs {
    /// An evaluation: a folder or file of `lightmoe evaluate --out` or `lm_eval --output_path
    /// --log_samples`, or the folder of a run, with `@original`, `@built` or `@recovered` behind it for
    /// another model than its last
    pub a: String,
    /// The evaluation to compare with it
    pub b: String,
    /// Write the comparison as JSON
    #[arg(long, value_name = "FILE.json")]
    pub json: Option<PathBuf>,
    /// Write the table as Markdown
    #[arg(long, value_name = "FILE.md")]
    pub markdown: Option<PathBuf>,
    /// Write the items that are right in one evaluation alone, with both answers, one JSON object a line
    #[arg(long, value_name = "FILE.jsonl")]
    pub flips: Option<PathBuf>,
}
