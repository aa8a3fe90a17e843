//! Checkpoints that others wrote in other ways: FP8 with block scales, tensors beside the model's.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Tensor};
use lightmoe_models::{Checkpoint, CheckpointWriter, Decoder, Extra, Format, Manifest};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use support::{Folder, assert_close, config, config_with, logits, open, original_tensors, values};

/// A block that fits neither side of the matrices.
const BLOCK: [usize; 2] = [5, 7];

/// The number that an E4M3 byte stands for, by the definition of the format (arXiv 2209.05433).
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// The nearest E4M3 byte.
fn to_e4m3(value: f32) -> u8 {
    let bytes = (0..=255u8).filter(|&b| e4m3(b).is_finite());
    let distance = |b: &u8| (e4m3(*b) - value).abs();
    bytes
        .min_by(|a, b| distance(a).total_cmp(&distance(b)))
        .unwrap()
}

/// One stored tensor: name, type, shape, bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn write(path: &Path, tensors: &[Stored], config: &Value) {
    fs::create_dir_all(path).unwrap();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(path.join("model.safetensors"), bytes).unwrap();
    fs::write(path.join("config.json"), config.to_string()).unwrap();
}

fn f32s(name: &str, shape: &[usize], values: &[f32]) -> Stored {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (name.to_owned(), Dtype::F32, shape.to_vec(), bytes)
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The random model with its projections in FP8, and what the numbers are then.
fn fp8(folder: &Folder) -> (PathBuf, Vec<(String, Vec<f32>)>) {
    let (mut stored, mut expected) = (Vec::new(), Vec::new());
    for (name, tensor) in original_tensors(folder) {
        let values = numbers(&tensor);
        let &[rows, columns] = tensor.dims() else {
            stored.push(f32s(&name, tensor.dims(), &values));
            expected.push((name, values));
            continue;
        };
        if !name.contains("_proj") {
            stored.push(f32s(&name, tensor.dims(), &values));
            expected.push((name, values));
            continue;
        }
        let blocks = [rows.div_ceil(BLOCK[0]), columns.div_ceil(BLOCK[1])];
        let scales: Vec<f32> = (0..blocks[0] * blocks[1])
            .map(|i| 0.02 + 0.01 * i as f32)
            .collect();
        let scale = |i: usize| scales[i / columns / BLOCK[0] * blocks[1] + i % columns / BLOCK[1]];
        let each = values.iter().enumerate();
        let bytes: Vec<u8> = each.map(|(i, v)| to_e4m3(v / scale(i))).collect();
        let each = bytes.iter().enumerate();
        expected.push((
            name.clone(),
            each.map(|(i, &b)| e4m3(b) * scale(i)).collect(),
        ));
        stored.push(f32s(&format!("{name}_scale_inv"), &blocks, &scales));
        stored.push((name, Dtype::F8_E4M3, vec![rows, columns], bytes));
    }
    let quantised = json!({"quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": BLOCK,
    }});
    let path = folder.path("fp8");
    write(&path, &stored, &config_with(quantised));
    (path, expected)
}

#[test]
fn fp8_numbers_are_scaled_block_by_block() {
    let folder = Folder::new();
    let (path, expected) = fp8(&folder);
    let checkpoint = open(&path);
    assert_eq!(checkpoint.dtype(), DType::BF16);
    assert_eq!(checkpoint.extras().unwrap(), []);
    checkpoint.check().unwrap();
    let shapes = Manifest::of(checkpoint.config(), checkpoint.layout()).unwrap();
    for (name, shape) in &shapes.tensors {
        let found = expected.iter().find(|(n, _)| n == name).unwrap();
        let ours = numbers(&checkpoint.tensor(name, shape).unwrap());
        assert_eq!(ours, found.1, "{name}");
    }
}

/// What is written of an FP8 model is an ordinary bf16 model.
#[test]
fn fp8_models_are_written_as_bf16() {
    let folder = Folder::new();
    let (path, _) = fp8(&folder);
    let checkpoint = open(&path);
    let (config, layout) = (checkpoint.config(), checkpoint.layout());
    let format = Format::new(checkpoint.dtype(), checkpoint.scheme());
    let manifest = Manifest::of(config, layout).unwrap();
    let target = folder.path("bf16");
    let writer = CheckpointWriter::new(&target, &format, &manifest, &[]).unwrap();
    writer.copy(&checkpoint, &manifest.tensors).unwrap();
    writer.finish(&layout.annotate(config).unwrap()).unwrap();
    let written = open(&target);
    assert_eq!(written.config().fp8_block, None);
    assert_eq!(written.names(), folder.original(&support::config()).names());
    let ids = [3, 9, 14, 2, 21, 7];
    let model = |c: &Checkpoint| logits(&Decoder::load(c).unwrap(), &ids, 1);
    assert_close(&model(&written), &model(&checkpoint), 0.03);
}

#[test]
fn fp8_without_its_scales_is_refused() {
    let folder = Folder::new();
    let (path, _) = fp8(&folder);
    let gate = "model.layers.1.mlp.experts.3.gate_proj.weight";
    let check = |words: &[&str]| {
        let message = open(&path).check().unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
    };
    let file = path.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let kept = all.tensors().into_iter();
    let kept = kept.filter(|(name, _)| name != &format!("{gate}_scale_inv"));
    fs::write(&file, safetensors::serialize(kept, None).unwrap()).unwrap();
    check(&[gate, "scale_inv", "missing"]);
    fs::write(path.join("config.json"), config().to_string()).unwrap();
    check(&["FP8", "weight_block_size", "bf16"]);
}

/// A layer that the model does not run is copied; what has no place in a copy is refused.
#[test]
fn extra_tensors_are_carried_along() {
    let folder = Folder::new();
    let mut stored: Vec<Stored> = Vec::new();
    for (name, tensor) in original_tensors(&folder) {
        stored.push(f32s(&name, tensor.dims(), &numbers(&tensor)));
    }
    let guess = "model.layers.2.eh_proj.weight";
    stored.push(f32s(guess, &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.5]));
    let path = folder.path("more");
    write(&path, &stored, &config());
    let checkpoint = open(&path);
    let extras = checkpoint.extras().unwrap();
    let shape = vec![2, 3];
    let (name, dtype) = (guess.to_owned(), DType::F32);
    assert_eq!(extras, [Extra { name, shape, dtype }]);
    let (config, layout) = (checkpoint.config(), checkpoint.layout());
    let mut manifest = Manifest::of(config, layout).unwrap();
    // One of the model's own tensors keeps a type of its own too, among narrower ones.
    let router = "model.layers.0.mlp.gate.weight";
    manifest.types.insert(router.into(), DType::F32);
    let format = Format::new(DType::BF16, checkpoint.scheme());
    let target = folder.path("copy");
    let writer = CheckpointWriter::new(&target, &format, &manifest, &extras).unwrap();
    writer.copy(&checkpoint, &manifest.tensors).unwrap();
    writer.copy_extras(&checkpoint, &extras).unwrap();
    writer.finish(&config.raw).unwrap();
    let copy = open(&target);
    assert_eq!(copy.names(), checkpoint.names());
    let ours = copy.tensor(guess, &[2, 3]).unwrap();
    assert_eq!(values(&ours), [1.0, 2.0, 3.0, 4.0, 5.0, 6.5]);
    let same = |name: &str| {
        let numbers = |c: &Checkpoint| values(&c.tensor(name, &[8, 16]).unwrap());
        numbers(&copy) == numbers(&checkpoint)
    };
    assert!(same(router) && !same("model.layers.1.mlp.gate.weight"));
    let mut kept = Manifest::of(config, layout).unwrap();
    copy.keep_types(&mut kept).unwrap();
    assert_eq!(kept.types, manifest.types);
    let bytes = fs::read(target.join("model.safetensors")).unwrap();
    let written = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (name, view) in written.tensors() {
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert!(start.is_multiple_of(view.dtype().bitsize() / 8), "{name}");
    }
    stored.push(("positions".into(), Dtype::I64, vec![1], vec![0; 8]));
    write(&path, &stored, &support::config());
    let message = open(&path).extras().unwrap_err().to_string();
    assert!(
        message.contains("positions") && message.contains("I64"),
        "{message}"
    );
}
