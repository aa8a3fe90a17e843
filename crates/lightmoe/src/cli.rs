//! The command line.

mod bench;
mod benchmarks;
mod compare_results;
mod divergence;
mod reference;
mod report;
mod speak;

use crate::settings::Settings;
use clap::{Args, Parser, Subcommand, ValueEnum};
use lightmoe_compress::Sensitivity;
use std::path::PathBuf;

pub use bench::{BenchCommand, MethodsArgs, QualityArgs, ScaleArgs, SpeedArgs, UsageArgs};
pub use benchmarks::{BenchmarkArgs, DocumentArgs, TasksArgs};
pub use compare_results::CompareResultsArgs;
pub use divergence::{DivergenceArgs, TextArgs};
pub use reference::ReferenceArgs;
pub use report::ReportArgs;
pub use speak::{ChatArgs, GenerateArgs, PlaceArgs, SpeakArgs};

/// Makes a Mixture-of-Experts language model smaller and keeps it working
#[derive(Debug, Parser)]
#[command(name = "lightmoe", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
    /// Form of the log on standard error
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// No progress bars
    #[arg(long, global = true)]
    pub quiet: bool,
    /// The most memory to use, like `3GiB`: observe runs fewer tokens at once, and a model that does
    /// not fit is read layer by layer [default: three quarters of what is free]
    #[arg(long, global = true, value_name = "SIZE", value_parser = size)]
    pub max_memory: Option<u64>,
}

/// A number of bytes, with or without a unit.
fn size(text: &str) -> Result<u64, String> {
    let size: bytesize::ByteSize = text
        .parse()
        .map_err(|_| "not a size; write it like 3GiB, 500MB or a number of bytes".to_owned())?;
    Ok(size.as_u64())
}

/// How much errors matter, by its name in recipes.
fn sensitivity(text: &str) -> Result<Sensitivity, String> {
    let value = serde_json::Value::String(text.to_owned());
    serde_json::from_value(value).map_err(|_| "use fisher or relative".to_owned())
}

/// A finite number above 0.
fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|n: &f64| *n > 0.0 && n.is_finite())
        .ok_or_else(|| "give a number above 0".to_owned())
}

/// A share of something.
fn share(text: &str) -> Result<f64, String> {
    let share = positive(text).ok();
    share
        .filter(|share| *share <= 1.0)
        .ok_or_else(|| "give a share above 0, at most 1".to_owned())
}

/// Form of the log.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    /// Lines to read
    Text,
    /// JSON lines
    Json,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// All stages: observe, plan, build, recover, evaluate; a compressed model and a report
    Compress(CompressArgs),
    /// Methods × ratios × tasks × seeds: one table of scores, sizes and costs, and a page
    Compare(CompareArgs),
    /// Record what the routers do on the training examples, or on token ids
    Observe(ObserveArgs),
    /// Decide what each expert becomes; needs `--ratio`, `--bytes`, `--threshold` or `--max-damage`, but for `lora` and `compressed`
    Plan(PlanArgs),
    /// Make the compressed checkpoint of a plan
    Build(BuildArgs),
    /// Train a built checkpoint
    Recover(RecoverArgs),
    /// Score a model on a task, or on benchmarks
    Evaluate(EvaluateArgs),
    /// Measure how far a compressed model's predictions are from the original's
    Divergence(DivergenceArgs),
    /// Compare two evaluations of the same items: paired differences, and which items changed
    CompareResults(CompareResultsArgs),
    /// Write the page of a finished run again: among other runs, or by other thresholds
    Report(ReportArgs),
    /// List the benchmarks of `evaluate --tasks`
    Tasks(TasksArgs),
    /// Write a compressed model for another program, or what recovery changed as a small file
    Export(ExportArgs),
    /// Put the update of `export --pack compeft` back on the model that it was made from
    Unpack(UnpackArgs),
    /// Show what a model holds
    Inspect(InspectArgs),
    /// Continue a text
    Generate(GenerateArgs),
    /// Talk to a model, in its chat template
    Chat(ChatArgs),
    /// Write what a model computes from token ids: logits, hidden states, routing
    Logits(LogitsArgs),
    /// Write a model of the true shape with random weights, to measure with
    Synthesize(SynthesizeArgs),
    /// Train the small model of the repository from nothing
    Pretrain(PretrainArgs),
    /// Measure
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Print the reference of all commands as Markdown, or the JSON Schema of a file
    Reference(ReferenceArgs),
}

/// Settings from a recipe file and the command line.
#[derive(Debug, Args)]
pub struct RecipeArgs {
    /// Recipe file (TOML) with the same keys as the options below, `-` written `_`
    #[arg(long, value_name = "FILE.toml")]
    pub recipe: Option<PathBuf>,
    /// The settings
    #[command(flatten)]
    pub settings: Settings,
}

/// `compress`
#[derive(Debug, Args)]
pub struct CompressArgs {
    /// The recipe
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Folder of the run [default: runs/<task>-<method>-<ratio>]
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Go on with an interrupted run
    #[arg(long)]
    pub resume: bool,
    /// Say what the run would leave, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// With `--dry-run`, a config.json, where there are no weights at hand
    #[arg(
        long,
        value_name = "FILE.json",
        requires = "dry_run",
        conflicts_with = "model"
    )]
    pub config: Option<PathBuf>,
    /// Print results.json instead of the table
    #[arg(long)]
    pub json: bool,
}

/// `compare`
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Model, as `compress` takes it [default: olmoe-nano]
    #[arg(long)]
    pub model: Option<String>,
    /// Methods, each with recipe keys of its own if wanted: `lightmoe,lightmoe:base=random,lora:rank=4`
    #[arg(long, value_name = "METHOD[:KEY=VALUE,...],...")]
    pub methods: String,
    /// Shares of all parameters to save
    #[arg(long, value_delimiter = ',', default_value = "0.3,0.5")]
    pub ratios: Vec<f64>,
    /// Built-in tasks [default: all, or the records of the recipe's `train`]
    #[arg(long, value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Seeds, from 0
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
    /// Training steps of every recovery [default: 500]
    #[arg(long)]
    pub steps: Option<usize>,
    /// Learning rates to choose from, by method and task, on the validation split at the highest
    /// ratio and seed 0; one is no choice [default: the recipe's]
    #[arg(long, value_delimiter = ',')]
    pub rates: Vec<f64>,
    /// Test examples, and validation examples [default: 500]
    #[arg(long)]
    pub eval_examples: Option<usize>,
    /// Recipe file (TOML) with further settings common to all cells
    #[arg(long, value_name = "FILE.toml")]
    pub recipe: Option<PathBuf>,
    /// Cells at once, each in a process of its own with its share of the cores and of the memory
    #[arg(long, default_value_t = 1)]
    pub jobs: usize,
    /// Stop beginning new cells after this many minutes
    #[arg(long)]
    pub minutes: Option<f64>,
    /// Folder of the comparison; a second call does what is missing
    #[arg(long)]
    pub out: PathBuf,
}

/// `observe`
#[derive(Debug, Args)]
pub struct ObserveArgs {
    /// The recipe
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Token ids to observe instead of a task: `input_ids` [batch, length]
    #[arg(long, value_name = "FILE.safetensors")]
    pub tokens: Option<PathBuf>,
    /// Record second moments of what each expert is given, as `svd` and `d2moe` need them; a folder `.moments` beside the observations
    #[arg(long)]
    pub moments: bool,
    /// Record the mean outputs of every expert for all tokens, as `hcsmoe` needs them
    #[arg(long)]
    pub all_outputs: bool,
    /// Record a sample of tokens with what every expert gives for them, as `moei2` needs it; in the folder `.moments` beside the observations
    #[arg(long)]
    pub samples: bool,
    /// Record what errors of the experts cost the model, as `budget` needs it: fisher (by gradients) or relative (by the size of what goes into their layer); in the folder `.moments` beside the observations
    #[arg(long, value_parser = sensitivity, value_name = "HOW")]
    pub damage: Option<Sensitivity>,
    /// The observations to write
    #[arg(long, value_name = "FILE.safetensors")]
    pub out: PathBuf,
}

/// `plan`
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The recipe
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// A config.json, where there are no weights at hand
    #[arg(long, conflicts_with = "model")]
    pub config: Option<PathBuf>,
    /// What `observe` wrote
    #[arg(
        long,
        value_name = "FILE.safetensors",
        required_unless_present = "scores"
    )]
    pub observations: Option<PathBuf>,
    /// Importance scores made elsewhere: `{"gate_scores": {"<layer>": {"<expert>": score}}}`
    #[arg(long, value_name = "FILE.json", conflicts_with = "observations")]
    pub scores: Option<PathBuf>,
    /// The plan to write
    #[arg(long, value_name = "FILE.json")]
    pub out: PathBuf,
    /// Print the plan's totals as JSON
    #[arg(long)]
    pub json: bool,
}

/// `build`
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// The original model
    #[arg(long)]
    pub model: String,
    /// What `plan` wrote
    #[arg(long, value_name = "FILE.json")]
    pub plan: PathBuf,
    /// What `observe` wrote; `mone`, `svd`, `d2moe` and `budget` need it
    #[arg(long, value_name = "FILE.safetensors")]
    pub observations: Option<PathBuf>,
    /// The model folder to write
    #[arg(long)]
    pub out: PathBuf,
    /// Seed of the fresh adapters
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// `recover`
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// The recipe; `--model` is the original model
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// What `build` wrote
    #[arg(long)]
    pub built: PathBuf,
    /// The plan that it was built from
    #[arg(long, value_name = "FILE.json")]
    pub plan: PathBuf,
    /// The model folder to write; training state and loss curve lie in `<OUT>.recovery` beside it,
    /// from which an interrupted run goes on
    #[arg(long)]
    pub out: PathBuf,
}

/// `evaluate`
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// The recipe; of its keys `model`, `task`, `train` (the held-out records), `eval_examples` and
    /// `max_length` matter
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Which examples
    #[arg(long, value_enum, default_value_t = EvalSplit::Test, conflicts_with = "tasks")]
    pub split: EvalSplit,
    /// Scores to write, JSON; samples go beside it. With `--tasks`, a folder, from which an interrupted
    /// evaluation goes on
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Scores of the original on the same examples, as `--out` wrote them: with thresholds, what is
    /// printed holds the verdict beside the `scores`; `--max-bytes` needs none
    #[arg(long, value_name = "FILE.json")]
    pub against: Option<PathBuf>,
    /// Benchmarks
    #[command(flatten)]
    pub benchmarks: BenchmarkArgs,
}

/// Which held-out examples.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum EvalSplit {
    /// To choose settings on
    Validation,
    /// To report
    Test,
}

/// `export`
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The compressed model, or the folder of a run
    #[arg(long)]
    pub model: String,
    /// dense (multiplied out: loads wherever the original loads, saves no memory) or compact
    #[arg(long, default_value = "dense")]
    pub kind: String,
    /// The folder to write
    #[arg(long)]
    pub out: PathBuf,
    /// Element type: auto (the model's own), f32, bf16 or f16
    #[arg(long, default_value = "auto")]
    pub dtype: String,
    /// How the experts are packed
    #[arg(long, value_enum, default_value_t = Packing::Auto)]
    pub experts: Packing,
    /// Instead of a model, write what recovery changed as `update.compeft`, for `unpack`
    #[arg(long, value_enum, conflicts_with_all = ["kind", "dtype", "experts"])]
    pub pack: Option<Pack>,
    /// With `--pack`, the model before recovery [default: `built` in the folder of the run]
    #[arg(long, requires = "pack")]
    pub base: Option<String>,
    /// With `--pack`, the share of the changed numbers to keep [default: it and alpha are searched, by
    /// the answer NLL on the validation examples of the run]
    #[arg(long, requires = "pack", requires = "alpha", value_parser = share)]
    pub density: Option<f64>,
    /// With `--pack`, what is left of a kept number, in standard deviations of all changes
    #[arg(long, requires = "density", value_parser = positive)]
    pub alpha: Option<f64>,
}

/// How an export packs what recovery changed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Pack {
    /// The signs of the largest changes and one size for all of them (ComPEFT)
    Compeft,
}

/// `unpack`
#[derive(Debug, Args)]
pub struct UnpackArgs {
    /// The model that the update was made from: `built` in the folder of the run
    #[arg(long)]
    pub base: String,
    /// What `export --pack compeft` wrote
    #[arg(long, value_name = "FILE.compeft")]
    pub update: PathBuf,
    /// The model folder to write
    #[arg(long)]
    pub out: PathBuf,
}

/// How an export packs experts.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Packing {
    /// As the model does
    Auto,
    /// One tensor for each matrix, as checkpoints are published
    Separate,
    /// Stacked by layer, as transformers 5 holds them
    Fused,
}

/// `inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The model
    #[arg(long, default_value = crate::source::BUILT_IN)]
    pub model: String,
    /// A config.json, where there are no weights at hand
    #[arg(long, value_name = "FILE.json", conflicts_with = "model")]
    pub config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `logits`
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// The model, original or compressed
    #[arg(long, default_value = crate::source::BUILT_IN)]
    pub model: String,
    /// Token ids: `input_ids` [batch, length], integers [default: 2 × 32 ids spread over the vocabulary]
    #[arg(long, value_name = "FILE.safetensors")]
    pub tokens: Option<PathBuf>,
    /// Where
    #[command(flatten)]
    pub place: PlaceArgs,
    /// What to write: `input_ids`, `logits` [batch, length, vocabulary], `hidden.<layer>` (what goes
    /// into a layer; after the last, the normed output) and, by layer with experts,
    /// `router.<layer>.{logits,ids,weights}`
    #[arg(long, value_name = "FILE.safetensors")]
    pub out: PathBuf,
}

/// `synthesize`
#[derive(Debug, Args)]
pub struct SynthesizeArgs {
    /// The config.json of the model
    #[arg(long, value_name = "FILE.json")]
    pub config: PathBuf,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Element type: auto (what the configuration names, else bf16), f32, bf16 or f16
    #[arg(long, default_value = "auto")]
    pub dtype: String,
    /// The model folder to write
    #[arg(long)]
    pub out: PathBuf,
}

/// `pretrain`
#[derive(Debug, Args)]
pub struct PretrainArgs {
    /// The pre-training recipe; with a table `[text]` in it (`files`, a list of files or patterns of plain text or of JSON lines with `text`, and `vocab_size` for the tokenizer that is trained on them), the text is theirs and not the built-in mix; with `upcycle_from`, a folder, all experts begin as copies of the one that the model there has in each layer
    #[arg(
        long,
        value_name = "FILE.toml",
        default_value = "fixtures/olmoe-nano.toml"
    )]
    pub recipe: PathBuf,
    /// Write the model here instead of where the recipe says
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// auto, cpu, or cuda (cuda:N for another than the first GPU) in a program with CUDA
    #[arg(long, default_value = "auto")]
    pub device: String,
}
