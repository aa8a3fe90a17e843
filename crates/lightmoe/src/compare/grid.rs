//! The cells of a comparison.

use super::variant::{Variant, check_common};
use crate::cli::CompareArgs;
use crate::recipe::Recipe;
use crate::settings::Settings;
use anyhow::{Result, ensure};
use lightmoe_compress::methods::Kind;
use lightmoe_data::Task;
use lightmoe_models::ModelConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Grid {
    /// The methods.
    pub methods: Vec<Variant>,
    /// The shares of all parameters to save, ascending.
    pub ratios: Vec<f64>,
    /// The built-in tasks; `null` for the user's own data.
    pub tasks: Vec<Option<Task>>,
    /// Seeds from 0.
    pub seeds: u64,
    /// The learning rates to choose from; one is no choice, none leaves it to the recipe.
    pub rates: Vec<f64>,
}

/// One compression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Cell {
    /// The method.
    pub method: Variant,
    /// The built-in task; null for the user's own data.
    pub task: Option<Task>,
    /// The share of all parameters to save; null for LoRA, which saves nothing.
    pub ratio: Option<f64>,
    /// The seed of every random choice.
    pub seed: u64,
    /// The highest learning rate; null for the recipe's.
    pub lr: Option<f64>,
}

impl Cell {
    /// A name that no other cell has.
    pub fn id(&self) -> String {
        let (task, method) = (task_name(self.task), self.method.file_name());
        let ratio = self.ratio.map_or(String::new(), |r| format!("-{r}"));
        let lr = self.lr.map_or(String::new(), |lr| format!("-lr{lr}"));
        format!("{task}-{method}{ratio}-seed{}{lr}", self.seed)
    }

    /// The recipe of the compression, whose other settings are those `common` to all cells.
    ///
    /// # Errors
    /// If it cannot work for the model of `config`; the method is named.
    pub fn recipe(&self, common: &Settings, config: &ModelConfig) -> Result<Recipe> {
        let own = Settings {
            task: self.task.map(|t| t.to_string()),
            ratio: self.ratio,
            seed: Some(self.seed),
            lr: self.lr,
            // The folder of a cell goes, and its report with it.
            contrast_tokens: Some(0),
            ..Settings::default()
        };
        let settings = own.or(self.method.settings.clone()).or(common.clone());
        Recipe::resolve(settings, config).map_err(|e| e.context(format!("`{}`", self.method)))
    }
}

/// The name of a task in tables.
pub fn task_name(task: Option<Task>) -> String {
    task.map_or("records".to_owned(), |t| t.to_string())
}

impl Grid {
    /// The grid that the arguments ask for, beside the settings common to its cells.
    ///
    /// # Errors
    /// If something is wrong, missing or twice there.
    pub fn of(args: &CompareArgs, common: &Settings) -> Result<Self> {
        check_common(common)?;
        let tasks: Vec<Option<Task>> = match (&args.tasks[..], &common.train) {
            ([], Some(_)) => vec![None],
            ([], None) => Task::ALL.map(Some).to_vec(),
            (names, _) => names
                .iter()
                .map(|name| Ok(Some(name.parse()?)))
                .collect::<Result<_>>()?,
        };
        let mut grid = Self {
            methods: Variant::list(&args.methods)?,
            ratios: args.ratios.clone(),
            tasks,
            seeds: args.seeds,
            rates: args.rates.clone(),
        };
        grid.ratios.sort_by(f64::total_cmp);
        ensure!(grid.seeds > 0, "`--seeds` is 0; give at least 1");
        ensure!(
            !grid.ratios.is_empty(),
            "`--ratios` is empty; give at least one"
        );
        for rate in &grid.rates {
            ensure!(
                *rate > 0.0 && rate.is_finite(),
                "`--rates` has {rate}; give numbers above 0"
            );
        }
        once("--methods", &grid.methods)?;
        once("--ratios", &grid.ratios)?;
        once("--tasks", &grid.tasks)?;
        once("--rates", &grid.rates)?;
        Ok(grid)
    }

    /// The rows: each method at each ratio, those that keep all experts once.
    pub fn rows(&self) -> Vec<(&Variant, Option<f64>)> {
        let rows = self.methods.iter().flat_map(|method| {
            let ratios = match method.method.kind() {
                Kind::Keep => vec![None],
                _ => self.ratios.iter().copied().map(Some).collect(),
            };
            ratios.into_iter().map(move |ratio| (method, ratio))
        });
        rows.collect()
    }

    /// Whether the learning rate of `method` is chosen on the validation split.
    pub fn is_searched(&self, method: &Variant) -> bool {
        self.rates.len() > 1 && method.settings.lr.is_none()
    }

    /// The cells between which a learning rate is chosen: at the highest ratio, seed 0.
    pub fn search(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for &task in &self.tasks {
            for method in self.methods.iter().filter(|m| self.is_searched(m)) {
                cells.extend(self.candidates(method, task));
            }
        }
        cells
    }

    /// The cells of one choice of a learning rate.
    pub fn candidates(&self, method: &Variant, task: Option<Task>) -> Vec<Cell> {
        let highest = self.rows().into_iter().rev().find(|row| row.0 == method);
        let cell = |&lr| Cell {
            method: method.clone(),
            task,
            ratio: highest.and_then(|row| row.1),
            seed: 0,
            lr: Some(lr),
        };
        self.rates.iter().map(cell).collect()
    }

    /// All cells, seed by seed and the highest ratio first, which tells most, at the learning rate that `rate` knows of a method and task; without
    /// one, they are left out.
    pub fn cells(&self, rate: &dyn Fn(&Variant, Option<Task>) -> Rate) -> Vec<Cell> {
        let mut cells = Vec::new();
        let mut rows = self.rows();
        rows.sort_by(|a, b| b.1.unwrap_or(0.0).total_cmp(&a.1.unwrap_or(0.0)));
        for seed in 0..self.seeds {
            for &(method, ratio) in &rows {
                for &task in &self.tasks {
                    if let Rate::Known(lr) = rate(method, task) {
                        cells.push(Cell {
                            method: method.clone(),
                            task,
                            ratio,
                            seed,
                            lr,
                        });
                    }
                }
            }
        }
        cells
    }

    /// Whether a cell is one of this grid, at whatever learning rate.
    pub fn holds(&self, cell: &Cell) -> bool {
        self.rows().contains(&(&cell.method, cell.ratio))
            && self.tasks.contains(&cell.task)
            && cell.seed < self.seeds
    }
}

/// The learning rate of a method on a task.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rate {
    /// This one; `None` for the recipe's.
    Known(Option<f64>),
    /// The cells to choose it by are not all done.
    Open,
}

fn once<T: PartialEq + Serialize>(flag: &str, list: &[T]) -> Result<()> {
    for (i, item) in list.iter().enumerate() {
        ensure!(
            !list[..i].contains(item),
            "`{flag}` has {} twice; keep one",
            serde_json::to_string(item)?
        );
    }
    Ok(())
}
