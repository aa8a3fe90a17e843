//! Which model a run ends with: the recovered one, or the better of that and the built one.

use crate::pipeline::evaluate_stage;
use crate::source::TaskData;
use anyhow::{Context, Result};
use lightmoe_models::Checkpoint;
use lightmoe_models::folder::PartialFolder;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

/// What a run ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The recovered model.
    Recovered,
    /// The recovered model, if its answers on the validation examples are likelier than those of the
    /// built one; else that.
    Better,
}

/// Puts the better of the models `built` and `recovered` in the place `model`.
///
/// # Errors
/// If one cannot be scored or moved, or the work was stopped.
pub fn keep_better(
    built: &Path,
    recovered: &Path,
    model: &Path,
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
    let nll = |path: &Path| -> Result<f64> {
        let checkpoint = Checkpoint::open(path)?;
        let examples = &data.validation;
        let scores = evaluate_stage("validation", &checkpoint, data, examples, max_length, None)?;
        let score = scores.get(&data.name).and_then(|s| s.get("answer_nll"));
        Ok(score.context("the validation gave no answer NLL")?.value)
    };
    let (before, after) = (nll(built)?, nll(recovered)?);
    tracing::info!(
        built = before,
        recovered = after,
        "answer NLL on validation"
    );
    if after < before {
        return fs::rename(recovered, model)
            .with_context(|| format!("cannot move the model to `{}`", model.display()));
    }
    let mut folder = PartialFolder::new(model)?;
    for entry in fs::read_dir(built)? {
        let path = entry?.path();
        let target = folder.path().join(path.file_name().unwrap_or_default());
        fs::copy(&path, &target).with_context(|| format!("cannot copy `{}`", path.display()))?;
    }
    folder.commit()?;
    forget(recovered)
}
