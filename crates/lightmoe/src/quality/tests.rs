//! The grid and the page of the quality bench, on made-up scores.

use super::cells::{Cell, Method, RATES, Rule, TELLING, grid, rate_search};
use super::table::markdown;
use super::{Raw, Record};
use crate::results::{Score, TaskScores};
use crate::source::{BUILT_IN, open_model};
use lightmoe_compress::plan::Parameters;
use lightmoe_data::Task;
use lightmoe_models::ModelConfig;
use std::collections::{BTreeMap, HashSet};

fn config() -> ModelConfig {
    open_model(BUILT_IN).unwrap().config().clone()
}

fn scores(task: Task, exact_match: f64) -> TaskScores {
    let score = |value| Score {
        value,
        stderr: 0.01,
        n: 500,
    };
    let metrics = BTreeMap::from([
        ("exact_match".to_owned(), score(exact_match)),
        ("answer_nll".to_owned(), score(1.0 - exact_match)),
    ]);
    BTreeMap::from([(task.to_string(), metrics)])
}

fn record(cell: Cell, lr: f64, exact_match: f64) -> Record {
    Record {
        lr,
        rank: 4,
        parameters: Parameters {
            before: 100,
            after: 50,
            trained: 10,
        },
        achieved: 0.5,
        built: scores(cell.task, 0.1),
        validation: scores(cell.task, exact_match),
        test: scores(cell.task, exact_match),
        seconds: 60.0,
        cell,
    }
}

#[test]
fn every_comparison_has_its_cells_once() {
    let search = rate_search();
    assert_eq!(search.len(), 5 * 4 * RATES.len());
    let cells = grid(3);
    let names: HashSet<String> = search.iter().chain(&cells).map(Cell::id).collect();
    assert_eq!(names.len(), search.len() + cells.len());
    let count = |method, rule| {
        let these = cells
            .iter()
            .filter(|c| (c.method, c.rule) == (method, rule));
        these.count()
    };
    use Method::{Lightmoe, Lora, NoAnnealing, RandomBase, ReplaceNone, ReplaceOne};
    for method in [Lightmoe, ReplaceNone, ReplaceOne] {
        assert_eq!(count(method, Rule::EqualTrainable), 5 * 2 * 3);
    }
    for method in [Lora, RandomBase, NoAnnealing] {
        assert_eq!(count(method, Rule::EqualTrainable), 5 * 3);
    }
    // LightMoE's cells serve both rules.
    assert_eq!(count(Lightmoe, Rule::EqualRank), 0);
    assert_eq!(count(ReplaceOne, Rule::EqualRank), 5 * 2 * 3);
    assert_eq!(count(Lora, Rule::EqualRank), 5 * 3);
}

/// At equal trainable parameters the methods train as much as LightMoE, within one rank.
#[test]
fn the_ranks_are_equal_budgets() {
    let config = config();
    let rank = |method| {
        let cell = Cell {
            method,
            rule: Rule::EqualTrainable,
            task: Task::Math,
            ratio: Some(TELLING),
            seed: 0,
            rate: None,
        };
        let settings = cell.settings(&config);
        (settings.rank.unwrap(), settings.groups.unwrap())
    };
    // Three bases of 32 experts are worth rank 8, one is worth 2.7.
    assert_eq!(rank(Method::Lightmoe), (4, 3));
    assert_eq!(rank(Method::Lora), (8, 0));
    assert_eq!(rank(Method::ReplaceNone), (8, 0));
    assert_eq!(rank(Method::ReplaceOne), (6, 1));
}

#[test]
fn the_page_shows_means_spreads_and_what_is_missing() {
    let empty = markdown(&Raw::default(), &config());
    assert!(empty.contains("not measured yet"), "{empty}");
    let mut raw = Raw {
        date: "2026-01-31".to_owned(),
        processor: "A processor, 2 cores".to_owned(),
        ..Raw::default()
    };
    for task in Task::ALL {
        raw.original.insert(task, scores(task, 0.5));
    }
    for cell in grid(3) {
        // Two points more for each seed; LightMoE ten points above the rest.
        let ahead = 0.1 * f64::from(u8::from(cell.method == Method::Lightmoe));
        let missing = (cell.method, cell.seed) == (Method::ReplaceOne, 2);
        if !missing {
            let value = 0.4 + ahead + 0.02 * cell.seed as f64;
            raw.records.push(record(cell, 0.004, value));
        }
    }
    let page = markdown(&raw, &config());
    for text in [
        "last on 2026-01-31, A processor, 2 cores",
        "| original, untuned | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 |",
        "| 50%, **LightMoE** | 0.520 ± 0.040 |",
        "| 50%, replace, one base | 0.410 ± 0.020 (2) |",
        "without a base: measured +10.0 points",
        "level with LoRA (paper: −0.2 points): measured +10.0 points",
    ] {
        assert!(page.contains(text), "`{text}` is missing from\n{page}");
    }
    assert!(!page.contains("NaN"), "{page}");
}
