//! The arguments of `lightmoe bench`.

use super::PlaceArgs;
use super::speak::count;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// `bench`
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Methods × tasks × ratios × seeds on the built-in model
    Quality(QualityArgs),
    /// The built-in model: its scores, and how its experts share the work between tasks
    Usage(UsageArgs),
    /// A model of full size: memory and speed of observe, plan and build
    Scale(ScaleArgs),
    /// Plan and build by every method at a model's true shape, a few of its layers, and write what each takes
    Methods(MethodsArgs),
    /// How fast a model reads prompts and answers them, several at a time
    Speed(SpeedArgs),
}

/// `bench scale`
#[derive(Debug, Args)]
pub struct ScaleArgs {
    /// The config.json of the model, which is synthesized
    #[arg(long, default_value = "fixtures/configs/olmoe-1b-7b-0924.json")]
    pub config: PathBuf,
    /// Folder for the models; it needs two and a half times the size of the model, and is left there
    #[arg(long, default_value = "runs/scale")]
    pub out: PathBuf,
    /// Token ids to observe
    #[arg(long, default_value_t = 8192)]
    pub tokens: usize,
    /// The page to write
    #[arg(long, default_value = "docs/benchmarks/scale.md")]
    pub table: PathBuf,
}

/// `bench methods`
#[derive(Debug, Args)]
pub struct MethodsArgs {
    /// The config.json of the model, of which some layers are synthesized
    #[arg(long, default_value = "fixtures/configs/olmoe-1b-7b-0924.json")]
    pub config: PathBuf,
    /// How many layers
    #[arg(long, default_value_t = 2)]
    pub layers: usize,
    /// Methods, with commas between them [default: all]
    #[arg(long)]
    pub methods: Option<String>,
    /// Steps of the fit of mobe, of which its recipe has 1000, one like the other
    #[arg(long, default_value_t = 20)]
    pub fit_steps: usize,
    /// Share of the parameters to save
    #[arg(long, default_value_t = 0.5)]
    pub ratio: f64,
    /// Token ids to observe
    #[arg(long, default_value_t = 8192)]
    pub tokens: usize,
    /// Folder for the models and what is observed of them
    #[arg(long, default_value = "runs/methods")]
    pub out: PathBuf,
    /// The page to write
    #[arg(long, default_value = "docs/benchmarks/methods-scale.md")]
    pub table: PathBuf,
}

/// `bench speed`
#[derive(Debug, Args)]
pub struct SpeedArgs {
    /// Model, as `compress` takes it
    #[arg(long)]
    pub model: String,
    /// Where
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Tokens of each prompt, which are made up
    #[arg(long, default_value_t = 512, value_parser = count)]
    pub prompt_tokens: usize,
    /// Tokens of each answer, at least two
    #[arg(long, default_value_t = 64)]
    pub new_tokens: usize,
    /// How many prompts at a time, one measurement each
    #[arg(long, value_delimiter = ',', default_value = "1,8,32", value_parser = count)]
    pub prompts: Vec<usize>,
    /// Runs that the median is taken of, after one that is not counted
    #[arg(long, default_value_t = 3, value_parser = count)]
    pub runs: usize,
    /// Print JSON instead of the table
    #[arg(long)]
    pub json: bool,
}

/// `bench usage`
#[derive(Debug, Args)]
pub struct UsageArgs {
    /// The page to write
    #[arg(long, default_value = "docs/benchmarks/olmoe-nano.md")]
    pub table: PathBuf,
}

/// `bench quality`
#[derive(Debug, Args)]
pub struct QualityArgs {
    /// Folder of the finished cells; a second call goes on where the first stopped
    #[arg(long, default_value = "runs/quality")]
    pub out: PathBuf,
    /// The table to write
    #[arg(long, default_value = "docs/benchmarks/quality.md")]
    pub table: PathBuf,
    /// Cells at once, each on one thread
    #[arg(long, default_value_t = 2)]
    pub jobs: usize,
    /// Seeds
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    /// Training steps of every cell; translation has three times as many
    #[arg(long, default_value_t = 400)]
    pub steps: usize,
    /// Stop beginning new cells after this many minutes
    #[arg(long)]
    pub minutes: Option<f64>,
}
