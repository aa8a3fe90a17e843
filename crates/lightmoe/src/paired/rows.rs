//! Task by task and metric by metric: the same items in both evaluations, and what changed.

use super::evaluation::{Item, ItemValue, Key, TaskItems};
use super::way::Way;
use crate::preflight::Refused;
use anyhow::Result;
use lightmoe_eval::paired::{Difference, Flips};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Differences that chance brings about more rarely are clear.
const CLEAR: f64 = 0.05;

/// One line of the comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// The task or group.
    pub task: String,
    /// Of a group, the tasks that were put together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
    /// The metric.
    pub metric: String,
    /// The chain of filters before it; empty where there is none.
    pub filter: String,
    /// Items in both evaluations.
    pub items: usize,
    /// The scores on these items, and their difference; as they were written where the samples do not
    /// give them.
    #[serde(flatten)]
    pub difference: Difference,
    /// Whether more is better; null where that is not known.
    pub higher_is_better: Option<bool>,
    /// Items that changed; null where items are not right or wrong.
    pub flips: Option<Flips>,
    /// McNemar's exact two-sided test of the flips: the probability of at least so uneven ones by chance.
    /// Null for a group whose tasks count alike.
    pub mcnemar_p: Option<f64>,
    /// What follows.
    pub outcome: Outcome,
    /// What a reader should know before believing it.
    pub warnings: Vec<String>,
}

/// What a difference says of B.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is better than A.
    Better,
    /// It is worse than A.
    Worse,
    /// It differs from A, and which way is better is not known.
    Other,
    /// Nothing: chance may have made the difference.
    Unclear,
}

impl Row {
    /// Fills in what follows from the difference and the flips: by McNemar's test where items are right
    /// or wrong, else by the interval.
    pub(super) fn judged(self) -> Self {
        let is_clear = match self.mcnemar_p {
            Some(p) => p < CLEAR,
            None => self.difference.is_clear(),
        };
        let rises = self.difference.difference > 0.0;
        let outcome = match (is_clear, self.higher_is_better) {
            (false, _) => Outcome::Unclear,
            (true, None) => Outcome::Other,
            (true, Some(higher)) if higher == rises => Outcome::Better,
            (true, Some(_)) => Outcome::Worse,
        };
        Self { outcome, ..self }
    }
}

/// The items of a task that are in both evaluations, under one filter.
struct Matched<'a> {
    pairs: Vec<(&'a Item, &'a Item)>,
    warnings: Vec<String>,
}

/// Compares a task under every metric that both evaluations have.
///
/// # Errors
/// [`Refused`] if the items are not the same.
pub(super) fn compare_task(
    task: &str,
    a: &TaskItems,
    b: &TaskItems,
    flipped: &mut Vec<Value>,
) -> Result<Vec<Row>> {
    let none = Vec::new();
    let mut rows = Vec::new();
    for (key, of_a) in &a.scores {
        let Some(of_b) = b.scores.get(key) else {
            continue;
        };
        let [items_a, items_b] = [a, b].map(|task| task.items.get(&key.filter).unwrap_or(&none));
        let mut matched = matched(task, items_a, items_b)?;
        matched.warnings.extend(other_conditions(a, b));
        let flips = flips(&matched.pairs, key, task, of_a.higher_is_better, flipped);
        let config = a.metrics.get(&key.metric);
        let paired = Way::of(key, config, (items_a, of_a), (items_b, of_b))
            .and_then(|way| way.difference(&matched.pairs, &key.metric))
            .map(|found| flips.map_or(found, |flips| found.with_flips(flips, matched.pairs.len())));
        if paired.is_none() {
            matched.warnings.push(
                "the samples do not give the score, so the interval is that of different items"
                    .to_owned(),
            );
        }
        rows.push(
            Row {
                task: task.to_owned(),
                tasks: Vec::new(),
                metric: key.metric.clone(),
                filter: key.filter.clone(),
                items: matched.pairs.len(),
                difference: paired.unwrap_or_else(|| {
                    Difference::independent((of_a.value, of_a.stderr), (of_b.value, of_b.stderr))
                }),
                higher_is_better: of_a.higher_is_better,
                mcnemar_p: flips.filter(|_| paired.is_some()).map(Flips::p_value),
                flips,
                outcome: Outcome::Unclear,
                warnings: matched.warnings,
            }
            .judged(),
        );
    }
    Ok(rows)
}

/// Finds the items of A in B by their numbers and holds them to be the same.
fn matched<'a>(task: &str, a: &'a [Item], b: &'a [Item]) -> Result<Matched<'a>> {
    let (of_a, of_b) = (by_number(task, "A", a)?, by_number(task, "B", b)?);
    let found = of_a
        .iter()
        .filter_map(|(id, item)| Some((*item, *of_b.get(id)?)));
    let pairs: Vec<(&Item, &Item)> = found.collect();
    let mut others = pairs.iter().filter(|(a, b)| a.content != b.content);
    if let Some((first, _)) = others.next() {
        let message = format!(
            "task `{task}`: {} of {} items differ, the first is number {}; evaluate both models on \
             the same data",
            1 + others.count(),
            pairs.len(),
            first.id
        );
        return Err(Refused(message).into());
    }
    if pairs.is_empty() && !(a.is_empty() && b.is_empty()) {
        let message = format!(
            "task `{task}`: no item is in both evaluations; evaluate both models on the same data"
        );
        return Err(Refused(message).into());
    }
    let mut warnings = Vec::new();
    let (missing_a, missing_b) = (b.len() - pairs.len(), a.len() - pairs.len());
    for (count, name) in [(missing_a, "A"), (missing_b, "B")] {
        if count > 0 {
            warnings.push(format!("{count} items are not in {name} and were left out"));
        }
    }
    let prompts = pairs.iter().filter(|(a, b)| a.prompt != b.prompt).count();
    if prompts > 0 {
        warnings.push(format!("{prompts} items have other prompts"));
    }
    Ok(Matched { pairs, warnings })
}

fn by_number<'a>(task: &str, side: &str, items: &'a [Item]) -> Result<BTreeMap<u64, &'a Item>> {
    let mut all = BTreeMap::new();
    for item in items {
        if all.insert(item.id, item).is_some() {
            let message = format!(
                "task `{task}`: item {} comes twice in the samples of {side}; evaluate again",
                item.id
            );
            return Err(Refused(message).into());
        }
    }
    Ok(all)
}

fn other_conditions(a: &TaskItems, b: &TaskItems) -> Vec<String> {
    let is_same = |a: &Value, b: &Value| match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    };
    let pairs = a.conditions.iter().filter_map(|(what, a)| {
        let (_, b) = b.conditions.iter().find(|(other, _)| other == what)?;
        (!is_same(a, b)).then(|| format!("{what}: {} in A, {} in B", shown(a), shown(b)))
    });
    pairs.collect()
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        // Of a hash, the beginning tells enough.
        Value::String(text) => text.chars().take(12).collect(),
        other => other.to_string(),
    }
}

/// How many items changed, if all are right (1) or wrong (0); those are added to `flipped`.
fn flips(
    pairs: &[(&Item, &Item)],
    key: &Key,
    task: &str,
    higher_is_better: Option<bool>,
    flipped: &mut Vec<Value>,
) -> Option<Flips> {
    if higher_is_better != Some(true) || pairs.is_empty() {
        return None;
    }
    let right = |item: &Item| match item.values.get(&key.metric)? {
        ItemValue::One(value) if *value == 1.0 => Some(true),
        ItemValue::One(value) if *value == 0.0 => Some(false),
        _ => None,
    };
    let right: Option<Vec<(bool, bool)>> = pairs
        .iter()
        .map(|(a, b)| Some((right(a)?, right(b)?)))
        .collect();
    let mut flips = Flips::default();
    for ((a, b), right) in pairs.iter().zip(right?) {
        let change = match right {
            (true, false) => {
                flips.lost += 1;
                "lost"
            }
            (false, true) => {
                flips.gained += 1;
                "gained"
            }
            _ => continue,
        };
        let mut line = json!({
            "task": task, "metric": key.metric, "filter": key.filter, "item": a.id,
            "change": change, "a": a.response, "b": b.response,
        });
        if let Some(line) = line.as_object_mut() {
            line.extend(a.shown.clone());
        }
        flipped.push(line);
    }
    Some(flips)
}
