//! Benchmarks scored as lm-evaluation-harness scores them, with results in its layout.
//!
//! Requests of all tasks run together, sorted by length and batched by tokens. What is finished is
//! kept in a journal, so that an interrupted evaluation goes on and ends with the same numbers.

mod boot;
mod cache;
mod cleaning;
pub(crate) mod encode;
mod filters;
mod found;
mod journal;
mod layout;
mod metrics;
mod programs;
mod reference;
mod results;
mod sample;
mod score;
mod work;

pub use cache::RequestCache;
pub use encode::{BeginOfText, rendered};
pub use layout::{
    BenchmarkResults, CallOptions, Cell, Documents, Partial, Row, ScoreKey, TaskKeys,
};
pub use metrics::corpus_metric;
pub use programs::Judge;
pub use reference::reference_rows;
pub use results::{RunFacts, results};
pub use sample::{Arguments, Asked, BenchmarkSample, Response, SampleValue};

use crate::{Error, Progress, Result};
use encode::Encoder;
use filters::Filters;
use found::{Found, Place};
use journal::Journal;
use lightmoe_data::harness::{Prompts, TaskConfig};
use lightmoe_models::{LanguageModel, ModelTokenizer};
use metrics::{Kind, Metric, Value, metrics};
use programs::Verdicts;
use sha2::{Digest, Sha256};
use std::path::Path;
use work::{Stores, Work};

/// How benchmarks are run.
#[derive(Clone)]
pub struct HarnessOptions<'a> {
    /// The most tokens of a batch, padding and answers included; a longer request is alone.
    pub batch_tokens: usize,
    /// Most tokens that the model reads at once [default: `max_position_embeddings`].
    pub max_length: Option<usize>,
    /// What stands before a text.
    pub begin: BeginOfText,
    /// Tokens from one window of a text to the next, instead of the task's own.
    pub stride: Option<usize>,
    /// Runs programs that the model writes; without it, tasks that need it are refused.
    pub judge: Option<&'a dyn Judge>,
}

impl Default for HarnessOptions<'_> {
    fn default() -> Self {
        Self {
            batch_tokens: 8192,
            max_length: None,
            begin: BeginOfText::None,
            stride: None,
            judge: None,
        }
    }
}

/// A task and its requests.
pub struct TaskPrompts {
    /// The task.
    pub task: TaskConfig,
    /// The requests.
    pub prompts: Prompts,
}

impl TaskPrompts {
    /// Whether the documents can be scored, as far as that is known before the model runs.
    ///
    /// # Errors
    /// [`Error::Invalid`] as [`check_task`]; [`Error::Document`] if a filter wants fields that the first
    /// document does not have.
    pub fn check(&self) -> Result<()> {
        self.scoring().map(drop)
    }

    fn scoring(&self) -> Result<(Vec<Metric>, Filters)> {
        let (metrics, filters) = scoring(&self.task)?;
        if let Some(first) = self.prompts.items.first() {
            filters.check(first)?;
        }
        Ok((metrics, filters))
    }
}

/// Whether the metrics and filters of a task can be used: a check for a
/// [`Catalogue`](lightmoe_data::harness::Catalogue).
///
/// # Errors
/// The metric or filter that cannot be, and what to do.
pub fn check_task(task: &TaskConfig) -> std::result::Result<(), String> {
    scoring(task).map(drop).map_err(|e| e.to_string())
}

fn scoring(task: &TaskConfig) -> Result<(Vec<Metric>, Filters)> {
    Ok((metrics(task)?, Filters::new(task)?))
}

/// Where finished requests are kept.
#[derive(Default)]
pub struct Kept<'a> {
    /// The file of this evaluation, from which it goes on.
    pub journal: Option<&'a Path>,
    /// What the numbers depend on besides the requests and batches: the model.
    pub fingerprint: &'a str,
    /// What evaluations have in common.
    pub cache: Option<&'a RequestCache>,
}

/// What came of all tasks.
pub struct Outcome {
    /// By task, in the order given.
    pub tasks: Vec<TaskOutcome>,
    /// Whether every request was done; otherwise the work was interrupted.
    pub is_whole: bool,
    /// Most tokens that the model read at once.
    pub max_length: usize,
    /// Requests of all tasks.
    pub requests: usize,
    /// How many of them the cache knew.
    pub cached: usize,
}

/// What came of a task.
pub struct TaskOutcome {
    /// The name.
    pub name: String,
    /// By metric and chain of filters.
    pub scores: Vec<TaskScore>,
    /// Documents that were scored.
    pub documents: usize,
    /// What became of each document, in the harness's form.
    pub samples: Vec<BenchmarkSample>,
    /// A hash over documents, prompts and targets.
    pub hash: String,
}

/// One metric under one chain of filters.
pub struct TaskScore {
    /// The metric.
    pub metric: String,
    /// The chain.
    pub filter: String,
    /// The value.
    pub value: f64,
    /// Its standard error, where the harness knows one.
    pub stderr: Option<f64>,
    /// Of a metric of the corpus, what decides it besides the texts, as sacreBLEU writes it.
    pub signature: Option<String>,
}

/// Runs the tasks on `model`. `progress` sees how many requests are done, of how many; its `false`
/// stops the work, and what is there is scored.
///
/// # Errors
/// [`Error::Invalid`] for metrics, filters and options that cannot work, [`Error::Document`] for a
/// document that cannot be scored, [`Error::NoNumbers`], and what the model and the journal bring.
pub fn evaluate_tasks(
    model: &dyn LanguageModel,
    tokenizer: &ModelTokenizer,
    tasks: &[TaskPrompts],
    options: &HarnessOptions<'_>,
    kept: Kept<'_>,
    progress: &mut (dyn FnMut(usize, usize) -> bool + Send),
) -> Result<Outcome> {
    let context = model.config().max_position_embeddings;
    let max_length = options.max_length.unwrap_or(context);
    if options.batch_tokens == 0 || max_length == 0 || max_length > context {
        return Err(Error::Invalid(format!(
            "batches of {} tokens and texts of {max_length} cannot be; use 1 or more, and texts of at \
             most the {context} that the model reads",
            options.batch_tokens
        )));
    }
    if options.stride == Some(0) {
        return Err(Error::Invalid(
            "with a stride of 0 no window would ever be the last; use 1 or more".into(),
        ));
    }
    let encoder = Encoder {
        tokenizer,
        begin: options.begin,
        max_length,
    };
    // All that can be wrong with a task is found before the model runs.
    let mut work = Work::default();
    let mut prepared = Vec::new();
    for whole in tasks {
        let TaskPrompts { task, prompts } = whole;
        let (metrics, filters) = whole.scoring()?;
        if options.judge.is_none() && metrics.iter().any(runs_programs) {
            return Err(Error::Invalid(format!(
                "task `{}` runs programs that the model writes, and nothing is there to run them",
                task.name()
            )));
        }
        let places = work.add(task, prompts, &encoder, options.stride)?;
        prepared.push((metrics, filters, places));
    }
    let journal = match kept.journal {
        Some(path) => {
            // Batches are part of it: their size moves likelihoods in the last digits.
            let (model, batch) = (kept.fingerprint, options.batch_tokens);
            let fingerprint = format!("{model}-{batch}-{}", work.fingerprint());
            Journal::open(path, &fingerprint)?
        }
        None => Journal::default(),
    };
    let stores = Stores {
        journal,
        cache: kept.cache,
    };
    let mut progress = Progress {
        done: 0,
        total: 0,
        report: progress,
    };
    let found = work.run(model, tokenizer, options, stores, &mut progress)?;
    let mut programs = Vec::new();
    for (scorer, task, places) in scorers(tasks, &prepared, &Verdicts::default()) {
        for (item, places) in task.prompts.items.iter().zip(places) {
            programs.extend(scorer.programs(item, places, &found)?);
        }
    }
    let verdicts = match options.judge {
        Some(judge) if found.is_whole() => Verdicts::run(programs, judge, &mut progress)?,
        _ => Verdicts::default(),
    };
    let outcomes = scorers(tasks, &prepared, &verdicts)
        .map(|(scorer, task, places)| outcome(&scorer, task, places, &found));
    let outcomes: Vec<TaskOutcome> = outcomes.collect::<Result<_>>()?;
    let is_scored = |(task, outcome): (&TaskPrompts, &TaskOutcome)| {
        task.prompts.items.len() == outcome.documents
    };
    Ok(Outcome {
        is_whole: tasks.iter().zip(&outcomes).all(is_scored),
        tasks: outcomes,
        max_length,
        requests: work.requests(),
        cached: found.cached.iter().map(Vec::len).sum(),
    })
}

/// What is made of a task before the model runs.
type Prepared = (Vec<Metric>, Filters, Vec<Vec<Place>>);

/// What scores each task, with the task and the places of its results.
fn scorers<'a>(
    tasks: &'a [TaskPrompts],
    prepared: &'a [Prepared],
    verdicts: &'a Verdicts,
) -> impl Iterator<Item = (score::Scorer<'a>, &'a TaskPrompts, &'a [Vec<Place>])> {
    let all = tasks.iter().zip(prepared);
    all.map(move |(task, (metrics, filters, places))| {
        let scorer = score::Scorer {
            task: &task.task,
            metrics,
            filters,
            verdicts,
        };
        (scorer, task, places.as_slice())
    })
}

fn runs_programs(metric: &Metric) -> bool {
    matches!(metric.kind, Kind::Passes(_))
}

fn outcome(
    scorer: &score::Scorer<'_>,
    task: &TaskPrompts,
    places: &[Vec<Place>],
    found: &Found,
) -> Result<TaskOutcome> {
    let items = &task.prompts.items;
    let (mut scores, mut samples, mut documents) = (Vec::new(), Vec::new(), 0);
    let mut hashes = String::new();
    let mut references = items.iter().map(|item| score::targets(item).len());
    let first = references.next();
    let references = first.filter(|first| references.all(|other| other == *first));
    for (chain, filter) in scorer.chains().into_iter().enumerate() {
        let mut scored = Vec::new();
        for (numbered, places) in items.iter().enumerate().zip(places) {
            scored.extend(scorer.score(numbered, places, found, chain)?);
        }
        documents = scored.len();
        for (number, metric) in scorer.metrics.iter().enumerate() {
            let values: Vec<Value> = scored
                .iter()
                .map(|scored| scored.values[number].clone())
                .collect();
            if values.is_empty() {
                continue;
            }
            let (value, stderr) = metric.aggregate(&values);
            scores.push(TaskScore {
                metric: metric.name.clone(),
                filter: filter.to_owned(),
                value,
                stderr,
                signature: metric.signature(references),
            });
        }
        for scored in scored {
            let item = &items[scored.number];
            samples.push(sample::sample(scorer, item, scored, filter, &mut hashes)?);
        }
    }
    Ok(TaskOutcome {
        name: task.task.name().to_owned(),
        scores,
        documents,
        samples,
        hash: hash_text(&hashes),
    })
}

/// SHA-256 of a text, in hexadecimal digits.
pub(crate) fn hash_text(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
