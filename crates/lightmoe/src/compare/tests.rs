//! The cells, the tables and the page of a comparison, on made-up scores.

use super::grid::{Cell, Grid, Rate};
use super::measure::Measure;
use super::page::html;
use super::table::{csv, markdown};
use super::variant::{Variant, check_common};
use super::{Active, Comparison, Record, SCHEMA_VERSION};
use crate::results::tests::sample;
use crate::results::{Score, Stage};
use crate::run::Inputs;
use crate::settings::Settings;
use lightmoe_data::Task;
use std::collections::{BTreeMap, HashSet};

fn grid(methods: &str, rates: &[f64]) -> Grid {
    Grid {
        methods: Variant::list(methods).unwrap(),
        ratios: vec![0.3, 0.5],
        tasks: vec![Some(Task::Math), Some(Task::Code)],
        seeds: 2,
        rates: rates.to_vec(),
    }
}

/// A record of what `lightmoe` at 50% on math would give, moved by ratio, seed and learning rate.
fn record(cell: Cell) -> Record {
    let mut results = sample();
    let task = cell.task.unwrap().to_string();
    let exact = 0.9 - cell.ratio.unwrap_or(0.0) - 0.1 * cell.seed as f64 + 0.1;
    for (stage, scores) in &mut results.stages {
        let (metric, shift) = match stage {
            Stage::Original => (0.8, 0.0),
            Stage::Built => (0.1, 1.0),
            Stage::Recovered => (exact, 0.0),
        };
        let score = |value, stderr| Score {
            value,
            stderr,
            n: 500,
        };
        let mut metrics = BTreeMap::from([
            ("exact_match".to_owned(), score(metric, 0.02)),
            ("answer_nll".to_owned(), score(2f64.ln() + shift, 0.01)),
        ]);
        if cell.task == Some(Task::Translation) {
            metrics.insert("chrf".to_owned(), score(50.0 * metric, 1.0));
        }
        // A further task that was scored is not the row's.
        let further = BTreeMap::from([("exact_match".to_owned(), score(0.123, 0.0))]);
        *scores = BTreeMap::from([(task.clone(), metrics), ("a".to_owned(), further)]);
    }
    results.task = task.clone();
    let mut validation = results.stages[&Stage::Recovered].clone();
    validation.remove("a");
    for metrics in validation.values_mut() {
        let nll = (cell.lr.unwrap_or(0.004) - 0.004).abs();
        metrics.get_mut("answer_nll").unwrap().value = nll;
    }
    results.seconds = BTreeMap::from([
        ("observe".to_owned(), 2.0),
        ("recover".to_owned(), 40.0),
        ("evaluate_built".to_owned(), 500.0),
    ]);
    results.peak_rss_by_stage = BTreeMap::from([
        ("recover".to_owned(), (1 + cell.seed) << 28),
        ("evaluate_built".to_owned(), 1 << 40),
    ]);
    Record {
        active_parameters: Active {
            before: 1_500_000,
            after: 700_000,
        },
        validation,
        date: "2026-01-31".to_owned(),
        processor: "A processor, 2 cores".to_owned(),
        threads: 1,
        results,
        cell,
    }
}

/// A comparison with all records that its grid asks for.
fn comparison(grid: Grid) -> Comparison {
    let mut comparison = Comparison {
        schema_version: SCHEMA_VERSION,
        model: "tiny-<olmoe>".to_owned(),
        inputs: Inputs {
            model: "0123".to_owned(),
            data: "built-in".to_owned(),
            lightmoe: "0.1.0".to_owned(),
        },
        settings: serde_json::Map::new(),
        records: grid.search().into_iter().map(record).collect(),
        grid,
        measure: Measure::Score,
    };
    let cells = comparison.grid.cells(&|m, t| comparison.rate(m, t));
    let missing = cells
        .into_iter()
        .filter(|c| comparison.records.iter().all(|r| r.cell != *c));
    let more: Vec<Record> = missing.map(record).collect();
    comparison.records.extend(more);
    comparison
}

#[test]
fn a_label_carries_keys_of_the_recipe() {
    let list = "lightmoe,lightmoe:base=random,annealing=none, replace:groups=1,lora:rank=4";
    let variants = Variant::list(list).unwrap();
    let labels: Vec<&str> = variants.iter().map(|v| v.label.as_str()).collect();
    let expected = [
        "lightmoe",
        "lightmoe:base=random,annealing=none",
        "replace:groups=1",
        "lora:rank=4",
    ];
    assert_eq!(labels, expected);
    let settings = &variants[1].settings;
    assert_eq!(settings.base.as_deref(), Some("random"));
    assert_eq!(settings.annealing.as_deref(), Some("none"));
    assert_eq!(variants[2].settings.groups, Some(1));
    for (label, part) in [
        ("lightmo", "unknown method `lightmo`"),
        ("", "unknown method ``"),
        ("lightmoe:", "`` in the method `lightmoe:`"),
        ("lightmoe:base", "write `method:key=value"),
        ("lightmoe:colour=red", "unknown field `colour`"),
        ("lightmoe:rank=many", "in the method `lightmoe:rank=many`"),
        ("lightmoe:rank=", "in the method `lightmoe:rank=`"),
        ("lightmoe:rank=1,rank=2", "`rank` stands twice"),
        ("lightmoe:ratio=0.5", "give `--ratios`"),
        ("lightmoe:seed=1", "give `--seeds`"),
    ] {
        let message = format!("{:#}", Variant::list(label).unwrap_err());
        assert!(message.contains(part), "{label}: {message}");
        assert!(!message.contains('\n'), "{label}: {message}");
    }
    let lr = Settings {
        lr: Some(0.1),
        ..Settings::default()
    };
    assert!(
        check_common(&lr)
            .unwrap_err()
            .to_string()
            .contains("--rates")
    );
    let common = Settings {
        steps: Some(3),
        calibrate: Some("math,code".to_owned()),
        ..Settings::default()
    };
    check_common(&common).unwrap();
}

#[test]
fn every_cell_is_there_once() {
    let rates = [0.002, 0.004, 0.008];
    let grid = grid("lightmoe,lora:rank=4,reap:lr=0.01", &rates);
    // The methods whose rate is open, on 2 tasks, at the highest ratio.
    let search = grid.search();
    assert_eq!(search.len(), 2 * 2 * 3);
    assert!(search.iter().all(|c| c.seed == 0 && c.ratio != Some(0.3)));
    let comparison = comparison(grid.clone());
    let rate = |m: &Variant, t| comparison.rate(m, t);
    let cells = grid.cells(&rate);
    // Two ratios of two methods and LoRA, on 2 tasks with 2 seeds.
    assert_eq!(cells.len(), (2 + 2 + 1) * 2 * 2);
    let ids: HashSet<String> = cells.iter().map(Cell::id).collect();
    assert_eq!(ids.len(), cells.len());
    assert!(cells.iter().all(|c| grid.holds(c)));
    let lrs = |name: &str| -> HashSet<String> {
        let these = cells.iter().filter(|c| c.method.label == name);
        these.map(|c| format!("{:?}", c.lr)).collect()
    };
    assert_eq!(lrs("lightmoe"), HashSet::from(["Some(0.004)".to_owned()]));
    assert_eq!(
        lrs("reap:lr=0.01"),
        HashSet::from(["Some(0.01)".to_owned()])
    );
    // Before all candidates are tried, there is no rate.
    let mut fewer = comparison.clone();
    fewer.records.retain(|r| r.cell.lr != Some(0.008));
    assert_eq!(fewer.rate(&grid.methods[0], Some(Task::Math)), Rate::Open);
    assert_eq!(
        super::tests::grid("reap", &[])
            .cells(&|_, _| Rate::Known(None))
            .len(),
        2 * 2 * 2
    );
}

#[test]
fn the_tables_hold_means_spreads_and_what_is_missing() {
    let mut comparison = comparison(grid("lightmoe,lora:rank=4", &[]));
    comparison
        .records
        .retain(|r| (r.cell.task, r.cell.ratio, r.cell.seed) != (Some(Task::Code), Some(0.3), 1));
    let page = markdown(&comparison);
    for text in [
        "| original | – | 0.800 ± 0.014 | 0.800 ± 0.020 | 0.800 ± 0.020 |",
        "| lightmoe | 30% | 0.675 ± 0.014 (1) | 0.650 ± 0.020 [0.600–0.700] | 0.700 ± 0.020 (1) |",
        "| original | – | 0.800 ± 0.020 | – | 2.00 ± 0.02 | – | 3,560,000 | 1,500,000 | 0 |",
        "| lightmoe | 50% | 0.100 ± 0.020 | 0.450 ± 0.020 [0.400–0.500] | 5.44 ± 0.05 | 2.00 ± 0.02 | \
         1,772,880 | 700,000 | 240,000 | 6.76 MiB | 42 | 512.00 MiB | – | 2 |",
        "| 256.00 MiB | – | 1 of 2 |",
        "| lora:rank=4 | – |",
    ] {
        assert!(page.contains(text), "`{text}` is missing from\n{page}");
    }
    let table = csv(&comparison);
    let lines: Vec<Vec<&str>> = table.lines().map(|l| l.split(',').collect()).collect();
    // Three tasks with the average, and the original, two ratios and LoRA of each.
    assert_eq!(lines.len(), 1 + 3 * 4);
    assert!(lines.iter().all(|l| l.len() == lines[0].len()));
    let column = |name: &str| lines[0].iter().position(|h| *h == name).unwrap();
    let row = lines
        .iter()
        .find(|l| l[..3] == ["math", "lightmoe", "0.5"])
        .unwrap();
    let number = |name: &str| row[column(name)].parse::<f64>().unwrap();
    for (name, value) in [
        ("score_after", 0.45),
        ("score_after_stderr", 0.02),
        ("score_after_min", 0.4),
        ("score_after_max", 0.5),
        ("perplexity_after", 2.0),
        ("active_parameters", 700_000.0),
        ("seconds", 42.0),
        ("seeds", 2.0),
    ] {
        assert!(
            (number(name) - value).abs() < 1e-9,
            "{name}: {}",
            number(name)
        );
    }
}

#[test]
fn a_translation_that_is_right_in_part_counts_in_part() {
    let grid = Grid {
        tasks: vec![Some(Task::Translation)],
        ..grid("reap", &[])
    };
    let page = markdown(&comparison(grid));
    let text = "| reap | 50% | 0.050 ± 0.010 | 0.225 ± 0.010 [0.200–0.250] |";
    assert!(page.contains(text), "`{text}` is missing from\n{page}");
}

#[test]
fn the_page_stands_alone_and_is_a_function_of_the_file() {
    let methods = "lightmoe,lightmoe:base=random,annealing=none,lora:rank=4";
    let comparison = comparison(grid(methods, &[0.002, 0.004]));
    let page = html(&comparison).unwrap();
    // Two pictures for the average and each of two tasks.
    assert_eq!(page.matches("<svg viewBox=\"0 0 450").count(), 2 * 3);
    for strange in ["NaN", "inf\"", "http:", "https:", "<script", "tiny-<"] {
        assert!(!page.contains(strange), "{strange}");
    }
    assert!(
        page.contains("lightmoe:base=random,annealing=none"),
        "{page}"
    );
    assert!(page.contains(".front {"), "the style is missing");
    let text = comparison.to_json().unwrap();
    let read: Comparison = serde_json::from_str(&text).unwrap();
    assert_eq!(html(&read).unwrap(), page);
    assert_eq!(markdown(&read), markdown(&comparison));
    assert_eq!(csv(&read), csv(&comparison));
    assert!(csv(&read).contains("\"lightmoe:base=random,annealing=none\""));
    assert!(text.lines().count() > comparison.records.len());
    // Nothing is done yet.
    let empty = Comparison {
        records: Vec::new(),
        ..comparison
    };
    let read: Comparison = serde_json::from_str(&empty.to_json().unwrap()).unwrap();
    assert!(read.records.is_empty());
    for text in [html(&empty).unwrap(), markdown(&empty), csv(&empty)] {
        assert!(
            !text.contains("NaN") && !text.contains("viewBox=\"0 0 450"),
            "{text}"
        );
    }
}

/// On text the score is the perplexity, of which less is better.
#[test]
fn the_score_of_text_is_its_perplexity() {
    let mut comparison = comparison(grid("lightmoe,reap", &[]));
    comparison.grid.tasks = vec![None];
    comparison
        .records
        .retain(|r| r.cell.task == Some(Task::Math));
    for record in &mut comparison.records {
        record.cell.task = None;
        record.results.task = "book".to_owned();
        for scores in record.results.stages.values_mut() {
            let nll = scores["math"]["answer_nll"];
            let perplexity = Score {
                value: nll.value.exp(),
                ..nll
            };
            let of_text = [("nll", nll), ("perplexity", perplexity)];
            let of_text = of_text.map(|(metric, score)| (metric.to_owned(), score));
            *scores = BTreeMap::from([("book".to_owned(), BTreeMap::from(of_text))]);
        }
        record.validation = record.results.stages[&Stage::Recovered].clone();
        record
            .validation
            .get_mut("book")
            .unwrap()
            .get_mut("nll")
            .unwrap()
            .value = 0.25;
    }
    comparison.measure = Measure::Perplexity;
    assert_eq!(comparison.records[0].validation_nll(), 0.25);
    let page = markdown(&comparison);
    for text in [
        "The score is perplexity: lower is better.",
        "## book",
        "| method | ratio | perplexity, before | perplexity, after | parameters |",
        "| original | – | 2.00 ± 0.02 | – |",
        "| reap | 50% | 5.44 ± 0.05 | 2.00 ± 0.02 |",
    ] {
        assert!(page.contains(text), "`{text}` is missing from\n{page}");
    }
    assert!(!page.contains("exact match"), "{page}");
    let html = html(&comparison).unwrap();
    // The name of the axis and the description, in two pictures.
    assert_eq!(
        html.matches("ln perplexity, lower is better").count(),
        4,
        "{html}"
    );
    assert!(csv(&comparison).starts_with("task,method,ratio,seeds,lr,score_before,"));
    assert!(
        csv(&comparison).contains("\nbook,reap,0.5,2,,,,,,,,,,5.43"),
        "{}",
        csv(&comparison)
    );
    // Before there is a cell, too.
    comparison.records.clear();
    let empty = markdown(&comparison);
    assert!(empty.contains("The score is perplexity"), "{empty}");
    assert!(empty.contains("| perplexity, before |"), "{empty}");
}
