//! Checkpoint folders: round trips through every element type and through shards.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::{DType, Device, Tensor};
use lightmoe_models::Decoder;
use std::fs;
use support::{
    Folder, Random, begin, element, files, index_json, open, original_tensors, values,
    write_sharded,
};

#[test]
fn every_element_type_comes_back_rounded_once() {
    let folder = Folder::new();
    let tensors = original_tensors(&folder);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let path = folder.path("copy");
        write_sharded(&path, &tensors, dtype, 1 << 30);
        assert_eq!(files(&path), ["config.json", "model.safetensors"]);
        let checkpoint = open(&path);
        assert_eq!(checkpoint.dtype(), dtype);
        let file = std::fs::read(path.join("model.safetensors")).unwrap();
        let head = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let elements: usize = tensors.iter().map(|(_, t)| t.elem_count()).sum();
        assert_eq!(file.len(), head + elements * dtype.size_in_bytes());
        assert_eq!(checkpoint.bytes(), file.len() as u64);
        for (name, tensor) in &tensors {
            let ours = checkpoint.tensor(name, tensor.dims()).unwrap();
            assert_eq!(ours.dtype(), DType::F32);
            let rounded = tensor.to_dtype(dtype).unwrap();
            assert_eq!(values(&ours), values(&rounded), "{name} as {dtype:?}");
        }
        // What others read of it.
        let theirs = candle_core::safetensors::load(
            path.join("model.safetensors"),
            &candle_core::Device::Cpu,
        );
        let theirs = theirs.unwrap();
        assert_eq!(theirs.len(), tensors.len());
        let rounded = tensors[5].1.to_dtype(dtype).unwrap();
        assert_eq!(values(&theirs[&tensors[5].0]), values(&rounded));
    }
}

#[test]
fn a_change_reaches_every_reader_and_is_rounded_as_a_copy_would() {
    let folder = Folder::new();
    let shape = [3, (1 << 19) / 3 + 1];
    let mut all = original_tensors(&folder);
    all.push(("long".into(), Random::new(1).tensor(&shape, 0.0, 1.0)));
    let (from, to) = (folder.path("from"), folder.path("to"));
    let shapes: Vec<_> = all
        .iter()
        .map(|(n, t)| (n.clone(), t.dims().to_vec()))
        .collect();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        write_sharded(&from, &all, dtype, 1 << 30);
        let changed = open(&from).changed(|name, first, values| {
            let places = (first..).zip(values).filter(|_| name == "long");
            places.for_each(|(place, value)| *value += (place % 1009) as f32 * 1e-3);
        });
        let writer = begin(&to, dtype, &all);
        writer.copy(&changed, &shapes).unwrap();
        writer.finish(&changed.config().raw).unwrap();
        for (name, shape) in &shapes {
            let mut expected = open(&from).tensor(name, shape).unwrap();
            if name == "long" {
                let all = 0..shape.iter().product::<usize>();
                let change: Vec<f32> = all.map(|place| (place % 1009) as f32 * 1e-3).collect();
                let change = Tensor::from_vec(change, shape.as_slice(), &Device::Cpu).unwrap();
                expected = (expected + change).unwrap().to_dtype(dtype).unwrap();
            }
            let expected = values(&expected);
            assert_eq!(values(&changed.tensor(name, shape).unwrap()), expected);
            assert_eq!(values(&open(&to).tensor(name, shape).unwrap()), expected);
        }
    }
}

#[test]
fn tensors_longer_than_a_read_come_back_whole() {
    let folder = Folder::new();
    // A first piece, a second, and the beginning of a third.
    let shape = [3, (1 << 19) / 3 + 1];
    let long = Random::new(1).tensor(&shape, 0.0, 1.0);
    let mut all = original_tensors(&folder);
    all.push(("long".into(), long.clone()));
    for dtype in [DType::F32, DType::BF16] {
        write_sharded(&folder.path("long"), &all, dtype, 1 << 30);
        let ours = open(&folder.path("long")).tensor("long", &shape).unwrap();
        let rounded = long.to_dtype(dtype).unwrap();
        assert_eq!(values(&ours), values(&rounded));
        let path = folder.path("long/model.safetensors");
        let at = element(&path, "long", dtype, (1 << 18) + 5);
        let mut bytes = fs::read(&path).unwrap();
        bytes[at..at + dtype.size_in_bytes()].fill(0xff);
        fs::write(&path, bytes).unwrap();
        let message = open(&folder.path("long"))
            .tensor("long", &shape)
            .unwrap_err();
        let word = format!("element {} is NaN", (1 << 18) + 5);
        assert!(message.to_string().contains(&word), "{message}");
    }
}

#[test]
fn shards_and_their_index_agree() {
    let folder = Folder::new();
    let (tensors, path) = (original_tensors(&folder), folder.path("sharded"));
    let limit = 4096;
    write_sharded(&path, &tensors, DType::BF16, limit);
    let (index, names) = (index_json(&path), files(&path));
    let shards = names.iter().filter(|n| n.ends_with(".safetensors")).count();
    assert!(shards > 3, "{names:?}");
    let elements: usize = tensors.iter().map(|(_, t)| t.elem_count()).sum();
    assert_eq!(index["metadata"]["total_size"], 2 * elements);
    assert_eq!(
        index["weight_map"].as_object().unwrap().len(),
        tensors.len()
    );
    let first = format!("model-00001-of-{shards:05}.safetensors");
    assert_eq!(index["weight_map"][&tensors[0].0], first);
    for i in 1..=shards {
        let shard = path.join(format!("model-{i:05}-of-{shards:05}.safetensors"));
        let size = fs::metadata(&shard).unwrap().len() as usize;
        let header = u64::from_le_bytes(fs::read(&shard).unwrap()[..8].try_into().unwrap());
        assert!(
            (size - 8) as u64 - header <= limit,
            "shard {i} has {size} bytes"
        );
    }
    let checkpoint = open(&path);
    assert_eq!(checkpoint.names().len(), tensors.len());
    for (name, tensor) in &tensors {
        let ours = checkpoint.tensor(name, tensor.dims()).unwrap();
        assert_eq!(
            values(&ours),
            values(&tensor.to_dtype(DType::BF16).unwrap())
        );
    }
    // A tensor above the limit has a shard of its own.
    write_sharded(&path, &tensors, DType::F32, 1);
    assert_eq!(files(&path).len(), tensors.len() + 2);
    Decoder::load(&open(&path)).unwrap();
}
