//! `evaluate --tasks` and `tasks`.

use crate::support::{self, Outcome, assert_schema, command, end, files, names, repository};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Benchmarks on the tiny data of the repository.
fn benchmarks(tasks: &str, out: &Path) -> Command {
    let mut command = command("evaluate");
    command.args(["--tasks", tasks, "--num-fewshot", "2", "--data"]);
    command.arg(repository("fixtures/harness/data"));
    command.arg("--out").arg(out);
    command
}

/// What a run leaves but for times.
fn lasting(out: &Path) -> Value {
    let mut results = support::json(&out.join("results.json"));
    for timed in ["date", "total_evaluation_time_seconds"] {
        results.as_object_mut().unwrap().remove(timed).unwrap();
    }
    results
}

#[test]
fn results_lie_in_the_harness_layout() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let table = benchmarks("ai2_arc,gsm8k", &out).ok();
    for part in [
        "arc_easy",
        "acc_norm",
        "flexible-extract",
        "0.1667",
        "results.json",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let left = [
        "results.json",
        "samples_arc_challenge.jsonl",
        "samples_arc_easy.jsonl",
    ];
    assert_eq!(names(&out), [&left[..], &["samples_gsm8k.jsonl"]].concat());
    let results = lasting(&out);
    assert_eq!(results["n-shot"]["gsm8k"], 2);
    assert_eq!(results["config"]["fewshot_seed"], 1234);
    assert_eq!(results["model_name"], "olmoe-nano");
    let commit = option_env!("LIGHTMOE_GIT_HASH");
    assert_eq!(results["git_hash"], Value::from(commit));
    let samples = fs::read_to_string(out.join("samples_gsm8k.jsonl")).unwrap();
    assert_eq!(samples.lines().count(), 12);
    // A second run says the same; the chat template is recorded by its hash.
    benchmarks("ai2_arc,gsm8k", &out).ok();
    assert_eq!(lasting(&out), results);
    benchmarks("gsm8k", &out)
        .args(["--apply-chat-template", "--limit", "2"])
        .ok();
    let chat = support::json(&out.join("results.json"));
    assert_eq!(chat["chat_template_sha"].as_str().unwrap().len(), 64);
    assert_eq!(chat["n-samples"]["gsm8k"]["effective"], 2);
}

#[test]
fn an_interrupted_run_says_so_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    // One request a batch, so that the signal comes in the middle.
    let run = |out: &Path| {
        let mut command = benchmarks("mmlu,gsm8k", out);
        command.args(["--batch-tokens", "1"]);
        command
    };
    run(&whole).ok();
    let journal = out.join("requests.jsonl");
    let lines = || fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
    let code = end(&mut run(&out), "-INT", || lines() > 20);
    assert_eq!(code, Some(130));
    assert_eq!(names(&out), ["requests.jsonl", "results.partial.json"]);
    let partial = support::json(&out.join("results.partial.json"));
    assert_schema("benchmarks", &partial);
    let (done, all) = (
        &partial["partial"]["documents_done"],
        &partial["partial"]["documents"],
    );
    assert!(
        done.as_u64().unwrap() < all.as_u64().unwrap(),
        "{partial:?}"
    );
    run(&out).ok();
    assert_eq!(lasting(&out), lasting(&whole));
    let samples = |out: &Path| {
        let mut files = files(out);
        files.remove("results.json");
        files
    };
    assert_eq!(samples(&out), samples(&whole));
}

/// Questions of several lengths, with answers of none to some tens of tokens.
fn questions(count: usize) -> String {
    let facts = [
        "Natalia sold clips to friends",
        "Weng has dollars for an hour of work",
        "Betty is saving money for a wallet",
        "Julie is reading a book of many pages",
    ];
    let question = |i: usize| {
        let more = format!(", and {}", facts[(i * 3 + 1) % 4]).repeat(i % 7 + 1);
        let question = format!("{}{more}?", facts[i % 4]);
        json!({"question": question, "answer": format!("#### {i}")}).to_string() + "\n"
    };
    (0..count).map(question).collect()
}

/// An answer is kept as soon as it is whole.
#[test]
fn an_interrupted_run_goes_on_with_the_answers_that_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data/gsm8k");
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("train.jsonl"), questions(5)).unwrap();
    fs::write(data.join("test.jsonl"), questions(300)).unwrap();
    let run = |out: &Path| {
        let mut command = command("evaluate");
        command.args(["--tasks", "gsm8k", "--num-fewshot", "0"]);
        // Some at a time.
        command.args(["--batch-tokens", "1200", "--data"]);
        command.arg(data.parent().unwrap()).arg("--out").arg(out);
        command
    };
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    run(&whole).ok();
    let samples = |out: &Path| fs::read_to_string(out.join("samples_gsm8k.jsonl")).unwrap();
    let answer = |line: &str| serde_json::from_str::<Value>(line).unwrap()["resps"].clone();
    let answers: HashSet<String> = (samples(&whole).lines())
        .map(|line| answer(line).to_string())
        .collect();
    assert!(answers.len() > 10, "{answers:?}");
    let journal = out.join("requests.jsonl");
    let lines = || fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
    assert_eq!(end(&mut run(&out), "-INT", || lines() > 8), Some(130));
    assert!((8..300).contains(&lines()), "{} answers", lines());
    run(&out).ok();
    assert_eq!(lasting(&out), lasting(&whole));
    assert_eq!(samples(&out), samples(&whole));
}

#[test]
fn a_model_that_does_not_fit_gives_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, streamed) = (folder.path().join("whole"), folder.path().join("streamed"));
    benchmarks("winogrande,wikitext", &whole).ok();
    benchmarks("winogrande,wikitext", &streamed)
        .args(["--max-memory", "4MB"])
        .ok();
    assert_eq!(lasting(&streamed)["results"], lasting(&whole)["results"]);
}

#[test]
fn perplexity_of_a_file_with_and_without_stride() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let text = "Compute 3 + 4.\nAnswer: 7\n".repeat(20);
    fs::write(folder.path().join("mine.txt"), &text).unwrap();
    let scores = |stride: &[&str]| {
        let mut command = command("evaluate");
        command.args(["--tasks", "perplexity", "--max-length", "32", "--data"]);
        command
            .arg(folder.path().join("mine.txt"))
            .args(stride)
            .arg("--out")
            .arg(&out)
            .ok();
        let scores = &support::json(&out.join("results.json"))["results"]["perplexity"];
        [
            "token_perplexity,none",
            "byte_perplexity,none",
            "bits_per_byte,none",
        ]
        .map(|key| scores[key].as_f64().unwrap())
    };
    let [token, byte, bits] = scores(&[]);
    assert!((byte.log2() - bits).abs() < 1e-9);
    assert!(token > byte);
    // More of the text is seen before each token.
    assert!(scores(&["--stride", "4"])[0] < token);
}

#[test]
fn what_cannot_be_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let refused = |tasks: &str, arguments: &[&str], said: &[&str]| {
        let message = benchmarks(tasks, &out).args(arguments).fails(2);
        for part in said {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(names(&out).is_empty());
    };
    refused("mmlu_law", &[], &["`mmlu_law`", "lightmoe tasks"]);
    refused("arc_easy", &["--seed", "9999999999"], &["2^32"]);
    refused("arc_easy", &["--add-bos-token"], &["--add-bos-token"]);
    refused("arc_easy", &["--limit", "0"], &["limit of 0"]);
    for (flag, said) in [
        ("--stride", "stride of 0"),
        ("--batch-tokens", "batches of 0"),
    ] {
        let message = benchmarks("arc_easy", &out).args([flag, "0"]).fails(1);
        assert!(
            message.contains(said) && names(&out).is_empty(),
            "{message}"
        );
    }
    let task = folder.path().join("mine.yaml");
    fs::write(&task, "task: mine\noutput_typ: multiple_choice\n").unwrap();
    refused(
        task.to_str().unwrap(),
        &[],
        &["mine.yaml", "line 2", "output_typ"],
    );
    fs::create_dir(folder.path().join("data")).unwrap();
    let mut absent = command("evaluate");
    absent
        .args(["--tasks", "boolq", "--data"])
        .arg(folder.path().join("data"));
    let message = absent.fails(2);
    for part in ["data/BoolQ/val.jsonl", "one JSON object a line", "--data"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let mut many = command("evaluate");
    many.args(["--tasks", "gsm8k", "--num-fewshot", "9", "--data"]);
    let message = many.arg(repository("fixtures/harness/data")).fails(2);
    assert!(
        message.contains("9 few-shot") && message.contains("ask for fewer"),
        "{message}"
    );
}

#[test]
fn the_list_and_its_page_are_up_to_date() {
    let list = command("tasks").ok();
    for part in [
        "gsm8k",
        "    mmlu_virology",
        "loglikelihood_rolling",
        "hellaswag_val.jsonl",
    ] {
        assert!(list.contains(part), "{part}: {list}");
    }
    let one = command("tasks").arg("mmlu_stem").ok();
    assert!(one.contains("19 tasks") && !one.contains("gsm8k"), "{one}");
    let page = command("tasks").arg("--markdown").ok();
    let committed = fs::read_to_string(repository("docs/tasks.md")).unwrap();
    assert_eq!(page, committed, "run `cargo xtask docs`");
}
