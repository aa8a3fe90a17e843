//! `evaluate --tasks`: benchmarks as lm-evaluation-harness runs them; and `tasks`, which lists them.

mod data;
mod list;

pub use list::list;

use crate::cli::BenchmarkArgs;
use crate::device;
use crate::machine::Environment;
use crate::pipeline::load_model;
use crate::preflight::Refused;
use crate::progress::{Progress, stopped};
use crate::report::table::{Section, ascii};
use crate::sandbox::{Limits, Sandbox};
use crate::settings::Settings;
use crate::source::{BUILT_IN, model_fingerprint, open_model};
use anyhow::{Context, Result, bail};
use data::{Download, prompts_of};
use lightmoe_data::harness::{Benchmark, Catalogue, Chat, PromptOptions, Turns};
use lightmoe_data::records::Message;
use lightmoe_eval::harness::{
    BeginOfText, BenchmarkResults, CallOptions, Cell, HarnessOptions, Judge, Kept, Outcome,
    RequestCache, RunFacts, ScoreKey, TaskPrompts, check_task, evaluate_tasks, rendered, results,
};
use lightmoe_models::{ModelTokenizer, folder};
use std::fs;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What an evaluation leaves.
const RESULTS: &str = "results.json";
/// The same, after an interruption.
const PARTIAL: &str = "results.partial.json";
/// Finished requests of an evaluation that goes on.
const JOURNAL: &str = "requests.jsonl";
/// The harness's seed of few-shot examples.
const FEWSHOT_SEED: u32 = 1234;

/// Runs benchmarks and writes `results.json` and `samples_<task>.jsonl`; returns a table.
///
/// # Errors
/// [`Refused`] for tasks and data that cannot be used; if the work was stopped, with what was done in
/// `results.partial.json`.
pub fn run(args: &BenchmarkArgs, settings: &Settings, out: Option<&Path>) -> Result<String> {
    let (begin, date) = (Instant::now(), SystemTime::now());
    let selected = Catalogue::built_in()?
        .checking(check_task)
        .select(&args.tasks)
        .map_err(Refused::of)?;
    if out.is_some_and(|out| out.exists() && !out.is_dir()) {
        let message = "with `--tasks`, `--out` is a folder, and a file has its name; give another";
        return Err(Refused(message.into()).into());
    }
    let sandbox = sandbox(args, &selected)?;
    let name = settings.model.as_deref().unwrap_or(BUILT_IN);
    let checkpoint = open_model(name)?;
    let tokenizer = ModelTokenizer::load(checkpoint.dir(), checkpoint.config().eos_token_id)?;
    if args.add_bos_token && tokenizer.encode_with_special("a")? == tokenizer.encode("a")? {
        let message = "the model's tokenizer.json puts nothing before a text; leave out \
                       `--add-bos-token`, or add a post-processor to it";
        return Err(Refused(message.into()).into());
    }
    let seed = fewshot_seed(settings)?;
    let tasks = prompts(args, &selected, &tokenizer, seed)?;
    for task in &tasks {
        task.check().map_err(Refused::of)?;
    }
    let options = HarnessOptions {
        batch_tokens: args.batch_tokens,
        max_length: settings.max_length,
        begin: match args.add_bos_token {
            true => BeginOfText::Token,
            false => BeginOfText::None,
        },
        stride: args.stride,
        judge: sandbox.as_ref().map(|sandbox| sandbox as &dyn Judge),
    };
    let depends = (
        model_fingerprint(checkpoint.dir())?,
        env!("CARGO_PKG_VERSION"),
    );
    let fingerprint = device::fingerprint(
        &crate::fingerprint(&depends)?,
        &device::placement(&checkpoint),
    )?;
    let journal = out.map(|out| out.join(JOURNAL));
    let cache = cache(args.use_cache.as_deref(), &fingerprint)?;
    let kept = Kept {
        journal: journal.as_deref(),
        fingerprint: &fingerprint,
        cache: cache.as_ref(),
    };
    let model = load_model(&checkpoint)?;
    let bar = Progress::new("evaluate", 0);
    let outcome = evaluate_tasks(
        &*model,
        &tokenizer,
        &tasks,
        &options,
        kept,
        &mut |done, all| bar.of(done, all),
    )?;
    if cache.is_some() {
        let (known, all) = (outcome.cached, outcome.requests);
        tracing::info!("{known} of {all} requests were in the cache");
    }
    let here = Environment::here();
    let facts = RunFacts {
        model: name,
        config: config(name, args, settings, seed),
        system_instruction: args.system_instruction.as_deref(),
        chat_template: tokenizer.template().filter(|_| args.apply_chat_template),
        fewshot_as_multiturn: args.fewshot_as_multiturn,
        date: date.duration_since(UNIX_EPOCH)?.as_secs_f64(),
        seconds: begin.elapsed().as_secs_f64(),
        version: env!("CARGO_PKG_VERSION"),
        git_hash: here.git_hash.as_deref(),
    };
    let results = results(&selected, &tasks, &outcome, &tokenizer, facts)?;
    if let Some(out) = out {
        write(out, &results, &outcome)?;
    }
    if !outcome.is_whole {
        bail!(match out {
            Some(out) => format!(
                "interrupted; `{}` has the scores so far, and the same command goes on",
                out.join(PARTIAL).display()
            ),
            None => "interrupted; with `--out` the same command would go on".into(),
        });
    }
    Ok(table(&results, out))
}

/// Where the programs that the model writes are run, if a task asks for that.
fn sandbox(args: &BenchmarkArgs, selected: &[Benchmark]) -> Result<Option<Sandbox>> {
    let mut tasks = selected.iter().flat_map(Benchmark::tasks);
    let Some(task) = tasks.find(|task| task.runs_programs()) else {
        return Ok(None);
    };
    if !args.allow_code {
        let message = format!(
            "`{}` runs programs that the model writes; give `--allow-code` to let them run in a \
             sandbox",
            task.name()
        );
        return Err(Refused(message).into());
    }
    let itself = std::env::current_exe().context("cannot find this program's own file")?;
    let sandbox = Sandbox::new(&itself, Limits::default()).map_err(Refused)?;
    Ok(Some(sandbox))
}

/// The answers that evaluations have in common, if there are to be such.
fn cache(folder: Option<&Path>, fingerprint: &str) -> Result<Option<RequestCache>> {
    let Some(folder) = folder else {
        return Ok(None);
    };
    let cache = RequestCache::open(folder, fingerprint).map_err(Refused::of)?;
    for line in cache.damaged() {
        tracing::warn!("in the cache, {line}; the line was left out");
    }
    Ok(Some(cache))
}

/// The seed of the few-shot examples.
///
/// # Errors
/// [`Refused`] for one that the harness's random numbers do not take.
pub(crate) fn fewshot_seed(settings: &Settings) -> Result<u32> {
    let seed = settings.seed.map_or(Ok(FEWSHOT_SEED), u32::try_from);
    seed.map_err(|_| Refused("give a seed below 2^32".into()).into())
}

/// The requests of every task that was asked for, once each.
pub(crate) fn prompts(
    args: &BenchmarkArgs,
    selected: &[Benchmark],
    tokenizer: &ModelTokenizer,
    seed: u32,
) -> Result<Vec<TaskPrompts>> {
    if args.apply_chat_template && tokenizer.template().is_none() {
        let message = "the model has no chat template; leave out `--apply-chat-template`";
        return Err(Refused(message.into()).into());
    }
    let render = |messages: &[Message]| rendered(tokenizer, messages);
    let options = PromptOptions {
        num_fewshot: args.documents.num_fewshot,
        limit: args.documents.limit,
        seed,
        system_instruction: args.system_instruction.as_deref(),
        chat: args.apply_chat_template.then_some(Chat {
            render: &render,
            turns: match args.fewshot_as_multiturn {
                true => Turns::Each,
                false => Turns::One,
            },
        }),
        repositories: &[],
    };
    let download = match args.documents.download {
        true => Download::Missing,
        false => Download::Never,
    };
    let mut tasks: Vec<TaskPrompts> = Vec::new();
    for task in selected.iter().flat_map(Benchmark::tasks) {
        if stopped() {
            bail!("interrupted while reading the data; run the same command again");
        }
        if !tasks.iter().any(|other| other.task.name() == task.name()) {
            tasks.push(TaskPrompts {
                prompts: prompts_of(task, &args.documents.data, download, &options)?,
                task: task.clone(),
            });
        }
    }
    Ok(tasks)
}

/// What the harness records of the call.
fn config(name: &str, args: &BenchmarkArgs, settings: &Settings, seed: u32) -> CallOptions {
    CallOptions {
        model: "lightmoe",
        model_args: format!("pretrained={name}"),
        batch_tokens: args.batch_tokens,
        max_length: settings.max_length,
        add_bos_token: args.add_bos_token,
        stride: args.stride,
        allow_code: args.allow_code,
        limit: args.documents.limit,
        use_cache: args.use_cache.clone(),
        bootstrap_iters: 100_000,
        fewshot_seed: seed,
    }
}

fn write(out: &Path, results: &BenchmarkResults, outcome: &Outcome) -> Result<()> {
    let text = serde_json::to_string_pretty(results)? + "\n";
    if !outcome.is_whole {
        return Ok(folder::write_file(&out.join(PARTIAL), text.as_bytes())?);
    }
    for task in &outcome.tasks {
        let mut lines = Vec::new();
        for sample in &task.samples {
            serde_json::to_writer(&mut lines, sample)?;
            lines.push(b'\n');
        }
        folder::write_file(&out.join(format!("samples_{}.jsonl", task.name)), &lines)?;
    }
    folder::write_file(&out.join(RESULTS), text.as_bytes())?;
    for left in [PARTIAL, JOURNAL] {
        let path = out.join(left);
        if path.exists() {
            fs::remove_file(&path).with_context(|| {
                format!("cannot remove `{}`, which is done with", path.display())
            })?;
        }
    }
    Ok(())
}

/// The table that the harness prints.
fn table(results: &BenchmarkResults, out: Option<&Path>) -> String {
    let mut table = Section::new([
        "task", "version", "filter", "n-shot", "metric", "value", "stderr",
    ]);
    let text = |cell: &Cell| match cell {
        Cell::Number(n) if *n < 1e6 => format!("{n:.4}"),
        Cell::Number(n) => format!("{n:.4e}"),
        Cell::Text(text) => (*text).to_owned(),
    };
    for (name, row) in &results.results {
        let shots = results.n_shot.get(name);
        for (ScoreKey(key), value) in &row.scores {
            let Some((metric, filter)) =
                key.split_once(',').filter(|(m, _)| !m.ends_with("_stderr"))
            else {
                continue;
            };
            let stderr = row
                .scores
                .get(&ScoreKey(format!("{metric}_stderr,{filter}")));
            table.rows.push(vec![
                row.alias.clone(),
                results
                    .versions
                    .get(name)
                    .map_or(String::new(), list::shown),
                filter.to_owned(),
                shots.map_or(String::new(), usize::to_string),
                metric.to_owned(),
                text(value),
                stderr.map_or(String::new(), text),
            ]);
        }
    }
    let place = out.map(|out| format!("\n\nresults  {}", out.join(RESULTS).display()));
    ascii(&table, table.head.len()) + &place.unwrap_or_default()
}
