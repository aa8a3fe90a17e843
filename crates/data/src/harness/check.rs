//! What must hold of a task before anything is read for it.

use super::config::{OutputType, TaskConfig};

/// Whether a task can be run at all.
///
/// # Errors
/// What is missing or cannot work, and what to do.
pub(super) fn check_task(task: &TaskConfig) -> Result<(), String> {
    let name = task.name();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || !name.chars().all(is_plain) {
        return Err(format!(
            "`task` is `{name}`; name the task with letters, digits, `_`, `-` and `.`, for files are \
             named after it"
        ));
    }
    let needs = |key: &str, is_there: bool| match is_there {
        true => Ok(()),
        false => Err(format!(
            "`{name}` has no `{key}`, which its output type needs; add it"
        )),
    };
    needs(
        "test_split` or `validation_split",
        task.eval_split().is_some(),
    )?;
    needs(
        "data_files` or `dataset_path",
        task.data_files.is_some() || task.dataset_path.is_some(),
    )?;
    needs("doc_to_target", task.doc_to_target.is_some())?;
    if task.output_type() != OutputType::LoglikelihoodRolling {
        needs("doc_to_text", task.doc_to_text.is_some())?;
    }
    if task.output_type() == OutputType::MultipleChoice {
        needs("doc_to_choice", task.doc_to_choice.is_some())?;
    }
    let generation = task.generation();
    let sampled =
        generation.do_sample == Some(true) || generation.temperature.is_some_and(|t| t > 0.0);
    if sampled || task.repeats.is_some_and(|n| n != 1) {
        return Err(format!(
            "`{name}` asks for sampled answers; answers are greedy here, so leave out `repeats`, \
             `do_sample` and `temperature`"
        ));
    }
    if generation.max_gen_toks == Some(0) {
        return Err(format!(
            "`{name}` has `max_gen_toks` 0; allow 1 token or more"
        ));
    }
    match (task.stride, task.output_type()) {
        (None, _) => Ok(()),
        (Some(1..), OutputType::LoglikelihoodRolling) => Ok(()),
        (Some(_), _) => Err(format!(
            "`{name}` has a `stride`, which must be 1 or more and is for `loglikelihood_rolling` only"
        )),
    }
}
