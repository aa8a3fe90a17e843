//! What a sample says of a missing set of experts, against the layer run without them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::Tensor;
use lightmoe_compress::Statistics;
use lightmoe_compress::observations::Observations;
use lightmoe_models::{Checkpoint, Embedding, Layer, Rotary, Tokens};
use std::path::Path;

mod common;
use common::{observed, without};

fn square(difference: &Tensor) -> f64 {
    let values: Vec<f32> = difference.flatten_all().unwrap().to_vec1().unwrap();
    values.iter().map(|v| f64::from(*v).powi(2)).sum()
}

/// In every family: softmax, logistic and sparsemixer routing, with and without groups and shared
/// experts. Samples of two lengths are padded, and all their tokens sampled.
#[test]
fn the_loss_of_a_set_is_the_distance_that_the_output_moves() {
    let samples: Vec<Vec<u32>> = [7u32, 3, 7]
        .map(|n| (2..2 + n * 3).step_by(3).collect())
        .into();
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity");
    let mut moved = 0;
    for family in std::fs::read_dir(parity).unwrap() {
        let family = family.unwrap().path();
        if !family.join("config.json").is_file() {
            continue;
        }
        let checkpoint = Checkpoint::open(&family).unwrap();
        let config = checkpoint.config();
        let folder = tempfile::tempdir().unwrap();
        let statistics = Statistics {
            samples: true,
            ..Statistics::default()
        };
        observed(&checkpoint, &samples, statistics, &folder);
        let seen = Observations::load(&folder.path().join("seen.safetensors")).unwrap();
        assert!(seen.moments().is_err());

        let rotary = Rotary::new(config);
        let embedding = Embedding::load(&checkpoint).unwrap();
        let mut states: Vec<Tensor> = samples
            .iter()
            .map(|ids| embedding.embed(Tokens::one(ids)).unwrap())
            .collect();
        for l in 0..config.num_layers {
            let layer = Layer::load(&checkpoint, l).unwrap();
            let forward = |layer: &Layer, x: &Tensor| layer.forward(x, config, &rotary, None);
            let next: Vec<Tensor> = states
                .iter()
                .map(|x| forward(&layer, x).unwrap().0)
                .collect();
            if layer.bank().is_some() {
                let sample = seen.sample(config, l).unwrap();
                assert_eq!(sample.loss(&[]).unwrap(), 0.0);
                let experts = config.moe.num_experts;
                let spare = experts - config.moe.top_k;
                let single = (0..experts).map(|expert| vec![expert]);
                let several = (1..=spare).map(|n| (experts - n..experts).collect());
                for set in single.chain(several).filter(|_| spare > 0) {
                    let layer = without(&layer, &set);
                    let outputs = states.iter().map(|x| forward(&layer, x).unwrap().0);
                    let sum: f64 = outputs
                        .zip(&next)
                        .map(|(now, then)| square(&(now - then).unwrap()))
                        .sum();
                    let (ours, direct) = (sample.loss(&set).unwrap(), sum.sqrt());
                    assert!(
                        (ours - direct).abs() <= 1e-3 * direct + 1e-5,
                        "{}, layer {l} without {set:?}: {ours} is not {direct}",
                        family.display()
                    );
                    moved += usize::from(direct > 1e-3);
                }
            }
            states = next;
        }
    }
    assert!(moved > 50, "{moved}");
}
