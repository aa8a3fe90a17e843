//! What `evaluate` takes for benchmarks, and `tasks`.

use clap::Args;
use std::path::PathBuf;

/// Benchmarks, for `evaluate --tasks`
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Benchmarks")]
pub struct BenchmarkArgs {
    /// Run benchmarks as lm-evaluation-harness does, instead of the recipe's task: names that
    /// `lightmoe tasks` lists, and YAML files or folders of them; of the recipe, `model`, `max_length`
    /// (of what the model reads at once) and `seed` (of the few-shot examples, 1234) matter
    #[arg(long, value_delimiter = ',', value_name = "NAME|FILE.yaml,...")]
    pub tasks: Vec<String>,
    /// Their documents
    #[command(flatten)]
    pub documents: DocumentArgs,
    /// Run the programs that the model writes, which some tasks ask for, in a sandbox: in a folder that
    /// goes, without a network, for some seconds
    #[arg(long, requires = "tasks")]
    pub allow_code: bool,
    /// The most tokens of a batch
    #[arg(long, requires = "tasks", default_value_t = 8192)]
    pub batch_tokens: usize,
    /// Make prompts conversations in the model's chat template
    #[arg(long, requires = "tasks")]
    pub apply_chat_template: bool,
    /// Give each few-shot example turns of its own
    #[arg(long, requires = "apply_chat_template")]
    pub fewshot_as_multiturn: bool,
    /// Text before the task's description
    #[arg(long, requires = "tasks", value_name = "TEXT")]
    pub system_instruction: Option<String>,
    /// Let the tokenizer put its token for the begin of text before every text
    #[arg(long, requires = "tasks")]
    pub add_bos_token: bool,
    /// Keep the answers to requests in a folder, by the model's content, and take from there what another
    /// evaluation of the same model asked before; likelihoods may differ in the last digits by the batch
    /// that they were first computed in
    #[arg(long, requires = "tasks", value_name = "DIR")]
    pub use_cache: Option<PathBuf>,
    /// Tokens from one window of a text to the next, for perplexity [default: a whole window]
    #[arg(long, requires = "tasks")]
    pub stride: Option<usize>,
}

/// Which documents of the benchmarks that `tasks` names
#[derive(Debug, Clone, Default, Args)]
pub struct DocumentArgs {
    /// Where the benchmarks' files lie, in their own form or as Parquet; several folders are searched in
    /// turn, and then the Hugging Face Hub's cache
    #[arg(
        long,
        value_delimiter = ',',
        requires = "tasks",
        value_name = "DIR,..."
    )]
    pub data: Vec<PathBuf>,
    /// Download what is in no folder and not in the cache from the Hugging Face Hub
    #[arg(long, requires = "tasks")]
    pub download: bool,
    /// Few-shot examples in a prompt [default: the task's own number]
    #[arg(long, requires = "tasks")]
    pub num_fewshot: Option<usize>,
    /// Only the first documents of each benchmark
    #[arg(long, requires = "tasks")]
    pub limit: Option<usize>,
}

/// `tasks`
#[derive(Debug, Args)]
pub struct TasksArgs {
    /// Tasks, groups, YAML files or folders of them; a file is checked, too [default: all that come with
    /// the program]
    pub names: Vec<String>,
    /// Print the page of the documentation
    #[arg(long, conflicts_with = "names")]
    pub markdown: bool,
}
