//! Pre-training, with a model of a few thousand parameters.

use crate::support::{Outcome, command, end, files, names};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

const RECIPE: &str = "out = 'model'\nseed = 3\n[model]\nhidden_size = 16\n\
    num_hidden_layers = 2\nnum_attention_heads = 2\nintermediate_size = 8\nnum_experts = 4\n\
    num_experts_per_tok = 2\nmax_position_embeddings = 64\n[training]\nsteps = 6\nrows = 2\n\
    length = 32\nbalance = 0.01\nweight_decay = 0.1\nclip_norm = 1.0\nbeta1 = 0.9\n\
    beta2 = 0.95\n[training.learning_rate]\npeak = 3e-3\nwarmup = 0.1\nflat_until = 0.5\n\
    decay = 'linear'\nfinal_share = 0.02\n";

#[test]
fn a_model_is_trained_from_nothing_and_always_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("recipe.toml"), RECIPE).unwrap();
    let train = |out: &str| {
        let mut call = command("pretrain");
        call.args(["--recipe", "recipe.toml", "--out", out]);
        call.current_dir(folder.path()).ok()
    };
    assert!(train("a").contains("last training loss"));
    train("b");
    let model = folder.path().join("a");
    assert!(files(&model) == files(&folder.path().join("b")));
    let text = command("inspect")
        .arg("--json")
        .arg("--model")
        .arg(&model)
        .ok();
    let summary: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(summary["shape"]["num_experts"], 4);
    assert_eq!(summary["dtype"], "bf16");
    let config: Value =
        serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    // 0.01 for the mean over the two chosen experts is half of that for their sum.
    assert_eq!(config["router_aux_loss_coef"], 0.005);
    let mut speak = command("generate");
    speak.args(["--prompt", "Tom has", "--max-new-tokens", "4"]);
    speak.arg("--model").arg(&model).ok();

    let wrong = RECIPE.replace("rows = 2", "rowes = 2");
    fs::write(folder.path().join("recipe.toml"), wrong).unwrap();
    let mut call = command("pretrain");
    call.args(["--recipe", "recipe.toml", "--out", "c"]);
    let message = call.current_dir(folder.path()).fails(2);
    assert!(
        message.contains("recipe.toml") && message.contains("rowes"),
        "{message}"
    );
    assert!(!names(folder.path()).contains(&"c".to_owned()));
}

#[test]
fn experts_that_begin_as_copies_learn_from_where_their_model_was() {
    let folder = tempfile::tempdir().unwrap();
    let train = |recipe: &str, out: &str| {
        fs::write(folder.path().join("recipe.toml"), recipe).unwrap();
        pretrain(folder.path(), out)
    };
    let loss = |text: String| -> f64 {
        let text = text.split("last training loss ").nth(1).unwrap();
        text.trim().parse().unwrap()
    };
    let longer = RECIPE.replace("steps = 6", "steps = 60");
    let one = longer.replace("num_experts = 4", "num_experts = 1");
    let one = one.replace("per_tok = 2", "per_tok = 1");
    let one = one.replace("balance = 0.01", "balance = 0.0");
    train(&one, "one").ok();
    let anew = loss(train(RECIPE, "anew").ok());
    let from = |recipe: &str| format!("upcycle_from = 'one'\n{recipe}");
    let upcycled = loss(train(&from(RECIPE), "upcycled").ok());
    assert!(upcycled < anew - 0.5, "{upcycled} {anew}");

    let wider = RECIPE.replace("intermediate_size = 8", "intermediate_size = 16");
    let message = train(&from(&wider), "wider").fails(2);
    assert!(message.contains("upcycle_from") && message.contains("`one`"));
    assert!(message.contains("num_experts = 1"), "{message}");
    let message = train(&from(RECIPE).replace("'one'", "'runs/none'"), "none").fails(2);
    assert!(
        message.contains("`runs/none`") && message.contains("config.json"),
        "{message}"
    );
}

/// Small files of documents, of sentences that a tokenizer can learn from, and a recipe for them.
fn write_books(folder: &Path) {
    fs::create_dir(folder.join("books")).unwrap();
    let words = [
        "the whale",
        "a ship",
        "sailed on",
        "the sea",
        "slept",
        "under a star",
    ];
    let sentence = |i: usize| {
        let word = |k: usize| words[(i * (k + 2) + i / 3) % words.len()];
        format!("{}, {} {}.\n", word(0), word(1), word(3))
    };
    let book = |from: usize| (from..from + 120).map(sentence).collect::<String>();
    let lines = [book(0), book(7)].map(|text| json!({"title": "A book", "text": text}).to_string());
    fs::write(folder.join("books/some.jsonl"), lines.join("\n")).unwrap();
    fs::write(folder.join("books/other.txt"), book(50)).unwrap();
    fs::write(folder.join("recipe.toml"), text_recipe("['books/*']", 280)).unwrap();
}

fn text_recipe(files: &str, vocab_size: usize) -> String {
    format!("{RECIPE}[text]\nfiles = {files}\nvocab_size = {vocab_size}\n")
}

fn pretrain(folder: &Path, out: &str) -> Command {
    let mut call = command("pretrain");
    call.args(["--recipe", "recipe.toml", "--out", out]);
    call.current_dir(folder);
    call
}

#[test]
fn a_model_of_text_files_has_a_tokenizer_of_its_own_and_always_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    write_books(folder.path());
    pretrain(folder.path(), "a").ok();
    pretrain(folder.path(), "b").ok();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    assert!(files(&a) == files(&b));
    let read =
        |name: &str| -> Value { serde_json::from_slice(&fs::read(a.join(name)).unwrap()).unwrap() };
    assert_eq!(read("config.json")["vocab_size"], 280);
    let vocabulary = read("tokenizer.json")["model"]["vocab"].clone();
    assert_eq!(
        (&vocabulary["<|endoftext|>"], &vocabulary["<|padding|>"]),
        (&json!(0), &json!(1))
    );
    assert!(vocabulary.as_object().unwrap().contains_key("Ġthe"));
    let config = read("tokenizer_config.json");
    assert_eq!(config["eos_token"], "<|endoftext|>");
    assert!(config["chat_template"].is_null());
    let mut speak = command("generate");
    speak.args(["--prompt", "the whale", "--max-new-tokens", "4", "--model"]);
    speak.arg(&a).ok();
}

#[test]
fn a_model_of_text_files_goes_on_after_a_kill_but_not_on_other_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    write_books(folder.path());
    let longer = text_recipe("['books/*']", 280).replace("steps = 6", "steps = 700");
    fs::write(path("recipe.toml"), longer).unwrap();
    pretrain(folder.path(), "whole").ok();
    let begun =
        || path("part.pretraining").is_dir() && !names(&path("part.pretraining")).is_empty();
    end(&mut pretrain(folder.path(), "part"), "-KILL", begun);
    pretrain(folder.path(), "part").ok();
    assert!(files(&path("whole")) == files(&path("part")));

    // A training that was begun does not go on with other text.
    let begun =
        || path("other.pretraining").is_dir() && !names(&path("other.pretraining")).is_empty();
    assert_eq!(
        end(&mut pretrain(folder.path(), "other"), "-TERM", begun),
        Some(130)
    );
    fs::write(path("books/other.txt"), "another text, of other words").unwrap();
    let message = pretrain(folder.path(), "other").fails(1);
    assert!(message.contains("other settings"), "{message}");
}

#[test]
fn text_that_cannot_be_had_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_books(folder.path());
    let path = |name: &str| folder.path().join(name);
    fs::write(
        path("books/bad.jsonl"),
        "{\"text\": \"fine\"}\n{\"txt\": \"no\"}\n",
    )
    .unwrap();
    fs::write(path("empty.txt"), "\n").unwrap();
    for (files, size, words) in [
        (
            "['books/bad.jsonl']",
            300,
            &["bad.jsonl` line 2", "`text`"][..],
        ),
        ("['books/*.md']", 300, &["books/*.md", ".jsonl.gz"]),
        ("['empty.txt']", 300, &["empty.txt", "empty"]),
        ("[]", 300, &["recipe.toml", "text.files"]),
        (
            "['books/other.txt']",
            200,
            &["recipe.toml", "text.vocab_size", "258"],
        ),
    ] {
        fs::write(path("recipe.toml"), text_recipe(files, size)).unwrap();
        let message = pretrain(folder.path(), "model").fails(2);
        for word in words {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
        }
        assert!(!names(folder.path()).contains(&"model".to_owned()));
    }
}
