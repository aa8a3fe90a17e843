//! Groups and ways that the fixtures of the program's tests have not.

use super::evaluation::{GroupScores, Item, ItemValue, Key, Recorded, TaskItems};
use super::*;
use lightmoe_data::harness::MetricConfig;
use lightmoe_eval::paired::{Basis, Difference, Flips};
use serde_json::Map;
use std::collections::BTreeMap;
use std::path::PathBuf;

fn key(metric: &str) -> Key {
    Key {
        metric: metric.to_owned(),
        filter: String::new(),
    }
}

fn recorded(value: f64) -> Recorded {
    Recorded {
        value,
        stderr: Some(0.1),
        higher_is_better: Some(true),
    }
}

fn task(metric: &str, values: Vec<ItemValue>, score: f64) -> TaskItems {
    let items = values.into_iter().enumerate().map(|(id, value)| Item {
        id: id as u64,
        content: String::new(),
        prompt: String::new(),
        values: BTreeMap::from([(metric.to_owned(), value)]),
        shown: Map::new(),
        response: Value::Null,
    });
    TaskItems {
        conditions: Vec::new(),
        metrics: BTreeMap::new(),
        scores: BTreeMap::from([(key(metric), recorded(score))]),
        items: BTreeMap::from([(String::new(), items.collect())]),
    }
}

fn accuracy(values: &[f64]) -> TaskItems {
    let score = values.iter().sum::<f64>() / values.len() as f64;
    task(
        "acc",
        values.iter().map(|&v| ItemValue::One(v)).collect(),
        score,
    )
}

fn evaluation(tasks: [(&str, TaskItems); 2], group: f64) -> Evaluation {
    let names = tasks.iter().map(|(name, _)| (*name).to_owned()).collect();
    let group = GroupScores {
        tasks: names,
        scores: BTreeMap::from([(key("acc"), recorded(group))]),
    };
    Evaluation {
        path: PathBuf::new(),
        model: String::new(),
        tasks: tasks.map(|(name, task)| (name.to_owned(), task)).into(),
        groups: BTreeMap::from([("group".to_owned(), group)]),
    }
}

fn group_row(of_a: f64, of_b: f64) -> Row {
    let a = [
        ("x", accuracy(&[1.0, 1.0, 0.0, 0.0])),
        ("y", accuracy(&[1.0, 0.0])),
    ];
    let b = [
        ("x", accuracy(&[1.0, 0.0, 0.0, 0.0])),
        ("y", accuracy(&[1.0, 1.0])),
    ];
    let (a, b) = (evaluation(a, of_a), evaluation(b, of_b));
    let (file, _) = compare(("a", &a), ("b", &b)).unwrap();
    file.rows[0].clone()
}

#[test]
fn a_group_is_pooled_as_its_score_was() {
    // By size A has 3/6 and B 3/6; evenly (1/2 + 1/2)/2 and (1/4 + 1)/2.
    let by_size = group_row(0.5, 0.5);
    assert_eq!((by_size.difference.difference, by_size.items), (0.0, 6));
    assert_eq!(by_size.flips, Some(Flips { lost: 1, gained: 1 }));
    assert_eq!(by_size.mcnemar_p, Some(1.0));
    let even = group_row(0.5, 0.625);
    assert_eq!(even.difference.difference, 0.125);
    assert_eq!(even.difference.uncertainty.unwrap().by, Basis::Paired);
    assert_eq!((even.mcnemar_p, even.flips), (None, by_size.flips));
    let neither = group_row(0.5, 0.7);
    assert_eq!(
        neither.difference.uncertainty.unwrap().by,
        Basis::Independent
    );
    assert!(neither.warnings[0].contains("the tasks do not give the score"));
}

#[test]
fn an_even_group_without_flips_has_an_interval() {
    let tasks = || {
        [
            ("x", accuracy(&[1.0, 1.0, 0.0, 0.0])),
            ("y", accuracy(&[1.0, 0.0, 0.0, 0.0, 0.0])),
        ]
    };
    // Evenly (1/2 + 1/5)/2; by size it would be 3/9.
    let one = || evaluation(tasks(), 0.35);
    let (file, _) = compare(("a", &one()), ("b", &one())).unwrap();
    let group = &file.rows[0];
    assert_eq!((group.task.as_str(), group.mcnemar_p), ("group", None));
    assert_eq!(group.flips, Some(Flips::default()));
    assert_eq!(group.outcome, Outcome::Unclear);
    // Each task reaches 1.96 sqrt(2)/(n + 2), the group half of both in squares.
    let reach = 1.959_963_984_540_054 / 2.0 * (2.0f64 / 36.0 + 2.0 / 49.0).sqrt();
    let of = group.difference.uncertainty.unwrap();
    assert!(
        (of.high - reach).abs() < 1e-12 && (of.low + reach).abs() < 1e-12,
        "{of:?}"
    );
}

#[test]
fn perplexities_are_of_all_words_together() {
    let of = |pairs: [(f64, f64); 3]| {
        let (sum, words) = pairs.iter().fold((0.0, 0.0), |t, p| (t.0 + p.0, t.1 + p.1));
        let values = pairs.map(|(sum, words)| ItemValue::Of(sum, words)).to_vec();
        let score: f64 = -sum / words;
        task("word_perplexity", values, score.exp())
    };
    let (a, b) = (
        of([(-10.0, 5.0), (-9.0, 3.0), (-8.0, 4.0)]),
        of([(-11.0, 5.0), (-9.5, 3.0), (-8.5, 4.0)]),
    );
    let rows = compare_task("text", &a, &b, &mut Vec::new()).unwrap();
    let Difference {
        a, b, uncertainty, ..
    } = rows[0].difference;
    assert!((a - (27.0f64 / 12.0).exp()).abs() < 1e-12);
    assert!((b - (29.0f64 / 12.0).exp()).abs() < 1e-12);
    let of = uncertainty.unwrap();
    assert!(of.by == Basis::Bootstrap && of.low > 0.0 && of.high > of.low);
    assert_eq!(rows[0].flips, None);
}

#[test]
fn scores_of_a_corpus_are_paired_by_their_counts() {
    let texts = |answers: [&str; 4]| {
        let answers = answers.into_iter().map(|answer| ItemValue::Texts {
            answer: answer.to_owned(),
            references: vec!["the cat sat on the mat".to_owned()],
        });
        answers.collect::<Vec<_>>()
    };
    let whole = "the cat sat on the mat";
    let half = "the cat sat over a mat";
    let (of_a, of_b) = ([half, half, "", half], [whole, half, "the", whole]);
    let chrf = |answers: [&str; 4]| {
        let pairs: Vec<_> = answers.iter().map(|answer| (*answer, whole)).collect();
        lightmoe_data::overlap::corpus_chrf(&pairs)
    };
    let config = MetricConfig {
        metric: "chrf".into(),
        ..MetricConfig::default()
    };
    let of = |answers, score| TaskItems {
        metrics: BTreeMap::from([("chrf".to_owned(), config.clone())]),
        ..task("chrf", texts(answers), score)
    };
    let (a, b) = (of(of_a, chrf(of_a)), of(of_b, chrf(of_b)));
    let rows = compare_task("text", &a, &b, &mut Vec::new()).unwrap();
    let found = rows[0].difference.uncertainty.unwrap();
    assert_eq!(found.by, Basis::Bootstrap);
    // No resample makes B the worse one; those of items without a change make them equal.
    assert!(found.low >= 0.0 && found.high > rows[0].difference.difference);
    let p = found.bootstrap_p.unwrap();
    assert!(p > 0.0 && p < 0.5, "{p}");
    // A score that the counts do not give, as of another metric, is not paired.
    let other = of(of_b, chrf(of_b) + 1.0);
    let rows = compare_task("text", &a, &other, &mut Vec::new()).unwrap();
    let found = rows[0].difference.uncertainty.unwrap();
    assert_eq!((found.by, found.bootstrap_p), (Basis::Independent, None));
    assert!(rows[0].warnings[0].contains("do not give the score"));
}
