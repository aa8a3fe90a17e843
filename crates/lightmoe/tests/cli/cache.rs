//! `evaluate --tasks … --use-cache`.

use crate::support::{Outcome, base, command, files, json, names, repository};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// An evaluation with a cache in `folder`, which leaves its results in `folder`, too.
fn evaluate(folder: &Path, tasks: &str, out: &str, further: &[&str]) -> Command {
    let mut command = command("evaluate");
    command.args(["--tasks", tasks, "--num-fewshot", "2", "--data"]);
    command.arg(repository("fixtures/harness/data"));
    command.arg("--out").arg(folder.join(out)).args(further);
    command.arg("--use-cache").arg(folder.join("cache"));
    command.env("RUST_LOG", "info");
    command
}

/// What it logs, and the scores.
#[track_caller]
fn ran(mut command: Command, folder: &Path, out: &str) -> (String, Value) {
    let output = command.output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    let results = json(&folder.join(out).join("results.json"));
    (log, results["results"].clone())
}

#[track_caller]
fn known(log: &str) -> (usize, usize) {
    let (before, _) = log.split_once(" requests were in the cache").unwrap();
    let words: Vec<&str> = before.split_whitespace().rev().take(3).collect();
    (words[2].parse().unwrap(), words[0].parse().unwrap())
}

/// Scores as they are without a cache: shares to the bit, likelihoods but for the last digits.
#[track_caller]
fn assert_same(a: &Value, b: &Value) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
            a.iter()
                .for_each(|(key, value)| assert_same(value, &b[key]));
        }
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => assert!((a - b).abs() <= 1e-5 * b.abs(), "{a} {b}"),
            _ => assert_eq!(a, b),
        },
    }
}

#[test]
fn what_was_asked_before_is_not_computed_again() {
    let made = tempfile::tempdir().unwrap();
    let folder = made.path();
    let run = |tasks: &str, out: &str, further: &[&str]| {
        ran(evaluate(folder, tasks, out, further), folder, out)
    };
    let whole = |tasks: &str, out: &str| {
        let mut command = command("evaluate");
        command.args(["--tasks", tasks, "--num-fewshot", "2", "--data"]);
        command.arg(repository("fixtures/harness/data"));
        command.arg("--out").arg(folder.join(out)).ok();
        json(&folder.join(out).join("results.json"))["results"].clone()
    };
    let (log, _) = run("arc_easy,gsm8k", "a", &["--limit", "3"]);
    let (none, few) = known(&log);
    assert!(none == 0 && few > 6, "{log}");
    // More documents, then another task with the first one in its group: only what is new is computed.
    let (log, scores) = run("arc_easy,gsm8k", "b", &[]);
    let (hits, all) = known(&log);
    assert!(hits == few && all > few, "{log}");
    assert_same(&scores, &whole("arc_easy,gsm8k", "b-whole"));
    let lines = || -> usize {
        let files = files(&folder.join("cache"));
        let texts = files
            .values()
            .map(|bytes| bytes.split(|b| *b == b'\n').count() - 1);
        texts.sum()
    };
    assert_eq!(lines(), all);
    let (log, scores) = run("ai2_arc,gsm8k", "c", &[]);
    let (hits, more) = known(&log);
    assert!(hits == all && more > all, "{log}");
    assert_same(&scores, &whole("ai2_arc,gsm8k", "c-whole"));
    assert_eq!(lines(), more);
    // The same again computes nothing and adds nothing.
    let (log, again) = run("ai2_arc,gsm8k", "d", &[]);
    assert_eq!((known(&log), lines()), ((more, more), more));
    assert_eq!(again, scores);
    // Another model finds nothing.
    let model = base().join("model");
    let model = ["--limit", "3", "--model", model.to_str().unwrap()];
    let (log, _) = run("arc_easy,gsm8k", "e", &model);
    assert_eq!(known(&log), (0, few));
    assert_eq!(names(&folder.join("cache")).len(), 2);
}

#[test]
fn two_write_at_once_and_damage_is_told() {
    let made = tempfile::tempdir().unwrap();
    let folder = made.path();
    let start = |out: &str| {
        let mut command = evaluate(folder, "arc_easy", out, &[]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    let (mut a, mut b) = (start("a"), start("b"));
    assert!(a.wait().unwrap().success() && b.wait().unwrap().success());
    let cache = folder.join("cache");
    let mut found: Vec<String> = files(&cache).into_keys().collect();
    found.sort();
    // The first line of the first file is cut, its second one no sample, and an unknown file lies beside.
    let path = cache.join(&found[0]);
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let damaged = format!("{}\n{{}}\n{}\n", &lines[0][..20], lines[2..].join("\n"));
    fs::write(&path, damaged).unwrap();
    for other in &found[1..] {
        fs::remove_file(cache.join(other)).unwrap();
    }
    fs::write(path.with_file_name("notes.txt"), "x").unwrap();
    let (log, scores) = ran(evaluate(folder, "arc_easy", "c", &[]), folder, "c");
    for number in [1, 2] {
        let place = format!("{}` line {number}:", path.display());
        assert!(log.contains(&place), "{place}: {log}");
    }
    let (hits, all) = known(&log);
    assert!(hits == lines.len() - 2 && hits < all, "{log}");
    let of_a = json(&folder.join("a/results.json"))["results"].clone();
    assert_same(&scores, &of_a);
}
