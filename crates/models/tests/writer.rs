//! Writing checkpoint folders: side files, replacement, and everything that must leave no trace.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Device, Tensor};
use lightmoe_models::{CheckpointWriter, Family};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use support::{Folder, config, files, open};

fn tensor(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn begin(path: &Path, dtype: DType) -> CheckpointWriter {
    CheckpointWriter::new(path, dtype, Family::Olmoe).unwrap()
}

#[test]
fn side_files_are_copied_and_weights_are_not() {
    let folder = Folder::new();
    let source = folder.original(&config()).dir().to_owned();
    let side = [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
    ];
    let left = [
        "consolidated.00.pth",
        "model.gguf",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ];
    for name in side.iter().chain(&left) {
        fs::write(source.join(name), name).unwrap();
    }
    fs::create_dir(source.join("original")).unwrap();
    let target = folder.path("copy");
    let mut writer = begin(&target, DType::F32);
    writer.push("w", &tensor(&[1.0])).unwrap();
    writer.copy_side_files(&source).unwrap();
    writer.side_file("README.md", b"ours").unwrap();
    writer.finish(&config()).unwrap();
    let mut expected = [&side[..], &["config.json", "model.safetensors"]].concat();
    expected.sort_unstable();
    assert_eq!(files(&target), expected);
    for name in side {
        let text = fs::read_to_string(target.join(name)).unwrap();
        assert_eq!(text, if name == "README.md" { "ours" } else { name });
    }
    let written: serde_json::Value =
        serde_json::from_slice(&fs::read(target.join("config.json")).unwrap()).unwrap();
    assert_eq!(written, config());
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing() {
    let folder = Folder::new();
    let target = folder.path("out");
    for stage in 0..3 {
        let mut writer = begin(&target, DType::F32).with_shard_bytes(1);
        if stage > 0 {
            writer.push("a", &tensor(&[1.0, 2.0])).unwrap();
            writer.push("b", &tensor(&[1.0, 2.0])).unwrap();
        }
        if stage > 1 {
            writer.side_file("tokenizer.json", b"{}").unwrap();
            writer.side_file("no/such/folder", b"").unwrap_err();
        }
        assert_eq!(files(folder.dir.path()), [".out.partial"]);
        drop(writer);
        assert!(files(folder.dir.path()).is_empty());
    }
}

#[test]
fn a_model_is_replaced_whole_or_not_at_all() {
    let folder = Folder::new();
    let target = folder.original(&config()).dir().to_owned();
    fs::write(target.join("notes.txt"), "of the old one").unwrap();
    let before = fs::read(target.join("model.safetensors")).unwrap();
    let mut writer = begin(&target, DType::F32);
    writer.push("w", &tensor(&[1.0])).unwrap();
    assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), before);
    drop(writer);
    assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), before);
    // Leftovers of a killed run do not come into the next.
    let mut killed = begin(&target, DType::F32).with_shard_bytes(1);
    killed.push("a", &tensor(&[1.0])).unwrap();
    killed.push("b", &tensor(&[1.0])).unwrap();
    std::mem::forget(killed);
    let mut writer = begin(&target, DType::BF16);
    writer.push("w", &tensor(&[1.0])).unwrap();
    writer.finish(&config()).unwrap();
    assert_eq!(files(&target), ["config.json", "model.safetensors"]);
    assert_eq!(files(folder.dir.path()), ["original"]);
    assert_eq!(open(&target).names(), ["w"]);
}

#[test]
fn a_folder_of_other_things_is_not_replaced() {
    let folder = Folder::new();
    let target = folder.path("out");
    fs::create_dir(&target).unwrap();
    begin(&target, DType::F32);
    fs::write(target.join("thesis.tex"), "years of work").unwrap();
    let message = CheckpointWriter::new(&target, DType::F32, Family::Olmoe)
        .err()
        .unwrap()
        .to_string();
    assert!(
        message.contains("other files") && message.contains("empty folder"),
        "{message}"
    );
    assert_eq!(files(folder.dir.path()), ["out"]);
    assert_eq!(files(&target), ["thesis.tex"]);
}

#[test]
fn weights_are_as_readable_as_the_config() {
    let folder = Folder::new();
    let target = folder.original(&config()).dir().to_owned();
    let mode = |name: &str| {
        fs::metadata(target.join(name))
            .unwrap()
            .permissions()
            .mode()
    };
    assert_eq!(mode("model.safetensors"), mode("config.json"));
}

#[test]
fn what_could_not_be_read_back_is_not_written() {
    let folder = Folder::new();
    let fail = |writer: &mut CheckpointWriter, values: &[f32], words: &[&str]| {
        let message = writer.push("w", &tensor(values)).unwrap_err().to_string();
        for word in words.iter().chain(&["`w`", ";"]) {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
    };
    let path = folder.path("out");
    let nan = [0.0, f32::NAN];
    fail(&mut begin(&path, DType::F32), &nan, &["element 1", "NaN"]);
    let large = [0.0, 1.0, 7e4];
    fail(
        &mut begin(&path, DType::F16),
        &large,
        &["element 2", "70000", "bf16"],
    );
    begin(&path, DType::BF16)
        .push("w", &tensor(&large))
        .unwrap();
    fail(
        &mut begin(&path, DType::BF16),
        &[f32::MAX],
        &["element 0", "F32", "f32"][..1],
    );
    let mut writer = begin(&path, DType::F32);
    writer.push("w", &tensor(&[1.0])).unwrap();
    fail(&mut writer, &[1.0], &["twice"]);
    // A refused tensor is not half written.
    writer.push("v", &tensor(&nan)).unwrap_err();
    writer.push("v", &tensor(&[2.0])).unwrap();
    writer.finish(&config()).unwrap();
    assert_eq!(open(&path).names(), ["v", "w"]);
    let integers = CheckpointWriter::new(&path, DType::U8, Family::Olmoe)
        .err()
        .unwrap();
    assert!(integers.to_string().contains("bf16"));
}

#[test]
fn views_are_written_as_their_elements() {
    let folder = Folder::new();
    let whole = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap();
    let whole = whole.reshape((3, 4)).unwrap();
    let turned = whole.t().unwrap().narrow(0, 1, 2).unwrap();
    let f64s = whole.to_dtype(DType::F64).unwrap();
    let path = folder.write("m", &[("t".into(), turned), ("d".into(), f64s)], &config());
    let read = open(&path);
    let ours = read.tensor("t", &[2, 3]).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(ours, [[1., 5., 9.], [2., 6., 10.]]);
    let both = ["d".to_owned(), "d".to_owned()];
    let stack = read.stack(&both, &[3, 4]).unwrap();
    assert_eq!(stack.dims(), [2, 3, 4]);
    let last = stack.get(1).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(last[2], [8., 9., 10., 11.]);
}
