//! Evaluations that are interrupted and go on.

use crate::{World, expected, facts, select};
use candle_core::Tensor;
use lightmoe_data::harness::Benchmark;
use lightmoe_eval::harness::{HarnessOptions, Kept, RequestCache, evaluate_tasks, results};
use lightmoe_models::{
    Cache, Decoder, Ends, LanguageModel, Layer, ModelConfig, Observer, Result, Tokens,
};
use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A model that counts the prompts that it reads.
struct Reading<'a> {
    model: &'a Decoder,
    prompts: AtomicUsize,
}

impl LanguageModel for Reading<'_> {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn ends(&self) -> &Ends {
        self.model.ends()
    }

    fn layer(&self, number: usize) -> Result<Cow<'_, Layer>> {
        self.model.layer(number)
    }

    fn forward(
        &self,
        tokens: Tokens<'_>,
        cache: Option<&mut Cache>,
        observe: &mut Observer<'_>,
    ) -> Result<Tensor> {
        if tokens.ids.len() > tokens.rows {
            self.prompts.fetch_add(tokens.rows, Ordering::Relaxed);
        }
        self.model.forward(tokens, cache, observe)
    }
}

/// One of choices and one of answers.
fn two_tasks(expected: &serde_json::Value) -> Vec<Benchmark> {
    let mut selected = select(expected);
    selected.retain(|benchmark| ["arc_easy", "gsm8k"].contains(&benchmark.name()));
    selected
}

/// So that there are moments to stop at.
fn small_batches() -> HarnessOptions<'static> {
    HarnessOptions {
        batch_tokens: 600,
        ..HarnessOptions::default()
    }
}

#[test]
fn an_interrupted_evaluation_goes_on_to_the_same_numbers() {
    let (world, expected) = (World::new(), expected("fewshot"));
    let selected = two_tasks(&expected);
    let tasks = world.prompts(&selected, &expected["options"]);
    let options = small_batches();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.jsonl");
    let run = |fingerprint: &str, stop: usize| {
        let mut calls = 0;
        let kept = Kept {
            journal: Some(&path),
            fingerprint,
            cache: None,
        };
        let (model, tokenizer) = (&world.model, &world.tokenizer);
        let outcome = evaluate_tasks(model, tokenizer, &tasks, &options, kept, &mut |_, _| {
            calls += 1;
            calls < stop
        });
        let outcome = outcome.unwrap();
        (
            outcome.is_whole,
            serde_json::to_value(&outcome.tasks[0].samples).unwrap(),
            outcome,
        )
    };
    let lines = || std::fs::read_to_string(&path).unwrap().lines().count();
    let (whole, undisturbed, all) = run("a", usize::MAX);
    assert!(whole);
    let everything = lines();
    // Another model's journal is of no use.
    let (whole, samples, part) = run("b", 3);
    assert!(!whole && lines() < everything, "{}", lines());
    assert!(samples.as_array().unwrap().len() < undisturbed.as_array().unwrap().len());
    let said = results(&selected, &tasks, &part, &world.tokenizer, facts()).unwrap();
    assert_eq!(said.partial.unwrap().documents, 16);
    // A line that a kill cut off is done again.
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &text[..text.len() - 5]).unwrap();
    // What is known counts as done, so each run gets a little further.
    for stop in (6..).step_by(40) {
        if run("b", stop).0 {
            break;
        }
    }
    let (_, samples, resumed) = run("b", usize::MAX);
    assert_eq!(samples, undisturbed);
    for (a, b) in resumed.tasks.iter().zip(&all.tasks) {
        assert_eq!(a.hash, b.hash);
        assert_eq!(a.samples, b.samples);
    }
}

#[test]
fn a_resumed_evaluation_leaves_out_what_the_cache_knew_at_first() {
    let (world, expected) = (World::new(), expected("fewshot"));
    let selected = two_tasks(&expected);
    let tasks = world.prompts(&selected, &expected["options"]);
    let options = small_batches();
    let folder = tempfile::tempdir().unwrap();
    let run = |journal: &str, cache: &str, stop: usize| {
        let mut calls = 0;
        let cache = RequestCache::open(&folder.path().join(cache), "model").unwrap();
        let journal = folder.path().join(journal);
        let kept = Kept {
            journal: Some(&journal),
            fingerprint: "model",
            cache: Some(&cache),
        };
        let (model, tokenizer) = (&world.model, &world.tokenizer);
        let mut go_on = |_, _| {
            calls += 1;
            calls < stop
        };
        evaluate_tasks(model, tokenizer, &tasks, &options, kept, &mut go_on).unwrap()
    };
    // A part, in two folders.
    assert!(!run("first.jsonl", "a", 3).is_whole);
    let [a, b] = ["a/model", "b/model"].map(|name| folder.path().join(name));
    std::fs::create_dir_all(&b).unwrap();
    for file in std::fs::read_dir(a).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, b.join(path.file_name().unwrap())).unwrap();
    }
    let undisturbed = run("a.jsonl", "a", usize::MAX);
    assert!(undisturbed.is_whole && undisturbed.cached > 0);
    assert!(!run("b.jsonl", "b", 4).is_whole);
    let resumed = run("b.jsonl", "b", usize::MAX);
    assert_eq!(resumed.cached, undisturbed.cached);
    for (a, b) in resumed.tasks.iter().zip(&undisturbed.tasks) {
        assert_eq!(a.samples, b.samples);
    }
}

/// Though all prompts are worked off together, and the rest then in another company.
#[test]
fn an_answer_that_was_whole_is_not_generated_again() {
    let (world, expected) = (World::new(), expected("fewshot"));
    let mut selected = select(&expected);
    selected.retain(|benchmark| benchmark.name() == "gsm8k");
    let tasks = world.prompts(&selected, &expected["options"]);
    let folder = tempfile::tempdir().unwrap();
    let run = |journal: &str, stop: usize| {
        let journal = folder.path().join(journal);
        let kept = Kept {
            journal: Some(&journal),
            fingerprint: "model",
            cache: None,
        };
        let model = Reading {
            model: &world.model,
            prompts: AtomicUsize::new(0),
        };
        let mut calls = 0;
        let mut go_on = |_, _| {
            calls += 1;
            calls < stop
        };
        let options = HarnessOptions::default();
        let tokenizer = &world.tokenizer;
        let outcome =
            evaluate_tasks(&model, tokenizer, &tasks, &options, kept, &mut go_on).unwrap();
        let known = std::fs::read_to_string(&journal).unwrap().lines().count() - 1;
        (outcome, model.prompts.into_inner(), known)
    };
    let (all, prompts, known) = run("undisturbed", usize::MAX);
    assert!(all.is_whole && known == prompts);
    let mut before = 0;
    for stop in [9, 9] {
        let (part, _, known) = run("resumed", stop);
        assert!(
            !part.is_whole && before < known && known < prompts,
            "{known} of {prompts}"
        );
        assert_eq!(part.tasks[0].documents, known);
        before = known;
    }
    let (resumed, read, known) = run("resumed", usize::MAX);
    assert_eq!((read, known), (prompts - before, prompts));
    assert!(resumed.is_whole);
    assert_eq!(resumed.tasks[0].samples, all.tasks[0].samples);
}

/// Of the answers that are drawn for a request, those that are missing, with their own seeds.
#[test]
fn drawn_answers_are_drawn_again_one_by_one() {
    let (world, expected) = (World::new(), expected("fewshot"));
    let mut selected = select(&expected);
    selected.retain(|benchmark| benchmark.name() == "gsm8k");
    let mut tasks = world.prompts(&selected, &expected["options"]);
    let task = &mut tasks[0].task;
    task.repeats = Some(3);
    let generation = task.generation_kwargs.as_mut().unwrap();
    (generation.do_sample, generation.temperature) = (Some(true), Some(1.0));
    generation.max_gen_toks = Some(12);
    let folder = tempfile::tempdir().unwrap();
    let journal = folder.path().join("requests.jsonl");
    let run = || {
        let kept = Kept {
            journal: Some(&journal),
            fingerprint: "model",
            cache: None,
        };
        let (model, tokenizer) = (&world.model, &world.tokenizer);
        let options = HarnessOptions::default();
        let outcome = evaluate_tasks(model, tokenizer, &tasks, &options, kept, &mut |_, _| true);
        serde_json::to_value(&outcome.unwrap().tasks[0].samples).unwrap()
    };
    let all = run();
    let answers = all[0]["resps"][0].as_array().unwrap();
    assert!(
        answers.len() == 3 && answers[1] != answers[2],
        "{answers:?}"
    );
    let text = std::fs::read_to_string(&journal).unwrap();
    // All but one of the first request, the last of the second, the middle one of the third.
    let missing = [1, 2, 5, 7].map(|prompt| format!("{{\"prompt\":{prompt},"));
    let is_kept = |line: &&str| !missing.iter().any(|start| line.starts_with(start));
    let kept: Vec<&str> = text.lines().filter(is_kept).collect();
    assert_eq!(kept.len() + missing.len(), text.lines().count());
    std::fs::write(&journal, kept.join("\n") + "\n").unwrap();
    assert_eq!(run(), all);
}
