//! Build, against a plain loop over the members of every group (LightMoE eq. 4).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::{inputs, observations, options, random_checkpoint, small};
use lightmoe_compress::build;
use lightmoe_compress::methods::{BaseInit, MethodName, PlanOptions, Target, plan};
use lightmoe_compress::plan::Plan;
use lightmoe_models::{Checkpoint, Decoder, ModelConfig, names};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
/// `H` and `F`: wide enough that the spread of random matrices is close to their deviation.
const HIDDEN: usize = 64;
const WIDTH: usize = 32;
const RANK: usize = 4;

/// Every tensor of a checkpoint by its name.
type Tensors = BTreeMap<String, Vec<f64>>;

struct Original {
    folder: TempDir,
    checkpoint: Checkpoint,
}

impl Original {
    fn new(dtype: DType) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut raw = small(2, 8).raw;
        raw["hidden_size"] = HIDDEN.into();
        raw["intermediate_size"] = WIDTH.into();
        let config = ModelConfig::from_json(&raw, Path::new("config.json")).unwrap();
        let checkpoint = random_checkpoint(&config, dtype, 7, &folder);
        Self { folder, checkpoint }
    }

    /// In each layer a group of three and one of two, of unequal scores, beside kept experts.
    fn plan(&self, rank: usize, base: BaseInit) -> Plan {
        let config = self.checkpoint.config();
        let mut seen = observations(config, 0);
        seen.layers[0].gate_mass = vec![3.0, 31.0, 5.0, 11.0, 23.0, 2.0, 8.0, 17.0];
        seen.layers[1].gate_mass = vec![27.0, 1.0, 9.0, 21.0, 4.0, 12.0, 7.0, 19.0];
        for layer in &mut seen.layers {
            layer.similarity = None;
        }
        let options = PlanOptions {
            base,
            max_delta: 0.0,
            ..options(rank, 2)
        };
        let target = Target::Threshold(0.25);
        let plan = plan(config, &seen, target, MethodName::Lightmoe, &options).unwrap();
        let groups = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(l, g)| members(&plan, l, g));
        assert_eq!(
            groups,
            [vec![2, 3, 5], vec![0, 6], vec![1, 5, 6], vec![2, 4]]
        );
        plan
    }

    fn build(&self, plan: &Plan, seed: u64) -> Checkpoint {
        let path = self.folder.path().join("built");
        build(&inputs(&self.checkpoint, plan, seed), &path, &mut |_, _| {
            true
        })
        .unwrap();
        Checkpoint::open(&path).unwrap()
    }
}

fn members(plan: &Plan, layer: usize, group: usize) -> Vec<usize> {
    plan.layers[layer].members(group).collect()
}

/// Every replaced expert with its layer.
fn replaced(plan: &Plan) -> Vec<(usize, usize)> {
    let all = (0..16).map(|i| (i / 8, i % 8));
    let gone = |&(layer, e): &(usize, usize)| plan.layers[layer].slots[e].form.is_replaced();
    all.filter(gone).collect()
}

/// Every matrix of every base: its layer, its group and its name.
fn bases() -> impl Iterator<Item = (usize, usize, &'static str)> {
    (0..12).map(|i| (i / 6, i / 3 % 2, PROJECTIONS[i % 3]))
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn tensors(checkpoint: &Checkpoint) -> Tensors {
    let all = Decoder::load(checkpoint).unwrap().tensors().unwrap();
    all.into_iter().map(|(n, t)| (n, values(&t))).collect()
}

/// `Σ s_i W_i / Σ s_i` over one group's members, in f64.
fn mean(
    original: &Tensors,
    plan: &Plan,
    (layer, group, projection): (usize, usize, &str),
) -> Vec<f64> {
    let mut sum = vec![0.0; HIDDEN * WIDTH];
    let mut total = 0.0;
    for expert in members(plan, layer, group) {
        let score = plan.layers[layer].slots[expert].score;
        let weights = &original[&names::expert(layer, expert, projection)];
        for (sum, weight) in sum.iter_mut().zip(weights) {
            *sum += score * weight;
        }
        total += score;
    }
    sum.into_iter().map(|sum| sum / total).collect()
}

fn root_mean_square(values: &[f64]) -> f64 {
    let squares: f64 = values.iter().map(|v| v * v).sum();
    (squares / values.len() as f64).sqrt()
}

/// Within `tolerance` of the largest expected value.
#[track_caller]
fn assert_close(ours: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), expected.len());
    let scale = expected.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    assert!(scale > 1e-3, "nothing to compare: all zero");
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * scale, "{i}: {a} is not {b}");
    }
}

/// Builds `plan` and expects the means that the scores of `expected` give.
#[track_caller]
fn check_bases(original: &Original, plan: &Plan, expected: &Plan) {
    let before = tensors(&original.checkpoint);
    let built = tensors(&original.build(plan, 1));
    for (layer, group, projection) in bases() {
        let base = &built[&names::base(layer, group, projection)];
        let mean = mean(&before, expected, (layer, group, projection));
        assert_close(base, &mean, 1e-6);
    }
}

#[test]
fn a_base_is_the_mean_of_its_members_weighted_by_their_scores() {
    let original = Original::new(DType::F32);
    let plan = original.plan(RANK, BaseInit::GateWeighted);
    check_bases(&original, &plan, &plan);
}

/// Experts that no calibration token chose count alike; beside others they count nothing.
#[test]
fn members_without_a_score_give_the_plain_mean() {
    let original = Original::new(DType::F32);
    let mut plan = original.plan(RANK, BaseInit::GateWeighted);
    plan.layers[1].slots[5].score = 0.0;
    let mut expected = plan.clone();
    for expert in members(&plan, 0, 0) {
        plan.layers[0].slots[expert].score = 0.0;
        expected.layers[0].slots[expert].score = 1.0;
    }
    check_bases(&original, &plan, &expected);
}

#[test]
fn all_but_the_replaced_experts_stay_as_they_are_to_the_bit() {
    let bits = |values: &[f64]| values.iter().map(|v| v.to_bits()).collect::<Vec<u64>>();
    for dtype in [DType::F32, DType::BF16] {
        let original = Original::new(dtype);
        let plan = original.plan(RANK, BaseInit::GateWeighted);
        let built = original.build(&plan, 1);
        assert_eq!(built.dtype(), dtype);
        let (before, after) = (tensors(&original.checkpoint), tensors(&built));
        let mut gone: Vec<String> = Vec::new();
        for (name, values) in &before {
            match after.get(name) {
                Some(now) => assert!(bits(now) == bits(values), "{name}"),
                None => gone.push(name.clone()),
            }
        }
        let mut expected: Vec<String> = replaced(&plan)
            .into_iter()
            .flat_map(|(layer, e)| PROJECTIONS.map(|p| names::expert(layer, e, p)))
            .collect();
        expected.sort();
        assert_eq!(gone, expected);
        // What came: the matrices of the bases, and two of an adapter for each of those that went.
        let came = after.len() - (before.len() - gone.len());
        assert_eq!(came, bases().count() + 2 * gone.len());
    }
}

#[test]
fn adapters_start_as_gaussian_times_zero() {
    let original = Original::new(DType::F32);
    let plan = original.plan(RANK, BaseInit::GateWeighted);
    let built = tensors(&original.build(&plan, 1));
    for (projection, columns) in PROJECTIONS.into_iter().zip([HIDDEN, HIDDEN, WIDTH]) {
        // In units of the deviation.
        let scale = (columns as f64).sqrt();
        let mut drawn: Vec<Vec<f64>> = Vec::new();
        for (layer, expert) in replaced(&plan) {
            let name = |ab| names::expert(layer, expert, &format!("{projection}.lora_{ab}"));
            assert!(built[&name("B")].iter().all(|&v| v == 0.0));
            let a: Vec<f64> = built[&name("A")].iter().map(|v| v * scale).collect();
            assert_eq!(a.len(), RANK * columns);
            assert!(!drawn.contains(&a), "{} is another's", name("A"));
            drawn.push(a);
        }
        // At least 1280 numbers: the bounds are some five standard errors.
        let all = drawn.concat();
        let count = all.len() as f64;
        let deviation = root_mean_square(&all);
        assert!((deviation - 1.0).abs() < 0.1, "{projection}: {deviation}");
        let center = all.iter().sum::<f64>() / count;
        assert!(center.abs() < 0.15, "{projection}: {center}");
        // The share of a Gaussian within one deviation; of a uniform distribution .58.
        let within = all.iter().filter(|v| v.abs() < 1.0).count() as f64 / count;
        assert!((within - 0.683).abs() < 0.06, "{projection}: {within}");
    }
}

#[test]
fn random_bases_are_as_large_as_the_mean_and_else_their_own() {
    let original = Original::new(DType::F32);
    let plan = original.plan(RANK, BaseInit::Random);
    let before = tensors(&original.checkpoint);
    let [built, again, other] = [1, 1, 2].map(|seed| tensors(&original.build(&plan, seed)));
    assert!(built == again);
    for (layer, group, projection) in bases() {
        let name = names::base(layer, group, projection);
        let mean = mean(&before, &plan, (layer, group, projection));
        let base = &built[&name];
        let size = root_mean_square(&mean);
        let ratio = root_mean_square(base) / size;
        assert!((ratio - 1.0).abs() < 0.1, "{name}: {ratio}");
        // Of two independent matrices of one size, √2 times that size.
        let difference: Vec<f64> = base.iter().zip(&mean).map(|(a, b)| a - b).collect();
        assert!(root_mean_square(&difference) > size, "{name}");
        assert!(base != &other[&name], "{name}: the seed changes nothing");
        let alike = built.values().filter(|&values| values == base);
        assert_eq!(alike.count(), 1, "{name}");
    }
}

/// `matrix · x`, row by row.
fn times(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    let dot = |row: &[f64]| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
    matrix.chunks(x.len()).map(dot).collect()
}

/// Merging is the special case of rank 0: every member computes what the one expert computes whose
/// matrices are the weighted means.
#[test]
fn rank_zero_is_a_plain_merge() {
    let original = Original::new(DType::F32);
    let plan = original.plan(0, BaseInit::GateWeighted);
    let model = Decoder::load(&original.build(&plan, 1)).unwrap();
    let before = tensors(&original.checkpoint);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let x: Vec<f32> = (0..3 * HIDDEN).map(|_| rng.random()).collect();
    let x = Tensor::from_vec(x, (3, HIDDEN), &Device::Cpu).unwrap();
    for (layer, group) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let bank = model.layers[layer].bank().unwrap();
        assert!(bank.adapters.is_none());
        let [gate, up, down] = PROJECTIONS.map(|p| mean(&before, &plan, (layer, group, p)));
        let mut expected = Vec::new();
        for token in values(&x).chunks(HIDDEN) {
            let gated = times(&gate, token).into_iter().zip(times(&up, token));
            let inner: Vec<f64> = gated.map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            expected.extend(times(&down, &inner));
        }
        let run = |gates: Vec<f32>, chosen: Vec<usize>| -> Vec<f64> {
            let gates = Tensor::new(gates, &Device::Cpu).unwrap();
            let chosen: Vec<u32> = chosen.into_iter().map(|e| e as u32).collect();
            values(&bank.forward(&x, &gates, &chosen).unwrap())
        };
        let members = members(&plan, layer, group);
        let outputs = members.iter().map(|&e| run(vec![1.0; 3], vec![e; 3]));
        let outputs: Vec<Vec<f64>> = outputs.collect();
        assert_close(&outputs[0], &expected, 1e-5);
        assert!(outputs.iter().all(|output| output == &outputs[0]));
        // Two members that share a token's weight.
        let shared = run([0.25, 0.75].repeat(3), members[..2].repeat(3));
        assert_close(&shared, &expected, 1e-5);
    }
}

/// The files of a folder and their bytes.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap());
    entries
        .map(|e| {
            let name = e.file_name().into_string().unwrap();
            (name, std::fs::read(e.path()).unwrap())
        })
        .collect()
}

/// A build that was stopped leaves no model, and goes on with the layer where it stopped.
#[test]
fn a_stopped_build_goes_on_to_the_same_bytes() {
    let original = Original::new(DType::BF16);
    let plan = original.plan(RANK, BaseInit::Random);
    let path = |name: &str| original.folder.path().join(name);
    let layers = |target: &Path, seed: u64, last: usize| {
        let mut calls = Vec::new();
        let done = build(
            &inputs(&original.checkpoint, &plan, seed),
            target,
            &mut |done, _| {
                calls.push(done);
                done < last
            },
        );
        (calls, done.is_ok())
    };
    build(
        &inputs(&original.checkpoint, &plan, 1),
        &path("whole"),
        &mut |_, _| true,
    )
    .unwrap();
    let target = path("cut");
    assert_eq!(layers(&target, 1, 1), (vec![1], false));
    assert!(!target.exists() && path(".cut.partial").exists());
    // What is written already is not written again: the damage below stays as it is.
    let shard = path(".cut.partial").join("model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let whole = files(&path("whole"));
    let head = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[head] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    assert_eq!(layers(&target, 1, 9), (vec![1, 2], true));
    let mut built = files(&target);
    built.get_mut("model.safetensors").unwrap()[head] ^= 1;
    assert!(built == whole, "not the same bytes");
    assert!(!path(".cut.partial").exists());
    // Another seed is another model: nothing of the first is used.
    let other = path("other");
    assert_eq!(layers(&other, 1, 1), (vec![1], false));
    assert_eq!(layers(&other, 2, 9), (vec![1, 2], true));
    build(
        &inputs(&original.checkpoint, &plan, 2),
        &path("two"),
        &mut |_, _| true,
    )
    .unwrap();
    assert!(files(&other) == files(&path("two")));
}
