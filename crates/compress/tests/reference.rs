//! Statistics and algorithms against what NumPy and SciPy compute (`fixtures/methods`).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{DType, Device, Tensor, safetensors};
use lightmoe_compress::align::{permutation, permuted};
use lightmoe_compress::factor::{Gram, Metric, singular_values, whitened};
use lightmoe_compress::merge::merge;
use lightmoe_compress::methods::hcsmoe::clusters;
use lightmoe_compress::methods::ream::{owners, similarity};
use lightmoe_compress::{ObserveOptions, Statistics, observe};
use lightmoe_models::Checkpoint;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// The tensors of a file that the script wrote.
struct Reference(HashMap<String, Tensor>);

impl Reference {
    fn load(name: &str) -> Self {
        let path = fixtures().join("methods").join(name);
        Self(safetensors::load(path, &Device::Cpu).unwrap())
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.0[name].clone()
    }

    fn floats(&self, name: &str) -> Vec<f64> {
        let tensor = self.tensor(name).to_dtype(DType::F64).unwrap();
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn ints(&self, name: &str) -> Vec<usize> {
        let values: Vec<i64> = self.tensor(name).flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(|v| v as usize).collect()
    }
}

/// Each number within `tolerance` of the largest expected one.
#[track_caller]
fn assert_close(ours: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(ours.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * scale,
            "{what}[{i}]: {a} is not {b}"
        );
    }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn observations_are_those_of_numpy() {
    let reference = Reference::load("observations.safetensors");
    let mut ids = reference.ints("ids").into_iter().map(|id| id as u32);
    let lengths = reference.ints("lengths");
    let samples: Vec<Vec<u32>> = lengths
        .iter()
        .map(|&n| ids.by_ref().take(n).collect())
        .collect();
    let checkpoint = Checkpoint::open(&fixtures().join("parity/olmoe")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = ObserveOptions {
        fingerprint: "numpy",
        state: &folder.path().join("state"),
        answers: &[],
        statistics: Statistics {
            moments: true,
            all_outputs: true,
            samples: false,
            damage: None,
            bias: false,
        },
        successor: None,
        max_memory: 1 << 32,
    };
    let seen = observe(&checkpoint, &samples, &options, &mut |_, _| true).unwrap();
    let seen = seen.save(&folder.path().join("seen.safetensors")).unwrap();
    let config = checkpoint.config();
    let tokens = lengths.iter().sum::<usize>() as f64;
    for layer in &seen.layers {
        let expected = |name: &str| reference.floats(&format!("layers.{}.{name}", layer.layer));
        let outputs = layer.outputs.as_ref().unwrap();
        let selections: Vec<f64> = layer.selections.iter().map(|&n| n as f64).collect();
        let all: Vec<f64> = layer
            .all_outputs
            .iter()
            .flatten()
            .map(|v| v * tokens)
            .collect();
        for (name, ours) in [
            ("gate_mass", &layer.gate_mass),
            ("selections", &selections),
            ("similarity", layer.similarity.as_ref().unwrap()),
            ("logit_gram", layer.logit_gram.as_ref().unwrap()),
            ("output_gated", &outputs.gated),
            ("output_norm", &outputs.norm),
            ("output_square", &outputs.square),
            ("output_sum", &outputs.sum),
            ("gated_sum", &outputs.weighted),
            ("all_sum", &all),
        ] {
            assert_close(ours, &expected(name), 2e-5, name);
        }
        let moments = seen.moments().unwrap().layer(layer.layer).unwrap();
        let (mut input, mut hidden) = (Vec::new(), Vec::new());
        for expert in 0..config.moe.num_experts {
            let [x, h] = moments.sums(config, expert).unwrap();
            input.extend(x.into_iter().map(f64::from));
            hidden.extend(h.into_iter().map(f64::from));
        }
        assert_close(&input, &expected("input_moment"), 2e-5, "input_moment");
        assert_close(&hidden, &expected("hidden_moment"), 2e-5, "hidden_moment");
    }
}

#[test]
fn factors_are_those_of_numpy() {
    let reference = Reference::load("factors.safetensors");
    let rank = reference.ints("rank")[0];
    let (weights, grams) = (reference.tensor("weight"), reference.tensor("gram"));
    let (singular, h) = (reference.floats("singular"), weights.dim(2).unwrap());
    let base = reference.tensor("base");
    for expert in 0..weights.dim(0).unwrap() {
        let w = weights.get(expert).unwrap();
        let gram = grams.get(expert).unwrap().flatten_all().unwrap();
        let gram = Gram::new(h, &gram.to_vec1().unwrap());
        let ours = singular_values(&w, &Metric::of_inputs(gram.clone())).unwrap();
        let expected = &singular[expert * ours.len()..(expert + 1) * ours.len()];
        assert_close(&ours, expected, 1e-5, "singular");
        for (name, w) in [("product", &w), ("delta_product", &(&w - &base).unwrap())] {
            let expected = values(&reference.tensor(name).get(expert).unwrap());
            // Wide as it is, and tall in the other order: the loss of Wᵀ on what W gives is another.
            let factors = whitened(w, &gram, rank).unwrap();
            let product = factors.b.matmul(&factors.a).unwrap();
            assert_close(&values(&product), &expected, 1e-4, name);
        }
    }
}

/// Gate, up and down of expert `expert` among stacked tensors of these names.
fn expert(reference: &Reference, prefix: &str, expert: usize) -> [Tensor; 3] {
    ["gate", "up", "down"].map(|p| {
        let stack = reference.tensor(&format!("{prefix}{p}"));
        stack.get(expert).unwrap()
    })
}

#[test]
fn alignment_and_merge_are_those_of_numpy() {
    let reference = Reference::load("merge.safetensors");
    let usage = reference.floats("usage");
    let orders = reference.ints("permutation");
    let neurons = orders.len() / usage.len();
    let first = expert(&reference, "", 0);
    for number in 0..usage.len() {
        let own = expert(&reference, "", number);
        let order = permutation(&first, &own).unwrap();
        let expected = &orders[number * neurons..(number + 1) * neurons];
        assert!(
            order
                .iter()
                .map(|&n| n as usize)
                .eq(expected.iter().copied())
        );
        let aligned = permuted(&own, &order).unwrap();
        for (ours, expected) in aligned.iter().zip(expert(&reference, "aligned_", number)) {
            assert_eq!(values(ours), values(&expected));
        }
    }
    let members: Vec<usize> = (0..usage.len()).collect();
    let weights = |number: usize| Ok(expert(&reference, "", number));
    let merged = merge(&weights, &members, &usage, true).unwrap();
    for (ours, name) in merged.iter().zip(["gate", "up", "down"]) {
        let expected = reference.floats(&format!("merged_{name}"));
        assert_close(&values(ours), &expected, 1e-6, name);
    }
}

#[test]
fn clusters_are_those_of_scipy() {
    let reference = Reference::load("clusters.safetensors");
    let features = reference.floats("features");
    for left in 1..=12 {
        let mut labels = vec![0; 12];
        for (label, members) in clusters(&features, 12, left).iter().enumerate() {
            members.iter().for_each(|&point| labels[point] = label);
        }
        assert_eq!(labels, reference.ints(&format!("labels_{left}")), "{left}");
    }
}

#[test]
fn pseudo_groups_are_those_of_numpy() {
    let reference = Reference::load("ream.safetensors");
    let logits = reference.tensor("router_logits").to_vec2::<f32>().unwrap();
    let experts = logits[0].len();
    let dot = |a: usize, b: usize| -> f64 {
        logits
            .iter()
            .map(|row| f64::from(row[a]) * f64::from(row[b]))
            .sum()
    };
    let cosines: Vec<f64> = (0..experts * experts)
        .map(|i| (i / experts, i % experts))
        .map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt())
        .collect();
    let similarity = similarity(&reference.floats("mean_output"), &cosines, experts);
    assert_close(
        &similarity,
        &reference.floats("similarity"),
        1e-6,
        "similarity",
    );
    let (keep, group) = (reference.ints("keep")[0], reference.ints("group")[0]);
    let owners = owners(&similarity, &reference.floats("saliency"), keep, group);
    assert_eq!(owners, reference.ints("owner"));
}
