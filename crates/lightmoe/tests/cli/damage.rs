//! Damaged inputs: the message names the file and the place, and no artefact is left half written.

use crate::support::{Outcome, model_copy, names, tiny};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const GATE: &str = "model.layers.2.mlp.experts.3.gate_proj.weight";
const WEIGHTS: &str = "model.safetensors";

fn split(bytes: &[u8]) -> (Value, &[u8]) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(length);
    (serde_json::from_slice(header).unwrap(), data)
}

/// Changes header and numbers of the weights.
fn edit_weights(model: &Path, change: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let path = model.join(WEIGHTS);
    let bytes = fs::read(&path).unwrap();
    let (mut header, data) = split(&bytes);
    let mut data = data.to_vec();
    change(&mut header, &mut data);
    let header = header.to_string().into_bytes();
    let length = (header.len() as u64).to_le_bytes();
    fs::write(&path, [&length[..], &header, &data].concat()).unwrap();
}

/// Compressing a model with this damage fails with all `words` in one message.
#[track_caller]
fn assert_refused(damage: impl FnOnce(&Path), words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let model = model_copy(&folder.path().join("damaged-model"));
    damage(&model);
    let out = folder.path().join("run");
    let mut call = tiny("compress");
    call.arg("--model").arg(&model).arg("--out").arg(&out);
    let message = call.fails(1);
    for word in words.iter().chain(&["damaged-model"]) {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
    // What a later run would go on with is hidden.
    let mut left = names(&out);
    left.retain(|name| !name.starts_with('.'));
    let expected = ["recipe.toml", "run.json"];
    assert!(left.is_empty() || left == expected, "{left:?}");
    assert_eq!(names(folder.path()).len(), 1 + usize::from(out.exists()));
}

#[test]
fn damaged_weights_are_named() {
    let cut = |model: &Path| {
        let path = model.join(WEIGHTS);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    };
    assert_refused(cut, &[WEIGHTS, "incomplete"]);
    let nan = |model: &Path| {
        edit_weights(model, |header, data| {
            let at = header[GATE]["data_offsets"][0].as_u64().unwrap() as usize;
            data[at + 20..at + 22].copy_from_slice(&0x7fc0u16.to_le_bytes());
        });
    };
    assert_refused(nan, &[WEIGHTS, GATE, "element 10", "NaN"]);
    let missing = |model: &Path| {
        edit_weights(model, |header, _| {
            let tensor = header.as_object_mut().unwrap().remove(GATE).unwrap();
            header["something.else"] = tensor;
        });
    };
    assert_refused(missing, &[GATE, "missing"]);
    let shape = |model: &Path| {
        edit_weights(model, |header, _| header[GATE]["shape"] = json!([128, 64]));
    };
    assert_refused(shape, &[WEIGHTS, GATE, "[128, 64]", "[64, 128]"]);
}

#[test]
fn a_config_of_another_model_and_a_missing_tokenizer_are_named() {
    let config = |model: &Path| {
        let path = model.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["num_experts"] = json!(16);
        fs::write(&path, config.to_string()).unwrap();
    };
    assert_refused(config, &["mlp.gate", "config.json", "[16, 128]"]);
    let tokenizer = |model: &Path| fs::remove_file(model.join("tokenizer.json")).unwrap();
    assert_refused(tokenizer, &["tokenizer.json"]);
}

#[test]
fn a_broken_record_is_named_by_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("mine.jsonl"), folder.path().join("run"));
    let good = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    let long = format!(
        "{{\"prompt\": \"a\", \"completion\": \"{}\"}}",
        "b ".repeat(90)
    );
    for (bad, words) in [
        ("{\"prompt\": \"a\"", "not a valid record"),
        (
            "{\"prompt\": \"\", \"completion\": \"b\"}",
            "prompt is empty",
        ),
        // In the test part too, which is only read after the training.
        (long.as_str(), "limit of 64"),
    ] {
        let text = format!("{}{bad}\n{good}", good.repeat(19));
        fs::write(&file, text).unwrap();
        let mut call = tiny("compress");
        call.args(["--max-length", "64", "--train"]).arg(&file);
        let message = call.arg("--out").arg(&out).fails(1);
        assert!(message.contains("mine.jsonl` line 20"), "{message}");
        assert!(message.contains(words), "{message}");
        assert!(!out.exists());
    }
}
