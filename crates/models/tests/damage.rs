//! Damaged checkpoint folders: each error names the file and the tensor and says what to do.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::DType;
use lightmoe_models::{Checkpoint, Decoder, names};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use support::{
    Folder, Form, begin, config, config_with, element, factored_layers, index_json, open,
    original_tensors, write_sharded,
};

const GATE: &str = "model.layers.1.mlp.experts.3.gate_proj.weight";

/// An intact copy of a small model; `damage` gets its folder, and the error must name all `words`.
#[track_caller]
fn assert_refused(shard_bytes: u64, damage: impl FnOnce(&Path), words: &[&str]) {
    let folder = Folder::new();
    let path = folder.path("model");
    write_sharded(&path, &original_tensors(&folder), DType::F32, shard_bytes);
    Decoder::load(&open(&path)).unwrap();
    damage(&path);
    let result = Checkpoint::open(&path).and_then(|c| Decoder::load(&c));
    let message = result.expect_err("nothing was noticed").to_string();
    let dir = path.to_string_lossy();
    for word in words.iter().chain(&[&*dir, ";"]) {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

const ONE: u64 = 1 << 30;
const MANY: u64 = 4096;

fn single(path: &Path) -> PathBuf {
    path.join("model.safetensors")
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn damaged_files_are_named() {
    let file = "model.safetensors";
    let cut = |n: usize| move |p: &Path| edit(&single(p), |b| b.truncate(b.len() - n));
    assert_refused(ONE, cut(1), &[file, "damaged", "again"]);
    assert_refused(ONE, |p| edit(&single(p), |b| b.push(0)), &[file, "again"]);
    for len in [0, 7, 8, 100] {
        let short = |p: &Path| edit(&single(p), |b| b.truncate(len));
        assert_refused(ONE, short, &[file, "again"]);
    }
    let garbage = |p: &Path| edit(&single(p), |b| b[8..40].fill(b'x'));
    assert_refused(ONE, garbage, &[file, "not safetensors", "again"]);
    let endless = |p: &Path| edit(&single(p), |b| b[..8].fill(0xff));
    assert_refused(ONE, endless, &[file, "header", "again"]);
    // Offsets that leave a gap.
    let gap = |p: &Path| {
        edit(&single(p), |b| {
            let at = b
                .windows(17)
                .position(|w| w == b"\"data_offsets\":[0")
                .unwrap();
            b[at + 16] = b'4';
        });
    };
    assert_refused(ONE, gap, &[file, "again"]);
    assert_refused(
        ONE,
        |p| fs::remove_file(single(p)).unwrap(),
        &["no weights", file],
    );
    let config = |p: &Path| fs::remove_file(p.join("config.json")).unwrap();
    assert_refused(ONE, config, &["config.json"]);
}

#[test]
fn weights_that_are_not_what_the_config_says_are_named() {
    let hidden = |p: &Path| edit_json(&p.join("config.json"), |c| c["vocab_size"] = json!(25));
    let words = [names::EMBED, "model.safetensors", "[24, 16]", "[25, 16]"];
    assert_refused(ONE, hidden, &words);
    let experts = |p: &Path| edit_json(&p.join("config.json"), |c| c["num_experts"] = json!(9));
    assert_refused(
        ONE,
        experts,
        &["mlp.gate", "[8, 16]", "[9, 16]", "config.json"],
    );
    let layers = |p: &Path| {
        edit_json(&p.join("config.json"), |c| {
            c["num_hidden_layers"] = json!(3)
        });
    };
    assert_refused(ONE, layers, &["model.layers.2.", "missing", "again"]);
    // A tensor of a plausible size that nothing in the file backs: no allocation is tried.
    let huge = |p: &Path| {
        edit_json(&p.join("config.json"), |c| {
            c["vocab_size"] = json!(4_000_000_000u32)
        });
    };
    assert_refused(ONE, huge, &[names::EMBED, "4000000000"]);
    let integers = |p: &Path| {
        edit(&single(p), |b| {
            while let Some(at) = b.windows(5).position(|w| w == b"\"F32\"") {
                b[at..at + 5].copy_from_slice(b"\"I32\"");
            }
        });
    };
    assert_refused(ONE, integers, &["I32", "convert"]);
}

#[test]
fn missing_tensors_and_bad_numbers_are_named() {
    let rename = |p: &Path| {
        edit(&single(p), |b| {
            let at = b.windows(GATE.len()).position(|w| w == GATE.as_bytes());
            b[at.unwrap()] = b'n';
        });
    };
    assert_refused(ONE, rename, &[GATE, "missing", "again"]);
    for (bits, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let poison = |p: &Path| {
            let at = element(&single(p), GATE, DType::F32, 17);
            edit(&single(p), |b| {
                b[at..at + 4].copy_from_slice(&bits.to_le_bytes())
            });
        };
        let element = format!("element 17 is {word}");
        assert_refused(ONE, poison, &[GATE, "model.safetensors", &element, "again"]);
    }
}

#[test]
fn shards_that_do_not_fit_their_index_are_named() {
    let index = |p: &Path| p.join("model.safetensors.index.json");
    let shard_of = |p: &Path, name: &str| {
        let shard = index_json(p)["weight_map"][name].clone();
        p.join(shard.as_str().unwrap())
    };
    let missing = |p: &Path| fs::remove_file(shard_of(p, GATE)).unwrap();
    assert_refused(MANY, missing, &["index.json", "model-000", "download"]);
    // The index sends a tensor to a shard that lacks it, or names one that no shard has.
    let moved = |p: &Path| {
        edit_json(&index(p), |i| {
            i["weight_map"][GATE] = i["weight_map"][names::whole(names::EMBED)].clone()
        });
    };
    assert_refused(MANY, moved, &[GATE, "model-00001-of", "index.json"]);
    let extra = |p: &Path| {
        edit_json(&index(p), |i| {
            i["weight_map"]["ghost"] = i["weight_map"][GATE].clone()
        });
    };
    assert_refused(MANY, extra, &["ghost", "index.json"]);
    // One tensor in two shards.
    let twice = |p: &Path| {
        fs::copy(shard_of(p, GATE), p.join("other.safetensors")).unwrap();
        edit_json(&index(p), |i| {
            i["weight_map"]["ghost"] = json!("other.safetensors")
        });
    };
    assert_refused(
        MANY,
        twice,
        &["also stands in", "other.safetensors", "model-000"],
    );
    for shard in [
        json!("../model/model-00001-of-00002.safetensors"),
        json!("/etc/passwd"),
        json!(1),
        json!(""),
    ] {
        let outside = |p: &Path| edit_json(&index(p), |i| i["weight_map"][GATE] = shard.clone());
        assert_refused(MANY, outside, &["index.json", GATE, "no file name"]);
    }
    for text in [
        "{",
        "[]",
        "{}",
        "{\"weight_map\": {}}",
        "{\"weight_map\": 3}",
    ] {
        let broken = |p: &Path| fs::write(index(p), text).unwrap();
        assert_refused(MANY, broken, &["index.json", "again"]);
    }
}

#[test]
fn a_single_file_comes_before_an_index() {
    let folder = Folder::new();
    let path = folder.path("model");
    write_sharded(&path, &original_tensors(&folder), DType::F32, ONE);
    fs::write(path.join("model.safetensors.index.json"), "{").unwrap();
    Decoder::load(&open(&path)).unwrap();
}

#[test]
fn a_layout_that_the_weights_do_not_have_is_named() {
    let folder = Folder::new();
    let original = folder.original(&config());
    let compressed = folder.compressed(&original, Form::Mixed.slots());
    // The config of one beside the weights of the other.
    for (from, to, word) in [
        (&compressed, &original, "mlp.bases.0.gate_proj"),
        (&original, &compressed, "mlp.experts.0.gate_proj"),
    ] {
        let path = to.dir().join("config.json");
        let kept = fs::read(&path).unwrap();
        fs::copy(from.dir().join("config.json"), &path).unwrap();
        let message = Decoder::load(&open(to.dir())).unwrap_err().to_string();
        assert!(
            message.contains(word) && message.contains("missing"),
            "{message}"
        );
        fs::write(&path, kept).unwrap();
    }
    let path = compressed.dir().join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"rank\": 3", "\"rank\": 4")).unwrap();
    let message = Decoder::load(&open(compressed.dir()))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("lora_A") && message.contains("[3, 16]"),
        "{message}"
    );
}

/// Places of rows that are none, or stored as anything but whole numbers.
#[test]
fn damaged_places_of_rows_are_named() {
    const INDEX: &str = "model.layers.0.mlp.bases.1.up_proj.index.weight";
    let folder = Folder::new();
    let original = folder.original(&config());
    let path = folder
        .of_layers(&original, factored_layers())
        .dir()
        .to_owned();
    let refused = |words: &[&str]| {
        let message = Decoder::load(&open(&path)).expect_err("nothing was noticed");
        let message = message.to_string();
        for word in words.iter().chain(&[INDEX, ";", "again"]) {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
    };
    let kept = fs::read(single(&path)).unwrap();
    let at = element(&single(&path), INDEX, DType::U32, 0);
    for places in [[0u32, 12], [5, 5], [7, 2], [0, u32::MAX]] {
        let bytes = places.map(u32::to_le_bytes).concat();
        edit(&single(&path), |file| {
            file[at..at + 8].copy_from_slice(&bytes)
        });
        refused(&["12 rows"]);
    }
    fs::write(single(&path), &kept).unwrap();
    Decoder::load(&open(&path)).unwrap();
    // Of the same size, so only the header differs.
    let text = |from: &str, to: &str| {
        edit(&single(&path), |file| {
            let at = file.windows(from.len()).position(|w| w == from.as_bytes());
            let at = at.unwrap();
            file[at..at + to.len()].copy_from_slice(to.as_bytes());
        });
    };
    let entry = |dtype: &str| format!("\"{INDEX}\":{{\"dtype\":\"{dtype}\"");
    text(&entry("U32"), &entry("F32"));
    refused(&["F32", "expected U32"]);
    fs::write(single(&path), &kept).unwrap();
    // And a weight is no whole number.
    let weight = INDEX.replace(".index.", ".rows.");
    text(
        &entry("F32").replace(INDEX, &weight),
        &entry("U32").replace(INDEX, &weight),
    );
    let message = Decoder::load(&open(&path)).unwrap_err().to_string();
    assert!(message.contains("U32 is not supported"), "{message}");
}

#[test]
fn a_folder_lost_in_a_kill_is_pointed_to() {
    let folder = Folder::new();
    let path = folder.original(&config_with(json!({}))).dir().to_owned();
    let old = path.with_file_name(".original.old");
    fs::rename(&path, &old).unwrap();
    let message = Checkpoint::open(&path).err().unwrap().to_string();
    assert!(message.contains(&*old.to_string_lossy()) && message.contains("rename"));
    // A reader leaves it alone; the next writer puts it back before it begins.
    assert!(!path.exists());
    drop(begin(&path, DType::F32, &[]));
    Decoder::load(&open(&path)).unwrap();
}
