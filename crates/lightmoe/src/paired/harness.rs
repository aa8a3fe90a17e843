//! The layout of lm-evaluation-harness, in which `evaluate --tasks` writes, too.

use super::evaluation::{
    Evaluation, GroupScores, Item, ItemValue, Key, Recorded, TaskItems, read_lines, refused,
};
use anyhow::Result;
use lightmoe_data::harness::{MetricConfig, python};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// What of a sample is not a metric's.
const CONTENT: &str = "doc_hash";

/// Reads scores and, from the files beside them, samples.
pub(super) fn read(file: &Path, scores: &Value) -> Result<Evaluation> {
    let table = object(file, scores, "results")?;
    let subtasks = scores.get("group_subtasks").and_then(Value::as_object);
    let members = |name: &str| -> Vec<&str> {
        let list = subtasks.and_then(|groups| groups.get(name)?.as_array());
        list.into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect()
    };
    let (mut tasks, mut groups) = (BTreeMap::new(), BTreeMap::new());
    for (name, row) in table {
        let directions = scores
            .pointer("/higher_is_better")
            .and_then(|all| all.get(name));
        let recorded = recorded(row, directions);
        if members(name).is_empty() {
            // A task that an interruption left without a document has no scores.
            if !recorded.is_empty() {
                let task = TaskItems {
                    conditions: conditions(scores, name),
                    metrics: metrics(scores, name),
                    items: items(file, name, &recorded)?,
                    scores: recorded,
                };
                tasks.insert(name.clone(), task);
            }
        } else if !recorded.is_empty() {
            let group = GroupScores {
                tasks: leaves(name, &members),
                scores: recorded,
            };
            groups.insert(name.clone(), group);
        }
    }
    let model = ["model_name", "model_source"].map(|key| scores.get(key).and_then(Value::as_str));
    Ok(Evaluation {
        path: file.to_owned(),
        model: model
            .into_iter()
            .flatten()
            .next()
            .unwrap_or("unknown")
            .to_owned(),
        tasks,
        groups,
    })
}

fn object<'a>(file: &Path, of: &'a Value, key: &str) -> Result<&'a Map<String, Value>> {
    of.get(key)
        .and_then(Value::as_object)
        .ok_or_else(|| refused(file, format!("`{key}` is no table; evaluate again")))
}

/// The tasks of a group and of the groups in it, once each.
fn leaves<'a>(name: &str, members: &impl Fn(&str) -> Vec<&'a str>) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    // A group within itself would have no end.
    let mut seen = vec![name.to_owned()];
    let mut open = members(name);
    while let Some(member) = open.pop() {
        if seen.iter().any(|name| name == member) {
            continue;
        }
        seen.push(member.to_owned());
        match members(member) {
            none if none.is_empty() => found.push(member.to_owned()),
            inner => open.extend(inner),
        }
    }
    found.sort();
    found
}

/// The scores of a row: `<metric>,<filter>` and `<metric>_stderr,<filter>`.
fn recorded(row: &Value, directions: Option<&Value>) -> BTreeMap<Key, Recorded> {
    let mut all = BTreeMap::new();
    for (key, value) in row.as_object().into_iter().flatten() {
        let (Some((metric, filter)), Some(value)) = (key.split_once(','), value.as_f64()) else {
            continue;
        };
        if metric.ends_with("_stderr") {
            continue;
        }
        let stderr = row.get(format!("{metric}_stderr,{filter}"));
        let key = Key {
            metric: metric.to_owned(),
            filter: filter.to_owned(),
        };
        let recorded = Recorded {
            value,
            stderr: stderr.and_then(Value::as_f64),
            higher_is_better: directions.and_then(|all| all.get(metric)?.as_bool()),
        };
        all.insert(key, recorded);
    }
    all
}

/// What else than the model may make a difference.
fn conditions(scores: &Value, task: &str) -> Vec<(&'static str, Value)> {
    let of_task = [
        ("version", "versions"),
        ("number of few-shot examples", "n-shot"),
    ];
    let of_all = [
        ("most tokens read at once", "max_length"),
        ("chat template", "chat_template_sha"),
        ("system instruction", "system_instruction_sha"),
    ];
    let of_task = of_task.map(|(what, key)| (what, scores.get(key).and_then(|all| all.get(task))));
    let of_all = of_all.map(|(what, key)| (what, scores.get(key)));
    let known = of_task.into_iter().chain(of_all);
    known
        .map(|(what, value)| (what, value.cloned().unwrap_or_default()))
        .collect()
}

/// What a task says of its metrics, as far as it can be read.
fn metrics(scores: &Value, task: &str) -> BTreeMap<String, MetricConfig> {
    let configs = scores.get("configs").and_then(|all| all.get(task));
    let list = configs.and_then(|config| config.get("metric_list")?.as_array());
    let known = list.into_iter().flatten().filter_map(|metric| {
        let config = serde_json::from_value::<MetricConfig>(metric.clone()).ok()?;
        Some((config.metric.clone(), config))
    });
    known.collect()
}

/// The samples of a task: beside `results<date>.json` they lie in `samples_<task><date>.jsonl`.
fn items(
    file: &Path,
    task: &str,
    recorded: &BTreeMap<Key, Recorded>,
) -> Result<BTreeMap<String, Vec<Item>>> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let date = stem.strip_prefix("results").unwrap_or_default();
    let path = file.with_file_name(format!("samples_{task}{date}.jsonl"));
    let metrics: Vec<&str> = recorded.keys().map(|key| key.metric.as_str()).collect();
    let mut items: BTreeMap<String, Vec<Item>> = BTreeMap::new();
    for (number, mut sample) in read_lines::<Map<String, Value>>(&path)?
        .into_iter()
        .enumerate()
    {
        let missing = |key: &str| {
            let number = number + 1;
            refused(
                &path,
                format!("line {number} has no `{key}`; evaluate again"),
            )
        };
        let text = |key: &str| sample.get(key).and_then(Value::as_str);
        let id = sample.get("doc_id").and_then(Value::as_u64);
        let (id, doc) = (
            id.ok_or_else(|| missing("doc_id"))?,
            text(CONTENT).ok_or_else(|| missing(CONTENT))?,
        );
        let content = format!("{doc} {}", text("target_hash").unwrap_or_default());
        let prompt = text("prompt_hash").unwrap_or_default().to_owned();
        let filter = text("filter").unwrap_or("none").to_owned();
        let values = metrics.iter().filter_map(|metric| {
            let value = item_value(sample.get(*metric)?)?;
            Some(((*metric).to_owned(), value))
        });
        let item = Item {
            id,
            content,
            prompt,
            values: values.collect(),
            response: sample.remove("filtered_resps").unwrap_or_default(),
            shown: ["doc", "target"]
                .into_iter()
                .filter_map(|key| Some((key.to_owned(), sample.remove(key)?)))
                .collect(),
        };
        items.entry(filter).or_default().push(item);
    }
    Ok(items)
}

/// A number, two, or the texts that a metric of a corpus counts in: of what is more the harness keeps no
/// number for an item alone.
fn item_value(value: &Value) -> Option<ItemValue> {
    match value {
        Value::Bool(is) => Some(ItemValue::One(f64::from(u8::from(*is)))),
        Value::Number(number) => number.as_f64().map(ItemValue::One),
        Value::Array(pair) => match pair.as_slice() {
            [Value::Number(sum), Value::Number(units)] => {
                Some(ItemValue::Of(sum.as_f64()?, units.as_f64()?))
            }
            [target, answer] => Some(ItemValue::Texts {
                answer: texts(answer).into_iter().next()?,
                references: texts(target),
            }),
            _ => None,
        },
        _ => None,
    }
}

/// One text or several.
fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::Array(list) => list.iter().map(python::text_of).collect(),
        one => vec![python::text_of(one)],
    }
}
