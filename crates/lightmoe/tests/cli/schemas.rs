//! The files of a run are as their schemas say, and the schemas say something.

use crate::support::{assert_schema, base, json, names, validated};
use serde_json::{Value, json};
use std::fs;

/// The lines of a file.
fn lines(path: &std::path::Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

fn recipe() -> Value {
    let text = fs::read_to_string(base().join("recipe.toml")).unwrap();
    let table: toml::Table = text.parse().unwrap();
    serde_json::to_value(table).unwrap()
}

#[test]
fn a_run_is_as_its_schemas_say() {
    let run = base();
    for name in ["plan", "run", "results", "divergence", "contrast"] {
        assert_schema(name, &json(&run.join(format!("{name}.json"))));
    }
    assert_schema("recipe", &recipe());
    let config = json(&run.join("model/config.json"));
    assert_schema("config", &config["lightmoe"]);
    let logs = run.join("logs");
    let mut samples = 0;
    for name in names(&logs).iter().filter(|n| n.ends_with(".jsonl")) {
        let schema = match name.starts_with("samples_") {
            true => "samples",
            false => "loss",
        };
        for line in lines(&logs.join(name)) {
            assert_schema(schema, &line);
            samples += usize::from(schema == "samples");
        }
    }
    assert_eq!(samples, 60);
}

#[test]
fn what_a_file_may_not_hold_is_refused() {
    let plan = json(&base().join("plan.json"));
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut changed = plan.clone();
        change(&mut changed);
        validated("plan", &changed).is_err()
    };
    assert!(!refused(&|_| ()));
    // A key more, one less, another type, another version, a form that there is not, one at the wrong
    // form.
    assert!(refused(&|plan| plan["layers"][0]["depth"] = json!(1)));
    assert!(refused(&|plan| {
        plan["settings"].as_object_mut().unwrap().remove("rank");
    }));
    assert!(refused(&|plan| plan["ratio"]["achieved"] = json!("half")));
    assert!(refused(&|plan| plan["schema_version"] = json!(99)));
    assert!(refused(
        &|plan| plan["layers"][0]["slots"][0]["form"] = json!("gone")
    ));
    assert!(refused(
        &|plan| plan["layers"][0]["slots"][0]["into"] = json!("x")
    ));
    let mut recipe = recipe();
    recipe["rnak"] = json!(4);
    assert!(validated("recipe", &recipe).is_err());
    // One's own recipe leaves most keys out.
    assert_schema(
        "recipe",
        &json!({"method": "reap", "verdict": {"min_score": 0.9}}),
    );
}
