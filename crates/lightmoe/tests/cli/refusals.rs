//! What cannot work is refused in one line, before anything is spent.

use crate::support::{Outcome, base, command, names, tiny};
use std::fs;
use std::time::{Duration, Instant};

#[test]
fn a_dry_run_is_quick_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let text = command("compress")
        .arg("--dry-run")
        .current_dir(folder.path())
        .ok();
    // Without optimisation the tokenizer alone takes longer.
    let limit = if cfg!(debug_assertions) { 60 } else { 2 };
    let elapsed = begin.elapsed();
    assert!(elapsed < Duration::from_secs(limit), "{elapsed:?}");
    for word in ["lightmoe", "experts replaced", "parameters", "tokens"] {
        assert!(text.contains(word), "{text}");
    }
    let mut call = tiny("compress");
    call.args(["--dry-run", "--json", "--method", "lora", "--out"]);
    let text = call.arg(folder.path().join("run")).ok();
    let forecast: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(forecast["parameters_before"], forecast["parameters_after"]);
    assert!(names(folder.path()).is_empty());
}

#[test]
fn what_cannot_work_is_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let record = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    let few = write("few.jsonl", &record.repeat(25));
    let fewer = write("fewer.jsonl", &record.repeat(19));
    let unknown = write("unknown.toml", "steps = 3\nstepps = 4\n");
    let broken = write("broken.toml", "steps = 3\n[[[\n");
    let compressed = base().join("model").to_str().unwrap().to_owned();
    let both = write("both.toml", "ratio = 0.5\nthreshold = 0.1\n");
    let cases: [(&[&str], &[&str]); 25] = [
        (&["--ratio", "0.99"], &["0.99", "to", "lower"]),
        (&["--ratio=-0.5"], &["-0.5"]),
        (&["--rank", "1000"], &["rank 1000", "64"]),
        (&["--task", "poetry"], &["poetry", "translation"]),
        (&["--method", "magic"], &["magic", "replace"]),
        (&["--train", &few], &["too little", "tokens"]),
        (&["--train", &fewer], &["19 records", "20"]),
        (
            &["--recipe", &unknown],
            &["line 2", "stepps", "unknown.toml"],
        ),
        (&["--recipe", &broken], &["line 2", "broken.toml"]),
        (&["--recipe", &both], &["ratio", "threshold"]),
        (
            &["--ratio", "0.4", "--threshold", "0.1"],
            &["ratio", "threshold"],
        ),
        (&["--threshold", "5"], &["`threshold` is 5"]),
        (&["--ratio", "nan"], &["`ratio` is NaN"]),
        (&["--alpha", "inf"], &["`alpha` is inf"]),
        (&["--weight-decay", "inf"], &["`weight_decay` is inf"]),
        (&["--steps", "4294967296"], &["`steps` is 4294967296"]),
        (&["--seed", "9223372036854775808"], &["`seed`", "2^63"]),
        (&["--threshold", "0.2", "--rank", "60"], &["rank 60"]),
        (&["--method", "lora", "--rank", "0"], &["`rank` is 0"]),
        (
            &["--method", "replace", "--annealing", "none"],
            &["`replace`", "end_ratio"],
        ),
        (
            &["--method", "replace", "--groups", "0", "--end-ratio", "0"],
            &["`replace`", "end_ratio"],
        ),
        (
            &["--method", "replace", "--rank", "0", "--threshold", "0.2"],
            &["rank 0"],
        ),
        (&["--model", &compressed], &["compressed already"]),
        (&["--decay", "sudden"], &["sudden", "cosine"]),
        (&["--model", "no/such/folder"], &["no/such/folder"]),
    ];
    for (args, words) in cases {
        let mut call = command("compress");
        call.args(args).arg("--out").arg(&out);
        let message = call.fails(2);
        assert_eq!(message.trim_end().lines().count(), 1, "{message}");
        for word in words {
            assert!(message.contains(word), "{args:?}: {message}");
        }
        assert!(!out.exists(), "{args:?}");
    }
}

#[test]
fn what_only_the_observations_can_tell_is_refused_too() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut call = tiny("compress");
    call.args(["--threshold", "0.0000001", "--out"]).arg(&out);
    let message = call.fails(2);
    assert!(message.contains("replaces no expert"), "{message}");
    let mut plan = tiny("plan");
    plan.arg("--observations");
    plan.arg(base().join("observations.safetensors"));
    let message = plan
        .arg("--out")
        .arg(folder.path().join("plan.json"))
        .fails(2);
    for word in ["--ratio", "--threshold"] {
        assert!(message.contains(word), "{message}");
    }
    assert_eq!(names(folder.path()), ["run"]);
}

/// Any plan may be edited; one that no bank can hold is refused before the weights are read.
#[test]
fn an_edited_plan_that_no_bank_can_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("plan.json"), folder.path().join("out"));
    let mut plan = crate::support::json(&base().join("plan.json"));
    let slots = plan["layers"][1]["slots"].as_array_mut().unwrap();
    let adapted = slots.iter_mut().find(|s| s["form"] == "adapted").unwrap();
    adapted["group"] = 7.into();
    fs::write(&path, plan.to_string()).unwrap();
    let mut build = command("build");
    build
        .args(["--model", "olmoe-nano"])
        .arg("--plan")
        .arg(&path);
    let message = build.arg("--out").arg(&out).fails(1);
    for word in ["plan.json", "layer 1", "group 7"] {
        assert!(message.contains(word), "{message}");
    }
    assert_eq!(names(folder.path()), ["plan.json"]);
}

#[test]
fn a_compressed_model_is_not_taken_for_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let (model, plan) = (base().join("model"), base().join("plan.json"));
    let mut build = command("build");
    build.arg("--model").arg(&model).arg("--plan").arg(&plan);
    let message = build.arg("--out").arg(&out).fails(2);
    assert!(message.contains("compressed already"), "{message}");
    let mut recover = tiny("recover");
    recover.arg("--model").arg(&model).arg("--plan").arg(&plan);
    recover.arg("--built").arg(base().join("built"));
    let message = recover.arg("--out").arg(&out).fails(2);
    assert!(message.contains("compressed already"), "{message}");
    assert!(names(folder.path()).is_empty());
}
