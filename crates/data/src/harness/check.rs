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
    let is_drawn = generation.sampling().is_some();
    if !is_drawn && (generation.temperature.is_some_and(|t| t != 0.0) || generation.top_p.is_some())
    {
        return Err(format!(
            "`{name}` has a `temperature` or `top_p` for greedy answers; add `do_sample: true`, or \
             leave them out"
        ));
    }
    let is_share = |p: f64| p > 0.0 && p <= 1.0;
    if generation
        .temperature
        .is_some_and(|t| !t.is_finite() || t < 0.0)
        || generation.top_p.is_some_and(|p| !is_share(p))
    {
        return Err(format!(
            "`{name}` has a `temperature` below 0, or a `top_p` that is no share above 0; correct it"
        ));
    }
    if task.repeats() == 0 || task.repeats() > 1 && !is_drawn {
        return Err(format!(
            "`{name}` has `repeats` {}; greedy answers are all the same, so use 1, or sampled ones \
             (`do_sample: true` and a `temperature`)",
            task.repeats()
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
