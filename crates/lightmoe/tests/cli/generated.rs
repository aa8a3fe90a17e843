//! `evaluate --tasks` with metrics of generated answers: programs, mathematics, summaries, translations.

use crate::support::{Outcome, command, json, names, repository};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A task on the tiny data of the repository.
fn evaluate(task: &Path, out: &Path) -> Command {
    let mut command = command("evaluate");
    command.arg("--tasks").arg(task).arg("--data");
    let data = repository("fixtures/harness/data").display().to_string();
    command.arg(format!("{data},{data}/mbpp,{data}/gsm8k"));
    command.arg("--out").arg(out);
    command
}

fn samples(out: &Path, task: &str) -> Vec<Value> {
    let text = fs::read_to_string(out.join(format!("samples_{task}.jsonl"))).unwrap();
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Whether programs can be run here; says so if not.
fn runs_programs(folder: &Path) -> bool {
    let out = folder.join("tried");
    let mut tried = evaluate(Path::new("mbpp"), &out);
    let output = tried
        .args(["--allow-code", "--limit", "1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let lacks = said.contains("python3") || said.contains("this machine cannot");
    if lacks {
        assert_eq!(output.status.code(), Some(2), "{said}");
        eprintln!("SKIPPED, programs cannot be run here: {said}");
    } else {
        assert!(output.status.success(), "{said}");
    }
    !lacks
}

#[test]
fn programs_run_only_if_that_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for task in ["humaneval", "mbpp"] {
        let message = evaluate(Path::new(task), &out).fails(2);
        assert!(
            message.contains(task) && message.contains("--allow-code"),
            "{message}"
        );
    }
    let mut without = evaluate(Path::new("mbpp"), &out);
    let message = without.arg("--allow-code").env("PATH", "").fails(2);
    assert!(message.contains("python3"), "{message}");
    assert!(names(&out).is_empty());
}

#[test]
fn programs_pass_their_tests_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let (task, out) = (folder.path().join("known.yaml"), folder.path().join("out"));
    if !runs_programs(folder.path()) {
        return;
    }
    // Whatever the model writes, the answer is the code of the data, or a program that ends itself.
    let known = "include: mbpp.yaml\ntask: known\ngeneration_kwargs: {max_gen_toks: 4}\nfilter_list:\n\
                 - name: right\n  filter: [{function: template, template: '{{code}}'}]\n\
                 - name: wrong\n  filter: [{function: template, template: 'exit() #{{response}}'}]\n";
    fs::write(&task, known).unwrap();
    let table = evaluate(&task, &out).arg("--allow-code").ok();
    assert!(table.contains("pass_at_1"), "{table}");
    let scores = &json(&out.join("results.json"))["results"]["known"];
    assert_eq!(scores["pass_at_1,right"], 1.0);
    assert_eq!(scores["pass_at_1,wrong"], 0.0);
    assert_eq!(samples(&out, "known").len(), 8);
}

#[test]
fn drawn_answers_do_not_depend_on_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    let task = folder.path().join("drawn.yaml");
    if !runs_programs(folder.path()) {
        return;
    }
    let drawn = "include: mbpp.yaml\ntask: drawn\nnum_fewshot: 0\nrepeats: 3\n\
                 generation_kwargs: {do_sample: true, temperature: 1.0, top_p: 0.9, max_gen_toks: 12}\n\
                 metric_list: [{metric: pass_at_k, k: [1, 3]}]\n";
    fs::write(&task, drawn).unwrap();
    let run = |batch: &str| {
        let out = folder.path().join(batch);
        let mut command = evaluate(&task, &out);
        command.args(["--allow-code", "--batch-tokens", batch]).ok();
        (
            samples(&out, "drawn"),
            json(&out.join("results.json"))["results"]["drawn"].clone(),
        )
    };
    let (all, scores) = run("8192");
    let answers: Vec<&Vec<Value>> = all
        .iter()
        .map(|sample| sample["resps"][0].as_array().unwrap())
        .collect();
    assert!(answers.iter().all(|answers| answers.len() == 3));
    assert!(answers.iter().any(|answers| answers[0] != answers[1]));
    let (one, three) = (&scores["pass@1,none"], &scores["pass@3,none"]);
    assert!(one.as_f64().unwrap() <= three.as_f64().unwrap(), "{scores}");
    assert_eq!(run("1"), (all, scores));
    fs::write(&task, drawn.replace("[1, 3]", "[4]")).unwrap();
    let message = evaluate(&task, &folder.path().join("no"))
        .arg("--allow-code")
        .fails(1);
    assert!(
        message.contains("`k` is 4") && message.contains("repeats"),
        "{message}"
    );
}

#[test]
fn summaries_and_translations_are_scored() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("out"));
    fs::create_dir(&data).unwrap();
    let write = |name: &str, text: &str| fs::write(data.join(name), text).unwrap();
    write(
        "test.jsonl",
        "{\"source\": [\"We bake.\", \"It works.\"], \"target\": [\"We bake bread.\", \"Baking.\"]}\n\
         {\"source\": [\"We sow.\"], \"target\": [\"We sow corn.\"]}\n",
    );
    write(
        "cmn.txt",
        "I won!\t我赢了。\tCC-BY\nCheers!\t乾杯!\tCC-BY\n",
    );
    let mut both = command("evaluate");
    both.args([
        "--tasks",
        "scitldr,tatoeba_cmn_eng,tatoeba_eng_cmn",
        "--data",
    ]);
    let table = both.arg(&data).arg("--out").arg(&out).ok();
    assert!(
        table.contains("rougeL") && table.contains("chrf++"),
        "{table}"
    );
    let results = json(&out.join("results.json"));
    let score = |task: &str, metric: &str| results["results"][task][metric].as_f64();
    for metric in ["rouge1,none", "rougeL_stderr,none"] {
        assert!(score("scitldr", metric).is_some(), "{metric}");
    }
    for metric in ["bleu,none", "chrf,none", "chrf++_stderr,none"] {
        assert!(score("tatoeba_cmn_eng", metric).is_some(), "{metric}");
    }
    let signatures = &results["signatures"];
    assert_eq!(
        signatures["tatoeba_cmn_eng"]["bleu"],
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
    );
    assert_eq!(
        signatures["tatoeba_cmn_eng"]["chrf++"],
        "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0"
    );
    let chinese = signatures["tatoeba_eng_cmn"]["bleu"].as_str().unwrap();
    assert!(chinese.contains("tok:zh"), "{chinese}");
    let sample = &samples(&out, "tatoeba_cmn_eng")[0];
    assert_eq!(sample["bleu"][0], "I won!");
}

#[test]
fn metrics_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (task, out) = (folder.path().join("mine.yaml"), folder.path().join("out"));
    for (metric, said) in [
        ("{metric: bleu, tokenize: intl}", "neither `13a` nor `zh`"),
        (
            "{metric: exact_match, use_stemmer: true}",
            "rouge1, rouge2, rougeL",
        ),
        (
            "{metric: bleu, aggregation: mean}",
            "its aggregation is `bleu`",
        ),
        ("{metric: rouge3}", "use one of exact_match"),
    ] {
        let text = format!("include: gsm8k.yaml\ntask: mine\nmetric_list: [{metric}]\n");
        fs::write(&task, text).unwrap();
        let message = evaluate(&task, &out).fails(1);
        assert!(message.contains(said), "{metric}: {message}");
    }
}
