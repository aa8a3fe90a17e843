//! The page of a run, its verdict, and the commands that it names.

use crate::support::{
    Outcome, TINY, assert_same_run, base, command, files, json, names, repository, tiny,
};
use serde_json::{Value, from_str, json};
use std::fs;
use std::path::{Path, PathBuf};

/// A copy of the base run that may be changed.
fn copy(to: &Path) -> PathBuf {
    for (name, bytes) in files(base()) {
        let path = to.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    to.to_owned()
}

#[test]
fn a_finished_run_is_judged_anew() {
    let folder = tempfile::tempdir().unwrap();
    let run = copy(&folder.path().join("mine"));
    copy(&folder.path().join("other"));
    let results = || json(&run.join("results.json"));
    let before = results();
    assert!(before.get("verdict").is_none());
    let report = |flags: &[&str]| {
        let mut call = command("report");
        call.args(flags).arg("--run").arg(&run);
        call
    };
    let text = report(&[]).ok();
    assert!(text.contains("No verdict"), "{text}");
    assert_eq!(results(), before);
    let page = || fs::read_to_string(run.join("report.html")).unwrap();
    // Among the runs of its folder, and in one without others.
    assert!(page().contains("<th scope=\"row\">other</th>"));
    let alone = folder.path().join("alone.html");
    let mut call = report(&["--runs", "."]);
    call.arg("--out").arg(&alone).current_dir(&run).ok();
    let text = fs::read_to_string(&alone).unwrap();
    assert!(text.contains("(this run)") && !text.contains(">other<"));

    let text = report(&["--min-score", "0", "--max-nll-increase", "1000"]).ok();
    assert!(text.contains("Go: every threshold"), "{text}");
    assert_eq!(results()["verdict"]["word"], "go");
    assert!(page().contains("verdict Go"));
    let text = report(&["--max-bytes", "1kB"]).ok();
    assert!(
        text.contains("No-go: ") && text.contains("missed"),
        "{text}"
    );
    // A page elsewhere leaves the run, and its own page, as they are.
    let (own, kept) = (page(), results());
    let mut call = report(&["--max-bytes", "1GB"]);
    let text = call.arg("--out").arg(&alone).ok();
    assert!(text.contains("Go: every threshold"), "{text}");
    assert!(fs::read_to_string(&alone).unwrap().contains("verdict Go"));
    assert!(page() == own && results() == kept);
    // Without a page there is no new verdict either.
    let plan = fs::read(run.join("plan.json")).unwrap();
    fs::write(run.join("plan.json"), "{").unwrap();
    report(&["--max-bytes", "1GB"]).fails(1);
    fs::write(run.join("plan.json"), plan).unwrap();
    assert!(page() == own && results() == kept);
    let check = &results()["verdict"]["checks"][0];
    assert_eq!(check["limit"], 1000.0);
    assert_eq!(
        check["measured"],
        before["bytes"]["after"].as_f64().unwrap()
    );
    assert!(page().contains("verdict No-go"));

    let message = report(&["--min-score", "nan"]).fails(2);
    assert!(message.contains("`min_score`"), "{message}");
    fs::remove_file(run.join("results.json")).unwrap();
    let message = report(&[]).fails(2);
    assert!(message.contains("no finished run"), "{message}");
    let message = report(&["--max-bytes", "1kB"]).fails(2);
    assert!(message.contains("no finished run"), "{message}");
}

#[test]
fn thresholds_stand_in_the_recipe_and_the_verdict_in_the_results() {
    let folder = tempfile::tempdir().unwrap();
    let (recipe, out) = (folder.path().join("r.toml"), folder.path().join("run"));
    let tiny = TINY.replace("steps = 12", "steps = 2\ncontrast_tokens = 0");
    fs::write(&recipe, format!("{tiny}[verdict]\nmin_score = 0.0\n")).unwrap();
    let mut call = command("compress");
    call.arg("--recipe").arg(&recipe);
    let text = call.args(["--max-bytes", "1kB", "--out"]).arg(&out).ok();
    assert!(text.contains("No-go: "), "{text}");
    let verdict = json(&out.join("results.json"))["verdict"].clone();
    let checks = verdict["checks"].as_array().unwrap();
    let keys: Vec<_> = checks.iter().map(|c| &c["threshold"]).collect();
    assert_eq!(keys.first(), Some(&&json!("min_score")));
    assert_eq!(keys.last(), Some(&&json!("max_bytes")));
    assert!(!out.join("contrast.json").exists());
    let written = fs::read_to_string(out.join("recipe.toml")).unwrap();
    assert!(
        written.contains("[verdict]\nmin_score = 0.0\nmax_bytes = \"1kB\""),
        "{written}"
    );
    let mut again = command("compress");
    again
        .arg("--dry-run")
        .arg("--recipe")
        .arg(out.join("recipe.toml"))
        .ok();
    fs::write(&recipe, "[verdict]\nmin_scores = 0.9\n").unwrap();
    let mut call = command("compress");
    let message = call.arg("--recipe").arg(&recipe).fails(2);
    assert!(
        message.contains("line 2") && message.contains("min_scores"),
        "{message}"
    );
}

#[test]
fn scores_are_judged_against_those_of_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original.json");
    tiny("evaluate").arg("--out").arg(&original).ok();
    let against = |threshold: &str| {
        let mut call = tiny("evaluate");
        call.arg("--model").arg(base().join("model"));
        call.args(["--max-nll-increase", threshold]);
        call.arg("--against").arg(&original);
        call
    };
    let printed: Value = from_str(&against("1000").ok()).unwrap();
    let results = json(&base().join("results.json"));
    assert_eq!(printed["scores"], results["stages"]["recovered"]);
    assert_eq!(printed["verdict"]["word"], "go");
    let nll = |of: &Value| of["intent"]["answer_nll"]["value"].as_f64().unwrap();
    let rise = nll(&results["stages"]["recovered"]) - nll(&results["stages"]["original"]);
    let measured = printed["verdict"]["checks"][0]["measured"].as_f64();
    assert!((measured.unwrap() - rise).abs() < 1e-9);
    fs::write(&original, "[]").unwrap();
    let message = against("1").fails(1);
    assert!(
        message.contains("original.json") && message.contains("no scores"),
        "{message}"
    );
}

/// What would have no effect is refused; the size is measured without an original, too.
#[test]
fn thresholds_that_nothing_is_held_against_are_refused() {
    let refused = |arguments: &[&str], said: &str| {
        let message = tiny("evaluate").args(arguments).fails(2);
        assert!(message.contains(said), "{arguments:?}: {message}");
    };
    refused(&["--min-score", "0.9"], "--against");
    refused(&["--max-nll-increase", "1"], "--against");
    refused(&["--max-kl", "1"], "lightmoe divergence");
    let benchmarks = ["--tasks", "gsm8k"];
    for more in [["--against", "scores.json"], ["--max-bytes", "1GB"]] {
        refused(&[benchmarks, more].concat(), "compare-results");
    }
    let split = ["--split", "validation"];
    refused(&[benchmarks, split].concat(), "--split");
    let text = tiny("evaluate").args(["--max-bytes", "1kB"]).ok();
    let printed: Value = from_str(&text).unwrap();
    assert_eq!(printed["verdict"]["word"], "no-go");
    assert!(printed["scores"]["intent"]["exact_match"]["n"] == 20);
}

/// Every token of every item chooses `top_k` experts, in both models.
#[test]
fn both_models_read_the_same_items() {
    let contrast = json(&base().join("contrast.json"));
    assert_eq!(contrast["task"], "intent");
    assert_eq!(contrast["examples"], 20);
    let tokens = contrast["tokens"].as_u64().unwrap();
    let config = json(&repository("fixtures/olmoe-nano/config.json"));
    let top_k = config["num_experts_per_tok"].as_u64().unwrap();
    let layers = contrast["load"].as_array().unwrap();
    assert_eq!(json!(layers.len()), config["num_hidden_layers"]);
    let mut moved = 0;
    for layer in layers {
        let of = |name: &str| -> Vec<u64> {
            let counts = layer[name].as_array().unwrap().iter();
            counts.map(|n| n.as_u64().unwrap()).collect()
        };
        let (original, result) = (of("original"), of("result"));
        for counts in [&original, &result] {
            assert_eq!(json!(counts.len()), config["num_experts"]);
            assert_eq!(counts.iter().sum::<u64>(), tokens * top_k);
        }
        moved += usize::from(original != result);
    }
    assert!(moved > 0, "compression changed no choice");
    let answers = contrast["answers"].as_array().unwrap();
    assert_eq!(answers.len(), 8);
    // Where a sample was right, the answer is its target.
    let samples = base().join("logs/samples_intent_recovered.jsonl");
    let samples = fs::read_to_string(samples).unwrap();
    for (answer, sample) in answers.iter().zip(samples.lines()) {
        let sample: Value = from_str(sample).unwrap();
        assert_eq!(answer["prompt"], sample["prompt"]);
        let right = sample["exact_match"].as_bool().unwrap();
        let target = answer["target"].as_str().unwrap().trim();
        let same = answer["result"]["text"] == target && answer["result"]["whole"] == true;
        assert_eq!(same, right, "{answer}");
    }
}

/// The same numbers as of the command by itself.
#[test]
fn the_divergence_of_a_run_is_that_of_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("d.json");
    let mut call = tiny("divergence");
    call.args(["--against", "olmoe-nano", "--by-layer", "--model"]);
    call.arg(base().join("model")).arg("--out").arg(&out).ok();
    let ours = json(&base().join("divergence.json"));
    assert_eq!(ours["texts"], json(&out)["texts"]);
    let kl = &json(&base().join("results.json"))["divergence"]["kl"];
    assert_eq!(kl, &ours["texts"][0]["whole"]["kl"]);
    assert!(kl["value"].as_f64().unwrap() > 0.0);
}

/// The commands are taken from the page and run as they stand there.
#[test]
fn the_commands_of_the_page_make_the_run_again() {
    let page = fs::read_to_string(base().join("report.html")).unwrap();
    let commands = page.lines().filter_map(|line| {
        let (_, command) = line.split_once("lightmoe ")?;
        let line = line.trim_start_matches("<pre tabindex=\"0\">");
        line.starts_with("lightmoe ").then_some(command)
    });
    let commands: Vec<_> = commands.map(|c| c.replace("&#x2f;", "/")).collect();
    assert_eq!(commands.len(), 6, "{commands:?}");
    let beside = |suffix: &str| {
        let name = format!("cli-base-{suffix}");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder).unwrap();
        }
        folder
    };
    let (again, stages) = (beside("again"), beside("stages"));
    for line in &commands {
        let mut words = line.split(' ');
        let mut call = command(words.next().unwrap());
        call.args(words).ok();
    }
    assert_same_run(base(), &again);
    assert!(files(&base().join("model")) == files(&stages.join("model")));
    assert!(names(&stages).contains(&"plan.json".to_owned()));
}
