//! The recovery of a small compressed model: what changes, what stays, and going on after a stop.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use lightmoe_models::{Decoder, ParameterKind};
use lightmoe_train::{Curve, Folders, Point, finish_recovery};
use std::fs;
use support::{
    Models, STEPS, batch, failure, finish, interrupt, logits, of, options, parameters, write,
};

fn originals(model: &Decoder) -> usize {
    model.banks().filter(|b| b.originals.is_some()).count()
}

#[test]
fn training_lowers_the_loss_and_changes_what_it_should() {
    use ParameterKind::{Adapter, Base, Router};
    let models = Models::new();
    for router in [false, true] {
        let mut options = options();
        let mut trained = vec![Base, Adapter];
        trained.extend(router.then_some(Router));
        options.groups[0].kinds = trained.clone();
        let mut model = models.prepared(true);
        let before = parameters(&mut model);
        let name = format!("router-{router}");
        let curve = finish(&mut model, &options, &models.folders(&name));
        let after = parameters(&mut model);
        assert_eq!(before.len(), after.len());
        for (name, (kind, bits)) in &before {
            let changed = after[name].1 != *bits;
            assert_eq!(changed, trained.contains(kind), "{name}");
        }
        let mean =
            |points: &[Point]| points.iter().map(|p| p.loss).sum::<f64>() / points.len() as f64;
        let (first, last) = (mean(&curve[..5]), mean(&curve[STEPS - 5..]));
        assert!(last < 0.9 * first, "{first} → {last}");
        let steps: Vec<usize> = curve.iter().map(|p| p.step).collect();
        assert_eq!(steps, (0..STEPS).collect::<Vec<_>>());
    }
}

#[test]
fn originals_go_when_beta_is_zero_and_the_written_model_is_the_trained_one() {
    let models = Models::new();
    let mut model = models.prepared(true);
    assert_eq!(originals(&model), 2);
    // β is 1 − step/20.
    interrupt(&mut model, &options(), &models.folders("early"), 19);
    assert_eq!(originals(&model), 2);
    let mut model = models.prepared(true);
    interrupt(&mut model, &options(), &models.folders("late"), 20);
    assert_eq!(originals(&model), 0);

    let mut model = models.prepared(true);
    let curve = finish(&mut model, &options(), &models.folders("whole"));
    assert_eq!((curve[0].beta, curve[10].beta), (1.0, 0.5));
    assert!(curve[20..].iter().all(|p| p.beta == 0.0));
    assert_eq!(originals(&model), 0);
    let trained = logits(&model);
    finish_recovery(&mut model).unwrap();
    let path = models.folder.path().join("recovered");
    let written = write(&path, &models.built.config().raw, &of(&model));
    assert_eq!(written.names(), models.built.names());
    let reloaded = logits(&Decoder::load(&written).unwrap());
    let largest = trained.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in trained.iter().zip(&reloaded) {
        assert!((a - b).abs() <= 1e-5 * largest, "{a} is not {b}");
    }
    assert_ne!(trained, logits(&Decoder::load(&models.built).unwrap()));
}

#[test]
fn without_annealing_the_originals_are_never_there() {
    let models = Models::new();
    let mut options = options();
    options.annealing.end_ratio = 0.0;
    let anneal = options.annealing.beta(0, STEPS) > 0.0;
    assert!(!anneal);
    let mut model = models.prepared(anneal);
    assert_eq!(originals(&model), 0);
    let curve = finish(&mut model, &options, &models.folders("run"));
    assert!(curve.iter().all(|p| p.beta == 0.0));
}

#[test]
fn a_stopped_training_goes_on_to_the_same_bits() {
    let models = Models::new();
    let whole = models.folders("whole");
    let mut expected = models.prepared(true);
    finish(&mut expected, &options(), &whole);
    // While β falls, at a checkpoint, after β is zero, and before the last step.
    for last in [7, 9, 26, STEPS - 2] {
        let folders = models.folders(&format!("stopped-{last}"));
        interrupt(&mut models.prepared(true), &options(), &folders, last);
        assert_eq!(Curve::read(&folders.logs).unwrap().len(), last + 1);
        // What a kill leaves: a curve that is ahead of the checkpoint, its last line torn.
        let curve = folders.logs.join("loss.jsonl");
        let ahead = format!("{}{{\"step\":", fs::read_to_string(&curve).unwrap());
        fs::write(&curve, ahead).unwrap();
        let mut model = models.prepared(true);
        finish(&mut model, &options(), &folders);
        assert!(
            parameters(&mut model) == parameters(&mut expected),
            "{last}"
        );
        let file = |folders: &Folders| fs::read(folders.logs.join("loss.jsonl")).unwrap();
        assert!(file(&folders) == file(&whole), "{last}");
    }
    // A finished one has nothing left to do.
    let mut model = models.prepared(true);
    finish(&mut model, &options(), &whole);
    assert!(parameters(&mut model) == parameters(&mut expected));
    assert_eq!(originals(&model), 0);
}

#[test]
fn a_checkpoint_of_another_run_or_a_damaged_one_is_refused() {
    let models = Models::new();
    let folders = models.folders("run");
    interrupt(&mut models.prepared(true), &options(), &folders, 7);
    let mut other = options();
    other.fingerprint = "another run".into();
    let message = failure(&mut models.prepared(true), &other, &folders, &batch);
    for word in ["state.safetensors", "other settings", "remove it"] {
        assert!(message.contains(word), "{message}");
    }
    let path = folders.state.join("state.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    let message = failure(&mut models.prepared(true), &options(), &folders, &batch);
    assert!(message.contains("state.safetensors"), "{message}");
}

#[test]
fn what_goes_wrong_is_said() {
    let models = Models::new();
    let mut wild = options();
    wild.learning_rate.peak = 1e30;
    let folders = models.folders("wild");
    let message = failure(&mut models.prepared(true), &wild, &folders, &batch);
    for word in ["step 1", "learning rate"] {
        assert!(message.contains(word), "{message}");
    }
    let silent = |step| {
        let mut batch = batch(step)?;
        batch.loss_mask.fill(false);
        Ok(batch)
    };
    let folders = models.folders("silent");
    let message = failure(&mut models.prepared(true), &options(), &folders, &silent);
    assert!(message.contains("no target tokens"), "{message}");
    let mut nothing = options();
    nothing.groups.clear();
    let folders = models.folders("nothing");
    let message = failure(&mut models.prepared(true), &nothing, &folders, &batch);
    assert!(message.contains("nothing to train"), "{message}");
}
