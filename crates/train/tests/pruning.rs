//! The recovery of factored bases: which rows go, how many stay, and going on after a stop.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use candle_core::Tensor;
use lightmoe_models::{Decoder, Projections};
use lightmoe_train::{AnnealingShape, Point, TrainOptions, finish_recovery};
use std::fs;
use support::{
    Models, SHAPE, STEPS, batch, failure, finish, interrupt, logits, of, options, parameters, write,
};

/// There is nothing to fade out.
fn unannealed() -> TrainOptions {
    let mut options = options();
    options.annealing.shape = AnnealingShape::None;
    options
}

/// How many rows of each matrix are not zero: `[base]`.
fn rows(stack: &Tensor) -> Vec<usize> {
    let sums = stack
        .abs()
        .unwrap()
        .sum(2)
        .unwrap()
        .to_vec2::<f32>()
        .unwrap();
    let count = |sums: &Vec<f32>| sums.iter().filter(|sum| **sum > 0.0).count();
    sums.iter().map(count).collect()
}

fn sparse(model: &Decoder) -> Vec<&Projections> {
    model
        .banks()
        .map(|bank| bank.bases.as_ref().unwrap())
        .collect()
}

#[test]
fn as_many_rows_stay_as_planned_and_the_written_model_is_the_trained_one() {
    let models = Models::new();
    let built = models.factored();
    let mut model = models.unfolded(&built);
    for stacks in sparse(&model) {
        assert!(
            stacks
                .named()
                .iter()
                .all(|(_, s)| rows(s) == vec![s.dim(1).unwrap(); 2])
        );
    }
    let before = parameters(&mut model);
    let curve = finish(&mut model, &unannealed(), &models.folders("whole"));
    let mean = |points: &[Point]| points.iter().map(|p| p.loss).sum::<f64>() / points.len() as f64;
    let (first, last) = (mean(&curve[..5]), mean(&curve[STEPS - 5..]));
    assert!(last < 0.9 * first, "{first} → {last}");
    for stacks in sparse(&model) {
        for (projection, stack) in stacks.named() {
            assert_eq!(rows(stack), [SHAPE.rows(projection); 2], "{projection}");
        }
    }
    // Low rank and rows all train, and nothing else does.
    for (name, (_, bits)) in parameters(&mut model) {
        let trains = name.contains(".bases.") || name.contains(".shared.");
        assert_eq!(before[&name].1 != bits, trains, "{name}");
    }
    let trained = logits(&model);
    finish_recovery(&mut model).unwrap();
    let path = models.folder.path().join("recovered");
    let written = write(&path, &built.config().raw, &of(&model));
    assert_eq!(written.names(), built.names());
    let reloaded = logits(&Decoder::load(&written).unwrap());
    let largest = trained.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in trained.iter().zip(&reloaded) {
        assert!((a - b).abs() <= 1e-5 * largest, "{a} is not {b}");
    }
}

#[test]
fn a_stopped_pruning_goes_on_to_the_same_bits() {
    let models = Models::new();
    let built = models.factored();
    let mut expected = models.unfolded(&built);
    finish(&mut expected, &unannealed(), &models.folders("whole"));
    // Before rows go, while they go, and when no more do.
    for last in [0, 7, 9, 20, STEPS - 2] {
        let folders = models.folders(&format!("stopped-{last}"));
        let mut model = models.unfolded(&built);
        interrupt(&mut model, &unannealed(), &folders, last);
        let stopped: Vec<_> = sparse(&model).iter().map(|s| rows(&s.down)).collect();
        match last {
            0 => assert_eq!(stopped, [[16; 2]; 2]),
            20 => assert!(stopped.iter().flatten().all(|n| (4..16).contains(n))),
            _ => {}
        }
        let mut model = models.unfolded(&built);
        finish(&mut model, &unannealed(), &folders);
        assert!(
            parameters(&mut model) == parameters(&mut expected),
            "{last}"
        );
    }
}

#[test]
fn a_pruning_that_did_not_end_is_refused() {
    let models = Models::new();
    let built = models.factored();
    let mut model = models.unfolded(&built);
    let folders = models.folders("early");
    interrupt(&mut model, &unannealed(), &folders, 5);
    let message = finish_recovery(&mut model).unwrap_err().to_string();
    assert!(message.contains("train to the end"), "{message}");
    // A checkpoint without the importance of its rows is none of this run.
    let path = folders.state.join("state.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(11).position(|w| w == b".importance").unwrap();
    bytes[at + 1] = b'u';
    fs::write(&path, bytes).unwrap();
    let message = failure(
        &mut models.unfolded(&built),
        &unannealed(),
        &folders,
        &batch,
    );
    assert!(message.contains(".importance"), "{message}");
}
