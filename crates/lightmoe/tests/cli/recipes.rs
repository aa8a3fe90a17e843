//! Recipes from files and flags, the user's own records, and the other methods.

use crate::support::{Outcome, TINY, base, command, json, model_copy, scores, tiny};
use serde_json::json;
use std::fs;
use std::path::Path;

fn forecast(recipe: &Path, flags: &[&str]) -> String {
    let mut call = command("compress");
    call.args(["--dry-run", "--json"]).args(flags);
    call.arg("--recipe").arg(recipe).ok()
}

/// The recipe that a run with these settings writes.
fn resolved(recipe: &Path, flags: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut call = command("compress");
    call.arg("--recipe").arg(recipe).args(flags);
    call.arg("--out").arg(&out).ok();
    fs::read_to_string(out.join("recipe.toml")).unwrap()
}

#[test]
fn keys_equal_flags_and_flags_win() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, more: &str| {
        let path = folder.path().join(name);
        let tiny = TINY.replace("steps = 12", "steps = 2");
        fs::write(&path, format!("{tiny}{more}")).unwrap();
        path
    };
    let keys = "ratio = 0.3\nrank = 2\ngroups = 2\nlr = 0.002\nannealing = 'exponential'\n\
                end_ratio = 0.5\ntrain_router = true\n";
    let flags = "--ratio 0.3 --rank 2 --groups 2 --lr 0.002 --annealing exponential \
                 --end-ratio 0.5 --train-router true";
    let flags: Vec<&str> = flags.split_whitespace().collect();
    let (plain, keyed) = (file("plain.toml", ""), file("keyed.toml", keys));
    let recipe = resolved(&keyed, &[]);
    assert_eq!(resolved(&plain, &flags), recipe);
    assert!(recipe.contains("ratio = 0.3") && recipe.contains("train_router = true"));
    let other = file(
        "other.toml",
        "ratio = 0.6\nrank = 4\nlr = 7.0\ngroups = 5\n",
    );
    assert_eq!(resolved(&other, &flags), recipe);
    // A threshold on the command line replaces a ratio in the file.
    let text = forecast(&keyed, &["--threshold", "0.2"]);
    assert!(text.contains("\"parameters_after\": null"), "{text}");
}

#[test]
fn the_written_recipe_can_be_given_back() {
    let written = base().join("recipe.toml");
    let text = fs::read_to_string(&written).unwrap();
    let again = resolved(&written, &["--steps", "12"]);
    assert_eq!(again, text);
}

/// Compresses with 60 records made of `record`, and returns the run's results.
fn own_records(record: impl Fn(usize) -> serde_json::Value) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("mine.jsonl"), folder.path().join("run"));
    let lines: Vec<String> = (0..60).map(|i| record(i).to_string() + "\n").collect();
    fs::write(&file, lines.concat()).unwrap();
    let recipe = folder.path().join("short.toml");
    fs::write(&recipe, "steps = 3\nbatch_size = 4\n").unwrap();
    let mut call = command("compress");
    call.arg("--recipe").arg(&recipe).arg("--train").arg(&file);
    call.arg("--out").arg(&out).ok();
    for stage in ["original", "built", "recovered"] {
        assert!(scores(&out, stage)["mine"].is_object());
    }
    let sample = fs::read_to_string(out.join("logs/samples_mine_recovered.jsonl")).unwrap();
    assert_eq!(sample.lines().count(), 3);
    json(&out.join("results.json"))
}

#[test]
fn own_records_of_both_forms_run_to_the_end() {
    let (question, answer) = (
        |i: usize| format!("What is {i} and {i}? Say it."),
        |i: usize| format!("It is {}.", 2 * i),
    );
    let plain =
        own_records(|i| json!({"prompt": question(i), "completion": format!(" {}", answer(i))}));
    assert_eq!(plain["task"], "mine");
    let chat = own_records(|i| {
        json!({"messages": [
            {"role": "user", "content": question(i)},
            {"role": "assistant", "content": answer(i)},
        ]})
    });
    let nll = |results: &serde_json::Value| {
        results["stages"]["original"]["mine"]["answer_nll"]["value"]
            .as_f64()
            .unwrap()
    };
    assert!(nll(&plain).is_finite() && nll(&chat).is_finite());
}

#[test]
fn conversations_need_the_chat_template_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_copy(&folder.path().join("model"));
    let file = folder.path().join("chat.jsonl");
    let record = json!({"messages": [
        {"role": "user", "content": "Say it, please, as often as you like to."},
        {"role": "assistant", "content": "It."},
    ]});
    fs::write(&file, format!("{record}\n").repeat(60)).unwrap();
    let call = || {
        let mut call = command("compress");
        call.arg("--dry-run").arg("--model").arg(&model);
        call.arg("--train").arg(&file);
        call
    };
    call().ok();
    let path = model.join("tokenizer_config.json");
    let template = |text: &str| {
        let mut config = json(&path);
        config["chat_template"] = json!(text);
        fs::write(&path, config.to_string()).unwrap();
    };
    template("{{ raise_exception('no talking') }}");
    let message = call().fails(1);
    for part in ["chat.jsonl` line 1", "no talking"] {
        assert!(message.contains(part), "{message}");
    }
    fs::remove_file(&path).unwrap();
    let message = call().fails(1);
    assert!(message.contains("no chat template"), "{message}");
}

/// The loss of the first training step.
fn first_loss(run: &Path) -> f64 {
    let curve = fs::read_to_string(run.join("logs/loss.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(curve.lines().next().unwrap()).unwrap();
    first["loss"].as_f64().unwrap()
}

#[test]
fn the_other_methods_run_to_the_end() {
    // At β = 1, with adapters that start at zero, every method is the original model (eq. 6).
    let original = first_loss(base());
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str]); 3] = [
        ("adapters", &["--method", "replace", "--groups", "0"]),
        ("one-base", &["--method", "replace", "--groups", "1"]),
        ("lora", &["--method", "lora"]),
    ];
    for (name, flags) in cases {
        let out = folder.path().join(name);
        let mut call = tiny("compress");
        call.args(flags).args(["--steps", "4"]);
        call.arg("--out").arg(&out).ok();
        let (loss, tolerance) = (first_loss(&out), 1e-5 * original);
        assert!(
            (loss - original).abs() < tolerance,
            "{name}: {loss} {original}"
        );
        let results = json(&out.join("results.json"));
        let parameters = &results["parameters"];
        let achieved = results["ratio"]["achieved"].as_f64().unwrap();
        if name == "lora" {
            assert_eq!(parameters["after"], parameters["before"]);
            assert_eq!(achieved, 0.0);
        } else {
            assert!((achieved - 0.5).abs() < 0.01, "{name}: {achieved}");
        }
        assert!(parameters["trained"].as_u64().unwrap() > 0);
        assert!(scores(&out, "recovered")["intent"].is_object());
    }
}

/// The planner, for bytes, on a mix of tasks and records, without a recovery.
#[test]
fn a_plan_by_bytes_needs_no_recovery() {
    let folder = tempfile::tempdir().unwrap();
    let records = folder.path().join("notes.jsonl");
    let line = |i: usize| {
        format!(
            "{{\"prompt\": \"{i} + 1 =\", \"completion\": \"{}\"}}\n",
            i + 1
        )
    };
    fs::write(&records, (0..30).map(line).collect::<String>()).unwrap();
    let mix = format!("math,code=2,{}=0.5", records.display());
    let out = folder.path().join("out");
    let call = || {
        let mut call = tiny("compress");
        call.args(["--method", "budget", "--bytes", "5MB", "--steps", "0"]);
        call.args(["--calibrate", &mix, "--also", "math,code"]);
        call.arg("--out").arg(&out);
        call
    };
    call().ok();
    let results = json(&out.join("results.json"));
    let bytes = results["bytes"]["after"].as_u64().unwrap();
    assert!((4_950_000..=5_000_000).contains(&bytes), "{bytes}");
    let plan = json(&out.join("plan.json"));
    assert_eq!(plan["damage"]["bytes"], bytes);
    assert_eq!(results["parameters"]["trained"], 0);
    assert!(results["stages"].get("recovered").is_none());
    for task in ["intent", "math", "code"] {
        assert!(scores(&out, "built")[task].is_object(), "{task}");
    }
    assert!(out.join("model/config.json").is_file() && !out.join("built").exists());
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("<h2>Damage") && !page.contains("<h2>Recovery"));
    // What was calibrated on is a part of the run.
    fs::write(&records, (1..31).map(line).collect::<String>()).unwrap();
    let message = call().arg("--resume").fails(1);
    assert!(message.contains("data"), "{message}");
}

/// What training made worse is not kept, and what it made better is.
#[test]
fn the_better_model_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    for (lr, kept) in [("1e-3", "recovered"), ("30", "built")] {
        let out = folder.path().join(kept);
        let mut call = tiny("compress");
        call.args([
            "--method", "budget", "--ratio", "0.4", "--steps", "6", "--lr", lr,
        ]);
        call.arg("--out").arg(&out).ok();
        let weights = |name: &str| fs::read(out.join(name).join("model.safetensors")).unwrap();
        assert_eq!(
            weights("model") == weights("built"),
            kept == "built",
            "{lr}"
        );
        assert!(!out.join("recovered").exists());
        let same = scores(&out, "recovered") == scores(&out, "built");
        assert_eq!(same, kept == "built", "{lr}");
        let record = &json(&out.join("results.json"))["kept"];
        assert_eq!(record["model"], kept);
        let better = record["recovered_nll"].as_f64() < record["built_nll"].as_f64();
        assert_eq!(better, kept == "recovered");
    }
}

/// Other parts of LightMoE than the paper's: the stages find what they need, and recovery begins at the
/// original though the adapters hold something.
#[test]
fn lightmoe_with_other_parts_runs_from_one_call() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut call = tiny("compress");
    call.args(["--select", "damage", "--base", "least-squares"]);
    call.args(["--adapters", "whitened", "--steps", "3", "--out"]);
    call.arg(&out).ok();
    let plan = json(&out.join("plan.json"));
    assert_eq!(plan["settings"]["base"], "least-squares");
    assert_eq!(plan["settings"]["adapters"], "whitened");
    assert!(plan["layers"][0]["slots"][0]["weight"].as_f64().is_some());
    let first = |run: &Path| -> f64 {
        let text = fs::read_to_string(run.join("logs/loss.jsonl")).unwrap();
        let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        line["loss"].as_f64().unwrap()
    };
    // At β = 1 both are the uncompressed model on the same batch.
    let plain = folder.path().join("plain");
    tiny("compress")
        .args(["--steps", "3", "--out"])
        .arg(&plain)
        .ok();
    assert!((first(&out) - first(&plain)).abs() < 1e-5);
    // So is what `budget` begins with, where it is asked to.
    let planned = folder.path().join("planned");
    let mut call = tiny("compress");
    call.args(["--method", "budget", "--annealing", "linear"]);
    call.args(["--ratio", "0.3", "--steps", "3", "--out"]);
    call.arg(&planned).ok();
    let slots = &json(&planned.join("plan.json"))["layers"][0]["slots"];
    let is_adapted = |slot: &serde_json::Value| slot["form"] == "adapted";
    assert!(slots.as_array().unwrap().iter().any(is_adapted), "{slots}");
    let apart = (first(&planned) - first(&plain)).abs();
    assert!(apart < 1e-5, "{apart}");

    let mut call = tiny("compress");
    call.args(["--method", "svd", "--select", "reap", "--out"]);
    let message = call.arg(folder.path().join("other")).fails(2);
    assert!(message.contains("`select`"), "{message}");
}
