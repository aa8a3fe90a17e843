use super::*;
use crate::results::tests::sample;
use crate::results::{Results, Stage};

fn thresholds(text: &str) -> Thresholds {
    toml::from_str(text).unwrap()
}

fn word(results: &Results, text: &str) -> Word {
    judge(&results.measured(), &thresholds(text))
        .unwrap()
        .unwrap()
        .word
}

/// The sample keeps 0.554 of 0.570 and its NLL falls by a quarter of a nat.
#[test]
fn every_threshold_decides() {
    let results = sample();
    assert_eq!(
        judge(&results.measured(), &Thresholds::default()).unwrap(),
        None
    );
    for (text, expected) in [
        ("min_score = 0.97", Word::Go),
        ("min_score = 0.98", Word::NoGo),
        ("max_nll_increase = 0.0", Word::Go),
        ("max_bytes = '7MB'", Word::NoGo),
        ("max_bytes = '7.1MB'", Word::Go),
        ("min_score = 0.9\nmax_bytes = '1MB'", Word::NoGo),
    ] {
        assert_eq!(word(&results, text), expected, "{text}");
    }
}

#[test]
fn the_margin_is_that_of_both_scores_and_says_what_is_close() {
    let verdict = judge(&sample().measured(), &thresholds("min_score = 0.9")).unwrap();
    let [check] = &verdict.unwrap().checks[..] else {
        panic!("one metric of which more is better");
    };
    // 2 · sqrt(0.022² + (0.9 · 0.022)²)
    assert!((check.margin.unwrap() - 0.059_195).abs() < 1e-5, "{check}");
    assert_eq!(
        check.to_string(),
        "math · exact_match: 0.554 ± 0.059, at least 0.513 (90.0% of 0.570) by min_score: met, \
         within the error"
    );
    let verdict = judge(&sample().measured(), &thresholds("min_score = 0.5")).unwrap();
    assert!(!verdict.unwrap().checks[0].is_close());
}

/// What the divergence stage measured, and nothing where it did not run.
#[test]
fn the_divergence_decides() {
    let mut results = sample();
    assert_eq!(word(&results, "max_kl = 0.1"), Word::Undecided);
    let estimate = serde_json::json!({"value": 0.1, "stderr": 0.02});
    let distance = serde_json::json!({
        "kl": estimate, "top1_agreement": estimate, "nll_increase": estimate
    });
    results.divergence = serde_json::from_value(distance).unwrap();
    assert_eq!(word(&results, "max_kl = 0.1"), Word::Go);
    assert_eq!(word(&results, "max_kl = 0.09"), Word::NoGo);
    let verdict = judge(&results.measured(), &thresholds("max_kl = 0.2")).unwrap();
    let check = &verdict.unwrap().checks[0];
    assert_eq!((check.margin, check.is_close()), (Some(0.04), false));
}

/// What was not scored is neither met nor missed; of nothing nothing can be lost.
#[test]
fn what_is_not_measured_is_not_decided() {
    let mut results = sample();
    for tasks in results.stages.values_mut() {
        let metrics = tasks.get_mut("math").unwrap();
        metrics.get_mut("exact_match").unwrap().value = 0.0;
    }
    assert_eq!(word(&results, "min_score = 0.9"), Word::Go);
    let recovered = results.stages.get_mut(&Stage::Recovered).unwrap();
    recovered.get_mut("math").unwrap().remove("exact_match");
    assert_eq!(word(&results, "min_score = 0.9"), Word::Undecided);
    let two = "min_score = 0.9\nmax_bytes = '1MB'";
    assert_eq!(word(&results, two), Word::NoGo);
    results.stages.clear();
    assert_eq!(word(&results, "max_nll_increase = 1.0"), Word::Undecided);
    // Without an original there is no limit, but what is asked for is known.
    let verdict = judge(&results.measured(), &thresholds("min_score = 0.97")).unwrap();
    let verdict = verdict.unwrap();
    assert_eq!(verdict.word, Word::Undecided);
    let check = &verdict.checks[0];
    assert_eq!((check.limit, check.original), (None, None));
    assert_eq!(
        check.to_string(),
        "scores: not measured, at least 97.0% of the original's score by min_score: not measured"
    );
    let text = serde_json::to_string(&verdict).unwrap();
    assert_eq!(serde_json::from_str::<Verdict>(&text).unwrap(), verdict);
}

/// Without a recovery, what was built is judged.
#[test]
fn what_the_run_ended_with_is_judged() {
    let mut results = sample();
    results.stages.remove(&Stage::Recovered);
    assert_eq!(word(&results, "min_score = 0.9"), Word::NoGo);
}

#[test]
fn thresholds_that_are_none_are_refused() {
    for (text, part) in [
        ("min_score = nan", "`min_score`"),
        ("max_nll_increase = -1.0", "`max_nll_increase`"),
        ("max_bytes = 'much'", "`max_bytes` is `much`"),
    ] {
        let error = thresholds(text).check().unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(toml::from_str::<Thresholds>("min_scor = 1.0").is_err());
}

/// Perplexity and bits say the same as the NLL, in units that a limit in nats is not of.
#[test]
fn of_text_the_nll_is_held_against_its_limit() {
    let mut results = sample();
    for (stage, nll) in [(Stage::Original, 3.0), (Stage::Recovered, 3.2)] {
        let score = |value| Score {
            value,
            stderr: 0.01,
            n: 50,
        };
        let scores = [
            ("nll", nll),
            ("perplexity", f64::exp(nll)),
            ("bits_per_byte", nll / 2.0),
        ];
        let scores = scores.map(|(metric, value)| (metric.to_owned(), score(value)));
        let tasks = results.stages.get_mut(&stage).unwrap();
        tasks.insert("math".to_owned(), scores.into_iter().collect());
    }
    let judged = judge(&results.measured(), &thresholds("max_nll_increase = 0.3")).unwrap();
    let [check] = &judged.unwrap().checks[..] else {
        panic!("one NLL");
    };
    assert_eq!(
        (check.of.as_str(), check.outcome),
        ("math · nll", Outcome::Met)
    );
    assert_eq!(word(&results, "max_nll_increase = 0.1"), Word::NoGo);
    assert_eq!(word(&results, "min_score = 0.9"), Word::Undecided);
}
