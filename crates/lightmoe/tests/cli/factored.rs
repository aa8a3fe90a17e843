//! MC-SMoE through all stages: rows that training drops, killed and resumed, and what comes of the result.

use crate::support::{Outcome, assert_same_run, command, end, json, tiny};
use serde_json::{Value, from_str};
use std::fs;
use std::path::Path;
use std::process::Command;

/// More steps than between two training checkpoints (50).
fn run(out: &Path) -> Command {
    let mut command = tiny("compress");
    command.args(["--method", "mcsmoe", "--ratio", "0.4", "--steps", "70"]);
    command.args(["--batch-size", "2", "--out"]).arg(out);
    command
}

#[test]
fn a_killed_pruning_goes_on_to_the_same_bytes_and_the_result_serves() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (whole, cut) = (at("whole"), at("cut"));
    run(&whole).ok();
    let lines =
        || fs::read_to_string(cut.join("logs/loss.jsonl")).map_or(0, |text| text.lines().count());
    assert_eq!(end(&mut run(&cut), "-KILL", || lines() >= 57), None);
    run(&cut).arg("--resume").ok();
    assert_same_run(&whole, &cut);

    let results = json(&whole.join("results.json"));
    let achieved = results["ratio"]["achieved"].as_f64().unwrap();
    assert!((achieved - 0.4).abs() < 0.005, "{achieved}");
    let model = whole.join("model");
    let text = command("inspect")
        .args(["--json", "--model"])
        .arg(&model)
        .ok();
    let inspected: Value = from_str(&text).unwrap();
    assert_eq!(results["parameters"]["after"], inspected["parameters"]);
    assert_eq!(results["bytes"]["after"], inspected["bytes"]);
    let layers = inspected["layers"].as_array().unwrap();
    assert!(
        layers
            .iter()
            .all(|l| l["factored"]["rank"].as_u64().unwrap() > 0)
    );
    let recipe = fs::read_to_string(whole.join("recipe.toml")).unwrap();
    assert!(recipe.contains("distill = 0.2\n"), "{recipe}");

    // Multiplied out it answers the same, and what recovery changed is no small update.
    let mut export = command("export");
    export.args(["--kind", "dense", "--model"]).arg(&model);
    export.arg("--out").arg(at("dense")).ok();
    let says = |model: &Path| {
        let mut call = command("generate");
        call.args(["--max-new-tokens", "8", "--prompt", "book a flight to"]);
        call.arg("--model").arg(model).ok()
    };
    assert_eq!(says(&at("dense")), says(&model));
    let mut pack = command("export");
    pack.args(["--pack", "compeft", "--base"])
        .arg(whole.join("built"));
    pack.args(["--density", "0.1", "--alpha", "1", "--model"]);
    pack.arg(&model);
    let message = pack.arg("--out").arg(at("packed")).fails(1);
    assert!(message.contains("compact"), "{message}");
}
