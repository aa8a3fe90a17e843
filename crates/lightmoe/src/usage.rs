//! `lightmoe bench usage`: how good the built-in model is at each task, and how its experts share
//! the work between tasks.

use crate::calibration::Calibration;
use crate::cli::UsageArgs;
use crate::pipeline::{Observing, evaluate_stage, observe_samples};
use crate::results::{Score, digits};
use crate::source::{BUILT_IN, TaskData, open_model};
use anyhow::Result;

use lightmoe_compress::observations::Observations;
use lightmoe_data::Task;
use lightmoe_models::{ModelTokenizer, folder::write_file};
use std::fmt::Write;

/// Training tokens observed of each task.
const TOKENS: usize = 1 << 15;
/// Test items of each task.
const ITEMS: usize = 500;
/// Longest sequence.
const LENGTH: usize = 512;

/// Observes and evaluates the built-in model on every task and writes the page.
///
/// # Errors
/// If the model cannot be read or the page cannot be written.
pub fn run(args: UsageArgs) -> Result<String> {
    let checkpoint = open_model(BUILT_IN)?;
    let tokenizer = ModelTokenizer::load(checkpoint.dir(), checkpoint.config().eos_token_id)?;
    let mut scores = Vec::new();
    let mut seen = Vec::new();
    let folder = tempfile::tempdir()?;
    for task in Task::ALL {
        let data = TaskData::built_in(task, 4000, ITEMS, 0);
        let encoded = data.train.encoded(&tokenizer, LENGTH)?;
        let found = Calibration::first(&encoded, TOKENS).checked(&checkpoint)?;
        let path = folder.path().join("observations.safetensors");
        observe_samples(
            &checkpoint,
            &found.samples,
            &Observing::default(),
            "usage",
            &path,
        )?;
        seen.push(Observations::load(&path)?);
        let all = evaluate_stage("evaluate", &checkpoint, &data, &data.test, LENGTH, None)?;
        scores.push(all.into_values().next().unwrap_or_default());
    }
    let mut page = format!(
        "# The built-in model\n\nWritten by `cargo xtask bench usage` on {}; `fixtures/olmoe-nano` was \
         made by `cargo xtask pretrain` with the recipe `fixtures/olmoe-nano.toml`. The first three \
         tasks are part of its pre-training, the last two are not.\n\n## Scores\n\n",
        crate::machine::today()
    );
    scores_table(&mut page, &scores);
    for (title, text, value) in [
        (
            "Entropy of the gate mass",
            "Per layer and task, as a share of the entropy of an even load: lower is more \
             specialised.",
            entropy as fn(&[f64]) -> f64,
        ),
        (
            "Experts that carry 80% of the gate mass",
            "Per layer and task; an even load would need four fifths of all.",
            busy,
        ),
    ] {
        // Writing to a string cannot fail.
        let _ = write!(page, "\n## {title}\n\n{text}\n\n");
        layers_table(&mut page, &seen, value);
    }
    page.push_str(
        "\n## Likeness of tasks\n\nCosine between the gate mass of two tasks, the mean over layers: \
         1 is the same experts, 0 is no expert in common.\n\n",
    );
    likeness_table(&mut page, &seen);
    write_file(&args.table, page.as_bytes())?;
    Ok(args.table.display().to_string())
}

fn names(page: &mut String, first: &str) {
    let names = Task::ALL.map(|t| t.to_string()).join(" | ");
    let _ = writeln!(
        page,
        "| {first} | {names} |\n|---|{}",
        "---|".repeat(Task::ALL.len())
    );
}

fn scores_table(page: &mut String, scores: &[std::collections::BTreeMap<String, Score>]) {
    names(page, "metric");
    for metric in ["exact_match", "answer_nll", "acc", "chrf"] {
        let cells: Vec<String> = scores
            .iter()
            .map(|s| s.get(metric).map_or("–".into(), |s| s.show(digits(metric))))
            .collect();
        let _ = writeln!(page, "| {metric} | {} |", cells.join(" | "));
    }
}

fn layers_table(page: &mut String, seen: &[Observations], value: fn(&[f64]) -> f64) {
    names(page, "layer");
    for l in 0..seen.first().map_or(0, |s| s.layers.len()) {
        let cells: Vec<String> = seen
            .iter()
            .map(|s| format!("{:.2}", value(&s.layers[l].importance())))
            .collect();
        let _ = writeln!(
            page,
            "| {} | {} |",
            seen[0].layers[l].layer,
            cells.join(" | ")
        );
    }
}

fn likeness_table(page: &mut String, seen: &[Observations]) {
    names(page, "task");
    for (task, a) in Task::ALL.iter().zip(seen) {
        let cells: Vec<String> = seen
            .iter()
            .map(|b| {
                let pairs = a.layers.iter().zip(&b.layers);
                let sum: f64 = pairs
                    .map(|(a, b)| cosine(&a.importance(), &b.importance()))
                    .sum();
                format!("{:.2}", sum / a.layers.len() as f64)
            })
            .collect();
        let _ = writeln!(page, "| {task} | {} |", cells.join(" | "));
    }
}

fn entropy(share: &[f64]) -> f64 {
    let sum: f64 = share
        .iter()
        .filter(|p| **p > 0.0)
        .map(|p| -p * p.ln())
        .sum();
    sum / (share.len() as f64).ln()
}

fn busy(share: &[f64]) -> f64 {
    let mut sorted = share.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let mut sum = 0.0;
    let count = sorted.iter().take_while(|p| {
        let more = sum < 0.8;
        sum += **p;
        more
    });
    count.count() as f64
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_and_single_loads_are_the_ends_of_the_scale() {
        let (even, one) = ([0.25; 4], [1.0, 0.0, 0.0, 0.0]);
        assert!((entropy(&even) - 1.0).abs() < 1e-12 && entropy(&one) == 0.0);
        assert_eq!((busy(&even), busy(&one)), (4.0, 1.0));
        assert!((cosine(&even, &even) - 1.0).abs() < 1e-12);
        assert!((cosine(&even, &one) - 0.5).abs() < 1e-12);
    }
}
