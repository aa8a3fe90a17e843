//! An observation that was stopped goes on.

use super::{LAYERS, checkpoint, options, samples};
use lightmoe_compress::observations::Observations;
use lightmoe_compress::{Error, ObserveOptions, Sensitivity, Statistics, batch_tokens, observe};
use std::ffi::OsString;
use tempfile::TempDir;

fn wanting(statistics: Statistics, state: &TempDir) -> ObserveOptions<'_> {
    ObserveOptions {
        statistics,
        ..options(state)
    }
}

/// The files beside observations, by name.
fn beside(seen: &Observations) -> Vec<(OsString, Vec<u8>)> {
    let entries = seen.moments.iter().flat_map(|folder| {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap())
    });
    let mut files: Vec<_> = entries
        .map(|entry| (entry.file_name(), std::fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn the_work_can_be_stopped_after_any_layer() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(&folder);
    let samples = samples(&[4, 2]);
    let all = Statistics {
        moments: true,
        all_outputs: true,
        samples: true,
        damage: Some(Sensitivity::Relative),
        bias: true,
    };
    let returning = Statistics {
        bias: true,
        damage: Some(Sensitivity::Fisher),
        ..Statistics::default()
    };
    for (statistics, files, steps) in [
        (Statistics::default(), 0, LAYERS),
        (all, 4 * LAYERS + 1, LAYERS),
        (returning, 2 * LAYERS, 2 * LAYERS),
    ] {
        let state = tempfile::tempdir().unwrap();
        let undisturbed = observe(
            &checkpoint,
            &samples,
            &wanting(statistics, &state),
            &mut |_, _| true,
        );
        let path = folder.path().join("undisturbed.safetensors");
        let undisturbed = undisturbed.unwrap().save(&path).unwrap();
        assert_eq!(beside(&undisturbed).len(), files);
        for last in 1..=steps {
            let mut calls = Vec::new();
            let state = tempfile::tempdir().unwrap();
            let stopped = observe(
                &checkpoint,
                &samples,
                &wanting(statistics, &state),
                &mut |done, total| {
                    calls.push((done, total));
                    done < last
                },
            );
            assert!(matches!(stopped, Err(Error::Interrupted)));
            let expected: Vec<_> = (1..=last).map(|done| (done, steps)).collect();
            assert_eq!(calls, expected);
            // The next run does the layers that are left, and sees the same.
            let mut calls = Vec::new();
            let whole = observe(
                &checkpoint,
                &samples,
                &wanting(statistics, &state),
                &mut |done, _| {
                    calls.push(done);
                    true
                },
            );
            assert_eq!(calls, (last + 1..=steps).collect::<Vec<_>>());
            let path = folder.path().join("seen.safetensors");
            let whole = whole.unwrap().save(&path).unwrap();
            assert_eq!(beside(&whole), beside(&undisturbed));
            assert_eq!(whole, Observations::load(&path).unwrap());
            let moments = undisturbed.moments.clone();
            assert_eq!(Observations { moments, ..whole }, undisturbed);
            assert!(!state.path().exists());
        }
    }
}

/// What another run left is not continued, and damage is not trusted.
#[test]
fn only_the_same_work_is_continued() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(&folder);
    let (ours, others) = (samples(&[4, 2]), samples(&[4, 3]));
    let first = |options: &ObserveOptions<'_>, samples: &[Vec<u32>], last: usize| {
        let mut calls = Vec::new();
        let _ = observe(&checkpoint, samples, options, &mut |done, _| {
            calls.push(done);
            done < last
        });
        calls[0]
    };
    let state = tempfile::tempdir().unwrap();
    let same = options(&state);
    assert_eq!(first(&same, &ours, 2), 1);
    assert_eq!(first(&same, &others, 2), 1);
    let renamed = ObserveOptions {
        fingerprint: "those",
        ..same
    };
    // Nothing of the first is left to be taken for a pair of the second.
    assert_eq!(first(&renamed, &others, 1), 1);
    assert_eq!(first(&renamed, &others, 2), 2);
    assert_eq!(first(&renamed, &others, 2), 3);
    // With more memory the batches stay, with too little the work begins anew.
    let state = tempfile::tempdir().unwrap();
    let mut least = 0;
    for bit in (0..40).rev() {
        let more = batch_tokens(checkpoint.config(), 4, least | 1 << bit, 0, 1).is_err();
        least |= u64::from(more) << bit;
    }
    let limited = |max_memory: u64| ObserveOptions {
        max_memory,
        ..options(&state)
    };
    assert_eq!(first(&limited(least + 1), &ours, 1), 1);
    assert_eq!(first(&limited(1 << 32), &ours, 2), 2);
    assert_eq!(first(&limited(1 << 32), &others, 1), 1);
    assert_eq!(first(&limited(least + 1), &others, 1), 1);
    let state = tempfile::tempdir().unwrap();
    let same = options(&state);
    assert_eq!(first(&same, &ours, 2), 1);
    let hidden = state.path().join("hidden-2");
    let bytes = std::fs::read(&hidden).unwrap();
    std::fs::write(&hidden, &bytes[1..]).unwrap();
    assert_eq!(first(&same, &ours, 9), 1);
}
