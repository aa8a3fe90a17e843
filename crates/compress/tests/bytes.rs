//! Bytes as the target, and as they are in the files.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::DType;
use common::predictions::{built, samples};
use common::{observed, options, random_checkpoint, small};
use lightmoe_compress::methods::{Kind, MethodName, Target, Weights, plan};
use lightmoe_compress::{Sensitivity, Statistics};
use lightmoe_models::Checkpoint;
use std::fs;

/// What the files of weights take.
fn on_disk(checkpoint: &Checkpoint) -> u64 {
    let files = fs::read_dir(checkpoint.dir()).unwrap();
    let files = files.map(|file| file.unwrap());
    let weights = files.filter(|f| f.path().extension().is_some_and(|e| e == "safetensors"));
    weights.map(|file| file.metadata().unwrap().len()).sum()
}

/// Whatever a method leaves in steps of, its files take no more than was asked for, and not much less; the
/// planner says how many to the byte. The configuration says bf16, and the weights are f32.
#[test]
fn no_method_leaves_more_bytes_than_asked() {
    let folder = tempfile::tempdir().unwrap();
    let config = small(3, 8);
    let checkpoint = random_checkpoint(&config, DType::F32, 3, &folder);
    assert_eq!(checkpoint.bytes(), on_disk(&checkpoint));
    let statistics = Statistics {
        moments: true,
        all_outputs: true,
        samples: true,
        damage: Some(Sensitivity::Fisher),
        bias: false,
    };
    let seen = observed(&checkpoint, &samples(1), statistics, &folder);
    let weights = Weights {
        checkpoint: &checkpoint,
        progress: &|_, _| true,
    };
    let expert = 4 * config.expert_parameters();
    // The coarsest step that a method has: a rank of all experts, of three matrices of 32 x 16 each.
    let step = 4 * 3 * 8 * 3 * (32 + 16);
    let saving = MethodName::ALL.into_iter();
    for method in saving.filter(|method| method.kind() != Kind::Keep) {
        for experts in [3, 5, 6] {
            let bytes = checkpoint.bytes() - experts * expert - 1234;
            let plan = plan(weights, &seen, Target::Bytes(bytes), method, &options(1, 1)).unwrap();
            let built = built(&checkpoint, &plan, &seen, &folder);
            let found = on_disk(&built);
            assert_eq!(built.bytes(), found);
            assert!(found <= bytes, "{method}: {found}, not {bytes}");
            assert!(found + 2 * step > bytes, "{method}: {found}, not {bytes}");
            if let Some(damage) = &plan.damage {
                assert_eq!(damage.bytes, found);
            }
        }
    }
}

/// What cannot be had is refused in the words that it was asked for in.
#[test]
fn too_few_bytes_are_refused_with_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = random_checkpoint(&small(2, 8), DType::BF16, 3, &folder);
    let statistics = Statistics {
        damage: Some(Sensitivity::Relative),
        ..Statistics::default()
    };
    let seen = observed(&checkpoint, &samples(1), statistics, &folder);
    let config = checkpoint.config();
    for (target, words) in [
        (Target::Bytes(1000), "tensors of the smallest plan take"),
        (Target::Ratio(0.99), "saves at most 0."),
        (Target::Damage(0.01), "not observed in nats"),
    ] {
        let refused = plan(config, &seen, target, MethodName::Budget, &options(1, 1));
        let message = refused.unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
}
