//! What recovery changed as a small file, and the way back.

use crate::support::{Outcome, base, command, files, names, tiny};
use serde_json::{Value, from_str};
use std::fs;
use std::path::Path;

const FILE: &str = "update.compeft";

fn pack(model: &Path, out: &Path, args: &[&str]) -> std::process::Command {
    let mut call = command("export");
    call.args(["--pack", "compeft"]).args(args);
    call.arg("--model").arg(model).arg("--out").arg(out);
    call
}

fn unpack(base: &Path, update: &Path, out: &Path) -> std::process::Command {
    let mut call = command("unpack");
    call.arg("--base").arg(base).arg("--update").arg(update);
    call.arg("--out").arg(out);
    call
}

/// The number before a word of the output.
fn before(text: &str, word: &str) -> f64 {
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|w| w.trim_end_matches(',') == word);
    words[at.unwrap() - 1]
        .trim_end_matches(',')
        .parse()
        .unwrap()
}

#[test]
fn the_best_update_of_the_grid_scores_what_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let text = pack(base(), &at("packed"), &[]).ok();
    let [built, recovered, packed] =
        ["built", "recovered", "packed"].map(|word| before(&text, word));
    assert!(recovered < built && packed < built, "{text}");
    assert_eq!(names(&at("packed")), [FILE]);
    let update = at("packed").join(FILE);
    let bytes = fs::metadata(&update).unwrap().len();
    assert_eq!(before(&text, "bytes"), bytes as f64);
    assert!(before(&text, "times") > 5.0, "{text}");

    let built_model = base().join("built");
    let nll = |update: &Path, out: &Path| {
        unpack(&built_model, update, out).ok();
        let mut call = tiny("evaluate");
        call.args(["--split", "validation"]).arg("--model");
        let scores: Value = from_str(&call.arg(out).ok()).unwrap();
        scores["intent"]["answer_nll"]["value"].as_f64().unwrap()
    };
    let unpacked = nll(&update, &at("unpacked"));
    assert!(
        (unpacked - packed).abs() < 1e-4,
        "{unpacked} is not {packed}"
    );
    for (i, pair) in [["0.05", "10"], ["0.2", "2"], ["0.5", "0.5"]]
        .iter()
        .enumerate()
    {
        let (other, out) = (at(&format!("packed-{i}")), at(&format!("unpacked-{i}")));
        pack(base(), &other, &["--density", pair[0], "--alpha", pair[1]]).ok();
        assert!(nll(&other.join(FILE), &out) > packed - 1e-4, "{pair:?}");
    }

    // The chosen pair, given by hand for the two models, makes the same file.
    let setting = text.lines().nth(1).unwrap();
    let number = |word: &str| {
        let words: Vec<&str> = setting.split([' ', ',', ':']).collect();
        let at = words.iter().position(|w| *w == word).unwrap();
        words[at + 1].to_owned()
    };
    let (density, alpha) = (number("density"), number("alpha"));
    let mut call = pack(
        &base().join("model"),
        &at("again"),
        &["--density", &density, "--alpha", &alpha],
    );
    let text = call.arg("--base").arg(&built_model).ok();
    assert!(!text.contains("answer_nll"), "{text}");
    assert!(files(&at("again")) == files(&at("packed")));
}

#[test]
fn an_update_that_cannot_be_is_refused_and_nothing_left() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (out, model, built) = (at("out"), base().join("model"), base().join("built"));
    let built = built.to_str().unwrap();
    for (model, args, words) in [
        (base(), &["--density", "0.1"][..], "--alpha"),
        (base(), &["--density", "1.5", "--alpha", "2"], "at most 1"),
        (base(), &["--density", "0.1", "--alpha=-2"], "above 0"),
        (base(), &["--kind", "compact"], "--kind"),
        (&model, &[], "--base"),
        (&model, &["--base", built], "--density"),
    ] {
        let message = pack(model, &out, args).fails(2);
        assert!(message.contains(words), "{args:?}: {message}");
    }
    let setting = ["--density", "0.1", "--alpha", "2"];
    let same = [&setting[..], &["--base", model.to_str().unwrap()]].concat();
    let message = pack(base(), &out, &same).fails(1);
    assert!(message.contains("nothing to pack"), "{message}");
    assert!(names(folder.path()).is_empty());

    pack(base(), &at("packed"), &setting).ok();
    let update = at("packed").join(FILE);
    let message = unpack(&model, &update, &out).fails(1);
    assert!(message.contains("made from"), "{message}");
    let bytes = fs::read(&update).unwrap();
    fs::write(&update, &bytes[..bytes.len() - 9]).unwrap();
    let message = unpack(Path::new(built), &update, &out).fails(1);
    assert!(message.contains(FILE), "{message}");
    assert_eq!(names(folder.path()), ["packed"]);
}
