//! The file of observations, and scores from elsewhere.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::{Path, PathBuf};

use common::{observations, published, small};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::{Error, Result};
use serde_json::{Value, json};

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T>, words: &[&str]) {
    let message = result.unwrap_err().to_string();
    for word in words {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("observations.safetensors");
    (folder, path)
}

#[test]
fn what_is_saved_is_loaded_and_always_in_the_same_bytes() {
    let (_folder, path) = folder();
    let config = published("deepseek-v2-lite.json");
    let mut seen = observations(&config, 1);
    seen.layers[0].router_norm = None;
    seen.layers[1].similarity = None;
    seen.layers[2].gate_mass[5] = 0.0;
    seen.save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let loaded = Observations::load(&path).unwrap();
    assert_eq!(loaded, seen);
    loaded.check(&config).unwrap();
    assert_eq!(loaded.router_norms(), None);
    for _ in 0..8 {
        loaded.save(&path).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
}

#[test]
fn importance_is_the_share_of_the_layer() {
    let mut seen = observations(&small(2, 4), 0);
    seen.layers[0].gate_mass = vec![1.0, 0.0, 2.0, 5.0];
    assert_eq!(seen.layers[0].importance(), [0.125, 0.0, 0.25, 0.625]);
    let sum: f64 = seen.layers[1].importance().iter().sum();
    assert!((sum - 1.0).abs() < 1e-12);
}

#[test]
fn observations_of_another_model_or_with_impossible_values_are_refused() {
    let config = small(2, 8);
    assert_refused(observations(&small(3, 8), 0).check(&config), &["layers"]);
    assert_refused(
        observations(&small(2, 4), 0).check(&config),
        &["layer 0", "8"],
    );
    let (_folder, path) = folder();
    let mut seen = observations(&config, 0);
    seen.layers[1].gate_mass[3] = f64::NAN;
    assert_refused(seen.check(&config), &["layer 1", "expert 3", "NaN"]);
    assert_refused(seen.save(&path), &["layer 1", "expert 3"]);
    seen.layers[1].gate_mass = vec![0.0; 8];
    assert_refused(seen.check(&config), &["layer 1", "more tokens"]);
    let mut seen = observations(&config, 0);
    seen.layers[0].router_norm = Some(f64::INFINITY);
    assert_refused(seen.check(&config), &["layer 0", "router norm"]);
    let mut seen = observations(&config, 0);
    seen.layers[0].similarity = Some(vec![0.0; 8]);
    assert_refused(seen.check(&config), &["layer 0", "8 x 8"]);
    assert!(!path.exists());
}

#[test]
fn a_damaged_file_is_named() {
    let (_folder, path) = folder();
    assert!(matches!(Observations::load(&path), Err(Error::Io { .. })));
    observations(&small(2, 8), 0).save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut places = whole.windows(from.len());
        let at = places.position(|bytes| bytes == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    let schema = ("schema_version\\\":3", "schema_version\\\":7");
    for (bytes, words) in [
        (whole[..whole.len() - 8].to_vec(), vec!["not a whole"]),
        (whole[..4].to_vec(), vec!["not a whole"]),
        (replaced(schema.0, schema.1), vec!["schema version 7"]),
        (
            replaced("layers.1.gate_mass", "layers.1.gate_mess"),
            vec!["layers.1.gate_mess"],
        ),
        (
            replaced("layers.1.gate_mass", "layers.7.gate_mass"),
            vec!["layers.1.gate_mass", "missing"],
        ),
        (
            replaced("\"shape\":[8,8]", "\"shape\":[9,9]"),
            vec!["not a whole"],
        ),
        (
            replaced("\"dtype\":\"F64\"", "\"dtype\":\"I64\""),
            vec!["I64", "F64", "tensor"],
        ),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let refused = Observations::load(&path);
        assert!(matches!(refused, Err(Error::Observations { .. })));
        assert_refused(refused, &["observations.safetensors"]);
        assert_refused(Observations::load(&path), &words);
    }
}

fn scores(change: impl FnOnce(&mut Value)) -> Result<Observations> {
    let config = published("deepseek-v2-lite.json");
    let mut layers = serde_json::Map::new();
    for layer in 1..27 {
        let experts = (0..64).map(|e| (e.to_string(), json!(0.001 * f64::from(e + layer))));
        layers.insert(layer.to_string(), Value::Object(experts.collect()));
    }
    let mut file = json!({"gate_scores": layers, "token_scores": "ignored"});
    change(&mut file);
    let (_folder, path) = folder();
    let path = path.with_file_name("scores.json");
    std::fs::write(&path, file.to_string()).unwrap();
    Observations::from_scores(Path::new(&path), &config)
}

#[test]
fn scores_from_elsewhere_become_observations() {
    let seen = scores(|_| {}).unwrap();
    seen.check(&published("deepseek-v2-lite.json")).unwrap();
    assert_eq!(seen.layers[0].layer, 1);
    assert_eq!(seen.layers[25].layer, 26);
    // Numbers, not texts, order the experts: "10" comes after "9".
    assert_eq!(seen.layers[1].gate_mass[10], 0.001 * 12.0);
    assert_eq!(seen.router_norms(), None);
    assert!(seen.fingerprint.starts_with("scores:"));
    let other = scores(|f| f["gate_scores"]["3"]["7"] = json!(0.5)).unwrap();
    assert_ne!(seen.fingerprint, other.fingerprint);
}

#[test]
fn incomplete_scores_are_refused() {
    let layer = |f: &mut Value, key: &str| {
        f["gate_scores"].as_object_mut().unwrap().remove(key);
    };
    assert_refused(scores(|f| layer(f, "26")), &["scores.json", "layer 26"]);
    let expert = |f: &mut Value| {
        let layer = f["gate_scores"]["4"].as_object_mut().unwrap();
        layer.remove("63");
    };
    assert_refused(scores(expert), &["layer 4", "expert 63"]);
    for value in [json!(-0.1), json!("nan"), Value::Null] {
        let refused = scores(|f| f["gate_scores"]["4"]["2"] = value);
        assert_refused(refused, &["layer 4", "expert 2"]);
    }
    let dense = scores(|f| f["gate_scores"]["0"] = json!({"0": 1.0}));
    assert_refused(dense, &["layer `0`", "no experts"]);
    let many = scores(|f| f["gate_scores"]["4"]["64"] = json!(0.1));
    assert_refused(many, &["layer 4", "`64`"]);
    let zero = scores(|f| {
        for score in f["gate_scores"]["4"].as_object_mut().unwrap().values_mut() {
            *score = json!(0.0);
        }
    });
    assert_refused(zero, &["layer 4"]);
    assert_refused(scores(|f| *f = json!([1])), &["gate_scores"]);
}
