use super::*;

const GOLDEN: &str = r#"{
  "schema_version": 1,
  "lightmoe_version": "0.1.0",
  "model": "tiny-olmoe",
  "task": "math",
  "method": "lightmoe",
  "seed": 7,
  "ratio": {
    "target": 0.5,
    "achieved": 0.502
  },
  "parameters": {
    "before": 3560000,
    "after": 1772880,
    "trained": 240000
  },
  "bytes": {
    "before": 14240000,
    "after": 7091520
  },
  "stages": {
    "original": {
      "math": {
        "answer_nll": {
          "value": 0.75,
          "stderr": 0.03125,
          "n": 500
        },
        "exact_match": {
          "value": 0.57,
          "stderr": 0.022,
          "n": 500
        }
      }
    },
    "built": {
      "math": {
        "answer_nll": {
          "value": 2.5,
          "stderr": 0.0625,
          "n": 500
        },
        "exact_match": {
          "value": 0.112,
          "stderr": 0.014,
          "n": 500
        }
      }
    },
    "recovered": {
      "math": {
        "answer_nll": {
          "value": 0.5,
          "stderr": 0.03125,
          "n": 500
        },
        "exact_match": {
          "value": 0.554,
          "stderr": 0.022,
          "n": 500
        }
      }
    }
  },
  "seconds": {
    "build": 1.5,
    "observe": 2.25,
    "recover": 60.0
  },
  "peak_rss_bytes": 104857600,
  "peak_rss_by_stage": {
    "build": 52428800,
    "observe": 41943040,
    "recover": 104857600
  },
  "fingerprint": "0123456789abcdef"
}
"#;

/// The results of an invented run.
pub(crate) fn sample() -> Results {
    serde_json::from_str(GOLDEN).expect("the golden file is read")
}

fn set(results: &mut Results, metric: &str, value: f64) {
    let task = results.stages.get_mut(&Stage::Recovered).unwrap();
    let metrics = task.get_mut("math").unwrap();
    metrics.get_mut(metric).unwrap().value = value;
}

#[test]
fn the_file_is_the_golden_one() {
    assert_eq!(sample().to_json().unwrap(), GOLDEN);
}

#[test]
fn save_and_load_give_the_same_results() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.json");
    let mut results = sample();
    results.ratio.target = None;
    results.stages.remove(&Stage::Built);
    results.save(&path).unwrap();
    assert_eq!(Results::load(&path).unwrap(), results);

    results.schema_version = 2;
    results.save(&path).unwrap();
    let error = Results::load(&path).unwrap_err().to_string();
    assert!(error.contains("schema version 2"), "{error}");
}

#[test]
fn a_score_that_is_no_number_is_refused() {
    let mut results = sample();
    set(&mut results, "answer_nll", f64::NAN);
    let error = results.to_json().unwrap_err().to_string();
    assert!(error.contains("`answer_nll`"), "{error}");
}

#[test]
fn the_result_is_compared_with_the_original() {
    let mut results = sample();
    let outcomes = |results: &Results| -> Vec<_> {
        let comparisons = results.comparisons();
        comparisons.iter().map(|c| c.outcome).collect()
    };
    assert_eq!(outcomes(&results), [Outcome::Better, Outcome::Within]);
    assert_eq!(
        results.comparisons()[1].to_string(),
        "exact_match 0.554 against 0.570: within two standard errors (± 0.062, n = 500)"
    );
    set(&mut results, "exact_match", 0.4);
    set(&mut results, "answer_nll", 0.9);
    assert_eq!(outcomes(&results), [Outcome::Worse, Outcome::Worse]);

    for metrics in results.stages.values_mut().flat_map(|s| s.values_mut()) {
        metrics.values_mut().for_each(|score| score.n = 1);
    }
    assert!(outcomes(&results).is_empty());

    results.stages.remove(&Stage::Original);
    assert!(outcomes(&results).is_empty());
}

/// Without a recovery, what was built is compared.
#[test]
fn a_run_may_end_with_what_was_built() {
    let mut results = sample();
    let built = results.stages[&Stage::Built].clone();
    results.stages.remove(&Stage::Recovered);
    let scores = results.scores(Stage::Recovered).unwrap();
    assert_eq!(scores, &built[&results.task]);
    assert_eq!(results.comparisons().len(), 2);
}
