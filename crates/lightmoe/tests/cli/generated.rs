//! `evaluate --tasks` with metrics of generated answers: programs, mathematics, summaries, translations.

use crate::sandbox::{can_run_programs, processes, within};
use crate::support::{Outcome, assert_schema, command, end, json, names, repository};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

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

/// Writes a task in which each answer is the code of the data, and a program after it.
fn write_task(path: &Path, program: &str) {
    let program = program.replace('\n', "\\n");
    let task = format!(
        "include: mbpp.yaml\ntask: known\ngeneration_kwargs: {{max_gen_toks: 4}}\nfilter_list:\n\
         - name: right\n  filter: [{{function: template, template: \"{{{{code}}}}\\n{program}\"}}]\n"
    );
    fs::write(path, task).unwrap();
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
    if !can_run_programs() {
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
    let samples = samples(&out, "known");
    assert_eq!(samples.len(), 8);
    for sample in &samples {
        assert_schema("benchmark-samples", sample);
    }
}

/// Runs a command in a terminal of its own.
const IN_TERMINAL: &str = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) != 0)";

#[test]
fn programs_have_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let (task, out) = (folder.path().join("known.yaml"), folder.path().join("out"));
    if !can_run_programs() {
        return;
    }
    let open = "import os\nos.open('/dev/tty', os.O_RDONLY)";
    let in_terminal = || {
        let mut command = Command::new("python3");
        command.args(["-c", IN_TERMINAL]).stdin(Stdio::null());
        command
    };
    in_terminal().args(["python3", "-c", open]).ok();
    let open = open.replace('\n', "; ");
    let program = format!("try:\n    {open}\n    exit()\nexcept OSError: pass");
    write_task(&task, &program);
    let mut evaluation = evaluate(&task, &out);
    evaluation.arg("--allow-code");
    let mut command = in_terminal();
    command.arg(evaluation.get_program());
    command.args(evaluation.get_args()).ok();
    let scores = &json(&out.join("results.json"))["results"]["known"];
    assert_eq!(scores["pass_at_1,right"], 1.0);
}

#[test]
fn programs_end_with_the_evaluation() {
    let folder = tempfile::tempdir().unwrap();
    let (task, out) = (folder.path().join("known.yaml"), folder.path().join("out"));
    let programs = folder.path().join("programs");
    if !can_run_programs() {
        return;
    }
    fs::create_dir(&programs).unwrap();
    let name = programs.display().to_string();
    // Becomes a process with a name to know it by.
    write_task(
        &task,
        "import os, sys\nwait = 'import time; time.sleep(600)'\n\
         os.execv(sys.executable, ['python3', '-c', wait, 'asleep in ' + os.getcwd()])",
    );
    let mut evaluation = evaluate(&task, &out);
    evaluation.arg("--allow-code").env("TMPDIR", &programs);
    let asleep = format!("asleep in {name}");
    end(&mut evaluation, "-KILL", || !processes(&asleep).is_empty());
    assert!(within(5, || processes(&name).is_empty()));
    assert!(names(&programs).is_empty());
}

#[test]
fn drawn_answers_do_not_depend_on_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    let task = folder.path().join("drawn.yaml");
    if !can_run_programs() {
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
        .fails(2);
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
    // Against itself: the answers in the samples give every score again.
    let path = folder.path().join("c.json");
    let mut call = command("compare-results");
    call.arg(&out).arg(&out).arg("--json").arg(&path).ok();
    let rows = json(&path)["rows"].clone();
    let by = |task: &str, metric: &str| {
        let mut rows = rows.as_array().unwrap().iter();
        let row = rows.find(|row| row["task"] == task && row["metric"] == metric);
        let row = row.unwrap();
        assert_eq!(row["warnings"], serde_json::json!([]), "{row}");
        assert_eq!(row["difference"], 0.0, "{row}");
        row["uncertainty"]["by"].clone()
    };
    assert_eq!(by("scitldr", "rougeL"), "paired");
    for (task, metrics) in [
        ("tatoeba_cmn_eng", &["bleu", "chrf", "chrf++"][..]),
        ("tatoeba_eng_cmn", &["bleu", "chrf"]),
    ] {
        for metric in metrics {
            assert_eq!(by(task, metric), "bootstrap", "{task} {metric}");
        }
    }
}

#[test]
fn what_cannot_be_scored_is_refused_with_file_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let (task, out) = (folder.path().join("mine.yaml"), folder.path().join("out"));
    let refused = |keys: &str, said: &[&str]| {
        fs::write(&task, format!("include: gsm8k.yaml\ntask: mine\n{keys}\n")).unwrap();
        let list = command("tasks").arg(&task).fails(2);
        let run = evaluate(&task, &out).fails(2);
        for part in said.iter().chain(&["mine.yaml"]) {
            assert!(list.contains(part), "{part} of {keys}: {list}");
            assert!(run.contains(part), "{part} of {keys}: {run}");
        }
    };
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
        let keys = format!("metric_list: [{metric}]");
        refused(&keys, &["`metric_list`", said]);
    }
    let filter = |step: &str| format!("filter_list: [{{name: own, filter: [{step}]}}]");
    let regex = filter("{function: regex, regex_pattern: '(('}");
    refused(&regex, &["`filter_list`", "filter `own`", "(("]);
    let template = filter("{function: template, template: '{{response'}");
    refused(&template, &["`filter_list`", "{{response"]);
    refused("doc_to_text: 'Q: {{a b}}'", &["`doc_to_text`", "{{a b}}"]);
    refused(
        "process_docs: {q: '(question'}",
        &["`process_docs`", "(question"],
    );
    assert!(names(&out).is_empty());
}

#[test]
fn fields_that_a_filter_lacks_are_told_before_the_model_runs() {
    let folder = tempfile::tempdir().unwrap();
    let (task, out) = (folder.path().join("mine.yaml"), folder.path().join("out"));
    let write = |template: &str| {
        let keys = "include: gsm8k.yaml\ntask: mine\ngeneration_kwargs: {max_gen_toks: 2}\n";
        let filter = format!("[{{function: template, template: '{template}'}}]");
        fs::write(
            &task,
            format!("{keys}filter_list: [{{name: own, filter: {filter}}}]\n"),
        )
        .unwrap();
    };
    let said = ["task `mine`", "filter `own`", "no field `wrong`", "line 1"];
    write("{{wrong}}");
    let message = evaluate(&task, &out).fails(2);
    assert!(said.iter().all(|part| message.contains(part)), "{message}");
    assert!(names(&out).is_empty());
    // What only an answer brings to light is told of its document.
    write("{% if response %}{{wrong}}{% endif %}");
    let message = evaluate(&task, &out).fails(1);
    assert!(said.iter().all(|part| message.contains(part)), "{message}");
}
