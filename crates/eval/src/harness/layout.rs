//! What `results.json` holds, in lm-evaluation-harness's layout.

use indexmap::IndexMap;
use lightmoe_data::harness::TaskConfig;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// An evaluation on benchmarks.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct BenchmarkResults {
    /// The scores by task and group, each group before what is in it.
    pub results: IndexMap<String, Row>,
    /// Of these the groups that have scores of their own; absent if none has.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub groups: IndexMap<String, Row>,
    /// By group, the tasks and groups in it; a task that was asked for by its own name has none.
    pub group_subtasks: IndexMap<String, Vec<String>>,
    /// By task, its keys, with the harness's defaults of some that it leaves out.
    pub configs: BTreeMap<String, TaskKeys>,
    /// By task, and group with scores of its own, the `version` of its metadata; null where there is none.
    pub versions: BTreeMap<String, Json>,
    /// By task, the few-shot examples in a prompt.
    #[serde(rename = "n-shot")]
    pub n_shot: BTreeMap<String, usize>,
    /// By task and group, whether more is better, by metric; null where the tasks of a group disagree.
    pub higher_is_better: BTreeMap<String, IndexMap<String, Option<bool>>>,
    /// By task, its documents.
    #[serde(rename = "n-samples")]
    pub n_samples: BTreeMap<String, Documents>,
    /// The options of the call.
    pub config: CallOptions,
    /// The commit that the program was built from, with `-dirty` behind it where files differed from it;
    /// null where it was not built in a repository.
    pub git_hash: Option<String>,
    /// When the evaluation began, in seconds since the beginning of 1970 (UTC).
    pub date: f64,
    /// Version of the program.
    pub lightmoe_version: String,
    /// The token that ends a text, and its id as text.
    pub tokenizer_eos_token: (String, String),
    /// The token that begins a text, and its id as text; null where the tokenizer has none.
    pub tokenizer_bos_token: Option<(String, String)>,
    /// The id of the token that ends an answer.
    pub eot_token_id: u32,
    /// Most tokens that the model read at once.
    pub max_length: usize,
    /// By task and metric of a corpus, what decides the score besides the texts, as sacreBLEU writes it;
    /// absent where there is no such metric.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub signatures: IndexMap<String, IndexMap<String, String>>,
    /// By task, the SHA-256 over the hashes of its documents, prompts and targets.
    pub task_hashes: IndexMap<String, String>,
    /// What ran the model: always `lightmoe`.
    pub model_source: &'static str,
    /// The model, as it was given.
    pub model_name: String,
    /// The same with `__` for what names of files may not hold.
    pub model_name_sanitized: String,
    /// The text before the descriptions of the tasks.
    pub system_instruction: Option<String>,
    /// Its SHA-256.
    pub system_instruction_sha: Option<String>,
    /// Whether few-shot examples were turns of a conversation.
    pub fewshot_as_multiturn: bool,
    /// The chat template, if it was used.
    pub chat_template: Option<String>,
    /// Its SHA-256.
    pub chat_template_sha: Option<String>,
    /// Seconds that the evaluation took, as text.
    pub total_evaluation_time_seconds: String,
    /// After an interruption only: how far it came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partial: Option<Partial>,
}

/// The scores of a task or group.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Row {
    /// The name in tables, indented by its depth in groups.
    pub alias: String,
    /// The numbers.
    #[serde(flatten)]
    pub scores: IndexMap<ScoreKey, Cell>,
}

/// `<metric>,<filter>`, and `<metric>_stderr,<filter>` for its standard error; of a group without scores of
/// its own a space.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct ScoreKey(#[schemars(regex(pattern = r"^.+,.+$|^ $"))] pub String);

/// A score, or the text in its place.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Cell {
    /// A number; null where it is none, as a perplexity beyond all numbers.
    Number(#[schemars(with = "Option<f64>")] f64),
    /// `N/A` for a standard error that the harness does not know; a space where there is no score.
    Text(&'static str),
}

/// The keys of a task that have a value.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct TaskKeys(#[schemars(with = "TaskConfig")] pub Map<String, Json>);

/// How many documents a task has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Documents {
    /// In the data.
    pub original: usize,
    /// That were to be scored.
    pub effective: usize,
}

/// The options of a call.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, JsonSchema)]
pub struct CallOptions {
    /// What runs the model: always `lightmoe`.
    pub model: &'static str,
    /// `pretrained=` and the model, as it was given.
    pub model_args: String,
    /// The most tokens of a batch.
    pub batch_tokens: usize,
    /// Most tokens that the model was to read at once; null for as many as it can.
    pub max_length: Option<usize>,
    /// Whether the tokenizer put its token for the begin of text before every text.
    pub add_bos_token: bool,
    /// Tokens from one window of a text to the next; null for the task's own number.
    pub stride: Option<usize>,
    /// Whether programs that the model writes were run.
    pub allow_code: bool,
    /// Most documents of each task; null for all.
    pub limit: Option<usize>,
    /// The folder of answers that evaluations have in common.
    pub use_cache: Option<PathBuf>,
    /// Resamples for standard errors that have no formula.
    pub bootstrap_iters: u32,
    /// Seed of the few-shot examples.
    pub fewshot_seed: u32,
}

/// How far an evaluation came that was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Partial {
    /// Documents that are scored.
    pub documents_done: usize,
    /// Documents of all tasks.
    pub documents: usize,
}
