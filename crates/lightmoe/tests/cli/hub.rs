//! A model by its name on the Hub, with the variables that point to a Hub on the loopback address.

#[path = "../../../models/tests/support/hub.rs"]
mod server;

use crate::support::{Outcome, command, repository};
use serde_json::{Value, json};
use server::{Fault, Hub, files};
use std::path::Path;
use std::process::Command;

fn hub() -> Hub {
    let mut files = files(&repository("fixtures/parity/mixtral"));
    files.remove("reference.safetensors");
    Hub::new(files)
}

fn call(sub: &str, hub: &Hub, cache: &Path) -> Command {
    let mut command = command(sub);
    command
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_HUB_CACHE", cache)
        .env("HF_TOKEN", "secret")
        .env("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        .env_remove("HF_HUB_OFFLINE");
    command
}

#[test]
fn a_model_is_inspected_by_its_name() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let inspect = |name: &str| {
        let mut call = call("inspect", &hub, cache.path());
        call.args(["--json", "--model", name]);
        call
    };
    let text = inspect("org/tiny").ok();
    let summary: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(summary["family"], "mixtral");
    assert!(cache.path().join("models--org--tiny/refs/main").exists());
    let seen = hub.seen();
    assert_eq!(seen[0].headers["authorization"], "Bearer secret");
    // No weights for what the configuration tells.
    let weights = |seen: &[server::Seen]| seen.iter().any(|s| s.path.contains(".safetensors"));
    assert!(!weights(&seen));

    let offline = |name: &str| {
        let mut call = inspect(name);
        call.env("HF_HUB_OFFLINE", "1");
        call
    };
    assert_eq!(offline("org/tiny").ok(), text);
    let message = offline("org/other").fails(2);
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
    assert!(hub.seen().is_empty());

    for (name, words) in [
        ("org/none", ["no folder here", "HF_TOKEN"]),
        ("org/tiny@v3", ["no revision `v3`", "give"]),
        ("nowhere", ["no model folder", "org/name@revision"]),
    ] {
        let message = inspect(name).fails(2);
        assert_eq!(message.lines().count(), 1, "{message}");
        for word in words {
            assert!(message.contains(word), "{message}");
        }
    }
    let mut unreachable = inspect("org/tiny");
    unreachable.env("HF_ENDPOINT", "http://127.0.0.1:1");
    assert!(unreachable.fails(1).contains("network"));
}

#[test]
fn a_folder_comes_before_the_hub() {
    let (hub, folder) = (hub(), tempfile::tempdir().unwrap());
    for (name, word) in [("org/tiny", "no config.json"), ("org/.lost.old", "rename")] {
        std::fs::create_dir_all(folder.path().join(name)).unwrap();
        let model = name.replace(".lost.old", "lost");
        let mut inspect = call("inspect", &hub, folder.path());
        inspect.args(["--model", &model]).current_dir(folder.path());
        let code = if word == "rename" { 1 } else { 2 };
        let message = inspect.fails(code);
        assert!(message.contains(word), "{message}");
    }
    assert!(hub.seen().is_empty());
}

#[test]
fn a_failing_server_ends_with_one() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    hub.fail("model.safetensors", &[Fault::Status(500); 3]);
    let mut logits = call("logits", &hub, cache.path());
    logits.args(["--model", "org/tiny", "--out"]);
    let message = logits.arg(cache.path().join("logits")).fails(1);
    assert!(
        message.contains("500") && message.contains("try again"),
        "{message}"
    );
}

#[test]
fn a_plan_needs_the_config_alone() {
    let (hub, cache) = (hub(), tempfile::tempdir().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let scores = folder.path().join("scores.json");
    let layer: Value = (0..8).map(|e| (e.to_string(), json!(e + 1))).collect();
    let layers = json!({"gate_scores": {"0": layer, "1": layer}});
    std::fs::write(&scores, layers.to_string()).unwrap();
    let mut plan = call("plan", &hub, cache.path());
    plan.args([
        "--model",
        "org/tiny",
        "--threshold",
        "0.3",
        "--rank",
        "1",
        "--scores",
    ]);
    plan.arg(&scores)
        .arg("--out")
        .arg(folder.path().join("plan.json"))
        .ok();
    let paths: Vec<String> = hub.seen().into_iter().map(|s| s.path).collect();
    assert_eq!(paths.len(), 3, "{paths:?}");
    assert!(paths[1..].iter().all(|p| p.ends_with("/config.json")));
}

/// The data set of a task of the user's own, as the Hub would have it.
#[test]
fn data_come_from_the_cache_or_when_asked_from_the_hub() {
    let parquet = |name: &str| {
        let path = repository("fixtures/parquet/main").join(name);
        (format!("main/{name}"), std::fs::read(path).unwrap())
    };
    let names = [
        "test-00000-of-00001.parquet",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ];
    let hub = Hub::new(names.map(parquet).into());
    let (cache, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let task = "task: sums\ndataset_path: org/tiny\ndataset_name: main\ntest_split: test\n\
                fewshot_split: train\noutput_type: loglikelihood\ndoc_to_text: '{{question}}'\n\
                doc_to_target: ' {{answer}}'\nmetric_list: [{metric: acc}]\n";
    let path = folder.path().join("sums.yaml");
    std::fs::write(&path, task).unwrap();
    let evaluate = |more: &[&str]| {
        let mut call = call("evaluate", &hub, cache.path());
        call.arg("--tasks").arg(&path).args(more);
        call
    };
    // Never without being asked.
    let message = evaluate(&[]).fails(2);
    for part in ["datasets--org--tiny", "`org/tiny`", "--data", "--download"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(hub.seen().is_empty());
    let mut offline = evaluate(&["--download"]);
    let message = offline.env("HF_HUB_OFFLINE", "1").fails(2);
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");

    // Only what is needed, and once.
    let table = evaluate(&["--download"]).ok();
    assert!(table.contains("sums"), "{table}");
    let snapshot = cache
        .path()
        .join("datasets--org--tiny/snapshots")
        .join(server::COMMIT);
    assert!(snapshot.join("main").join(names[0]).exists());
    assert!(!snapshot.join("main").join(names[1]).exists());
    hub.seen();
    assert_eq!(evaluate(&["--download"]).ok(), table);
    assert!(hub.seen().is_empty());
    let shots = ["--num-fewshot", "2"];
    evaluate(&shots).fails(2);
    let with_shots = evaluate(&[&shots[..], &["--download"]].concat()).ok();
    hub.seen();
    assert_eq!(evaluate(&shots).ok(), with_shots);
    assert!(hub.seen().is_empty());
}
