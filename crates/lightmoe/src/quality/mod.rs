//! `lightmoe bench quality`: what each method keeps of each task, at equal trainable parameters and
//! at equal rank, with seeds and controls.
//!
//! Every cell is one compression of the built-in model, and one record in the raw data; finished cells
//! are kept, so an interrupted bench goes on. The
//! learning rate is chosen per method and task on the validation split, at 50% and seed 0; the cells
//! tried for that with the chosen rate are cells of the table as well.

mod cells;
mod table;
#[cfg(test)]
mod tests;

use crate::cli::QualityArgs;
use crate::machine;
use crate::recipe::Recipe;
use crate::results::{Parameters, Stage, TaskScores};
use crate::runner::{Finished, Job, Pace, Runner};
use crate::settings::Settings;
use crate::source::{BUILT_IN, open_model};
use anyhow::{Context, Result, anyhow, bail};
use cells::{Cell, RATES, grid, rate_of, rate_search};
use lightmoe_data::Task;
use lightmoe_models::{Checkpoint, folder};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;

/// Test items of a cell, and validation items.
const ITEMS: usize = 500;

/// A finished cell.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    cell: Cell,
    lr: f64,
    rank: usize,
    parameters: Parameters,
    /// Share of all parameters saved.
    achieved: f64,
    /// On the test split before any training.
    built: TaskScores,
    /// On the validation split after recovery.
    validation: TaskScores,
    /// On the test split after recovery.
    test: TaskScores,
    seconds: f64,
}

impl Record {
    fn score(scores: &TaskScores, metric: &str) -> Option<f64> {
        scores.values().next()?.get(metric).map(|s| s.value)
    }
}

/// The raw data: the original model's scores and the finished cells.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Raw {
    /// Content of the model that was compressed.
    model: String,
    steps: usize,
    /// The day on which the last cell was finished, and the processor.
    date: String,
    processor: String,
    original: HashMap<Task, TaskScores>,
    records: Vec<Record>,
}

/// The bench at work.
struct Bench {
    args: QualityArgs,
    original: Checkpoint,
    runner: Runner,
    raw: Mutex<Raw>,
    raw_path: PathBuf,
}

/// Runs what is missing and writes the table.
///
/// # Errors
/// If a cell fails; what is finished is kept.
pub fn run(args: QualityArgs) -> Result<String> {
    let original = open_model(BUILT_IN)?;
    let recipe = Recipe::resolve(Settings::default(), original.config())?;
    let inputs = crate::compress::inputs(&recipe, original.dir())?;
    let model = inputs.model.clone();
    let raw_path = args.table.with_extension("json");
    let mut raw = match std::fs::read_to_string(&raw_path) {
        Ok(text) => serde_json::from_str::<Raw>(&text)
            .with_context(|| format!("`{}`; remove it to start again", raw_path.display()))?,
        Err(_) => Raw {
            model: model.clone(),
            steps: args.steps,
            ..Raw::default()
        },
    };
    anyhow::ensure!(args.steps > 0, "`--steps` is 0; give at least 1");
    if (&raw.model, raw.steps) != (&model, args.steps) {
        bail!(
            "`{}` holds cells of {} steps on model {}, not of {} steps on model {model}; remove it, \
             or give another `--table`",
            raw_path.display(),
            raw.steps,
            raw.model,
            args.steps
        );
    }
    raw.records.sort_by_key(|r| r.cell.id());
    let pace = Pace {
        jobs: args.jobs.max(1),
        threads: 1,
        minutes: args.minutes,
    };
    let bench = Bench {
        runner: Runner::open(&original, inputs, &args.out.join(&model), pace)?,
        original,
        raw: Mutex::new(raw),
        raw_path,
        args,
    };
    let all = bench.all(rate_search())? && bench.all(grid(bench.args.seeds))?;
    let raw = bench.lock()?;
    let text = table::markdown(&raw, bench.original.config());
    folder::write_file(&bench.args.table, text.as_bytes())?;
    let note = bench.runner.finish(all)?;
    Ok(format!(
        "{} cells  {}{note}",
        raw.records.len(),
        bench.args.table.display()
    ))
}

impl Bench {
    fn lock(&self) -> Result<std::sync::MutexGuard<'_, Raw>> {
        self.raw
            .lock()
            .map_err(|_| anyhow!("a worker of the bench panicked"))
    }

    fn save(&self, raw: &Raw) -> Result<()> {
        let text = serde_json::to_string_pretty(raw)?;
        Ok(folder::write_file(
            &self.raw_path,
            (text + "\n").as_bytes(),
        )?)
    }

    /// Runs the cells that are missing; true if all are done.
    fn all(&self, cells: Vec<Cell>) -> Result<bool> {
        let rates = self.rates()?;
        let mut jobs = Vec::new();
        for cell in cells {
            if self.lock()?.records.iter().any(|r| r.cell == cell) {
                continue;
            }
            let lr = match cell.rate {
                Some(rate) => RATES[rate],
                None => rate_of(&rates, cell.method, cell.task).context("no rate was chosen")?,
            };
            if let Some(record) = self.tried(&cell, lr)? {
                let mut raw = self.lock()?;
                raw.records.push(record);
                self.save(&raw)?;
                continue;
            }
            let config = self.original.config();
            let settings = Settings {
                lr: Some(lr),
                steps: Some(cell.steps(self.args.steps)),
                eval_examples: Some(ITEMS),
                ..cell.settings(config)
            };
            jobs.push(Job {
                id: cell.id(),
                recipe: Recipe::resolve(settings, config)?,
                cell,
            });
        }
        self.runner
            .all(jobs, &|job, finished| self.keep(job, finished))
    }

    fn keep(&self, job: &Job<Cell>, finished: Finished) -> Result<()> {
        let (cell, mut results) = (job.cell.clone(), finished.results);
        let mut scores = |stage| results.stages.remove(&stage).unwrap_or_default();
        let mut raw = self.lock()?;
        raw.original
            .entry(cell.task)
            .or_insert_with(|| scores(Stage::Original));
        let record = Record {
            cell,
            lr: job.recipe.lr,
            rank: job.recipe.rank,
            built: scores(Stage::Built),
            validation: finished.validation,
            test: scores(Stage::Recovered),
            parameters: results.parameters,
            achieved: results.ratio.achieved,
            seconds: finished.seconds,
        };
        raw.records.push(record);
        (raw.date, raw.processor) = (machine::today(), machine::processor());
        self.save(&raw)
    }

    /// The best learning rate of each method on each task.
    fn rates(&self) -> Result<HashMap<(cells::Method, Task), f64>> {
        let raw = self.lock()?;
        let mut best: HashMap<_, (f64, f64)> = HashMap::new();
        for record in raw.records.iter().filter(|r| r.cell.rate.is_some()) {
            let key = (record.cell.method, record.cell.task);
            let nll = Record::score(&record.validation, "answer_nll").unwrap_or(f64::INFINITY);
            let entry = best.entry(key).or_insert((f64::INFINITY, RATES[0]));
            if nll < entry.0 {
                *entry = (nll, record.lr);
            }
        }
        Ok(best.into_iter().map(|(key, (_, lr))| (key, lr)).collect())
    }

    /// The record of `cell` if it was made while choosing the learning rate.
    fn tried(&self, cell: &Cell, lr: f64) -> Result<Option<Record>> {
        let raw = self.lock()?;
        let mut records = raw.records.iter();
        let is_it = |r: &&Record| {
            let fixed = Cell {
                rate: None,
                ..r.cell.clone()
            };
            r.lr == lr && fixed == *cell
        };
        // Its time is counted where it was spent.
        Ok(records.find(is_it).map(|r| Record {
            cell: cell.clone(),
            seconds: 0.0,
            ..r.clone()
        }))
    }
}
