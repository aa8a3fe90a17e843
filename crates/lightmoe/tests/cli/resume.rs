//! Killed at any moment, a run goes on to the same bytes.

use crate::support::{Outcome, assert_same_run, base, end, files, json, model_copy, names, tiny};
use std::fs;
use std::path::Path;
use std::process::Command;

/// More steps than between two training checkpoints (50).
const LONG: [&str; 4] = ["--steps", "120", "--batch-size", "2"];

fn long(out: &Path) -> Command {
    let mut command = tiny("compress");
    command.args(LONG).arg("--out").arg(out);
    command
}

fn lines(out: &Path) -> usize {
    fs::read_to_string(out.join("logs/loss.jsonl")).map_or(0, |t| t.lines().count())
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, cut) = (folder.path().join("whole"), folder.path().join("cut"));
    long(&whole).ok();
    let resume = || {
        let mut command = long(&cut);
        command.arg("--resume");
        command
    };
    let observed = || cut.join("observations.safetensors").exists();
    assert_eq!(end(&mut long(&cut), "-KILL", observed), None);
    assert_eq!(end(&mut resume(), "-KILL", || lines(&cut) >= 1), None);
    // Before the first checkpoint: from the beginning of the training.
    assert_eq!(end(&mut resume(), "-KILL", || lines(&cut) >= 30), None);
    // Behind it: from step 50.
    assert_eq!(end(&mut resume(), "-KILL", || lines(&cut) >= 57), None);
    assert!(cut.join("recovery/state.safetensors").exists());
    assert_eq!(end(&mut resume(), "-TERM", || lines(&cut) >= 70), Some(130));
    let stopped = lines(&cut);
    let at_model = || cut.join("model").exists();
    assert_eq!(end(&mut resume(), "-KILL", at_model), None);
    assert!((70..120).contains(&stopped) && lines(&cut) == 120);
    resume().ok();
    assert_same_run(&whole, &cut);
    let resumed = "events.out.tfevents.0000000050.lightmoe".to_owned();
    assert!(names(&cut.join("logs")).contains(&resumed));
    // And a finished run is finished.
    let before = files(&cut.join("model"));
    resume().ok();
    assert_eq!(files(&cut.join("model")), before);
    assert_same_run(&whole, &cut);
}

#[test]
fn a_stop_outside_of_the_training_can_be_resumed_too() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, cut) = (folder.path().join("whole"), folder.path().join("cut"));
    let call = |out: &Path, resume: bool| {
        let mut command = tiny("compress");
        // So much to evaluate that the signal comes in the middle of it.
        command.args(["--steps", "2", "--eval-examples", "200", "--out"]);
        command.arg(out).args(resume.then_some("--resume"));
        command
    };
    call(&whole, false).ok();
    let begun = || cut.join("run.json").exists();
    assert_eq!(end(&mut call(&cut, false), "-TERM", begun), Some(130));
    let built = || cut.join("built").exists();
    assert_eq!(end(&mut call(&cut, true), "-TERM", built), Some(130));
    call(&cut, true).ok();
    assert_same_run(&whole, &cut);
}

#[test]
fn a_run_is_only_resumed_with_its_own_recipe_and_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_copy(&folder.path().join("model-folder"));
    let out = folder.path().join("run");
    let call = || {
        let mut command = tiny("compress");
        command.arg("--model").arg(&model).arg("--out").arg(&out);
        command
    };
    end(&mut call(), "-KILL", || out.join("run.json").exists());
    let state = json(&out.join("run.json"));
    let again = call().fails(1);
    assert!(again.contains("--resume"), "{again}");
    let other = call()
        .args(["--resume", "--ratio", "0.4", "--lr", "0.007"])
        .fails(1);
    for part in ["`ratio` was 0.5 and is now 0.4", "`lr` was 0.0016 and is"] {
        assert!(other.contains(part), "{other}");
    }
    assert!(other.contains("0.007"), "{other}");
    let weights = model.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let changed = call().arg("--resume").fails(1);
    assert!(changed.contains("the model changed"), "{changed}");
    assert_eq!(json(&out.join("run.json")), state);
    // A folder with something else is left alone.
    let strange = folder.path().join("strange");
    fs::create_dir(&strange).unwrap();
    fs::write(strange.join("thesis.txt"), "years of work").unwrap();
    let full = tiny("compress").arg("--out").arg(&strange).fails(1);
    assert!(full.contains("not empty"), "{full}");
    assert_eq!(names(&strange), ["thesis.txt"]);
}

#[test]
fn a_run_without_a_folder_gets_the_next_free_one_and_resumes_the_last() {
    let folder = tempfile::tempdir().unwrap();
    let call = || {
        let mut command = tiny("compress");
        command.args(["--steps", "2"]).current_dir(folder.path());
        command
    };
    call().ok();
    let second = folder.path().join("runs/intent-lightmoe-0.5-2");
    let observed = || second.join("observations.safetensors").exists();
    assert_eq!(end(&mut call(), "-KILL", observed), None);
    let text = call().arg("--resume").ok();
    assert!(text.contains("intent-lightmoe-0.5-2"), "{text}");
    assert_same_run(&folder.path().join("runs/intent-lightmoe-0.5"), &second);
}

#[test]
fn a_recovery_of_its_own_goes_on_by_the_same_command() {
    let folder = tempfile::tempdir().unwrap();
    let call = |out: &str| {
        let mut command = tiny("recover");
        command.arg("--built").arg(base().join("built"));
        command.arg("--plan").arg(base().join("plan.json"));
        command.args(["--steps", "40", "--out", out]);
        command.current_dir(folder.path());
        command
    };
    call("whole").ok();
    let state = folder.path().join("cut.recovery");
    let curve = || fs::read_to_string(state.join("loss.jsonl")).unwrap_or_default();
    let begun = || curve().lines().count() >= 5;
    // A slash at the end makes no difference.
    assert_eq!(end(&mut call("cut/"), "-TERM", begun), Some(130));
    assert!(state.join("state.safetensors").exists());
    assert!(!folder.path().join("cut").exists());
    call("cut/").ok();
    assert!(files(&folder.path().join("cut")) == files(&folder.path().join("whole")));
    // A folder with something else is left alone, before any training.
    let strange = folder.path().join("strange");
    fs::create_dir(&strange).unwrap();
    fs::write(strange.join("thesis.txt"), "years of work").unwrap();
    let message = call("strange").fails(1);
    assert!(message.contains("holds other files"), "{message}");
    assert_eq!(names(&strange), ["thesis.txt"]);
    assert!(!folder.path().join("strange.recovery").exists());
}
