//! Writing checkpoint folders: side files, replacement, and everything that must leave no trace.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Device, Tensor};
use lightmoe_models::{CheckpointWriter, Family, Format, Scheme};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use support::{Folder, begin, config, files, manifest, open};

fn tensor(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

/// Tensors to announce to a writer: name and length.
fn planned(all: &[(&str, usize)]) -> Vec<(String, Tensor)> {
    let zeros = |n: usize| tensor(&vec![0.0; n]);
    all.iter()
        .map(|&(name, n)| (name.to_owned(), zeros(n)))
        .collect()
}

/// A writer for the tensor `w` of `n` numbers.
fn one(path: &Path, dtype: DType, n: usize) -> CheckpointWriter {
    begin(path, dtype, &planned(&[("w", n)]))
}

/// A writer for `a` and `b` of two numbers each, in a shard each.
fn two_shards(path: &Path, key: &str) -> CheckpointWriter {
    let format = Format {
        shard_bytes: 1,
        ..Format::new(DType::F32, Scheme::published(Family::Olmoe))
    };
    let all = manifest(&planned(&[("a", 2), ("b", 2)]));
    CheckpointWriter::resume(path, &format, &all, &[], key).unwrap()
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
    let mut writer = one(&target, DType::F32, 1);
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
        let mut writer = two_shards(&target, "");
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
    let writer = one(&target, DType::F32, 1);
    writer.push("w", &tensor(&[1.0])).unwrap();
    assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), before);
    drop(writer);
    assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), before);
    // Leftovers of a killed run do not come into the next.
    let mut killed = two_shards(&target, "killed");
    killed.push("a", &tensor(&[1.0, 2.0])).unwrap();
    killed.checkpoint().unwrap();
    std::mem::forget(killed);
    let writer = one(&target, DType::BF16, 1);
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
    one(&target, DType::F32, 1);
    fs::write(target.join("thesis.tex"), "years of work").unwrap();
    let format = Format::new(DType::F32, Scheme::published(Family::Olmoe));
    let message = CheckpointWriter::new(&target, &format, &manifest(&[]), &[])
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
    let fail = |writer: &CheckpointWriter, values: &[f32], words: &[&str]| {
        let message = writer.push("w", &tensor(values)).unwrap_err().to_string();
        for word in words.iter().chain(&["`w`", ";"]) {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
    };
    let path = folder.path("out");
    let nan = [0.0, f32::NAN];
    let f32s = &mut one(&path, DType::F32, 2);
    fail(f32s, &nan, &["element 1", "NaN"]);
    let large = [0.0, 1.0, 7e4];
    let f16s = &mut one(&path, DType::F16, 3);
    fail(f16s, &large, &["element 2", "70000", "bf16"]);
    let bf16s = &mut one(&path, DType::BF16, 3);
    bf16s.push("w", &tensor(&large)).unwrap();
    let too_large = [0.0, 0.0, f32::MAX];
    fail(
        &mut one(&path, DType::BF16, 3),
        &too_large,
        &["element 2", "f32"],
    );
    let writer = begin(&path, DType::F32, &planned(&[("w", 1), ("v", 1)]));
    writer.push("w", &tensor(&[1.0])).unwrap();
    fail(&writer, &[1.0], &["twice"]);
    // A refused tensor is not half written, and nothing is written that was not announced.
    writer.push("v", &tensor(&nan[1..])).unwrap_err();
    writer.push("v", &tensor(&[1.0, 2.0])).unwrap_err();
    writer.push("u", &tensor(&[2.0])).unwrap_err();
    writer.push("v", &tensor(&[2.0])).unwrap();
    writer.finish(&config()).unwrap();
    assert_eq!(open(&path).names(), ["v", "w"]);
    let format = Format::new(DType::U8, Scheme::published(Family::Olmoe));
    let integers = CheckpointWriter::new(&path, &format, &manifest(&[]), &[]);
    assert!(integers.err().unwrap().to_string().contains("bf16"));
}

#[test]
fn a_tensor_that_was_forgotten_is_an_error() {
    let folder = Folder::new();
    let path = folder.path("out");
    let writer = two_shards(&path, "");
    writer.push("a", &tensor(&[1.0, 2.0])).unwrap();
    let message = writer.finish(&config()).unwrap_err().to_string();
    assert!(message.contains("`b`"), "{message}");
    assert!(files(folder.dir.path()).is_empty());
}

#[test]
fn what_cannot_fit_the_disk_is_refused_before_it_begins() {
    let folder = Folder::new();
    let format = Format::new(DType::F32, Scheme::published(Family::Olmoe));
    let mut all = manifest(&[]);
    all.tensors.push(("w".into(), vec![1 << 25, 1 << 25]));
    let refused = CheckpointWriter::new(&folder.path("out"), &format, &all, &[]);
    let message = refused.err().unwrap().to_string();
    for word in ["GiB", "left", "free some"] {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
    assert!(files(folder.dir.path()).is_empty());
}

/// A run that was stopped or killed goes on if it is the same run, and begins anew if it is not.
#[test]
fn a_stopped_writer_goes_on() {
    let folder = Folder::new();
    let path = folder.path("out");
    for stopped in [true, false] {
        let mut writer = two_shards(&path, "one");
        writer.push("b", &tensor(&[3.0, 4.0])).unwrap();
        writer.checkpoint().unwrap();
        if stopped {
            drop(writer);
        } else {
            std::mem::forget(writer);
        }
        assert_eq!(files(folder.dir.path()), [".out.partial"]);
        let writer = two_shards(&path, "one");
        assert!(writer.is_done("b") && !writer.is_done("a"));
        writer.push("a", &tensor(&[1.0, 2.0])).unwrap();
        writer.finish(&config()).unwrap();
        let read = open(&path);
        assert_eq!(
            read.tensor("a", &[2]).unwrap().to_vec1::<f32>().unwrap(),
            [1.0, 2.0]
        );
        assert_eq!(
            read.tensor("b", &[2]).unwrap().to_vec1::<f32>().unwrap(),
            [3.0, 4.0]
        );
        assert_eq!(files(folder.dir.path()), ["out"]);
        assert!(!path.join("journal.json").exists());
        fs::remove_dir_all(&path).unwrap();
    }
    let mut writer = two_shards(&path, "one");
    writer.push("b", &tensor(&[3.0, 4.0])).unwrap();
    writer.checkpoint().unwrap();
    drop(writer);
    assert!(!two_shards(&path, "another").is_done("b"));
    // A shard that is gone, or a journal of something else, is no reason to fail.
    for damage in ["model-00002-of-00002.safetensors", "journal.json"] {
        let mut writer = two_shards(&path, "one");
        writer.push("b", &tensor(&[3.0, 4.0])).unwrap();
        writer.checkpoint().unwrap();
        drop(writer);
        let partial = folder.path(".out.partial");
        fs::remove_file(partial.join(damage)).unwrap();
        assert!(!two_shards(&path, "one").is_done("b"));
    }
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
