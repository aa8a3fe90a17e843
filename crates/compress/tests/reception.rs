//! Which sets of experts a block of layers loses, against every combination run layer by layer.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::Tensor;
use lightmoe_compress::reception::choose;
use lightmoe_compress::{Error, Statistics};
use lightmoe_models::{Checkpoint, DType, Embedding, Layer, Rotary, Tokens};
use tempfile::TempDir;

mod common;
use common::{observed, random_checkpoint, small, without};

const SAMPLES: Statistics = Statistics {
    moments: false,
    all_outputs: false,
    samples: true,
    damage: None,
    bias: false,
};

/// The square of the distance between two lists of tensors.
fn distance(a: &[Tensor], b: &[Tensor]) -> f64 {
    let square = |(a, b): (&Tensor, &Tensor)| {
        let sum = (a - b).unwrap().sqr().unwrap().sum_all().unwrap();
        f64::from(sum.to_scalar::<f32>().unwrap())
    };
    a.iter().zip(b).map(square).sum()
}

/// The best picks of every block, each combination run by itself, each sequence by itself.
fn best(
    checkpoint: &Checkpoint,
    samples: &[&[u32]],
    candidates: &[Vec<Vec<usize>>],
    block: usize,
) -> Vec<usize> {
    let config = checkpoint.config();
    let rotary = Rotary::new(config);
    let layers: Vec<Layer> = (0..config.num_layers)
        .map(|l| Layer::load(checkpoint, l).unwrap())
        .collect();
    let forward = |layers: &[Layer], states: &[Tensor]| -> Vec<Tensor> {
        let through = |x: &Tensor| {
            layers.iter().fold(x.clone(), |x, layer| {
                layer.forward(&x, config, &rotary, None).unwrap().0
            })
        };
        states.iter().map(through).collect()
    };
    let embedding = Embedding::load(checkpoint).unwrap();
    let mut states: Vec<Tensor> = samples
        .iter()
        .map(|ids| embedding.embed(Tokens::one(ids)).unwrap())
        .collect();
    let mut picks = Vec::new();
    for (layers, candidates) in layers.chunks(block).zip(candidates.chunks(block)) {
        let original = forward(layers, &states);
        let mut least: Option<(f64, Vec<usize>)> = None;
        let count: usize = candidates.iter().map(Vec::len).product();
        for mut number in 0..count {
            let mut chosen = Vec::new();
            for sets in candidates {
                chosen.push(number % sets.len());
                number /= sets.len();
            }
            let pruned: Vec<Layer> = layers
                .iter()
                .zip(candidates.iter().zip(&chosen))
                .map(|(layer, (sets, &pick))| without(layer, &sets[pick]))
                .collect();
            let apart = distance(&forward(&pruned, &states), &original);
            if least.as_ref().is_none_or(|(found, _)| apart < *found) {
                least = Some((apart, chosen));
            }
        }
        picks.extend(least.unwrap().1);
        states = original;
    }
    picks
}

/// Three sets of two, one, or no experts for each of `layers`.
fn candidates(layers: usize) -> Vec<Vec<Vec<usize>>> {
    let sets = |layer: usize| match layer {
        3 => vec![vec![]],
        _ => vec![
            vec![layer % 4, 5],
            vec![1 + layer % 4, 6],
            vec![2 + layer % 2, 7],
        ],
    };
    (0..layers).map(sets).collect()
}

#[test]
fn each_block_takes_the_combination_that_moves_its_output_least() {
    let config = small(5, 8);
    let samples: Vec<Vec<u32>> = (0..20u32)
        .map(|i| (0..3 + i).map(|t| (7 * t + 11 * i) % 60).collect())
        .collect();
    let samples_of: Vec<&[u32]> = samples.iter().map(Vec::as_slice).collect();
    let mut elsewhere = 0;
    for seed in 0..3 {
        let folder = TempDir::new().unwrap();
        let checkpoint = random_checkpoint(&config, DType::F32, seed, &folder);
        let seen = observed(&checkpoint, &samples, SAMPLES, &folder);
        let candidates = candidates(5);
        let chosen = choose(&checkpoint, &seen, &candidates, &|_, _| true).unwrap();
        assert_eq!(chosen, best(&checkpoint, &samples_of, &candidates, 3));
        // Layer by layer the choice is another one now and then.
        let alone = best(&checkpoint, &samples_of, &candidates, 1);
        elsewhere += usize::from(chosen != alone);
    }
    assert!(elsewhere > 0);
}

/// Of more tokens than run through a block the sequences are the first of some.
#[test]
fn long_sequences_are_cut() {
    let config = small(2, 8);
    let folder = TempDir::new().unwrap();
    let checkpoint = random_checkpoint(&config, DType::F32, 5, &folder);
    let long: Vec<u32> = (0..1500).map(|t| t * t % 60).collect();
    let seen = observed(&checkpoint, std::slice::from_ref(&long), SAMPLES, &folder);
    let candidates = candidates(2);
    let chosen = choose(&checkpoint, &seen, &candidates, &|_, _| true).unwrap();
    assert_eq!(chosen, best(&checkpoint, &[&long[..1024]], &candidates, 3));
}

#[test]
fn it_stops_when_told_and_needs_what_observe_left() {
    let config = small(2, 8);
    let folder = TempDir::new().unwrap();
    let checkpoint = random_checkpoint(&config, DType::F32, 5, &folder);
    let mut seen = observed(&checkpoint, &[vec![1, 2, 3]], SAMPLES, &folder);
    let stopped = choose(&checkpoint, &seen, &candidates(2), &|_, _| false);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    let file = seen
        .moments
        .clone()
        .unwrap()
        .join("sequences-0.safetensors");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 4]).unwrap();
    assert!(choose(&checkpoint, &seen, &candidates(2), &|_, _| true).is_err());
    seen.moments = None;
    let message = choose(&checkpoint, &seen, &candidates(2), &|_, _| true).unwrap_err();
    assert!(message.to_string().contains("--samples"), "{message}");
}
