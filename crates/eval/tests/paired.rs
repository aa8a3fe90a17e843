//! Paired results against SciPy and NumPy, see `fixtures/paired`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lightmoe_eval::paired::{Basis, Difference, Flips};
use serde_json::Value;
use std::path::Path;

fn fixture(key: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/paired/paired.json");
    let text = std::fs::read_to_string(path).unwrap();
    let mut all: Value = serde_json::from_str(&text).unwrap();
    all[key].take()
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
