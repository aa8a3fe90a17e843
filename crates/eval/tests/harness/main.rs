//! Benchmarks against lm-evaluation-harness 0.4.9 on the built-in model: `fixtures/harness` holds tiny
//! data in the benchmarks' own forms and what the harness said of them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod resume;

use lightmoe_data::harness::{Benchmark, Catalogue, Chat, PromptOptions, Turns, build_prompts};
use lightmoe_data::records::Message;
use lightmoe_eval::harness::{
    BeginOfText, CallOptions, HarnessOptions, Judge, Kept, RunFacts, TaskPrompts, check_task,
    evaluate_tasks, rendered, results,
};
use lightmoe_models::{Checkpoint, Decoder, ModelTokenizer};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// How far a log-likelihood may be from PyTorch's, relative to its size: both are sums in f32.
const TOLERANCE: f64 = 1e-5;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

struct World {
    model: Decoder,
    tokenizer: ModelTokenizer,
}

impl World {
    fn new() -> Self {
        let checkpoint = Checkpoint::open(&fixtures().join("olmoe-nano")).unwrap();
        Self {
            model: Decoder::load(&checkpoint).unwrap(),
            tokenizer: ModelTokenizer::load(checkpoint.dir(), None).unwrap(),
        }
    }

    /// Lets the tokenizer put its token for the begin of text before a text.
    fn begin(&mut self) {
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut tokenizer: Value =
            serde_json::from_str(&read(fixtures().join("olmoe-nano/tokenizer.json"))).unwrap();
        tokenizer["post_processor"] =
            serde_json::from_str(&read(fixtures().join("harness/begin.json"))).unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let config = fixtures().join("olmoe-nano/tokenizer_config.json");
        std::fs::copy(config, folder.path().join("tokenizer_config.json")).unwrap();
        self.tokenizer = ModelTokenizer::load(folder.path(), None).unwrap();
    }

    /// The tasks of a run with its options.
    fn prompts(&self, selected: &[Benchmark], options: &Value) -> Vec<TaskPrompts> {
        let render = |messages: &[Message]| rendered(&self.tokenizer, messages);
        let number = |key: &str| options[key].as_u64().map(|n| n as usize);
        let options = PromptOptions {
            num_fewshot: number("num_fewshot"),
            limit: number("limit"),
            seed: 1234,
            system_instruction: options["system_instruction"].as_str(),
            chat: (options["apply_chat_template"] == true).then_some(Chat {
                render: &render,
                turns: match options["fewshot_as_multiturn"] == true {
                    true => Turns::Each,
                    false => Turns::One,
                },
            }),
            ..PromptOptions::default()
        };
        let folders = [fixtures().join("harness/data")];
        let tasks = selected.iter().flat_map(Benchmark::tasks);
        tasks
            .map(|task| {
                let mut task = task.clone();
                if let (Some(most), Some(generation)) =
                    (number("max_gen_toks"), &mut task.generation_kwargs)
                {
                    generation.max_gen_toks = Some(most);
                }
                TaskPrompts {
                    prompts: build_prompts(&task, &folders, &options).unwrap(),
                    task,
                }
            })
            .collect()
    }
}

/// Says of programs what the harness said.
struct Verdicts(HashMap<String, bool>);

impl Judge for Verdicts {
    fn passes(&self, program: &str) -> Result<bool, String> {
        let known = self.0.get(program).copied();
        known.ok_or_else(|| format!("the harness did not run\n{program}"))
    }
}

impl Verdicts {
    fn of(expected: &Value) -> Self {
        let mut verdicts = HashMap::new();
        for task in ["humaneval", "mbpp"] {
            for sample in expected["samples"][task].as_array().into_iter().flatten() {
                let answer = &sample["filtered_resps"][0];
                let answer = answer.as_str().or(answer[0].as_str()).unwrap();
                let program = format!("{answer}\n{}", sample["target"].as_str().unwrap());
                let passed = sample.get("pass@1").or(sample.get("pass_at_1")).unwrap();
                verdicts.insert(program, passed == 1.0);
            }
        }
        Self(verdicts)
    }
}

fn expected(run: &str) -> Value {
    let path = fixtures().join(format!("harness/expected/{run}.json"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn select(expected: &Value) -> Vec<Benchmark> {
    let names = expected["tasks"].as_array().unwrap().iter();
    let names: Vec<String> = names
        .map(|name| {
            let own = fixtures().join(format!("harness/{}.yaml", name.as_str().unwrap()));
            match own.exists() {
                true => own.to_str().unwrap().to_owned(),
                false => name.as_str().unwrap().to_owned(),
            }
        })
        .collect();
    Catalogue::built_in().unwrap().select(&names).unwrap()
}

/// Both say the same: texts, numbers up to rounding, and lists and objects of them. Floats that were
/// written as text count as numbers.
#[track_caller]
fn assert_same(ours: &Value, theirs: &Value, place: &str) {
    let number = |value: &Value| match value {
        Value::String(text) => text.parse().ok(),
        Value::Bool(bit) => Some(f64::from(u8::from(*bit))),
        other => other.as_f64(),
    };
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let mut keys: Vec<&String> = ours.keys().chain(theirs.keys()).collect();
            keys.dedup();
            for key in keys {
                let (ours, theirs) = (ours.get(key), theirs.get(key));
                let place = format!("{place}/{key}");
                assert!(
                    ours.is_some() && theirs.is_some(),
                    "{place}: {ours:?} {theirs:?}"
                );
                assert_same(ours.unwrap(), theirs.unwrap(), &place);
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{place}: {ours:?} {theirs:?}");
            for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                assert_same(ours, theirs, &format!("{place}/{i}"));
            }
        }
        // As the harness's files hold them.
        (Value::String(text), Value::Bool(bit)) => {
            assert_eq!(text, if *bit { "True" } else { "False" }, "{place}");
        }
        (ours, theirs) => match (number(ours), number(theirs)) {
            (Some(a), Some(b)) => {
                // A perplexity is a power, so its logarithm is what is near.
                let (a, b) = match place.contains("perplexity") && b > 0.0 {
                    true => (a.ln(), b.ln()),
                    false => (a, b),
                };
                let near = (a - b).abs() <= TOLERANCE * b.abs();
                assert!(near || a == b, "{place}: {a} is not {b}");
            }
            _ => assert_eq!(ours, theirs, "{place}"),
        },
    }
}

/// Runs what the harness ran and compares all it said.
fn check(run: &str) {
    let (mut world, expected) = (World::new(), expected(run));
    if expected["model"]["add_bos_token"] == true {
        world.begin();
    }
    let selected = select(&expected);
    let tasks = world.prompts(&selected, &expected["options"]);
    let verdicts = Verdicts::of(&expected);
    let options = HarnessOptions {
        max_length: expected["model"]["max_length"].as_u64().map(|n| n as usize),
        begin: match expected["model"]["add_bos_token"] == true {
            true => BeginOfText::Token,
            false => BeginOfText::None,
        },
        judge: Some(&verdicts),
        ..HarnessOptions::default()
    };
    let (model, tokenizer) = (&world.model, &world.tokenizer);
    let outcome = evaluate_tasks(
        model,
        tokenizer,
        &tasks,
        &options,
        Kept::default(),
        &mut |_, _| true,
    )
    .unwrap();
    assert!(outcome.is_whole);
    let ours = results(&selected, &tasks, &outcome, tokenizer, facts()).unwrap();
    let ours = serde_json::to_value(ours).unwrap();
    for key in [
        "results",
        "groups",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
    ] {
        if let Some(theirs) = expected.get(key) {
            assert_same(&ours[key], theirs, key);
        }
    }
    let groups = ours["group_subtasks"].as_object().unwrap();
    assert_eq!(
        groups.len(),
        expected["group_subtasks"].as_object().unwrap().len()
    );
    for (group, members) in groups {
        // Theirs come in the order of files in a folder.
        let sorted = |list: &Value| {
            let mut list = list.as_array().unwrap().clone();
            list.sort_by_key(Value::to_string);
            list
        };
        assert_eq!(
            sorted(members),
            sorted(&expected["group_subtasks"][group]),
            "{group}"
        );
    }
    let mut compared = 0;
    for task in &outcome.tasks {
        let theirs = expected["samples"][&task.name].as_array().unwrap();
        assert_eq!(task.samples.len(), theirs.len(), "{}", task.name);
        // HellaSwag's documents hold here what is used of a row.
        let has_same_docs = task.name != "hellaswag";
        for (ours, theirs) in task.samples.iter().zip(theirs) {
            let ours = serde_json::to_value(ours).unwrap();
            let mut theirs = theirs.as_object().unwrap().clone();
            let place = format!("{run}/{}/{}", task.name, theirs["doc_id"]);
            let mut keys: Vec<String> = theirs.keys().cloned().collect();
            keys.retain(|key| key != "target" && (has_same_docs || key != "doc_hash"));
            for key in keys {
                let theirs = theirs.remove(&key).unwrap();
                assert_same(&ours[&key], &theirs, &format!("{place}/{key}"));
                compared += 1;
            }
        }
        if has_same_docs {
            assert_eq!(
                json!(task.hash),
                expected["task_hashes"][&task.name],
                "{}",
                task.name
            );
        }
    }
    assert!(compared > 100, "{compared}");
}

fn facts() -> RunFacts<'static> {
    RunFacts {
        model: "fixtures/olmoe-nano",
        config: CallOptions::default(),
        system_instruction: None,
        chat_template: None,
        fewshot_as_multiturn: false,
        date: 0.0,
        seconds: 0.0,
        version: "0",
        git_hash: None,
    }
}

#[test]
fn whatever_comes_along_can_be_scored() {
    let catalogue = Catalogue::built_in().unwrap();
    assert!(catalogue.tasks().len() > 50);
    for task in catalogue.tasks() {
        assert_eq!(check_task(task), Ok(()), "{}", task.name());
    }
}

#[test]
fn short_contexts_are_cut_and_windowed_as_in_the_harness() {
    check("short");
}

#[test]
fn the_token_for_the_begin_of_text_stands_where_the_harness_puts_it() {
    check("begin");
}

#[test]
fn few_shot_examples_are_those_of_the_harness() {
    check("fewshot");
}

#[test]
fn groups_are_pooled_as_in_the_harness() {
    check("groups");
}

#[test]
fn conversations_are_those_of_the_harness() {
    check("chat");
    check("turns");
}

#[test]
fn generated_answers_are_judged_as_in_the_harness() {
    check("generated");
}
