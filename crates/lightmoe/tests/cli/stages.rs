//! The stages one by one, plans without weights, and the export.

use crate::support::{Outcome, base, command, files, json, names, repository, scores, tiny};
use serde_json::{Map, Value, from_str, json};
use std::fs;

#[test]
fn the_stages_one_by_one_make_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    // A point in the name is no extension.
    let at = |name: &str| folder.path().join(name);
    let (seen, plan) = (at("seen.safetensors"), at("plan.json"));
    let (built, model) = (at("built-0.5"), at("model-0.5"));
    tiny("observe").arg("--out").arg(&seen).ok();
    let mut call = tiny("plan");
    call.arg("--observations").arg(&seen);
    call.args(["--ratio", "0.5", "--json"]);
    let totals: Value = from_str(&call.arg("--out").arg(&plan).ok()).unwrap();
    let mut call = command("build");
    call.args(["--model", "olmoe-nano"])
        .arg("--plan")
        .arg(&plan);
    call.arg("--out").arg(&built).ok();
    let mut call = tiny("recover");
    call.arg("--built").arg(&built).arg("--plan").arg(&plan);
    call.arg("--out").arg(&model).ok();
    for (ours, whole) in [
        (&seen, "observations.safetensors"),
        (&plan, "plan.json"),
        (&at("model-0.5.recovery/loss.jsonl"), "logs/loss.jsonl"),
    ] {
        let same = fs::read(ours).unwrap() == fs::read(base().join(whole)).unwrap();
        assert!(same, "{whole} differs");
    }
    assert!(files(&model) == files(&base().join("model")));
    assert!(files(&built) == files(&base().join("built")));
    let results = json(&base().join("results.json"));
    assert_eq!(totals["parameters"], results["parameters"]);
    let mut call = tiny("evaluate");
    call.arg("--model").arg(&model).arg("--out");
    let printed: Value = from_str(&call.arg(at("scores.json")).ok()).unwrap();
    assert_eq!(printed, scores(base(), "recovered"));
    assert_eq!(json(&at("scores.json")), printed);
    let left = [
        "built-0.5",
        "model-0.5",
        "model-0.5.recovery",
        "plan.json",
        "scores.json",
        "scores.samples.jsonl",
        "seen.safetensors",
    ];
    assert_eq!(names(folder.path()), left);
}

#[test]
fn scores_made_elsewhere_give_a_plan_without_weights() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("s.json"), folder.path().join("p.json"));
    let layer = |l: usize| -> Value {
        let score = |e: usize| (e.to_string(), json!(((e * 37 + l * 11) % 64 + 1) as f64));
        Value::Object((0..64).map(score).collect())
    };
    let layers: Map<String, Value> = (1..27).map(|l| (l.to_string(), layer(l))).collect();
    fs::write(&file, json!({"gate_scores": layers}).to_string()).unwrap();
    let config = repository("fixtures/configs/deepseek-v2-lite.json");
    let mut call = command("plan");
    call.arg("--config").arg(&config).arg("--scores").arg(&file);
    let text = call.args(["--ratio", "0.5", "--out"]).arg(&out).ok();
    assert!(text.contains("of 64 experts a layer replaced"), "{text}");
    let plan = json(&out);
    let layers = plan["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 26);
    assert_eq!(
        (&layers[0]["layer"], &layers[25]["layer"]),
        (&json!(1), &json!(26))
    );
    let slots = || layers.iter().flat_map(|l| l["slots"].as_array().unwrap());
    assert_eq!(slots().count(), 26 * 64);
    assert!(slots().all(|s| s["form"] == "dense" || s["form"] == "adapted"));
    assert!(slots().any(|s| s["form"] == "dense") && slots().any(|s| s["form"] == "adapted"));
    assert!((plan["ratio"]["achieved"].as_f64().unwrap() - 0.5).abs() < 0.01);
    // One score less.
    let mut scores = json(&file);
    scores["gate_scores"]["7"]
        .as_object_mut()
        .unwrap()
        .remove("63");
    fs::write(&file, scores.to_string()).unwrap();
    let mut call = command("plan");
    call.arg("--config").arg(&config).arg("--scores").arg(&file);
    call.args(["--ratio", "0.5", "--out"]);
    let message = call.arg(folder.path().join("q.json")).fails(1);
    assert!(
        message.contains("s.json") && message.contains("layer 7"),
        "{message}"
    );
    assert_eq!(names(folder.path()), ["p.json", "s.json"]);
}

#[test]
fn a_dense_export_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let dense = folder.path().join("dense");
    let mut call = command("export");
    call.args(["--kind", "dense", "--dtype", "f32"]);
    call.arg("--model")
        .arg(base())
        .arg("--out")
        .arg(&dense)
        .ok();
    let text = command("inspect")
        .arg("--json")
        .arg("--model")
        .arg(&dense)
        .ok();
    let summary: Value = from_str(&text).unwrap();
    assert_eq!(summary["parameters"], summary["parameters_original"]);
    assert_eq!(summary["dtype"], "f32");
    for layer in summary["layers"].as_array().unwrap() {
        assert_eq!((&layer["adapted"], &layer["bases"]), (&json!(0), &json!(0)));
    }
    let text = tiny("evaluate").arg("--model").arg(&dense).ok();
    let (ours, expected): (Value, Value) = (from_str(&text).unwrap(), scores(base(), "recovered"));
    for (metric, score) in expected["intent"].as_object().unwrap() {
        let value = |s: &Value| s["value"].as_f64().unwrap();
        let distance = (value(score) - value(&ours["intent"][metric])).abs();
        assert!(
            distance < 1e-4 * value(score).abs().max(1.0),
            "{metric}: {distance}"
        );
    }
    assert_eq!(names(folder.path()), ["dense"]);
}

/// The methods that drop experts go the same way as LightMoE; what they leave has no dense form.
#[test]
fn methods_that_drop_experts_run_to_the_end() {
    let folder = tempfile::tempdir().unwrap();
    for (method, form) in [("reap", "removed"), ("mone", "constant")] {
        let run = folder.path().join(method);
        let mut call = tiny("compress");
        call.args(["--method", method, "--ratio", "0.4"])
            .arg("--out")
            .arg(&run)
            .ok();
        let plan = crate::support::json(&run.join("plan.json"));
        let slots = plan["layers"].as_array().unwrap().iter();
        let slots = slots.flat_map(|l| l["slots"].as_array().unwrap());
        let dropped = slots.filter(|s| s["form"] == form).count();
        assert!(dropped > 30, "{method}: {dropped}");
        let results = crate::support::json(&run.join("results.json"));
        let achieved = results["ratio"]["achieved"].as_f64().unwrap();
        assert!((achieved - 0.4).abs() < 0.005, "{method}: {achieved}");
        let mut inspect = command("inspect");
        let text = inspect
            .arg("--json")
            .arg("--model")
            .arg(run.join("model"))
            .ok();
        let summary: Value = from_str(&text).unwrap();
        assert_eq!(summary["parameters"], plan["parameters"]["after"]);
        let mut export = command("export");
        export
            .arg("--model")
            .arg(&run)
            .arg("--out")
            .arg(folder.path().join("dense"));
        assert!(export.fails(1).contains("compact"));
        let mut export = command("export");
        export.args(["--kind", "compact"]).arg("--model").arg(&run);
        export.arg("--out").arg(folder.path().join("compact")).ok();
    }
    let mut forecast = tiny("compress");
    forecast.args(["--method", "reap", "--ratio", "0.4", "--dry-run", "--json"]);
    let forecast: Value = from_str(&forecast.ok()).unwrap();
    assert_eq!(forecast["parameters_after"], 2_203_469);
    let mut far = tiny("compress");
    let message = far
        .args(["--method", "ean", "--ratio", "0.85", "--dry-run"])
        .fails(2);
    assert!(message.contains("chooses 4"), "{message}");
}
