//! What `divergence` takes.

use super::RecipeArgs;
use clap::Args;
use std::path::PathBuf;

/// `divergence`
#[derive(Debug, Args)]
pub struct DivergenceArgs {
    /// The recipe; `--model` is the compressed model, and the test examples of `task`, or the held-out
    /// records of `train`, are the text; `eval_examples`, `max_length` (of what is read at once) and
    /// `seed` (of few-shot examples) matter
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// The original model
    #[arg(long, value_name = "MODEL")]
    pub against: String,
    /// What is predicted
    #[command(flatten)]
    pub text: TextArgs,
    /// Also put each layer of the compressed model alone into the original: takes half as many passes
    /// as there are layers
    #[arg(long)]
    pub by_layer: bool,
    /// The most tokens that run at once
    #[arg(long, default_value_t = 2048)]
    pub batch_tokens: usize,
    /// What was measured, to write
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
}

/// What is predicted, instead of the recipe's examples.
#[derive(Debug, Args)]
pub struct TextArgs {
    /// A text file to predict, in windows, instead of the recipe's examples
    #[arg(long, value_name = "FILE.txt", conflicts_with = "tasks")]
    pub text: Option<PathBuf>,
    /// The right answers of benchmarks, as `evaluate` takes them, each by itself, instead
    #[arg(long, value_delimiter = ',', value_name = "NAME|FILE.yaml,...")]
    pub tasks: Vec<String>,
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
    /// Tokens from one window of a text to the next [default: a whole window]
    #[arg(long)]
    pub stride: Option<usize>,
}
