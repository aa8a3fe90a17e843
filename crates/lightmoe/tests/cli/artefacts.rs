//! What a run leaves, and that the same settings always leave the same.

use crate::support::{
    Outcome, assert_same_run, base, command, files, json, names, repository, tiny,
};
use serde_json::{Value, from_str};
use std::fs;

#[test]
fn a_run_leaves_its_artefacts_and_nothing_else() {
    let run = base();
    for name in ["plan.json", "observations.safetensors", "recipe.toml"] {
        assert!(run.join(name).is_file(), "{name}");
    }
    let report = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("<svg") && report.contains("</html>"));
    let curve = fs::read_to_string(run.join("logs/loss.jsonl")).unwrap();
    let steps: Vec<u64> = curve
        .lines()
        .map(|l| from_str::<Value>(l).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (0..12).collect::<Vec<_>>());
    for stage in ["original", "built", "recovered"] {
        let path = run.join(format!("logs/samples_intent_{stage}.jsonl"));
        assert_eq!(fs::read_to_string(path).unwrap().lines().count(), 20);
    }
    let model = names(&run.join("model"));
    for side in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(model.contains(&side.to_owned()), "{model:?}");
    }
    assert!(!run.join("recovery").exists());
    for name in files(run).keys() {
        let hidden = name.split('/').any(|part| part.starts_with('.'));
        assert!(!hidden && !name.ends_with(".partial"), "{name}");
    }
}

#[test]
fn the_numbers_of_a_run_agree() {
    let run = base();
    let results = json(&run.join("results.json"));
    assert_eq!(results["schema_version"], 1);
    let (target, achieved) = (&results["ratio"]["target"], &results["ratio"]["achieved"]);
    let distance = (target.as_f64().unwrap() - achieved.as_f64().unwrap()).abs();
    assert!(distance < 0.01, "{achieved} instead of {target}");
    let inspect = |model: &str| -> Value {
        let text = command("inspect").args(["--json", "--model", model]).ok();
        from_str(&text).unwrap()
    };
    let (original, compressed) = (
        inspect("olmoe-nano"),
        inspect(run.join("model").to_str().unwrap()),
    );
    assert_eq!(results["parameters"]["before"], original["parameters"]);
    assert_eq!(results["parameters"]["after"], compressed["parameters"]);
    assert_eq!(compressed["parameters_original"], original["parameters"]);
    assert_eq!(results["bytes"]["after"], compressed["bytes"]);
    assert!(results["parameters"]["trained"].as_u64().unwrap() > 0);
    for stage in ["original", "built", "recovered"] {
        let score = &results["stages"][stage]["intent"]["exact_match"];
        assert!((0.0..=1.0).contains(&score["value"].as_f64().unwrap()));
        assert!(score["stderr"].as_f64().unwrap() >= 0.0);
        assert_eq!(score["n"], 20);
        let seconds = &results["seconds"][format!("evaluate_{stage}")];
        assert!(seconds.as_f64().unwrap() > 0.0);
    }
    for stage in ["observe", "plan", "build", "recover"] {
        assert!(results["seconds"][stage].as_f64().unwrap() > 0.0, "{stage}");
    }
    assert!(results["peak_rss_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn the_compressed_model_speaks() {
    let mut call = command("generate");
    call.args(["--max-new-tokens", "8", "--prompt", "book a flight to"]);
    let text = call.arg("--model").arg(base().join("model")).ok();
    assert!(!text.trim().is_empty());
}

#[test]
fn the_seed_decides_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    let (same, other) = (folder.path().join("same"), folder.path().join("other"));
    tiny("compress").arg("--out").arg(&same).ok();
    assert_same_run(base(), &same);
    let mut call = tiny("compress");
    call.args(["--seed", "1"]).arg("--out").arg(&other).ok();
    let weights = |run: &std::path::Path| fs::read(run.join("model/model.safetensors")).unwrap();
    assert_ne!(weights(base()), weights(&other));
}

#[test]
fn the_reference_in_the_repository_is_up_to_date() {
    let is_new = |page: &str, arguments: &[&str]| {
        let made = command("reference").args(arguments).ok();
        assert!(
            fs::read_to_string(repository(page)).is_ok_and(|page| page == made),
            "{page} is old; make it anew by `cargo xtask docs`"
        );
    };
    is_new("docs/reference.md", &[]);
    let mut pages = Vec::new();
    for name in command("reference").arg("--schemas").ok().lines() {
        let page = format!("{name}.schema.json");
        is_new(&format!("docs/schemas/{page}"), &["--schema", name]);
        pages.push(page);
    }
    pages.sort();
    assert_eq!(names(&repository("docs/schemas")), pages);
    command("reference").args(["--schema", "x"]).fails(2);
}
