//! The files of a run are as their schemas say, and the schemas say something.

use crate::support::{Outcome, assert_schema, base, command, json, names, repository, validated};
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

/// Benchmarks with every output type, groups, filters, metrics of a corpus, and a conversation.
#[test]
fn benchmarks_are_as_their_schemas_say() {
    let folder = tempfile::tempdir().unwrap();
    let own = ["cloze", "phrases", "sums"].map(|name| {
        let path = repository(&format!("fixtures/harness/{name}.yaml"));
        path.display().to_string()
    });
    let mut evaluate = command("evaluate");
    let tasks = format!("hendrycks_math,ai2_arc,gsm8k,wikitext,{}", own.join(","));
    evaluate.args(["--limit", "2", "--tasks", &tasks, "--data"]);
    evaluate.arg(repository("fixtures/harness/data"));
    evaluate.args(["--apply-chat-template", "--system-instruction", "Be brief."]);
    evaluate.arg("--out").arg(folder.path()).ok();
    let results = json(&folder.path().join("results.json"));
    assert_schema("benchmarks", &results);
    let mut samples = Vec::new();
    for name in names(folder.path())
        .iter()
        .filter(|n| n.ends_with(".jsonl"))
    {
        samples.extend(lines(&folder.path().join(name)));
    }
    // Two documents of each of 14 tasks, of which two score what two chains of filters leave.
    assert_eq!(samples.len(), 2 * (14 + 2));
    for sample in &samples {
        assert_schema("benchmark-samples", sample);
    }
    let refused = |schema: &str, of: &Value, change: &dyn Fn(&mut Value)| {
        let mut changed = of.clone();
        change(&mut changed);
        assert!(validated(schema, &changed).is_err(), "{changed}");
    };
    let result = |change: &dyn Fn(&mut Value)| refused("benchmarks", &results, change);
    result(&|all| all["n_shot"] = json!({}));
    result(&|all| drop(all.as_object_mut().unwrap().remove("task_hashes")));
    result(&|all| all["results"]["gsm8k"]["exact_match"] = json!(1));
    result(&|all| all["results"]["arc_easy"]["acc,none"] = json!([1]));
    result(&|all| all["configs"]["arc_easy"]["output_typ"] = json!("multiple_choice"));
    result(&|all| all["configs"]["arc_easy"]["metric_list"][0]["metrik"] = json!("acc"));
    result(&|all| all["config"]["limit"] = json!("2"));
    result(&|all| all["n-samples"]["wikitext"]["done"] = json!(2));
    let sample = |change: &dyn Fn(&mut Value)| refused("benchmark-samples", &samples[0], change);
    sample(&|one| one["doc_id"] = json!("0"));
    sample(&|one| drop(one.as_object_mut().unwrap().remove("filter")));
    sample(&|one| one["arguments"]["gen_args_0"]["arg_2"] = json!("more"));
    sample(&|one| one["resps"] = json!([1]));
    sample(&|one| one["acc"] = json!(true));
}
