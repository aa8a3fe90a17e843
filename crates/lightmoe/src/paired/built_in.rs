//! What `compress` and `evaluate` leave of the built-in tasks, of records and of text.

use super::evaluation::{
    Evaluation, Item, ItemValue, Key, Recorded, TaskItems, read_lines, refused,
};
use crate::preflight::Refused;
use crate::results::{Results, Score, Stage, TaskScores, lower_is_better};
use anyhow::Result;
use lightmoe_data::harness::MetricConfig;
use lightmoe_eval::Sample;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// A run folder's `results.json`: the scores of one stage, the last one if none is named.
pub(super) fn of_run(file: &Path, stage: Option<&str>) -> Result<Evaluation> {
    let results = Results::load(file).map_err(Refused::of)?;
    let stages = || results.stages.keys().map(|stage| stage.name());
    let stage = match stage {
        None => results.stages.keys().next_back().copied(),
        Some(name) => Stage::ALL
            .into_iter()
            .find(|stage| stage.name() == name && results.stages.contains_key(stage)),
    };
    let stage = stage.ok_or_else(|| {
        let known: Vec<&str> = stages().collect();
        refused(
            file,
            format!("it has no such stage; it has {}", known.join(", ")),
        )
    })?;
    let logs = file.with_file_name("logs");
    let mut tasks = BTreeMap::new();
    for (task, scores) in &results.stages[&stage] {
        let samples = logs.join(format!("samples_{task}_{}.jsonl", stage.name()));
        tasks.insert(task.clone(), task_items(scores, &samples)?);
    }
    Ok(Evaluation {
        path: file.to_owned(),
        model: format!("{}, {}", results.model, stage.name()),
        tasks,
        groups: BTreeMap::new(),
    })
}

/// What `evaluate --out FILE.json` wrote, with the samples beside it.
pub(super) fn of_scores(file: &Path, scores: &Value) -> Result<Evaluation> {
    let scores: TaskScores = serde_json::from_value(scores.clone()).map_err(|e| {
        refused(
            file,
            format!("it holds no scores ({e}); give what `evaluate --out` wrote"),
        )
    })?;
    let mut tasks = BTreeMap::new();
    for (task, scores) in scores {
        let items = task_items(&scores, &file.with_extension("samples.jsonl"))?;
        tasks.insert(task, items);
    }
    let name = file.file_stem().unwrap_or(file.as_os_str());
    Ok(Evaluation {
        path: file.to_owned(),
        model: name.to_string_lossy().into_owned(),
        tasks,
        groups: BTreeMap::new(),
    })
}

fn task_items(scores: &BTreeMap<String, Score>, samples: &Path) -> Result<TaskItems> {
    let recorded = scores.iter().map(|(metric, score)| {
        let key = Key {
            metric: metric.clone(),
            filter: String::new(),
        };
        let recorded = Recorded {
            value: score.value,
            stderr: (score.n > 1).then_some(score.stderr),
            higher_is_better: Some(!lower_is_better(metric)),
        };
        (key, recorded)
    });
    let items = read_lines::<Sample>(samples)?.into_iter().map(item);
    Ok(TaskItems {
        conditions: Vec::new(),
        // Its options are the defaults.
        metrics: BTreeMap::from([(
            "chrf".to_owned(),
            MetricConfig {
                metric: "chrf".into(),
                ..MetricConfig::default()
            },
        )]),
        scores: recorded.collect(),
        items: BTreeMap::from([(String::new(), items.collect::<Result<_>>()?)]),
    })
}

fn item(sample: Sample) -> Result<Item> {
    let is = |holds: bool| ItemValue::One(f64::from(u8::from(holds)));
    let mut values = BTreeMap::from([
        ("answer_nll".to_owned(), ItemValue::One(sample.nll)),
        ("exact_match".to_owned(), is(sample.exact_match)),
    ]);
    // Those of text are of all tokens together.
    let (tokens, bytes) = (sample.answer_tokens as f64, sample.target.len() as f64);
    let total = tokens * sample.nll;
    for (metric, value) in [
        ("nll", ItemValue::Of(total, tokens)),
        ("perplexity", ItemValue::Of(-total, tokens)),
        ("bits_per_byte", ItemValue::Of(-total, bytes)),
    ] {
        values.insert(metric.to_owned(), value);
    }
    if let Some(right) = sample.right_choice {
        values.insert("acc".into(), is(sample.choice == Some(right)));
        values.insert("acc_norm".into(), is(sample.choice_norm == Some(right)));
    }
    if let Some(answer) = sample.prediction.clone() {
        let references = vec![sample.target.clone()];
        values.insert("chrf".into(), ItemValue::Texts { answer, references });
    }
    let prompt = crate::fingerprint(&sample.prompt)?;
    Ok(Item {
        id: sample.index as u64,
        content: crate::fingerprint(&(&sample.prompt, &sample.target))?,
        prompt,
        values,
        response: json!(sample.prediction),
        shown: Map::from_iter([
            ("prompt".to_owned(), sample.prompt.into()),
            ("target".to_owned(), sample.target.into()),
        ]),
    })
}
