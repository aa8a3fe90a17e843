//! The run folder: which stages are done, how long they took, and what they depended on.
//!
//! A stage is done when `run.json` says so, and `run.json` is written, atomically, after the
//! stage's artefact stands in its place. A run killed in between does that stage again and, because
//! every stage is a function of its inputs, gets the same bytes.

use crate::machine;
use crate::recipe::Recipe;
use crate::results::TaskScores;
use anyhow::{Context, Result, bail, ensure};
use lightmoe_models::folder::write_file;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What a run depends on besides its recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Inputs {
    /// A hash of the model's content.
    pub model: String,
    /// A hash of the data to train, calibrate and test on.
    pub data: String,
    /// The program's version.
    pub lightmoe: String,
}

impl Inputs {
    /// What the run in the folder `dir` depended on; `None` where its `run.json` is gone.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn of(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("run.json");
        Ok(match path.exists() {
            true => Some(State::load(&path)?.inputs),
            false => None,
        })
    }

    /// Refuses other inputs than these, naming what differs.
    ///
    /// # Errors
    /// If they differ.
    pub fn same_as(&self, earlier: &Self) -> Result<()> {
        let parts = [
            ("model", &earlier.model, &self.model),
            ("training or calibration data", &earlier.data, &self.data),
            ("version of lightmoe", &earlier.lightmoe, &self.lightmoe),
        ];
        for (what, then, now) in parts {
            ensure!(
                then == now,
                "the {what} changed since the run began ({then} → {now}); give another `--out`"
            );
        }
        Ok(())
    }
}

/// A finished stage.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Done {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Highest resident memory while it ran, in bytes.
    pub peak_rss_bytes: u64,
    /// Scores by task and metric, where the stage evaluates.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub scores: Option<TaskScores>,
}

/// The whole of `run.json`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct State {
    /// What the run depends on besides its recipe.
    inputs: Inputs,
    /// Finished stages by name.
    stages: BTreeMap<String, Done>,
}

impl State {
    fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read `{}`", path.display()))?;
        serde_json::from_str(&text).with_context(|| {
            format!(
                "`{}` is damaged; remove the folder and start again",
                path.display()
            )
        })
    }
}

/// An open run folder.
pub struct Run {
    dir: PathBuf,
    state: State,
}

impl Run {
    /// Begins a run in `dir`, or goes on with the one that stands there if `resume`.
    ///
    /// # Errors
    /// If the folder holds something else, or a run with another recipe, model, data or version: the
    /// message names what differs.
    pub fn open(dir: &Path, recipe: &Recipe, inputs: Inputs, resume: bool) -> Result<Self> {
        let (recipe_path, state_path) = (dir.join("recipe.toml"), dir.join("run.json"));
        let begun = recipe_path.exists();
        if begun && resume {
            recipe.same_as(&Recipe::load(&recipe_path)?)?;
            let mut state = State {
                inputs: inputs.clone(),
                stages: BTreeMap::new(),
            };
            if state_path.exists() {
                state = State::load(&state_path)?;
            }
            inputs.same_as(&state.inputs)?;
            return Ok(Self {
                dir: dir.to_owned(),
                state,
            });
        }
        if begun {
            bail!(
                "`{}` holds a run already; go on with it by `--resume`, or give another `--out`",
                dir.display()
            );
        }
        ensure!(
            !occupied(dir)?,
            "`{}` is not empty and holds no run; give another `--out`",
            dir.display()
        );
        let run = Self {
            dir: dir.to_owned(),
            state: State {
                inputs,
                stages: BTreeMap::new(),
            },
        };
        write_file(&recipe_path, recipe.to_toml()?.as_bytes())?;
        run.save()?;
        Ok(run)
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The finished stages.
    pub fn stages(&self) -> &BTreeMap<String, Done> {
        &self.state.stages
    }

    /// Runs `work` unless the stage is done.
    ///
    /// # Errors
    /// What `work` brings.
    pub fn stage(&mut self, name: &str, work: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        self.scored(name, |run| work(run).map(|()| None))
            .map(|_| ())
    }

    /// As [`Run::stage`], for a stage that evaluates; returns its scores.
    ///
    /// # Errors
    /// What `work` brings.
    pub fn scored(
        &mut self,
        name: &str,
        work: impl FnOnce(&Self) -> Result<Option<TaskScores>>,
    ) -> Result<Option<TaskScores>> {
        if let Some(done) = self.state.stages.get(name) {
            tracing::info!(stage = name, "done before");
            return Ok(done.scores.clone());
        }
        let _span = tracing::info_span!("stage", name).entered();
        machine::reset_peak();
        let begin = Instant::now();
        let scores = work(self)?;
        let done = Done {
            seconds: begin.elapsed().as_secs_f64(),
            peak_rss_bytes: machine::peak(),
            scores: scores.clone(),
        };
        self.state.stages.insert(name.to_owned(), done);
        self.save()?;
        Ok(scores)
    }

    /// Takes a stage as done that another run did on the same inputs; its artefact must stand in its
    /// place.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn adopt(&mut self, name: &str, done: Done) -> Result<()> {
        self.state.stages.insert(name.to_owned(), done);
        self.save()
    }

    fn save(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.state)?;
        Ok(write_file(
            &self.dir.join("run.json"),
            (text + "\n").as_bytes(),
        )?)
    }
}

/// Whether something other than the leftovers of a killed write lies in the folder.
pub(crate) fn occupied(dir: &Path) -> Result<bool> {
    if !dir.exists() {
        return Ok(false);
    }
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot read `{}`", dir.display()))?;
    Ok(entries
        .flatten()
        .any(|e| !e.file_name().to_string_lossy().starts_with('.')))
}
