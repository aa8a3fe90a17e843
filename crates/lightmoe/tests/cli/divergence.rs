//! `divergence`.

use crate::support::{
    Outcome, assert_schema, base, command, end, json, model_copy, names, repository,
};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The built-in model's compressed form against the built-in model.
fn divergence(text: &Path, out: &Path) -> Command {
    let mut command = command("divergence");
    command.args(["--against", "olmoe-nano", "--max-length", "64"]);
    command.arg("--model").arg(base().join("model"));
    command.arg("--text").arg(text).arg("--out").arg(out);
    command
}

fn sums() -> String {
    let sum = |n: usize| format!("Compute {n} + {}.\nAnswer: {}\n", n + 4, 2 * n + 4);
    (1..40).map(sum).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

#[test]
fn a_text_whole_and_by_layer() {
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (folder.path().join("sums.txt"), folder.path().join("d.json"));
    fs::write(&text, sums()).unwrap();
    let shown = divergence(&text, &out).arg("--by-layer").ok();
    for part in [
        "sums.txt",
        "KL(original ‖ compressed)",
        "ratio",
        "layer",
        "d.json",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let file = json(&out);
    assert_schema("divergence", &file);
    let found = &file["texts"][0];
    assert_eq!(found["layers"].as_array().unwrap().len(), 4);
    let whole = number(&found["whole"]["kl"]["value"]);
    assert!(whole > 0.0 && number(&found["whole"]["kl"]["stderr"]) > 0.0);
    let perplexity = &found["perplexity"];
    let ratio = number(&perplexity["compressed"]) / number(&perplexity["original"]);
    assert!((number(&perplexity["ratio"]) / ratio - 1.0).abs() < 1e-9);
    // The evaluation takes the same windows.
    let scores = folder.path().join("scores");
    command("evaluate")
        .args(["--tasks", "perplexity", "--max-length", "64", "--data"])
        .arg(&text)
        .arg("--out")
        .arg(&scores)
        .ok();
    let token =
        &json(&scores.join("results.json"))["results"]["perplexity"]["token_perplexity,none"];
    let close = number(token) / number(&perplexity["original"]) - 1.0;
    assert!(close.abs() < 1e-5, "{token} {perplexity}");
    // Read layer by layer it is the same, and without layers there are none.
    let streamed = folder.path().join("streamed.json");
    let mut whole_only = divergence(&text, &streamed);
    whole_only.args(["--max-memory", "4MB"]).ok();
    let streamed = json(&streamed);
    assert_eq!(streamed["texts"][0]["whole"], found["whole"]);
    assert!(streamed["texts"][0].get("layers").is_none());
}

#[test]
fn items_of_a_task_and_benchmarks() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("d.json");
    let run = |arguments: &[&str]| {
        let mut command = command("divergence");
        command.args(["--against", "olmoe-nano", "--model"]);
        command.arg(base().join("model")).arg("--out").arg(&out);
        command.args(arguments).ok();
        json(&out)["texts"].as_array().unwrap().clone()
    };
    let texts = run(&["--task", "intent", "--eval-examples", "20"]);
    assert_eq!(
        (texts[0]["name"].as_str(), number(&texts[0]["rows"])),
        (Some("intent"), 20.0)
    );
    // The evaluation takes the same answers: NLL is a mean over items there, over tokens here.
    let samples = base().join("logs/samples_intent_original.jsonl");
    let (mut nll, mut tokens) = (0.0, 0.0);
    for line in fs::read_to_string(samples).unwrap().lines() {
        let sample: Value = serde_json::from_str(line).unwrap();
        tokens += number(&sample["answer_tokens"]);
        nll += number(&sample["nll"]) * number(&sample["answer_tokens"]);
    }
    assert_eq!(number(&texts[0]["tokens"]), tokens);
    let original = number(&texts[0]["perplexity"]["original"]).ln();
    assert!((original - nll / tokens).abs() < 1e-5, "{original}");
    let data = repository("fixtures/harness/data");
    let data = data.to_str().unwrap();
    let texts = run(&[
        "--tasks",
        "gsm8k,arc_easy,wikitext",
        "--data",
        data,
        "--num-fewshot",
        "1",
    ]);
    let names: Vec<&str> = texts
        .iter()
        .filter_map(|text| text["name"].as_str())
        .collect();
    assert_eq!(names, ["gsm8k", "arc_easy", "wikitext"]);
    assert!(
        texts
            .iter()
            .all(|text| number(&text["whole"]["kl"]["value"]) > 0.0)
    );
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (folder.path().join("sums.txt"), folder.path().join("d.json"));
    fs::write(&text, sums()).unwrap();
    let other = model_copy(&folder.path().join("other"));
    let tokenizer = other.join("tokenizer.json");
    let mut known = json(&tokenizer);
    // Two tokens change places.
    let vocabulary = &mut known["model"]["vocab"];
    let (one, other_one) = (vocabulary["Ġ42"].clone(), vocabulary["Ġ43"].clone());
    vocabulary["Ġ42"] = other_one;
    vocabulary["Ġ43"] = one;
    fs::write(&tokenizer, known.to_string()).unwrap();
    let refused = |text: &Path, arguments: &[&str], said: &str| {
        let message = divergence(text, &out).args(arguments).fails(2);
        assert!(message.contains(said), "{message}");
        assert!(!out.exists());
    };
    refused(&folder.path().join("none.txt"), &[], "none.txt");
    refused(&text, &["--stride", "0"], "strides of 0");
    refused(&text, &["--batch-tokens", "0"], "1 token or more");
    refused(&text, &["--max-kl", "1"], "no verdict");
    let of_task = ["--task", "math", "--stride", "3"];
    let mut call = command("divergence");
    let message = call
        .args(["--against", "olmoe-nano"])
        .args(of_task)
        .fails(2);
    assert!(message.contains("`--stride`"), "{message}");
    let message = command("divergence")
        .args(["--against", "olmoe-nano", "--model"])
        .arg(&other)
        .fails(2);
    assert!(
        message.contains("tokenizers of different tokens"),
        "{message}"
    );
}

#[test]
fn an_interruption_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (folder.path().join("sums.txt"), folder.path().join("d.json"));
    fs::write(&text, sums().repeat(100)).unwrap();
    let mut run = divergence(&text, &out);
    run.args(["--by-layer", "--batch-tokens", "1"]);
    let begin = Instant::now();
    let code = end(&mut run, "-INT", || {
        begin.elapsed() > Duration::from_millis(500)
    });
    assert_eq!(code, Some(130));
    assert_eq!(names(folder.path()), ["sums.txt"]);
}
