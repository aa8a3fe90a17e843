//! A comparison runs, goes on, and refuses what changed.

use crate::support::{Outcome, TINY, assert_schema, command, end, json, names};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Two methods at one ratio on one task with one seed.
fn compare(folder: &Path, steps: &str) -> Command {
    let recipe = folder.join("common.toml");
    let common = TINY.replace("task = 'intent'\nsteps = 12\n", "");
    fs::write(&recipe, common).unwrap();
    let mut command = command("compare");
    command.args(["--methods", "lightmoe,reap:rank=2", "--ratios", "0.4"]);
    command.args(["--tasks", "intent", "--seeds", "1", "--steps", steps]);
    command.arg("--recipe").arg(&recipe);
    command.arg("--out").arg(folder.join("out"));
    command
}

#[test]
fn a_comparison_goes_on_and_refuses_what_changed() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    // Ended while the first cell is at work.
    let cell = "intent-lightmoe-0.4-seed0";
    let begun = || out.join("work").join(cell).join("run.json").exists();
    let code = end(&mut compare(folder.path(), "3"), "-TERM", begun);
    assert_eq!(code, Some(130));
    assert_eq!(names(&out.join("cells")).len(), 0);
    let text = compare(folder.path(), "3").ok();
    assert!(text.contains("| reap:rank=2 | 40% |"), "{text}");
    let made = [
        "cells",
        "compare.csv",
        "compare.json",
        "compare.md",
        "index.html",
        "work",
    ];
    assert_eq!(names(&out), made);
    assert_schema("compare", &json(&out.join("compare.json")));
    let cells = [
        format!("{cell}.json"),
        "intent-reap-rank=2-0.4-seed0.json".to_owned(),
    ];
    assert_eq!(names(&out.join("cells")), cells);
    assert_eq!(names(&out.join("work")), [".lock", "shared"]);
    let records: Vec<_> = cells
        .iter()
        .map(|name| json(&out.join("cells").join(name)))
        .collect();
    // Observed once: the second cell took the first one's observations.
    let observed = |i: usize| {
        records[i]["results"]["seconds"]["observe"]
            .as_f64()
            .unwrap()
    };
    assert_eq!(observed(0), observed(1));
    let active = |i: usize, of: &str| records[i]["active_parameters"][of].as_u64().unwrap();
    // A base and an adapter are more than the expert they replace; pruning leaves as many to choose.
    assert!(active(0, "after") > active(0, "before"));
    assert_eq!(active(1, "after"), active(1, "before"));
    let peak = records[0]["results"]["peak_rss_bytes"].as_u64().unwrap();
    assert!(peak > 10 << 20, "{peak}");
    let before: Vec<_> = made[1..5]
        .iter()
        .map(|name| fs::read(out.join(name)).unwrap())
        .collect();
    compare(folder.path(), "3").ok();
    let after: Vec<_> = made[1..5]
        .iter()
        .map(|name| fs::read(out.join(name)).unwrap())
        .collect();
    assert!(before == after, "a second call changed something");
    // `compare.json` is enough to go on.
    fs::remove_dir_all(out.join("cells")).unwrap();
    fs::remove_dir_all(out.join("work")).unwrap();
    compare(folder.path(), "3").ok();
    let restored: Vec<_> = cells
        .iter()
        .map(|name| json(&out.join("cells").join(name)))
        .collect();
    assert_eq!(restored, records);

    let other = compare(folder.path(), "4").fails(1);
    assert!(other.contains("`steps` was 3 and is now 4"), "{other}");
    let path = out.join("cells").join(&cells[0]);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        text.replace("\"fingerprint\": \"", "\"fingerprint\": \"0"),
    )
    .unwrap();
    let changed = compare(folder.path(), "3").fails(1);
    assert!(
        changed.contains("other settings") && changed.contains(cell),
        "{changed}"
    );
}

#[test]
fn what_cannot_be_compared_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (arguments, part) in [
        (&["--methods", "reap", "--ratios", "0.85"][..], "`reap`: "),
        (&["--methods", "reap,reap"], "twice"),
        (&["--methods", "lightmoe:base=blue"], "`base` is `blue`"),
        (&["--methods", "reap", "--tasks", "chess"], "chess"),
        (&["--methods", "reap", "--seeds", "0"], "`--seeds` is 0"),
        (&["--methods", "reap", "--rates", "0"], "`--rates` has 0"),
    ] {
        let mut command = command("compare");
        let message = command.args(arguments).arg("--out").arg(&out).fails(2);
        assert!(message.contains(part), "{arguments:?}: {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(!out.exists());
    }
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.txt"), "years of work").unwrap();
    let mut command = command("compare");
    let message = command
        .args(["--methods", "reap", "--out"])
        .arg(&out)
        .fails(1);
    assert!(message.contains("not empty"), "{message}");
    assert_eq!(names(&out), ["thesis.txt"]);
}
