//! The predictions that are kept of another model: those that it makes, and a training by them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use lightmoe_models::{Decoder, LanguageModel, StreamedDecoder, TensorFile};
use lightmoe_train::{
    Curve, KeptPredictions, Outcome, Predictions, Result, Teacher, TrainBatch, train,
};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use support::{Models, STEPS, VOCABULARY, batch, options, parameters};

const TEMPERATURE: f64 = 2.0;

/// Rows of other lengths at every step, so that a pass of several batches pads them.
fn uneven(step: usize) -> Result<TrainBatch> {
    let whole = batch(step)?;
    let (old, len) = (10, 7 + step % 4);
    let cut = |i: usize| i / len * old + i % len;
    let places = || (0..whole.rows * len).map(cut);
    Ok(TrainBatch {
        tokens: places().map(|i| whole.tokens[i]).collect(),
        loss_mask: places().map(|i| whole.loss_mask[i]).collect(),
        rows: whole.rows,
    })
}

fn kept(folder: &Path, k: usize) -> KeptPredictions {
    KeptPredictions::new(folder, "this run", k, TEMPERATURE)
}

/// A model that is in memory.
fn opened(model: &Decoder) -> impl Fn() -> Result<Box<dyn LanguageModel>> {
    || Ok(Box::new(model.clone()))
}

fn teacher(predictions: Predictions<'_>) -> Teacher<'_> {
    Teacher {
        predictions,
        weight: 0.7,
        temperature: TEMPERATURE,
    }
}

/// Many rows, so that a pass takes four steps.
fn long(step: usize) -> Result<TrainBatch> {
    let few = uneven(step)?;
    Ok(TrainBatch {
        tokens: few.tokens.repeat(100),
        loss_mask: few.loss_mask.repeat(100),
        rows: few.rows * 100,
    })
}

/// Stopped after any pass, or killed within one, the keeping goes on to the same bytes; a model read layer
/// by layer predicts the same.
#[test]
fn kept_predictions_do_not_depend_on_stops() {
    let models = Models::new();
    let whole = || Ok(Box::new(Decoder::load(&models.original)?) as Box<dyn LanguageModel>);
    let layers = || Ok(Box::new(StreamedDecoder::new(&models.original)?) as Box<dyn LanguageModel>);
    let at = |name: &str| models.folder.path().join(name);
    let files = |name: &str| -> Vec<Vec<u8>> {
        let file = |step| fs::read(at(name).join(format!("{step}.safetensors"))).unwrap();
        (0..10).map(file).collect()
    };
    let mut told = Vec::new();
    let all = &mut |done| {
        told.push(done);
        true
    };
    assert!(kept(&at("one"), 3).keep(&whole, 10, &long, all).unwrap());
    assert!(told.len() > 1 && told.last() == Some(&10), "{told:?}");

    let cut = kept(&at("cut"), 3);
    assert!(!cut.keep(&whole, 10, &long, &mut |_| false).unwrap());
    assert_eq!(at("cut").read_dir().unwrap().count(), told[0]);
    fs::remove_file(at("cut").join("1.safetensors")).unwrap();
    assert!(cut.keep(&layers, 10, &long, &mut |_| true).unwrap());
    assert!(files("cut") == files("one"), "other bytes after a stop");
    let never = || -> Result<Box<dyn LanguageModel>> { panic!("nothing is missing") };
    assert!(cut.keep(&never, 10, &long, &mut |_| true).unwrap());
    cut.remove().unwrap();
    assert!(!at("cut").exists());
}

/// Kept whole, they train a model as the other one beside it does.
#[test]
fn kept_predictions_train_as_the_model_does() {
    let models = Models::new();
    let original = Decoder::load(&models.original).unwrap();
    let whole = kept(&models.folder.path().join("predictions"), VOCABULARY);
    assert!(
        whole
            .keep(&opened(&original), STEPS, &uneven, &mut |_| true)
            .unwrap()
    );

    let run = |name: &str, predictions: Predictions<'_>| -> Vec<f64> {
        let mut model = models.prepared(true);
        let folders = models.folders(name);
        let teacher = teacher(predictions);
        let go = &mut |_: &_| true;
        let outcome = train(
            &mut model,
            &options(),
            &folders,
            &uneven,
            Some(&teacher),
            go,
        );
        assert_eq!(outcome.unwrap(), Outcome::Finished);
        let curve = Curve::read(&folders.logs).unwrap();
        curve.iter().map(|point| point.distance.unwrap()).collect()
    };
    let beside = run("beside", Predictions::Model(&original));
    let by_file = run("kept", Predictions::Kept(&whole));
    for (a, b) in beside.iter().zip(&by_file) {
        assert!((a - b).abs() < 1e-4 * (1.0 + a), "{a} {b}");
    }
    assert!(beside[STEPS - 1] > 1e-4, "the teacher says nothing new");
}

/// The likeliest come first, and each has the probability that the model gives it.
#[test]
fn the_likeliest_tokens_are_kept() {
    let models = Models::new();
    let original = Decoder::load(&models.original).unwrap();
    let folder = models.folder.path().join("predictions");
    let keep = |k: usize, at: &Path| kept(at, k).keep(&opened(&original), 1, &batch, &mut |_| true);
    keep(VOCABULARY, &folder.join("all")).unwrap();
    keep(3, &folder.join("top")).unwrap();
    let read = |at: &str, k: usize| {
        let file = TensorFile::open(folder.join(at).join("0.safetensors")).unwrap();
        // Of ten tokens in four rows the first two are no targets.
        let shape = [4 * 8, k];
        ["ids", "log_probabilities"].map(|name| file.values(name, &shape).unwrap())
    };
    let ([ids, all], [top_ids, top]) = (read("all", VOCABULARY), read("top", 3));
    for row in 0..32 {
        let (of, few) = (
            row * VOCABULARY..(row + 1) * VOCABULARY,
            row * 3..row * 3 + 3,
        );
        let sum: f32 = all[of.clone()].iter().map(|v| v.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5);
        assert!(all[of.clone()].is_sorted_by(|a, b| a >= b));
        let different: BTreeSet<u32> = ids[of.clone()].iter().map(|&id| id as u32).collect();
        assert_eq!(different.len(), VOCABULARY);
        assert_eq!(all[of.clone()][..3], top[few.clone()]);
        assert_eq!(ids[of][..3], top_ids[few]);
    }
}

/// What was kept for other settings is not taken; where nothing was kept, the file is named.
#[test]
fn predictions_of_other_settings_are_refused() {
    let models = Models::new();
    let original = Decoder::load(&models.original).unwrap();
    let folder = models.folder.path().join("predictions");
    let go = &mut |_: usize| true;
    kept(&folder, 3)
        .keep(&opened(&original), 2, &batch, go)
        .unwrap();
    let message = |kept: KeptPredictions| {
        let (mut model, folders) = (models.prepared(true), models.folders("refused"));
        let before = parameters(&mut model);
        let teacher = teacher(Predictions::Kept(&kept));
        let ended = train(
            &mut model,
            &options(),
            &folders,
            &batch,
            Some(&teacher),
            &mut |_| true,
        );
        assert_eq!(parameters(&mut model), before);
        ended.unwrap_err().to_string()
    };
    assert!(message(kept(&folder, 4)).contains("other settings"));
    let none = message(kept(&folder.join("none"), 3));
    assert!(none.contains("0.safetensors"), "{none}");
    // Other settings are kept in their place.
    kept(&folder, 4)
        .keep(&opened(&original), 2, &batch, go)
        .unwrap();
    let file = TensorFile::open(folder.join("1.safetensors")).unwrap();
    assert_eq!(file.shape("ids").unwrap(), [32, 4]);
}

/// What cannot fit the disk is refused before the model is opened, and nothing is left; what is there already
/// needs no room.
#[test]
fn predictions_without_room_are_refused() {
    let models = Models::new();
    let original = Decoder::load(&models.original).unwrap();
    let folder = models.folder.path().join("predictions");
    let go = &mut |_: usize| true;
    let unopened = || -> Result<Box<dyn LanguageModel>> { panic!("the model was opened") };
    let all = 1 << 60;
    let refused = kept(&folder, all).keep(&unopened, 2, &batch, go);
    let message = refused.unwrap_err().to_string();
    for part in ["predictions", "GiB left", "free some"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!folder.exists());
    let whole = kept(&folder, 3);
    whole.keep(&opened(&original), 2, &batch, go).unwrap();
    whole.keep(&unopened, 2, &batch, go).unwrap();
}
