//! Plain text as data: trained on, observed, and scored by its perplexity.

use crate::support::{Outcome, command, json, names};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SETTINGS: &str = "steps = 3\nbatch_size = 4\neval_examples = 10\ncalibration_tokens = 6000\n\
                        max_length = 65\ncontrast_tokens = 512\n";

/// Sentences in which the built-in model knows the words; the `from`-th and those behind it.
fn prose(from: usize, count: usize) -> String {
    let words = [
        "dog", "lake", "king", "river", "horse", "wolf", "forest", "stone",
    ];
    let sentence = |i: usize| {
        let word = |k: usize| words[(i * (2 * k + 3) + i / 7 + k) % words.len()];
        format!(
            "The {} is near the {}, and the {} has {i} of them.\n",
            word(0),
            word(1),
            word(2)
        )
    };
    (from..from + count).map(sentence).collect()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("recipe.toml", SETTINGS);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// A call in this folder, with settings of a few seconds.
    fn call(&self, sub: &str, arguments: &[&str]) -> Command {
        let mut call = command(sub);
        call.args(["--recipe", "recipe.toml"]).args(arguments);
        call.current_dir(self.0.path());
        call
    }

    /// The scores of the built-in model on a split.
    fn scores(&self, split: &str, arguments: &[&str]) -> Value {
        let mut call = self.call("evaluate", arguments);
        let text = call.args(["--split", split]).ok();
        serde_json::from_str(&text).unwrap()
    }
}

fn number(scores: &Value, task: &str, metric: &str) -> f64 {
    scores[task][metric]["value"].as_f64().unwrap()
}

#[test]
fn a_text_runs_to_the_end_and_is_scored_by_its_perplexity() {
    let folder = Folder::new();
    folder.write("book.txt", &prose(0, 400));
    folder.write("other.txt", &prose(900, 60));
    let arguments = [
        "--train",
        "book.txt",
        "--eval-text",
        "other.txt",
        "--out",
        "run",
    ];
    let table = folder.call("compress", &arguments).ok();
    for part in ["other · nll", "other · perplexity", "other · bits_per_byte"] {
        assert!(table.contains(part), "{table}");
    }
    let run = folder.path("run");
    let results = json(&run.join("results.json"));
    assert_eq!(results["task"], "other");
    for stage in ["original", "built", "recovered"] {
        let scores = &results["stages"][stage];
        let (nll, perplexity) = (
            number(scores, "other", "nll"),
            number(scores, "other", "perplexity"),
        );
        assert!((nll.exp() / perplexity - 1.0).abs() < 1e-9);
        assert!(scores["other"]["perplexity"]["stderr"].as_f64().unwrap() > 0.0);
        assert_eq!(scores["other"]["nll"]["n"], 10);
        let samples = run.join(format!("logs/samples_other_{stage}.jsonl"));
        assert_eq!(fs::read_to_string(samples).unwrap().lines().count(), 10);
    }
    let page = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(
        page.contains("perplexity, lower is better"),
        "no picture of the runs"
    );
    let contrast = json(&run.join("contrast.json"));
    assert_eq!(contrast["answers"], serde_json::json!([]));
    assert_eq!(contrast["load"].as_array().unwrap().len(), 4);

    let mut pair = command("compare-results");
    pair.arg(format!("{}@original", run.display())).arg(&run);
    let text = pair.args(["--json"]).arg(folder.path("pair.json")).ok();
    for metric in ["nll", "perplexity", "bits_per_byte"] {
        assert!(text.contains(metric), "{text}");
    }
    assert!(!text.contains("exact_match"), "{text}");
    let pair = json(&folder.path("pair.json"));
    let rows = pair["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3, "{pair}");
    assert!(
        rows.iter()
            .all(|row| row["uncertainty"]["stderr"].as_f64().unwrap() > 0.0)
    );

    // Another text to test on is another run.
    folder.write("other.txt", &prose(901, 60));
    let again = [&arguments[..], &["--resume"]].concat();
    let message = folder.call("compress", &again).fails(1);
    assert!(message.contains("data"), "{message}");
}

#[test]
fn the_end_of_a_text_is_held_out() {
    let folder = Folder::new();
    // Lines of equal length in tokens, so that a share of them is one of the windows.
    let (first, middle, last) = (prose(1000, 360), prose(1360, 22), prose(1382, 18));
    let changed = |part: &str| part.replace(" king", " wolf");
    let scores = |parts: [&str; 3]| {
        folder.write("book.txt", &parts.concat());
        let of = |split| folder.scores(split, &["--train", "book.txt", "--max-length", "33"]);
        (of("validation"), of("test"))
    };
    let before = scores([&first, &middle, &last]);
    assert_ne!(before.0, before.1);
    assert_eq!(scores([&changed(&first), &middle, &last]), before);
    let (validation, test) = scores([&first, &middle, &changed(&last)]);
    assert_eq!(validation, before.0);
    assert_ne!(test, before.1);
    assert_ne!(scores([&first, &changed(&middle), &last]).0, before.0);
}

#[test]
fn the_perplexity_is_that_of_divergence_and_documents_stand_alone() {
    let folder = Folder::new();
    folder.write("book.txt", &prose(0, 200));
    folder.write("other.txt", &prose(700, 40));
    let arguments = [
        "--train",
        "book.txt",
        "--eval-examples",
        "1000",
        "--eval-text",
    ];
    let of = |file: &str| folder.scores("test", &[&arguments[..], &[file]].concat());
    let scores = of("other.txt");
    let mut call = command("divergence");
    call.args([
        "--against",
        "olmoe-nano",
        "--text",
        "other.txt",
        "--max-length",
        "64",
    ]);
    call.args(["--out", "divergence.json"]);
    call.current_dir(folder.0.path()).ok();
    let found = json(&folder.path("divergence.json"));
    let known = found["texts"][0]["perplexity"]["original"]
        .as_f64()
        .unwrap();
    let ours = number(&scores, "other", "perplexity");
    assert!((ours / known - 1.0).abs() < 1e-5, "{ours} {known}");
    let bytes = fs::read(folder.path("other.txt")).unwrap().len() as f64;
    let tokens = found["texts"][0]["tokens"].as_f64().unwrap();
    let bits = number(&scores, "other", "nll") * tokens / bytes / std::f64::consts::LN_2;
    assert!((bits / number(&scores, "other", "bits_per_byte") - 1.0).abs() < 1e-6);

    let document = |text: &str| serde_json::json!({"title": "a", "text": text}).to_string() + "\n";
    folder.write("one.jsonl", &document(&prose(700, 40)));
    assert_eq!(of("one.jsonl")["one"], scores["other"]);
    folder.write(
        "two.jsonl",
        &(document(&prose(700, 20)) + &document(&prose(720, 20))),
    );
    assert_ne!(of("two.jsonl")["two"]["nll"], scores["other"]["nll"]);
}

#[test]
fn a_comparison_on_text_has_its_perplexity_as_the_score() {
    let folder = Folder::new();
    folder.write("book.txt", &prose(0, 400));
    let recipe = SETTINGS.replace("contrast_tokens = 512\n", "train = 'book.txt'\n");
    folder.write("recipe.toml", &recipe);
    let arguments = [
        "--methods",
        "lightmoe,reap",
        "--ratios",
        "0.4",
        "--seeds",
        "1",
        "--out",
        "out",
    ];
    let text = folder.call("compare", &arguments).ok();
    for part in ["book: perplexity, lower is better", "| reap | 40% |"] {
        assert!(text.contains(part), "{text}");
    }
    let page = fs::read_to_string(folder.path("out/compare.md")).unwrap();
    assert!(
        page.contains("The score is perplexity: lower is better."),
        "{page}"
    );
    assert!(
        page.contains("| method | ratio | perplexity, before | perplexity, after |"),
        "{page}"
    );
    let html = fs::read_to_string(folder.path("out/index.html")).unwrap();
    assert_eq!(
        html.matches("ln perplexity, lower is better").count(),
        4,
        "{html}"
    );
    assert_eq!(names(&folder.path("out/cells")).len(), 2);
}

#[test]
fn a_model_is_observed_on_text() {
    let folder = Folder::new();
    folder.write("book.txt", &prose(0, 200));
    folder.write("few.txt", &prose(0, 4));
    let with = |mix: &str| {
        folder.call(
            "observe",
            &[
                "--task",
                "math",
                "--calibrate",
                mix,
                "--out",
                "seen.safetensors",
            ],
        )
    };
    with("math,book.txt=2").ok();
    let message = with("few.txt").fails(2);
    assert!(
        message.contains("few.txt") && message.contains("20"),
        "{message}"
    );
}

#[test]
fn text_that_cannot_work_is_refused() {
    let folder = Folder::new();
    folder.write("book.txt", &prose(0, 200));
    folder.write("few.txt", &prose(0, 9));
    folder.write("empty.txt", " \n");
    folder.write(
        "bad.jsonl",
        "{\"text\": \"fine\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n",
    );
    let cases: [(&[&str], i32, &[&str]); 5] = [
        (
            &["--train", "few.txt"],
            2,
            &["few.txt", "windows of 65 tokens", "max_length"],
        ),
        (&["--train", "empty.txt"], 1, &["empty.txt", "empty"]),
        (
            &["--train", "bad.jsonl"],
            1,
            &["bad.jsonl` line 2", "`text`"],
        ),
        (&["--eval-text", "book.txt"], 2, &["`eval_text`", "`train`"]),
        (
            &[
                "--train",
                "book.txt",
                "--task",
                "math",
                "--eval-text",
                "book.txt",
            ],
            2,
            &["`eval_text`", "without `task`"],
        ),
    ];
    for (arguments, code, words) in cases {
        let mut call = folder.call("compress", arguments);
        let message = call.args(["--out", "run"]).fails(code);
        for word in words {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
        assert!(!Path::new(&folder.path("run")).exists());
    }
}
