//! Groups: the rows of their tasks put together as the scores of the groups were.

use super::evaluation::{Evaluation, Key, Recorded};
use super::rows::{Outcome, Row};
use super::way::is_near;
use lightmoe_eval::paired::{Difference, Flips};
use std::collections::BTreeSet;

/// Compares a group under every metric that both evaluations have for it, from the rows of its tasks.
pub(super) fn compare_group(
    name: &str,
    evaluations: (&Evaluation, &Evaluation),
    of_tasks: &[Row],
) -> Vec<Row> {
    let (a, b) = evaluations;
    let (Some(of_a), Some(of_b)) = (a.groups.get(name), b.groups.get(name)) else {
        return Vec::new();
    };
    let mut rows = Vec::new();
    for (key, score_a) in &of_a.scores {
        let Some(score_b) = of_b.scores.get(key) else {
            continue;
        };
        let weighting = |by: Weighting| {
            let gives = |evaluation: &Evaluation, tasks: &[String], recorded: &Recorded| {
                by.mean(evaluation, tasks, key)
                    .is_some_and(|mean| is_near(mean, recorded.value))
            };
            gives(a, &of_a.tasks, score_a) && gives(b, &of_b.tasks, score_b)
        };
        let found = [Weighting::BySize, Weighting::Even]
            .into_iter()
            .find(|&by| weighting(by));
        let is_member = |row: &&Row| {
            row.metric == key.metric && row.filter == key.filter && of_a.tasks.contains(&row.task)
        };
        let members: Vec<&Row> = of_tasks.iter().filter(is_member).collect();
        let pooled = found.and_then(|by| {
            let weight = |row: &Row| match by {
                Weighting::BySize => row.items as f64,
                Weighting::Even => 1.0,
            };
            let parts: Vec<_> = members
                .iter()
                .map(|row| (weight(row), row.difference))
                .collect();
            Difference::pooled(&parts)
        });
        // The warnings of its tasks, once each.
        let warnings: BTreeSet<String> = members
            .iter()
            .flat_map(|row| row.warnings.clone())
            .collect();
        let mut warnings: Vec<String> = warnings.into_iter().collect();
        if of_a.tasks != of_b.tasks {
            warnings.push("the group has other tasks in B; the common ones were taken".to_owned());
        }
        if pooled.is_none() {
            warnings.push(
                "the tasks do not give the score, so the interval is that of different items"
                    .to_owned(),
            );
        }
        let flips: Option<Flips> = members.iter().try_fold(Flips::default(), |sum, row| {
            let flips = row.flips?;
            Some(Flips {
                lost: sum.lost + flips.lost,
                gained: sum.gained + flips.gained,
            })
        });
        let flips = flips.filter(|_| !members.is_empty());
        // Test and interval count items, so they are of the mean over items alone.
        let counted = flips.filter(|_| found == Some(Weighting::BySize));
        let items = members.iter().map(|row| row.items).sum();
        let difference = pooled.unwrap_or_else(|| {
            let known = |of: &Recorded| (of.value, of.stderr);
            Difference::independent(known(score_a), known(score_b))
        });
        let row = Row {
            task: name.to_owned(),
            tasks: members.iter().map(|row| row.task.clone()).collect(),
            metric: key.metric.clone(),
            filter: key.filter.clone(),
            items,
            difference: counted.map_or(difference, |flips| difference.with_flips(flips, items)),
            higher_is_better: score_a.higher_is_better,
            mcnemar_p: counted.map(Flips::p_value),
            flips,
            outcome: Outcome::Unclear,
            warnings,
        };
        rows.push(row.judged());
    }
    rows
}

/// How much a task counts in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weighting {
    BySize,
    Even,
}

impl Weighting {
    /// The mean of the tasks' scores as they were written.
    fn mean(self, evaluation: &Evaluation, tasks: &[String], key: &Key) -> Option<f64> {
        let (mut sum, mut weights) = (0.0, 0.0);
        for task in tasks.iter().filter_map(|name| evaluation.tasks.get(name)) {
            let Some(score) = task.scores.get(key) else {
                continue;
            };
            let weight = match self {
                Self::BySize => task.items.get(&key.filter)?.len() as f64,
                Self::Even => 1.0,
            };
            sum += weight * score.value;
            weights += weight;
        }
        (weights > 0.0).then(|| sum / weights)
    }
}
