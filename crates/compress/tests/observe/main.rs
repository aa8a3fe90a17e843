//! Observe, against the whole model run on each sample alone: no layer at a time, no padding.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;
mod resume;

use candle_core::{DType, Tensor};
use common::{random_checkpoint, small};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::{Error, ObserveOptions, Statistics, batch_tokens, observe};
use lightmoe_models::{Checkpoint, Decoder, LanguageModel, Rotary, Routing, Tokens, names};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const LAYERS: usize = 3;
const EXPERTS: usize = 6;
const TOP_K: usize = 2;

fn checkpoint(folder: &TempDir) -> Checkpoint {
    let config = small(LAYERS, EXPERTS);
    assert_eq!(config.moe.top_k, TOP_K);
    random_checkpoint(&config, DType::F32, 3, folder)
}

/// Random token ids, one sample of each length.
fn samples(lengths: &[usize]) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    lengths
        .iter()
        .map(|&length| (0..length).map(|_| rng.random_range(0..64)).collect())
        .collect()
}

fn options(state: &TempDir) -> ObserveOptions<'_> {
    ObserveOptions {
        fingerprint: "these",
        state: state.path(),
        statistics: Statistics::default(),
        answers: &[],
        successor: None,
        max_memory: 1 << 32,
    }
}

fn observed(checkpoint: &Checkpoint, samples: &[Vec<u32>]) -> Observations {
    let state = tempfile::tempdir().unwrap();
    let seen = observe(checkpoint, samples, &options(&state), &mut |_, _| true);
    seen.unwrap().observations
}

/// What one router did, from its logits alone.
#[derive(Default)]
struct Router {
    gate_mass: [f64; EXPERTS],
    selections: [u64; EXPERTS],
    /// Of each token.
    norms: Vec<f64>,
    /// Of each sample.
    cosines: Vec<Vec<f64>>,
}

impl Router {
    /// Adds the logits `[T, E]` of one sample.
    fn add(&mut self, logits: &[Vec<f32>]) {
        for token in logits {
            let token: Vec<f64> = token.iter().map(|&v| f64::from(v)).collect();
            let total: f64 = token.iter().map(|v| v.exp()).sum();
            let mut order: Vec<usize> = (0..EXPERTS).collect();
            order.sort_by(|&a, &b| token[b].total_cmp(&token[a]));
            for &expert in &order[..TOP_K] {
                self.gate_mass[expert] += token[expert].exp() / total;
                self.selections[expert] += 1;
            }
            let square: f64 = token.iter().map(|v| v * v).sum();
            self.norms.push(square.sqrt());
        }
        let columns: Vec<Vec<f64>> = (0..EXPERTS)
            .map(|e| logits.iter().map(|token| f64::from(token[e])).collect())
            .collect();
        let dot = |a: usize, b: usize| -> f64 {
            let pairs = columns[a].iter().zip(&columns[b]);
            pairs.map(|(x, y)| x * y).sum()
        };
        let cosine = |a: usize, b: usize| dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt());
        let pairs = (0..EXPERTS * EXPERTS).map(|i| (i / EXPERTS, i % EXPERTS));
        self.cosines
            .push(pairs.map(|(a, b)| cosine(a, b)).collect());
    }

    fn mean_norm(&self) -> f64 {
        self.norms.iter().sum::<f64>() / self.norms.len() as f64
    }

    /// Every sample counts alike, however long it is.
    fn mean_cosines(&self) -> Vec<f64> {
        let count = self.cosines.len() as f64;
        let mean = |i: usize| self.cosines.iter().map(|c| c[i]).sum::<f64>() / count;
        (0..EXPERTS * EXPERTS).map(mean).collect()
    }
}

/// What the routers of all layers do on each sample by itself.
fn alone(checkpoint: &Checkpoint, samples: &[Vec<u32>]) -> Vec<Router> {
    let model = Decoder::load(checkpoint).unwrap();
    let mut routers: Vec<Router> = (0..LAYERS).map(|_| Router::default()).collect();
    for sample in samples {
        model
            .forward(Tokens::one(sample), None, &mut |layer, _, routing| {
                routers[layer].add(&routing.unwrap().logits.to_vec2::<f32>()?);
                Ok(())
            })
            .unwrap();
    }
    routers
}

/// Each number within `tolerance` of its own size, but of `floor` where it is smaller than that.
#[track_caller]
fn assert_close(ours: &[f64], expected: &[f64], tolerance: f64, floor: f64) {
    assert_eq!(ours.len(), expected.len());
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        let bound = tolerance * b.abs().max(floor);
        assert!((a - b).abs() <= bound, "{i}: {a} is not {b}");
    }
}

#[track_caller]
fn check(lengths: &[usize]) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(&folder);
    let samples = samples(lengths);
    let seen = observed(&checkpoint, &samples);
    seen.check(checkpoint.config()).unwrap();
    let tokens: usize = lengths.iter().sum();
    assert_eq!(seen.tokens, tokens as u64);
    assert_eq!(seen.samples, lengths.len() as u64);
    assert_eq!(seen.fingerprint, "these");
    let expected = alone(&checkpoint, &samples);
    assert_eq!(seen.layers.len(), expected.len());
    for (number, (layer, router)) in seen.layers.iter().zip(&expected).enumerate() {
        assert_eq!(layer.layer, number);
        assert_eq!(layer.selections, router.selections);
        assert_eq!(
            layer.selections.iter().sum::<u64>(),
            (tokens * TOP_K) as u64
        );
        assert_close(&layer.gate_mass, &router.gate_mass, 1e-5, 0.0);
        let norm = layer.router_norm.unwrap();
        assert_close(&[norm], &[router.mean_norm()], 1e-5, 0.0);
        let similarity = layer.similarity.as_ref().unwrap();
        assert_close(similarity, &router.mean_cosines(), 1e-5, 1.0);
    }
}

#[test]
fn the_numbers_are_those_of_every_sample_alone() {
    check(&[5, 17, 1, 9, 17, 3, 30]);
    check(&[1]);
}

/// A long sample leaves room for one short one beside it, which is then nearly all padding; the
/// others come in a batch of their own.
#[test]
fn the_numbers_do_not_depend_on_the_batches() {
    check(&[4, 2800, 11, 2, 7]);
}

#[test]
fn the_order_of_the_samples_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(&folder);
    let mut samples = samples(&[5, 17, 1, 9, 17, 3, 30, 9]);
    let expected = observed(&checkpoint, &samples);
    for turn in 0..3 {
        samples.rotate_left(3);
        if turn == 1 {
            samples.reverse();
        }
        let seen = observed(&checkpoint, &samples);
        assert_eq!((seen.tokens, seen.samples), (expected.tokens, 8));
        for (layer, other) in seen.layers.iter().zip(&expected.layers) {
            assert_eq!(layer.selections, other.selections);
            assert_close(&layer.gate_mass, &other.gate_mass, 1e-9, 0.0);
            let norms = [layer, other].map(|l| l.router_norm.unwrap());
            assert_close(&norms[..1], &norms[1..], 1e-9, 0.0);
            let [ours, theirs] = [layer, other].map(|l| l.similarity.as_ref().unwrap());
            assert_close(ours, theirs, 1e-9, 1.0);
        }
    }
}

#[test]
fn samples_without_tokens_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(&folder);
    let mut one_empty = samples(&[4, 2]);
    one_empty.insert(1, Vec::new());
    for samples in [Vec::new(), one_empty] {
        let state = tempfile::tempdir().unwrap();
        let refused = observe(&checkpoint, &samples, &options(&state), &mut |_, _| {
            panic!("a layer was observed")
        });
        assert!(matches!(&refused, Err(Error::Invalid(_))));
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("sample"), "{message}");
    }
}

#[test]
fn little_memory_means_small_batches_and_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(&folder);
    let config = checkpoint.config();
    let samples = samples(&[9, 30, 17, 30, 4, 30, 30]);
    let mut least = 0;
    for bit in (0..40).rev() {
        least |= match batch_tokens(config, 30, least | 1 << bit, 0, 1) {
            Ok(_) => 0,
            Err(_) => 1 << bit,
        };
    }
    assert_eq!(batch_tokens(config, 30, least + 1, 0, 1).unwrap(), 30);
    let mut before = 0;
    for extra in [1, 1 << 12, 1 << 16, 1 << 20, 1 << 40] {
        let tokens = batch_tokens(config, 30, least + extra, 0, 1).unwrap();
        assert!(tokens >= before && tokens <= 8192);
        before = tokens;
    }
    assert_eq!(before, 8192);
    let seen = |max_memory: u64| {
        let state = tempfile::tempdir().unwrap();
        let options = ObserveOptions {
            max_memory,
            ..options(&state)
        };
        observe(&checkpoint, &samples, &options, &mut |_, _| true)
    };
    let (tight, ample) = (seen(least + 1).unwrap(), seen(1 << 32).unwrap());
    let layers = tight
        .observations
        .layers
        .iter()
        .zip(&ample.observations.layers);
    for (a, b) in layers {
        assert_eq!(a.selections, b.selections);
        assert_close(&a.gate_mass, &b.gate_mass, 1e-5, 0.0);
    }
    let message = seen(least).unwrap_err().to_string();
    for word in ["GiB", "--max-memory", "30 tokens"] {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

/// Numbers of a tensor.
fn numbers(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// What the experts gave, against their formula on every token alone: the inputs of the experts come
/// from the model, everything behind them from the weights in f64.
#[test]
fn the_outputs_are_those_of_every_token_alone() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(&folder);
    let config = checkpoint.config();
    let (h, f) = (config.hidden_size, config.moe.intermediate_size);
    let samples = samples(&[5, 17, 1, 9]);
    let seen = observed(&checkpoint, &samples);
    let model = Decoder::load(&checkpoint).unwrap();
    for (l, layer) in seen.layers.iter().enumerate() {
        let matrix = |e: usize, p: &str, shape: [usize; 2]| {
            let name = names::expert(l, e, p);
            numbers(&checkpoint.tensor(&name, &shape).unwrap())
        };
        let experts: Vec<[Vec<f64>; 3]> = (0..EXPERTS)
            .map(|e| {
                let gate = matrix(e, "gate_proj", [f, h]);
                [
                    gate,
                    matrix(e, "up_proj", [f, h]),
                    matrix(e, "down_proj", [h, f]),
                ]
            })
            .collect();
        let [mut gated, mut norm, mut square] = [[0.0; EXPERTS]; 3];
        let mut sum = vec![0.0; EXPERTS * h];
        for sample in &samples {
            let mut inputs = None;
            let mut chosen = (Vec::new(), Vec::new());
            let each = &mut |layer: usize, x: &Tensor, routing: Option<&Routing>| {
                if layer == l {
                    inputs = Some(x.clone());
                    let routing = routing.unwrap();
                    chosen = (routing.chosen.clone(), routing.gates.to_vec1::<f32>()?);
                }
                Ok(())
            };
            model.forward(Tokens::one(sample), None, each).unwrap();
            // What the experts see: the layer's input behind attention and norm.
            let x = expert_inputs(&model, l, &inputs.unwrap());
            for (pair, (&expert, &gate)) in chosen.0.iter().zip(&chosen.1).enumerate() {
                let (token, expert) = (pair / TOP_K, expert as usize);
                let row = &x[token * h..(token + 1) * h];
                let times = |m: &[f64], v: &[f64]| -> Vec<f64> {
                    m.chunks(v.len())
                        .map(|r| r.iter().zip(v).map(|(a, b)| a * b).sum())
                        .collect()
                };
                let [g, u, d] = &experts[expert];
                let pairs = times(g, row).into_iter().zip(times(u, row));
                let inner: Vec<f64> = pairs.map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let y = times(d, &inner);
                let size: f64 = y.iter().map(|v| v * v).sum();
                let of_token = &chosen.1[token * TOP_K..(token + 1) * TOP_K];
                let whole: f64 = of_token.iter().map(|&g| f64::from(g)).sum();
                gated[expert] += f64::from(gate) / whole * size.sqrt();
                norm[expert] += size.sqrt();
                square[expert] += size;
                for (sum, v) in sum[expert * h..].iter_mut().zip(&y) {
                    *sum += v;
                }
            }
        }
        let outputs = layer.outputs.as_ref().unwrap();
        let largest = |values: &[f64]| values.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for (ours, expected) in [
            (&outputs.gated, &gated[..]),
            (&outputs.norm, &norm[..]),
            (&outputs.square, &square[..]),
            (&outputs.sum, &sum[..]),
        ] {
            assert_close(ours, expected, 1e-4, largest(expected));
        }
        let flatness: Vec<f64> = experts
            .iter()
            .map(|m| {
                let all: Vec<f64> = m.concat();
                let absolute: f64 = all.iter().map(|w| w.abs()).sum();
                let square: f64 = all.iter().map(|w| w * w).sum();
                absolute / (all.len() as f64).sqrt() / square.sqrt()
            })
            .collect();
        assert_close(&outputs.flatness, &flatness, 1e-5, 0.0);
    }
}

/// The inputs `[T, H]` of the experts of a layer, found by taking the layer's weights apart: with a
/// router of unit rows, its logits are the inputs themselves.
fn expert_inputs(model: &Decoder, l: usize, x: &Tensor) -> Vec<f64> {
    let config = model.config();
    let h = config.hidden_size;
    let mut out = vec![0.0; x.dims()[1] * h];
    for first in (0..h).step_by(EXPERTS) {
        let mut layer = model.layers[l].clone();
        let width = EXPERTS.min(h - first);
        let rows: Vec<f32> = (0..EXPERTS * h)
            .map(|i| f32::from(i / h < width && i % h == first + i / h))
            .collect();
        let unit = Tensor::from_vec(rows, (EXPERTS, h), x.device()).unwrap();
        layer
            .visit(&mut |name, _, tensor| {
                if name == "mlp.gate" {
                    *tensor = unit.clone();
                }
                Ok(())
            })
            .unwrap();
        let rotary = Rotary::new(config);
        let (_, routing) = layer.forward(x, config, &rotary, None).unwrap();
        let logits = numbers(&routing.unwrap().logits);
        for (token, logits) in logits.chunks(EXPERTS).enumerate() {
            out[token * h + first..][..width].copy_from_slice(&logits[..width]);
        }
    }
    out
}
