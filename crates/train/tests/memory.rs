//! Ways to train in less memory, which change no step but for rounding: parts of a batch, and layers that run
//! again on the way back.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use lightmoe_models::{Decoder, ParameterKind};
use lightmoe_train::{KeptPredictions, Outcome, Point, Predictions, Teacher, TrainOptions, train};
use support::{Models, batch, finish, options, parameters};

/// What a training takes, beside the batch as a whole.
struct Way {
    micro_batch: usize,
    recompute: bool,
    /// How far losses may be apart, relative.
    within: f64,
}

/// Of four sequences.
const WAYS: [Way; 4] = [
    Way {
        micro_batch: 0,
        recompute: true,
        within: 1e-6,
    },
    Way {
        micro_batch: 1,
        recompute: false,
        within: 1e-4,
    },
    Way {
        micro_batch: 3,
        recompute: true,
        within: 1e-4,
    },
    Way {
        micro_batch: 9,
        recompute: false,
        within: 0.0,
    },
];

impl Way {
    fn options(&self, options: &TrainOptions) -> TrainOptions {
        TrainOptions {
            micro_batch: self.micro_batch,
            recompute: self.recompute,
            ..options.clone()
        }
    }

    #[track_caller]
    fn check(&self, ours: &[Point], expected: &[Point]) {
        assert_eq!(ours.len(), expected.len());
        for (a, b) in ours.iter().zip(expected) {
            for (a, b) in [
                (Some(a.loss), Some(b.loss)),
                (Some(a.grad_norm), Some(b.grad_norm)),
                (a.balance, b.balance),
                (a.distance, b.distance),
            ] {
                assert_eq!(a.is_some(), b.is_some());
                let (a, b) = (a.unwrap_or(0.0), b.unwrap_or(0.0));
                let what = format!("{a} is not {b}, by {}", self.micro_batch);
                assert!((a - b).abs() <= self.within * b.abs().max(1e-3), "{what}");
            }
        }
    }
}

/// The first steps: where rounding adds up, a token chooses another expert in the end.
fn first(options: TrainOptions) -> TrainOptions {
    TrainOptions {
        steps: 12,
        ..options
    }
}

#[test]
fn a_recovery_takes_the_same_steps() {
    let models = Models::new();
    let options = first(options());
    let curve = |options: &TrainOptions, name: &str| {
        let mut model = models.prepared(true);
        let curve = finish(&mut model, options, &models.folders(name));
        (curve, parameters(&mut model))
    };
    let (expected, trained) = curve(&options, "whole");
    for (i, way) in WAYS.iter().enumerate() {
        let (ours, found) = curve(&way.options(&options), &format!("way-{i}"));
        way.check(&ours, &expected);
        if way.micro_batch == 0 {
            // Layers that run again see what they saw.
            assert!(found == trained, "other bits");
        }
        // Nothing is trained, or left out, that is not otherwise.
        let moved = |all: &std::collections::BTreeMap<_, (ParameterKind, Vec<u32>)>| {
            let before = parameters(&mut models.prepared(true));
            let moved = all.iter().filter(|(name, own)| before[*name].1 != own.1);
            moved
                .map(|(name, _)| String::clone(name))
                .collect::<Vec<_>>()
        };
        assert_eq!(moved(&found), moved(&trained));
    }
}

/// Every parameter, the embedding among them.
#[test]
fn a_training_from_nothing_takes_the_same_steps() {
    let models = Models::new();
    let mut options = first(options());
    options.groups[0].kinds = vec![
        ParameterKind::Embedding,
        ParameterKind::Attention,
        ParameterKind::Norm,
        ParameterKind::Router,
        ParameterKind::Expert,
    ];
    let curve = |options: &TrainOptions, name: &str| {
        let mut model = Decoder::load(&models.original).unwrap();
        finish(&mut model, options, &models.folders(name))
    };
    let expected = curve(&options, "whole");
    for (i, way) in WAYS.iter().enumerate() {
        way.check(
            &curve(&way.options(&options), &format!("way-{i}")),
            &expected,
        );
    }
    // What balances the load is of the sequences that run together.
    options.balance = 0.1;
    let expected = curve(&options, "balanced");
    WAYS[0].check(
        &curve(&WAYS[0].options(&options), "balanced-way"),
        &expected,
    );
}

#[test]
fn a_teacher_is_heard_the_same() {
    let models = Models::new();
    let options = first(options());
    let original = Decoder::load(&models.original).unwrap();
    let kept = models.folder.path().join("predictions");
    let kept = KeptPredictions::new(&kept, "these", 5, 1.5);
    let open = || -> lightmoe_train::Result<Box<dyn lightmoe_models::LanguageModel>> {
        Ok(Box::new(original.clone()))
    };
    kept.keep(&open, options.steps, &batch, &mut |_| true)
        .unwrap();
    for (name, predictions) in [
        ("model", Predictions::Model(&original)),
        ("kept", Predictions::Kept(&kept)),
    ] {
        let teacher = Teacher {
            predictions,
            weight: 0.7,
            temperature: 1.5,
        };
        let curve = |options: &TrainOptions, name: &str| {
            let folders = models.folders(name);
            let mut model = models.prepared(true);
            let teacher = Some(&teacher);
            let done = train(&mut model, options, &folders, &batch, teacher, &mut |_| {
                true
            });
            assert_eq!(done.unwrap(), Outcome::Finished);
            lightmoe_train::Curve::read(&folders.logs).unwrap()
        };
        let expected = curve(&options, name);
        for (i, way) in WAYS.iter().enumerate() {
            way.check(
                &curve(&way.options(&options), &format!("{name}-{i}")),
                &expected,
            );
        }
    }
}
