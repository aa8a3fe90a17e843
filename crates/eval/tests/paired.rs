//! Paired results against SciPy and NumPy, see `fixtures/paired`, and sacreBLEU, see `fixtures/overlap`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lightmoe_data::harness::MetricConfig;
use lightmoe_data::overlap::add_counts;
use lightmoe_eval::harness::corpus_metric;
use lightmoe_eval::paired::{Basis, Difference, Flips};
use serde_json::Value;
use std::path::Path;

fn file(path: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures")
        .join(path);
    let text = std::fs::read_to_string(path).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn fixture(key: &str) -> Value {
    file("paired/paired.json")[key].take()
}

fn numbers(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap()
}

#[track_caller]
fn close(got: f64, want: &Value, tolerance: f64) {
    let want = want.as_f64().unwrap();
    assert!(
        (got - want).abs() <= tolerance * want.abs(),
        "{got}, SciPy {want}"
    );
}

#[test]
fn mcnemar_is_the_binomial_test() {
    for case in fixture("mcnemar").as_array().unwrap() {
        let count = |at: usize| case[at].as_u64().unwrap() as usize;
        let flips = Flips {
            lost: count(0),
            gained: count(1),
        };
        close(flips.p_value(), &case[2], 1e-10);
    }
}

#[test]
fn the_error_of_a_mean_difference_is_that_of_the_paired_t_test() {
    let case = fixture("means");
    let found = Difference::of_means(&numbers(&case["a"]), &numbers(&case["b"]));
    close(found.difference, &case["difference"], 1e-12);
    close(found.uncertainty.unwrap().stderr, &case["stderr"], 1e-12);
}

#[test]
fn the_bootstrap_of_perplexities_is_near_scipys() {
    let case = fixture("perplexities");
    let [words, a, b] = ["words", "a", "b"].map(|key| numbers(&case[key]));
    let perplexity = |of: &[f64], items: &[usize]| {
        let sum = |values: &[f64]| items.iter().map(|&i| values[i]).sum::<f64>();
        (-sum(of) / sum(&words)).exp()
    };
    let score = |items: &[usize]| (perplexity(&a, items), perplexity(&b, items));
    let found = Difference::bootstrapped(words.len(), 10_000, &score);
    close(found.difference, &case["difference"], 1e-12);
    let of = found.uncertainty.unwrap();
    assert_eq!(of.by, Basis::Bootstrap);
    // Ten thousand resamples know a standard error to about a hundredth.
    close(of.stderr, &case["stderr"], 0.03);
    close(of.low, &case["low"], 0.03);
    close(of.high, &case["high"], 0.03);
}

#[test]
fn corpora_are_paired_as_by_sacrebleu() {
    let said = file("overlap/paired.json");
    let texts = |key: &str| -> Vec<String> { serde_json::from_value(said[key].clone()).unwrap() };
    let draws: Vec<Vec<u32>> = serde_json::from_value(said["draws"].clone()).unwrap();
    let references = texts("references");
    for (name, systems) in said["metrics"].as_object().unwrap() {
        let config = MetricConfig {
            metric: name.clone(),
            ..MetricConfig::default()
        };
        let metric = corpus_metric(&config).unwrap();
        let counts = |system: &str| -> Vec<Vec<usize>> {
            let pairs = texts(system).into_iter().zip(&references);
            pairs
                .map(|(answer, reference)| metric.counts(&answer, &[reference.as_str()]))
                .collect()
        };
        let score = |counts: &[Vec<usize>], items: &[usize]| {
            let mut sums = Vec::new();
            items
                .iter()
                .for_each(|&n| add_counts(&mut sums, &counts[n]));
            metric.score(&sums)
        };
        let of_a = counts("a");
        for system in ["b", "c"] {
            let of_other = counts(system);
            let both = |items: &[usize]| (score(&of_a, items), score(&of_other, items));
            let found = Difference::of_draws(references.len(), &draws, &both);
            close(found.a, &systems["a"]["score"], 1e-12);
            close(found.b, &systems[system]["score"], 1e-12);
            let p = found.uncertainty.unwrap().bootstrap_p.unwrap();
            close(p, &systems[system]["p"], 1e-12);
        }
    }
}
