//! BLEU, chrF, ROUGE and the equivalence of answers in mathematics against sacreBLEU, `rouge_score` and
//! lm-evaluation-harness: `fixtures/overlap` holds what these said.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lightmoe_data::harness::latex;
use lightmoe_data::overlap::{
    Bleu, Case, Chrf, CorpusMetric, Rouge, Stemming, Tokenizer, Unit, add_counts,
};
use serde_json::Value;
use std::path::Path;

fn fixture(name: &str) -> Value {
    let path = format!("../../fixtures/overlap/{name}.json");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn texts(value: &Value) -> Vec<&str> {
    let values = list(value).iter();
    values.map(|text| text.as_str().unwrap()).collect()
}

#[track_caller]
fn assert_near(ours: f64, theirs: &Value, place: &str) {
    let theirs = theirs.as_f64().unwrap();
    assert!(
        (ours - theirs).abs() < 1e-9,
        "{place}: {ours} is not {theirs}"
    );
}

fn metric(name: &str) -> Box<dyn CorpusMetric> {
    let bleu = |tokenizer, case| Box::new(Bleu { tokenizer, case });
    let chrf = |words, case| Box::new(Chrf { words, case });
    match name {
        "bleu" => bleu(Tokenizer::V13a, Case::Mixed),
        "bleu_lc" => bleu(Tokenizer::V13a, Case::Lower),
        "bleu_zh" => bleu(Tokenizer::Chinese, Case::Mixed),
        "chrf" => chrf(0, Case::Mixed),
        "chrf_lc" => chrf(0, Case::Lower),
        "chrf++" => chrf(2, Case::Mixed),
        other => panic!("{other}"),
    }
}

#[test]
fn corpora_score_as_by_sacrebleu() {
    let fixture = fixture("overlap");
    for corpus in list(&fixture["corpora"]) {
        let pairs: Vec<&Value> = list(&corpus["pairs"])
            .iter()
            .map(|number| &fixture["pairs"][number.as_u64().unwrap() as usize])
            .collect();
        let counts: Vec<usize> = pairs.iter().map(|p| list(&p["references"]).len()).collect();
        let is_same = counts.iter().all(|count| *count == counts[0]);
        let references = is_same.then_some(counts[0]);
        for (name, said) in corpus["scores"].as_object().unwrap() {
            let (metric, mut sums) = (metric(name), Vec::new());
            for pair in &pairs {
                let references = texts(&pair["references"]);
                let counts = metric.counts(pair["answer"].as_str().unwrap(), &references);
                add_counts(&mut sums, &counts);
            }
            let place = format!("{name} of {}", corpus["pairs"]);
            assert_near(metric.score(&sums), &said[0], &place);
            assert_eq!(
                metric.signature(references),
                said[1].as_str().unwrap(),
                "{place}"
            );
        }
    }
}

#[test]
fn texts_score_as_by_rouge_score() {
    let fixture = fixture("overlap");
    for (pair, said) in list(&fixture["pairs"]).iter().zip(list(&fixture["rouge"])) {
        let references = texts(&pair["references"]);
        for (kind, stemming) in [("plain", Stemming::None), ("stemmed", Stemming::Porter)] {
            for (name, unit) in [
                ("rouge1", Unit::Ngrams(1)),
                ("rouge2", Unit::Ngrams(2)),
                ("rougeL", Unit::Subsequence),
                ("rougeLsum", Unit::Lines),
            ] {
                let score =
                    Rouge { unit, stemming }.score(pair["answer"].as_str().unwrap(), &references);
                assert_near(score, &said[kind][name], &format!("{name} of {pair}"));
            }
        }
    }
}

#[test]
fn words_have_the_stems_of_nltk() {
    let fixture = fixture("overlap");
    let rouge = Rouge {
        unit: Unit::Ngrams(1),
        stemming: Stemming::Porter,
    };
    for (word, stem) in fixture["stems"].as_object().unwrap() {
        // Words of up to three letters are left alone.
        let said = if word.len() > 3 {
            stem.as_str().unwrap()
        } else {
            word
        };
        assert_eq!(rouge.words(word), [said], "{word}");
    }
}

#[test]
fn answers_are_equal_that_the_harness_takes_for_equal() {
    let fixture = fixture("math");
    let answers = texts(&fixture["latex"]);
    let equal: Vec<Vec<&str>> = list(&fixture["equal"]).iter().map(texts).collect();
    for a in &answers {
        for b in answers.iter().filter(|b| *a < **b) {
            let said = equal.iter().any(|pair| pair[..] == [*a, *b]);
            assert_eq!(latex::is_equivalent(a, b), said, "{a} {b}");
        }
    }
    for (solution, answer) in fixture["boxed"].as_object().unwrap() {
        assert_eq!(latex::last_boxed(solution), answer.as_str(), "{solution}");
    }
    for (answer, right) in fixture["right"].as_object().unwrap() {
        let taken = latex::inside_dollars(answer);
        for target in ["1", "5", "1$ or $2", "b $ c", "5$", "", "so $5$ it is"] {
            let said = texts(right).contains(&target);
            assert_eq!(
                latex::is_equivalent(taken, target),
                said,
                "{answer} {target}"
            );
        }
    }
}
