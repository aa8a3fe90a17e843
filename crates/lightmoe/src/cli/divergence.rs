//! What `divergence` takes.

use super::{DocumentArgs, RecipeArgs};
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
    /// Their documents
    #[command(flatten)]
    pub documents: DocumentArgs,
    /// Tokens from one window of a text to the next [default: a whole window]
    #[arg(long)]
    pub stride: Option<usize>,
}
