//! What `reference` takes.

use clap::Args;

/// `reference`
#[derive(Debug, Args)]
pub struct ReferenceArgs {
    /// Print the JSON Schema of a file that the program writes, instead of the page
    #[arg(long, value_name = "NAME")]
    pub schema: Option<String>,
    /// List the names of the schemas
    #[arg(long, conflicts_with = "schema")]
    pub schemas: bool,
}
