//! Which model a run ends with: the recovered one, or the better of that and the built one.

use crate::pipeline::mean_nll;
use crate::results::Stage;
use crate::source::TaskData;
use anyhow::{Context, Result};
use lightmoe_models::Checkpoint;
use lightmoe_models::folder::{PartialFolder, write_file};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

/// What a run ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The recovered model.
    Recovered,
    /// The recovered model, if the answers of the validation examples (or the text of the validation
    /// split) are likelier to it than to the built one; else that.
    Better,
}

/// Which model was kept, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Kept {
    /// The state of the model that the run ended with.
    pub model: Stage,
    /// Mean NLL on the validation examples or text, nats a token: of the built model; null if it gives no
    /// numbers.
    pub built_nll: Option<f64>,
    /// The same of the recovered model.
    pub recovered_nll: Option<f64>,
}

impl Kept {
    /// Reads what [`keep_better`] wrote; `None` where nothing was to be chosen.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn load(record: &Path) -> Result<Option<Self>> {
        if !record.exists() {
            return Ok(None);
        }
        let text = fs::read(record)?;
        let kept = serde_json::from_slice(&text);
        kept.map(Some)
            .with_context(|| format!("`{}` is damaged; run again", record.display()))
    }
}

/// Puts the better of the models `built` and `recovered` in the place `model`, and writes the choice to
/// `record`.
///
/// # Errors
/// If one cannot be scored or moved, or the work was stopped.
pub fn keep_better(
    [built, recovered, model, record]: [&Path; 4],
    data: &TaskData,
    max_length: usize,
) -> Result<()> {
    let forget = |path: &Path| match path.exists() {
        true => {
            fs::remove_dir_all(path).with_context(|| format!("cannot remove `{}`", path.display()))
        }
        false => Ok(()),
    };
    // A run that was killed behind the choice: the model comes as a whole.
    if model.exists() {
        return forget(recovered);
    }
    let nll = |path: &Path| mean_nll(&Checkpoint::open(path)?, &data.validation, max_length);
    let (before, after) = (nll(built)?, nll(recovered)?);
    let kept = Kept {
        model: if after < before {
            Stage::Recovered
        } else {
            Stage::Built
        },
        built_nll: before.is_finite().then_some(before),
        recovered_nll: after.is_finite().then_some(after),
    };
    write_file(record, &serde_json::to_vec_pretty(&kept)?)?;
    if kept.model == Stage::Recovered {
        return fs::rename(recovered, model)
            .with_context(|| format!("cannot move the model to `{}`", model.display()));
    }
    let mut folder = PartialFolder::new(model)?;
    let entries = fs::read_dir(built)
        .with_context(|| format!("cannot read the model `{}`", built.display()))?;
    for entry in entries {
        let path = entry?.path();
        let target = folder.path().join(path.file_name().unwrap_or_default());
        fs::copy(&path, &target).with_context(|| format!("cannot copy `{}`", path.display()))?;
    }
    folder.commit()?;
    forget(recovered)
}
