//! `lightmoe compare`: methods × ratios × tasks × seeds, each cell one compression of its own, and the
//! tables and the page that come of them.
//!
//! A finished cell is a file in `cells/`, which a later call with the same settings finds again, and
//! `compare.json` holds all of them; the tables and the page are made from it alone, and the cells too
//! where they are missing. What is compared may grow from call to call; the settings and the model may
//! not change.

mod grid;
mod measure;
mod page;
mod rows;
mod table;
#[cfg(test)]
mod tests;
mod variant;

use crate::cli::CompareArgs;
use crate::machine;
use crate::preflight::{Refused, check_original, forecast};
use crate::recipe::{Recipe, differences};
use crate::results::{Results, TaskScores, nll};
use crate::run::{Inputs, occupied};
use crate::runner::{Finished, Job, Pace, Runner};
use crate::settings::Settings;
use crate::source::{BUILT_IN, open_model};
use anyhow::{Context, Result, anyhow, ensure};
use grid::{Cell, Grid, Rate};
use lightmoe_data::Task;
use lightmoe_models::{ModelConfig, folder};
use measure::Measure;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use variant::{Variant, given};

/// Version of the layout of `compare.json`.
const SCHEMA_VERSION: u32 = 1;

/// A finished cell: a file in `cells/`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
struct Record {
    /// What was compressed how.
    cell: Cell,
    /// Parameters that work on one token, on average.
    active_parameters: Active,
    /// Scores on the validation split after recovery.
    validation: TaskScores,
    /// The day on which it was finished, in UTC: `2026-11-22`.
    date: String,
    /// The processor that it ran on.
    processor: String,
    /// The threads that it ran on.
    threads: usize,
    /// Its `results.json`.
    results: Results,
}

/// Parameters that work on one token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
struct Active {
    /// Of the original.
    before: u64,
    /// Of the compressed model.
    after: u64,
}

/// The whole of `compare.json`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Comparison {
    /// Version of this layout.
    #[schemars(extend("const" = SCHEMA_VERSION))]
    schema_version: u32,
    /// The model's name or folder, as given.
    model: String,
    /// What all cells depend on besides their recipes.
    inputs: Inputs,
    /// The settings common to all cells that were given: keys of a recipe.
    settings: serde_json::Map<String, serde_json::Value>,
    /// What is compared.
    grid: Grid,
    /// What the models are compared by.
    #[serde(default)]
    measure: Measure,
    /// The finished cells of the grid.
    records: Vec<Record>,
}

impl Record {
    /// The score that decides between learning rates.
    fn validation_nll(&self) -> f64 {
        let scores = self.validation.values().next();
        scores.and_then(nll).map_or(f64::INFINITY, |s| s.value)
    }
}

impl Comparison {
    /// The file, a record a line.
    fn to_json(&self) -> Result<String> {
        let records = self.records.iter().map(serde_json::to_string);
        let records = records.collect::<serde_json::Result<Vec<_>>>()?.join(",\n");
        let none = Self {
            records: Vec::new(),
            ..self.clone()
        };
        let head = serde_json::to_string_pretty(&none)?;
        let head = head.trim_end_matches(['[', ']', '}', '\n']);
        Ok(format!("{head}[\n{records}\n]}}\n"))
    }

    /// The learning rate of a method on a task: the best of those to choose from, once all are tried.
    fn rate(&self, method: &Variant, task: Option<Task>) -> Rate {
        if !self.grid.is_searched(method) {
            let own = method.settings.lr;
            return Rate::Known(own.or(self.grid.rates.first().copied()));
        }
        let candidates = self.grid.candidates(method, task);
        let tried = |cell: &Cell| self.records.iter().find(|r| r.cell == *cell);
        let tried: Option<Vec<&Record>> = candidates.iter().map(tried).collect();
        let best = tried.and_then(|tried| {
            let by_nll =
                |a: &&&Record, b: &&&Record| a.validation_nll().total_cmp(&b.validation_nll());
            tried.iter().min_by(by_nll).map(|r| r.cell.lr)
        });
        best.map_or(Rate::Open, Rate::Known)
    }

    /// The records of a row of the table, one a seed.
    fn records<'a>(
        &'a self,
        method: &'a Variant,
        ratio: Option<f64>,
        task: Option<Task>,
    ) -> impl Iterator<Item = &'a Record> + 'a {
        let rate = self.rate(method, task);
        self.records.iter().filter(move |r| {
            let cell = &r.cell;
            (&cell.method, cell.ratio, cell.task) == (method, ratio, task)
                && Rate::Known(cell.lr) == rate
        })
    }
}

/// Runs what is missing and writes the tables and the page.
///
/// # Errors
/// [`Refused`] if what is asked for cannot be had; if the folder holds something else, or the model
/// or the settings changed; if cells fail or the user stops them, when what is finished is kept.
pub fn run(args: CompareArgs) -> Result<String> {
    let common = common(&args).map_err(Refused::of)?;
    let grid = Grid::of(&args, &common).map_err(Refused::of)?;
    let model = common.model.clone().unwrap_or_else(|| BUILT_IN.to_owned());
    let original = open_model(&model)?;
    check_original(&original)?;
    let config = original.config().clone();
    check(&grid, &common, &config)?;
    let any = Recipe::resolve(common.clone(), &config).map_err(Refused::of)?;
    let comparison = Comparison {
        schema_version: SCHEMA_VERSION,
        model,
        inputs: crate::compress::inputs(&any, original.dir())?,
        settings: given(&common)?,
        grid,
        measure: Measure::of(&any)?,
        records: Vec::new(),
    };
    let jobs = args.jobs.max(1);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pace = Pace {
        jobs,
        threads: (cores / jobs).max(1),
        minutes: args.minutes,
    };
    let earlier = earlier(&args.out, &comparison)?;
    let work = args.out.join("work");
    let comparing = Comparing {
        runner: Runner::open(&original, comparison.inputs.clone(), &work, pace)?,
        threads: pace.threads,
        comparison: Mutex::new(comparison),
        out: args.out,
        common,
        config,
    };
    comparing.restore(earlier)?;
    comparing.go_on()
}

/// The settings that all cells have in common.
fn common(args: &CompareArgs) -> Result<Settings> {
    let file = args.recipe.as_deref().map(Settings::load).transpose()?;
    let flags = Settings {
        model: args.model.clone(),
        steps: args.steps,
        eval_examples: args.eval_examples,
        ..Settings::default()
    };
    Ok(flags.or(file.unwrap_or_default()))
}

/// Refuses a comparison with a row that cannot be had, before anything is spent.
fn check(grid: &Grid, common: &Settings, config: &ModelConfig) -> Result<(), Refused> {
    for (method, ratio) in grid.rows() {
        let cell = Cell {
            method: method.clone(),
            task: grid.tasks[0],
            ratio,
            seed: 0,
            lr: None,
        };
        let recipe = cell.recipe(common, config).map_err(Refused::of)?;
        forecast(&recipe, config, 1, 0).map_err(|e| Refused(format!("`{method}`: {e}")))?;
    }
    Ok(())
}

/// The cells of an earlier call; refuses a folder that holds something else, or a comparison with other
/// settings.
fn earlier(out: &Path, now: &Comparison) -> Result<Vec<Record>> {
    let path = out.join("compare.json");
    if !path.exists() {
        let strange = occupied(out)? && !out.join("work").exists();
        ensure!(
            !strange,
            "`{}` is not empty and holds no comparison; give another `--out`",
            out.display()
        );
        return Ok(Vec::new());
    }
    let strange = || {
        format!(
            "`{}` is no comparison of this version; give another `--out`",
            path.display()
        )
    };
    let then: Comparison =
        serde_json::from_str(&fs::read_to_string(&path)?).with_context(strange)?;
    ensure!(then.schema_version == SCHEMA_VERSION, strange());
    now.inputs.same_as(&then.inputs)?;
    let differences = differences(&now.settings, &then.settings)?;
    ensure!(
        differences.is_empty(),
        "the comparison in `{}` had other settings: {differences}; give the same to go on, or \
         another `--out`",
        out.display()
    );
    Ok(then.records)
}

/// A comparison at work.
struct Comparing {
    comparison: Mutex<Comparison>,
    runner: Runner,
    threads: usize,
    out: PathBuf,
    common: Settings,
    config: ModelConfig,
}

impl Comparing {
    fn go_on(&self) -> Result<String> {
        self.load()?;
        self.write()?;
        let search = self.lock()?.grid.search();
        let mut all = self.all(search)?;
        let cells = {
            let comparison = self.lock()?;
            comparison.grid.cells(&|m, t| comparison.rate(m, t))
        };
        all &= self.all(cells)?;
        self.write()?;
        let note = self.runner.finish(all)?;
        let comparison = self.lock()?;
        Ok(format!(
            "{}\n{} cells  {}{note}",
            table::summary(&comparison),
            comparison.records.len(),
            self.out.join("index.html").display()
        ))
    }

    fn lock(&self) -> Result<MutexGuard<'_, Comparison>> {
        self.comparison
            .lock()
            .map_err(|_| anyhow!("a worker panicked"))
    }

    fn cell_path(&self, id: &str) -> PathBuf {
        self.out.join("cells").join(format!("{id}.json"))
    }

    /// Writes the cells of an earlier call whose files are missing.
    fn restore(&self, earlier: Vec<Record>) -> Result<()> {
        for record in earlier {
            let path = self.cell_path(&record.cell.id());
            if !path.exists() {
                write_json(&path, &record)?;
            }
        }
        Ok(())
    }

    /// Takes up the finished cells of this grid.
    fn load(&self) -> Result<()> {
        let mut comparison = self.lock()?;
        let entries = fs::read_dir(self.out.join("cells"));
        let mut paths: Vec<PathBuf> = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
        paths.sort();
        for path in paths {
            let damaged = || format!("`{}` is damaged; remove it", path.display());
            let record: Record =
                serde_json::from_str(&fs::read_to_string(&path)?).with_context(damaged)?;
            if !comparison.grid.holds(&record.cell) {
                continue;
            }
            let recipe = record.cell.recipe(&self.common, &self.config)?;
            ensure!(
                record.results.fingerprint == crate::fingerprint(&(&recipe, &comparison.inputs))?,
                "`{}` was made with another model or other settings; remove it, or give another \
                 `--out`",
                path.display()
            );
            comparison.records.push(record);
        }
        Ok(())
    }

    /// Runs the cells that are missing; true if all are done.
    fn all(&self, cells: Vec<Cell>) -> Result<bool> {
        let jobs: Vec<Job<Cell>> = {
            let comparison = self.lock()?;
            let done = |cell: &Cell| comparison.records.iter().any(|r| r.cell == *cell);
            let missing = cells.into_iter().filter(|cell| !done(cell));
            let job = |cell: Cell| {
                Ok(Job {
                    id: cell.id(),
                    recipe: cell.recipe(&self.common, &self.config)?,
                    cell,
                })
            };
            missing.map(job).collect::<Result<_>>()?
        };
        self.runner
            .all(jobs, &|job, finished| self.keep(job, finished))
    }

    fn keep(&self, job: &Job<Cell>, finished: Finished) -> Result<()> {
        let record = Record {
            cell: job.cell.clone(),
            active_parameters: Active {
                before: self.config.active_parameters(),
                after: finished.active,
            },
            validation: finished.validation,
            date: machine::today(),
            processor: machine::processor(),
            threads: self.threads,
            results: finished.results,
        };
        write_json(&self.cell_path(&job.id), &record)?;
        self.lock()?.records.push(record);
        Ok(())
    }

    /// Writes `compare.json` and what is made from it.
    fn write(&self) -> Result<()> {
        let mut comparison = self.lock()?;
        comparison.records.sort_by_key(|r| r.cell.id());
        for (name, text) in [
            ("compare.json", comparison.to_json()?),
            ("compare.md", table::markdown(&comparison)),
            ("compare.csv", table::csv(&comparison)),
            ("index.html", page::html(&comparison)?),
        ] {
            folder::write_file(&self.out.join(name), text.as_bytes())?;
        }
        Ok(())
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(folder::write_file(path, (text + "\n").as_bytes())?)
}
