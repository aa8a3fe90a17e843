//! `compare-results`.

use crate::support::{Outcome, assert_schema, base, command, json, names, repository};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const TASKS: &str = "ai2_arc,gsm8k,mmlu_stem,wikitext";

/// Benchmarks on the tiny data of the repository, with two examples.
fn evaluate(model: &Path, tasks: &str, out: &Path) {
    let mut command = command("evaluate");
    command.args(["--tasks", tasks, "--num-fewshot", "2", "--model"]);
    command.arg(model).arg("--data");
    command.arg(repository("fixtures/harness/data"));
    command.arg("--out").arg(out).ok();
}

/// Evaluations of the built-in model and of its compressed form, made once.
fn evaluations() -> &'static (PathBuf, PathBuf) {
    static MADE: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    MADE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-paired");
        let (a, b) = (folder.join("a"), folder.join("b"));
        evaluate(&repository("fixtures/olmoe-nano"), TASKS, &a);
        evaluate(&base().join("model"), TASKS, &b);
        (a, b)
    })
}

/// The comparison of two evaluations as JSON, and its table.
fn compared(a: &str, b: &str) -> (Vec<Value>, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.json");
    let mut command = command("compare-results");
    let table = command.args([a, b]).arg("--json").arg(&path).ok();
    let file = json(&path);
    assert_schema("compare-results", &file);
    (file["rows"].as_array().unwrap().clone(), table)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

#[track_caller]
fn row<'a>(rows: &'a [Value], task: &str, metric: &str) -> &'a Value {
    let mut rows = rows.iter();
    rows.find(|row| row["task"] == task && row["metric"] == metric)
        .unwrap()
}

/// A copy of an evaluation with its samples of a task changed.
fn changed(from: &Path, to: &Path, task: &str, change: impl Fn(usize, &mut Value) -> bool) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
    let path = to.join(format!("samples_{task}.jsonl"));
    let lines = fs::read_to_string(&path).unwrap();
    let kept = lines.lines().enumerate().filter_map(|(number, line)| {
        let mut sample: Value = serde_json::from_str(line).unwrap();
        change(number, &mut sample).then(|| format!("{sample}\n"))
    });
    fs::write(&path, kept.collect::<String>()).unwrap();
}

#[test]
fn benchmarks_are_compared_item_by_item() {
    let (a, b) = evaluations();
    let folder = tempfile::tempdir().unwrap();
    let (page, flips) = (folder.path().join("c.md"), folder.path().join("f.jsonl"));
    let (rows, table) = compared(text(a), text(b));
    let [of_a, of_b] = [a, b].map(|out| json(&out.join("results.json"))["results"].clone());
    for row in &rows {
        let key = format!(
            "{},{}",
            row["metric"].as_str().unwrap(),
            row["filter"].as_str().unwrap()
        );
        let task = row["task"].as_str().unwrap();
        for (side, results) in [("a", &of_a), ("b", &of_b)] {
            let (got, want) = (number(&row[side]), number(&results[task][&key]));
            assert!((got - want).abs() <= 1e-9 * want.abs(), "{row}: {want}");
        }
        assert_eq!(row["warnings"], json!([]), "{row}");
    }
    let by = |task: &str, metric: &str| row(&rows, task, metric)["uncertainty"]["by"].clone();
    assert_eq!(by("arc_easy", "acc"), "paired");
    assert_eq!(by("mmlu_stem", "acc"), "paired");
    assert_eq!(by("wikitext", "word_perplexity"), "bootstrap");
    assert_eq!(
        row(&rows, "mmlu_stem", "acc")["tasks"]
            .as_array()
            .unwrap()
            .len(),
        19
    );
    // The flips are those of the samples.
    command("compare-results")
        .args([a, b])
        .arg("--flips")
        .arg(&flips)
        .arg("--markdown")
        .arg(&page)
        .ok();
    let mut lines = 0;
    for line in fs::read_to_string(&flips).unwrap().lines() {
        let flip: Value = serde_json::from_str(line).unwrap();
        assert!(flip["doc"].is_object() && !flip["a"].is_null() && !flip["b"].is_null());
        lines += 1;
    }
    let of_tasks = rows
        .iter()
        .filter(|row| row.get("tasks").is_none() && !row["flips"].is_null());
    let counted =
        of_tasks.map(|row| number(&row["flips"]["lost"]) + number(&row["flips"]["gained"]));
    assert_eq!(counted.sum::<f64>(), f64::from(lines));
    let page = fs::read_to_string(&page).unwrap();
    assert!(page.contains(table.lines().next().unwrap()) && page.contains("McNemar"));
    // With itself nothing differs.
    let (same, _) = compared(text(a), text(a));
    assert!(
        same.iter()
            .all(|row| row["difference"] == 0.0 && row["outcome"] == "unclear")
    );
}

/// What lm-evaluation-harness said of the built-in model, in files as it names them.
#[test]
fn results_of_the_harness_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let theirs = folder.path().join("theirs/olmoe-nano");
    fs::create_dir_all(&theirs).unwrap();
    let mut said = json(&repository("fixtures/harness/expected/fewshot.json"));
    let date = "2025-06-30T12-00-00.000000";
    for (task, samples) in said["samples"].take().as_object().unwrap() {
        let lines = samples
            .as_array()
            .unwrap()
            .iter()
            .map(|line| format!("{line}\n"));
        let path = theirs.join(format!("samples_{task}_{date}.jsonl"));
        fs::write(path, lines.collect::<String>()).unwrap();
    }
    fs::write(
        theirs.join(format!("results_{date}.json")),
        said.to_string(),
    )
    .unwrap();
    // An earlier one, which is not read.
    fs::write(theirs.join("results_2024-06-30T12-00-00.json"), "{}").unwrap();
    let (ours, _) = evaluations();
    let (rows, _) = compared(text(&folder.path().join("theirs")), text(ours));
    for (task, metric) in [("arc_easy", "acc_norm"), ("gsm8k", "exact_match")] {
        let row = row(&rows, task, metric);
        assert_eq!(row["difference"], 0.0, "{row}");
        assert_eq!(row["flips"], json!({"lost": 0, "gained": 0}));
        assert_eq!(row["mcnemar_p"], 1.0);
        // The maximum length is not in the fixture.
        assert_eq!(row["warnings"].as_array().unwrap().len(), 1, "{row}");
    }
}

#[test]
fn stages_of_runs_and_files_of_evaluate() {
    let run = text(base()).to_owned();
    let (rows, table) = compared(&format!("{run}@original"), &run);
    let results = json(&base().join("results.json"));
    for (side, stage) in [("a", "original"), ("b", "recovered")] {
        let scores = results["stages"][stage]["intent"].as_object().unwrap();
        for (metric, score) in scores {
            let got = number(&row(&rows, "intent", metric)[side]);
            assert!((got - number(&score["value"])).abs() < 1e-9, "{metric}");
        }
    }
    assert!(
        table.contains("recovered") && row(&rows, "intent", "exact_match")["flips"].is_object()
    );
    let nll = row(&rows, "intent", "answer_nll");
    assert!(nll["flips"].is_null() && nll["uncertainty"]["by"] == "paired");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("scores.json");
    command("evaluate")
        .args(["--task", "translation", "--eval-examples", "20", "--out"])
        .arg(&out)
        .ok();
    let (rows, _) = compared(text(&out), text(&out));
    assert_eq!(
        row(&rows, "translation", "chrf")["uncertainty"]["by"],
        "bootstrap"
    );
    let fails = |a: &str, b: &str, said: &str| {
        let message = command("compare-results").args([a, b]).fails(2);
        assert!(message.contains(said), "{message}");
    };
    fails(
        &format!("{run}@first"),
        &run,
        "it has original, built, recovered",
    );
    fails(&format!("{}@built", text(&out)), &run, "no stage `built`");
    fails(text(&out), &run, "no metric of a task is in both");
}

#[test]
fn what_is_not_the_same_is_said_or_refused() {
    let (a, _) = evaluations();
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("other");
    let fails = |said: &[&str]| {
        let message = command("compare-results").arg(a).arg(&other).fails(2);
        for part in said {
            assert!(message.contains(part), "{part}: {message}");
        }
    };
    changed(a, &other, "arc_easy", |number, sample| {
        sample["doc_hash"] = match number {
            3 | 5 => json!("another"),
            _ => sample["doc_hash"].take(),
        };
        true
    });
    fails(&["`arc_easy`", "2 of 10 items differ", "number 3"]);
    changed(a, &other, "arc_easy", |_, sample| {
        sample.as_object_mut().unwrap().remove("doc_id");
        true
    });
    fails(&["samples_arc_easy.jsonl", "line 1", "`doc_id`"]);
    changed(a, &other, "arc_easy", |number, sample| {
        sample["doc_id"] = json!(number.min(8));
        true
    });
    fails(&["`arc_easy`", "item 8 comes twice in the samples of B"]);
    fs::remove_file(other.join("samples_arc_easy.jsonl")).unwrap();
    fails(&["samples_arc_easy.jsonl", "--log_samples"]);
    fs::remove_file(other.join("results.json")).unwrap();
    fails(&["other", "no results.json"]);
    // Fewer items, other prompts, other numbers of examples are said; a score that the samples do not
    // give is not paired.
    changed(a, &other, "arc_easy", |number, sample| {
        sample["prompt_hash"] = json!("another");
        number < 8
    });
    let mut results = json(&other.join("results.json"));
    results["n-shot"]["arc_easy"] = json!(5);
    fs::write(other.join("results.json"), results.to_string()).unwrap();
    let (rows, table) = compared(text(a), text(&other));
    let found = row(&rows, "arc_easy", "acc");
    assert_eq!(
        (&found["items"], &found["uncertainty"]["by"]),
        (&json!(8), &json!("independent"))
    );
    for part in [
        "2 items are not in B",
        "8 items have other prompts",
        "few-shot examples: 2 in A, 5 in B",
        "the samples do not give the score",
        "[4]",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert_eq!(row(&rows, "arc_challenge", "acc")["warnings"], json!([]));
}
