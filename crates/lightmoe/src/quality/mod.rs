//! `lightmoe bench quality`: what each method keeps of each task, at equal trainable parameters and
//! at equal rank, with seeds and controls.
//!
//! Every cell is one compression of the built-in model through the stages that `compress` runs, and
//! one record in the raw data; finished cells are kept, so an interrupted bench goes on. The
//! learning rate is chosen per method and task on the validation split, at 50% and seed 0; the cells
//! tried for that with the chosen rate are cells of the table as well.

mod cells;
mod table;
#[cfg(test)]
mod tests;

use crate::cli::QualityArgs;
use crate::machine;
use crate::pipeline::{
    RecoverInputs, build_stage, evaluate_stage, observe_stage, plan_stage, recover_stage,
};
use crate::progress::{set_quiet, stopped};
use crate::recipe::Recipe;
use crate::results::{Parameters, TaskScores};
use crate::settings::Settings;
use crate::source::{BUILT_IN, TaskData, model_fingerprint, open_model};
use anyhow::{Context, Result, anyhow, bail};
use cells::{Cell, RATES, grid, rate_of, rate_search};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::{BuildInputs, Statistics};
use lightmoe_data::{Encoded, Task};
use lightmoe_models::{Checkpoint, ModelTokenizer, folder};
use lightmoe_train::Folders;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

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
    tokenizer: ModelTokenizer,
    raw: Mutex<Raw>,
    raw_path: PathBuf,
    /// Observations and unfinished cells, of this model alone.
    work: PathBuf,
    /// Held while observing, so that cells at work do not observe the same examples at once.
    observing: Mutex<()>,
    begin: Instant,
}

/// Runs what is missing and writes the table.
///
/// # Errors
/// If a cell fails; what is finished is kept.
pub fn run(args: QualityArgs) -> Result<String> {
    set_quiet(true);
    let original = open_model(BUILT_IN)?;
    let tokenizer = ModelTokenizer::load(original.dir(), original.config().eos_token_id)?;
    let raw_path = args.table.with_extension("json");
    let model = model_fingerprint(original.dir())?;
    let mut raw = match std::fs::read_to_string(&raw_path) {
        Ok(text) => serde_json::from_str::<Raw>(&text)
            .with_context(|| format!("`{}`; remove it to start again", raw_path.display()))?,
        Err(_) => Raw {
            model: model.clone(),
            steps: args.steps,
            ..Raw::default()
        },
    };
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
    let bench = Bench {
        work: args.out.join(&model),
        observing: Mutex::default(),
        original,
        tokenizer,
        raw: Mutex::new(raw),
        raw_path,
        begin: Instant::now(),
        args,
    };
    bench.originals()?;
    let finished = bench.all(rate_search())? && bench.all(grid(bench.args.seeds))?;
    let raw = bench.raw.lock().map_err(|_| anyhow!("a worker panicked"))?;
    let text = table::markdown(&raw, bench.original.config());
    folder::write_file(&bench.args.table, text.as_bytes())?;
    let note = if finished {
        ""
    } else {
        "\nunfinished: run the same command again to go on"
    };
    Ok(format!(
        "{} cells  {}{note}",
        raw.records.len(),
        bench.args.table.display()
    ))
}

impl Bench {
    fn originals(&self) -> Result<()> {
        for task in Task::ALL {
            let known = self.lock()?.original.contains_key(&task);
            if !known {
                let data = TaskData::built_in(task, 1, ITEMS, 0);
                let scores =
                    evaluate_stage("original", &self.original, &data, &data.test, 512, None)?;
                self.lock()?.original.insert(task, scores);
            }
        }
        self.save(&*self.lock()?)
    }

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

    /// Runs the cells that are missing, several at once, each on a thread of its own. False if the
    /// time was up or the user stopped it.
    fn all(&self, cells: Vec<Cell>) -> Result<bool> {
        let missing: Vec<Cell> = {
            let raw = self.lock()?;
            let done = |c: &Cell| raw.records.iter().any(|r| r.cell == *c);
            cells.into_iter().filter(|c| !done(c)).collect()
        };
        let (next, begun) = (AtomicUsize::new(0), missing.len());
        let minutes = self.args.minutes.unwrap_or(f64::INFINITY);
        let worker = || -> Result<bool> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
            loop {
                let Some(cell) = missing.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    return Ok(true);
                };
                if stopped() || self.begin.elapsed().as_secs_f64() > 60.0 * minutes {
                    return Ok(false);
                }
                let record = pool
                    .install(|| self.cell(cell))
                    .with_context(|| format!("cell {}", cell.id()))?;
                let em = Record::score(&record.test, "exact_match").unwrap_or(f64::NAN);
                let line = format!(
                    "{:>4}/{begun} {:<48} exact match {em:.3}  {:.0} s",
                    next.load(Ordering::Relaxed).min(begun),
                    cell.id(),
                    record.seconds
                );
                let _ = writeln!(std::io::stderr(), "{line}");
                let mut raw = self.lock()?;
                raw.records.push(record);
                (raw.date, raw.processor) = (machine::today(), machine::processor());
                self.save(&raw)?;
            }
        };
        std::thread::scope(|scope| {
            let jobs: Vec<_> = (0..self.args.jobs.max(1))
                .map(|_| scope.spawn(worker))
                .collect();
            let mut finished = true;
            for job in jobs {
                finished &= job
                    .join()
                    .map_err(|_| anyhow!("a worker of the bench panicked"))??;
            }
            Ok(finished)
        })
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

    /// What the routers do on the training examples of a cell; the same for all methods.
    fn observed(&self, cell: &Cell, encoded: &[Encoded], recipe: &Recipe) -> Result<Observations> {
        let _one = self
            .observing
            .lock()
            .map_err(|_| anyhow!("a worker of the bench panicked"))?;
        let path = self
            .work
            .join(format!("{}-{}.safetensors", cell.task, cell.seed));
        if !path.exists() {
            observe_stage(
                &self.original,
                encoded,
                recipe,
                Statistics::default(),
                "bench",
                &path,
            )?;
        }
        Ok(Observations::load(&path)?)
    }

    fn cell(&self, cell: &Cell) -> Result<Record> {
        let begin = Instant::now();
        let lr = match cell.rate {
            Some(rate) => RATES[rate],
            None => {
                rate_of(&self.rates()?, cell.method, cell.task).context("no rate was chosen")?
            }
        };
        if let Some(record) = self.tried(cell, lr)? {
            return Ok(record);
        }
        let config = self.original.config();
        let settings = Settings {
            lr: Some(lr),
            steps: Some(cell.steps(self.args.steps)),
            ..cell.settings(config)
        };
        let recipe = Recipe::resolve(settings, config)?;
        let data = TaskData::built_in(cell.task, recipe.train_examples, ITEMS, cell.seed);
        let encoded = data.encoded(&self.tokenizer, recipe.max_length)?;
        let dir = self.work.join(cell.id());
        let observations = self.observed(cell, &encoded, &recipe)?;
        let plan = plan_stage(config, &observations, &recipe, &dir.join("plan.json"))?;
        let inputs = BuildInputs {
            checkpoint: &self.original,
            plan: &plan,
            observations: Some(&observations),
            seed: cell.seed,
        };
        build_stage(&inputs, &dir.join("built"))?;
        let built = Checkpoint::open(&dir.join("built"))?;
        let score = |checkpoint: &Checkpoint, examples: &[lightmoe_data::Example]| {
            evaluate_stage("cell", checkpoint, &data, examples, recipe.max_length, None)
        };
        let untrained = score(&built, &data.test)?;
        let fingerprint = crate::fingerprint(&(&recipe, &self.lock()?.model))?;
        let inputs = RecoverInputs {
            original: &self.original,
            built: &built,
            plan: &plan,
            encoded,
            fingerprint: &fingerprint,
            checkpoint_every: recipe.steps,
        };
        let folders = Folders {
            state: dir.join("recovery"),
            logs: dir.join("logs"),
        };
        recover_stage(inputs, &recipe, &folders, &dir.join("model"))?;
        let recovered = Checkpoint::open(&dir.join("model"))?;
        let record = Record {
            cell: cell.clone(),
            lr,
            rank: recipe.rank,
            parameters: plan.parameters,
            achieved: plan.ratio.achieved,
            built: untrained,
            validation: score(&recovered, &data.validation)?,
            test: score(&recovered, &data.test)?,
            seconds: begin.elapsed().as_secs_f64(),
        };
        remove(&dir)?;
        Ok(record)
    }
}

/// A cell's models have served; its scores stay.
fn remove(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove `{}`", dir.display()))
}
