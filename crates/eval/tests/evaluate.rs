//! The whole evaluation with a model that says what it is told to.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{Device, Tensor};
use lightmoe_data::overlap::corpus_chrf;
use lightmoe_data::{Encoded, Example, Metric, Split, Task, tokenizer};
use lightmoe_eval::divergence::text_rows;
use lightmoe_eval::{Error, EvalOptions, Sample, Scores, evaluate, evaluate_text, write_samples};
use lightmoe_models::{Decoder, LanguageModel, ModelConfig, ModelTokenizer, Tokens};
use std::collections::HashMap;
use std::path::Path;

const HIDDEN: usize = 128;
const CONTEXT: usize = 256;

fn model_tokenizer() -> ModelTokenizer {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokenizer.json");
    tokenizer::build().unwrap().save(file, false).unwrap();
    ModelTokenizer::load(dir.path(), Some(tokenizer::EOS_ID)).unwrap()
}

fn random(tokenizer: &ModelTokenizer) -> Decoder {
    let raw = serde_json::json!({
        "model_type": "olmoe", "vocab_size": tokenizer.inner.get_vocab_size(true),
        "hidden_size": HIDDEN, "intermediate_size": 16, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": CONTEXT,
    });
    let config = ModelConfig::from_json(&raw, Path::new("config.json")).unwrap();
    Decoder::random(&config, 5).unwrap()
}

/// A model whose next token depends on the last one alone: after each prompt it says the answer
/// and ends. Embeddings are unit vectors, the layers add nothing, the head reads the unit vector.
fn taught(tokenizer: &ModelTokenizer, lessons: &[(&str, &str)]) -> Decoder {
    let mut next: HashMap<u32, u32> = HashMap::new();
    for (prompt, answer) in lessons {
        let mut said = vec![*tokenizer.encode(prompt).unwrap().last().unwrap()];
        said.extend(tokenizer.encode(&format!(" {answer}")).unwrap());
        said.push(tokenizer.eos);
        for pair in said.windows(2) {
            let known = next.insert(pair[0], pair[1]);
            assert!(known.is_none_or(|token| token == pair[1]), "{said:?}");
        }
    }
    let mut model = random(tokenizer);
    let vocab = model.config().vocab_size;
    let (mut embed, mut head) = (vec![0f32; vocab * HIDDEN], vec![0f32; vocab * HIDDEN]);
    for (unit, (last, next)) in next.into_iter().enumerate() {
        embed[last as usize * HIDDEN + unit] = 1.0;
        head[next as usize * HIDDEN + unit] = 1.0;
    }
    let table = |values: &[f32]| Tensor::from_slice(values, (vocab, HIDDEN), &Device::Cpu).unwrap();
    model
        .visit(&mut |name, _, tensor| {
            *tensor = match name {
                "model.embed_tokens.weight" => table(&embed),
                "lm_head.weight" => table(&head),
                _ if name.contains("o_proj") || name.contains("down_proj") => {
                    tensor.zeros_like()?
                }
                _ => return Ok(()),
            };
            Ok(())
        })
        .unwrap();
    model
}

fn run(
    model: &Decoder,
    tokenizer: &ModelTokenizer,
    examples: &[Example],
    options: &EvalOptions,
) -> (Scores, Vec<Sample>) {
    evaluate(model, tokenizer, examples, options, &mut |_, _| true).unwrap()
}

fn only(metric: Metric) -> EvalOptions {
    EvalOptions {
        metrics: vec![metric],
        ..EvalOptions::default()
    }
}

fn message(examples: &[Example], options: &EvalOptions) -> String {
    let tokenizer = model_tokenizer();
    let model = random(&tokenizer);
    evaluate(&model, &tokenizer, examples, options, &mut |_, _| true)
        .unwrap_err()
        .to_string()
}

#[test]
fn exact_match_needs_the_whole_answer_and_its_end() {
    let tokenizer = model_tokenizer();
    let model = taught(
        &tokenizer,
        &[("the king", "dog cat"), ("the river", "horse wolf")],
    );
    let examples = [
        Example::new("the king", "dog cat"),
        Example::new("the king", "dog"),
        Example::new("the river", "horse wolf"),
        Example::new("the river", "horse bear"),
    ];
    let (scores, samples) = run(&model, &tokenizer, &examples, &only(Metric::ExactMatch));
    let right: Vec<bool> = samples.iter().map(|s| s.exact_match).collect();
    assert_eq!(right, [true, false, true, false]);
    let score = scores["exact_match"];
    assert_eq!((score.value, score.n), (0.5, 4));
    assert!((score.stderr - (0.25f64 / 3.0).sqrt()).abs() < 1e-12);
    assert_eq!(samples[0].prediction.as_deref(), Some("dog cat"));
    assert_eq!(samples[1].prediction, None);
    assert_eq!(scores["answer_nll"].n, 4);
    assert!(samples[0].nll < samples[3].nll);
    let keys: Vec<&str> = scores.keys().map(String::as_str).collect();
    assert_eq!(keys, ["answer_nll", "exact_match"]);
}

#[test]
fn a_program_that_differs_but_passes_counts() {
    let tokenizer = model_tokenizer();
    let prompt = "Program:\nx = 3\ny = 4\n___\nOutput: 7\nMissing:";
    let reference = Example::new(prompt, "print(x + y)");
    let options = EvalOptions::for_task(Task::Code);
    for (said, right) in [
        ("print(y + x)", 1.0),
        ("print(x + y)", 1.0),
        ("print(x - y)", 0.0),
        ("x + y", 0.0),
    ] {
        let model = taught(&tokenizer, &[(prompt, said)]);
        let (scores, samples) = run(
            &model,
            &tokenizer,
            std::slice::from_ref(&reference),
            &options,
        );
        assert_eq!(samples[0].prediction.as_deref(), Some(said));
        assert_eq!(scores["exact_match"].value, right, "{said}");
    }
    // Without the task's rule only the reference counts, and nothing is generated.
    let model = taught(&tokenizer, &[(prompt, "print(y + x)")]);
    let (scores, samples) = run(&model, &tokenizer, &[reference], &EvalOptions::default());
    assert_eq!(scores["exact_match"].value, 0.0);
    assert_eq!(samples[0].prediction, None);
}

#[test]
fn chrf_reads_what_is_generated() {
    let tokenizer = model_tokenizer();
    let lessons = [("the king", "dog farmer horse"), ("the river", "wolf girl")];
    let model = taught(&tokenizer, &lessons);
    let examples = [
        Example::new("the king", "dog farmer child"),
        Example::new("a green river", "wolf girl"),
        Example::new("a red king", "dog farmer horse"),
    ];
    let mut seen = Vec::new();
    let options = EvalOptions::for_task(Task::Translation);
    let (scores, samples) = evaluate(&model, &tokenizer, &examples, &options, &mut |done, all| {
        seen.push((done, all));
        true
    })
    .unwrap();
    let said = [lessons[0].1, lessons[1].1, lessons[0].1];
    let pairs: Vec<(&str, &str)> = said
        .into_iter()
        .zip(examples.iter().map(|e| e.completion.as_str()))
        .collect();
    assert_eq!(scores["chrf"].value, corpus_chrf(&pairs));
    assert!(scores["chrf"].stderr > 0.0);
    assert!((scores["exact_match"].value - 2.0 / 3.0).abs() < 1e-12);
    for (sample, said) in samples.iter().zip(said) {
        assert_eq!(sample.prediction.as_deref(), Some(said));
    }
    assert_eq!(seen.first(), Some(&(0, 3)));
    assert_eq!(seen.last(), Some(&(4, 4)));
}

#[test]
fn the_likeliest_choice_is_taken() {
    let tokenizer = model_tokenizer();
    let model = taught(&tokenizer, &[("the king", "dog"), ("the river", "horse")]);
    let choices = ["girl", "dog", "wolf", "horse"].map(String::from).to_vec();
    let example = |prompt: &str, completion: &str| Example {
        choices: choices.clone(),
        ..Example::new(prompt, completion)
    };
    let examples = [
        example("the king", "dog"),
        example("the river", "horse"),
        example("the river", "wolf"),
    ];
    let (scores, samples) = run(&model, &tokenizer, &examples, &only(Metric::Accuracy));
    let taken: Vec<_> = samples.iter().map(|s| s.choice.unwrap()).collect();
    assert_eq!(taken, [1, 3, 3]);
    assert_eq!(samples[2].right_choice, Some(2));
    assert!((scores["acc"].value - 2.0 / 3.0).abs() < 1e-12);
    assert!(scores.contains_key("acc_norm") && !scores.contains_key("exact_match"));
    for sample in &samples {
        assert_eq!(sample.choice_nll.len(), 4);
        let norm = |i: usize| sample.choice_nll[i] / choices[i].len() as f64;
        let best = sample.choice_norm.unwrap();
        assert!((0..4).all(|i| norm(best) <= norm(i)));
    }
}

#[test]
fn the_batch_size_changes_nothing() {
    let tokenizer = model_tokenizer();
    let model = random(&tokenizer);
    for task in Task::ALL {
        let examples = task.examples(Split::Test, 12, 7);
        let mut options = EvalOptions::for_task(task);
        let (one, one_samples) = run(&model, &tokenizer, &examples, &options);
        options.batch_tokens = 100;
        let (other, other_samples) = run(&model, &tokenizer, &examples, &options);
        for (name, score) in &one {
            let close = |a: f64, b: f64| (a - b).abs() < 1e-4;
            assert!(close(score.value, other[name].value), "{task} {name}");
            assert!(close(score.stderr, other[name].stderr), "{task} {name}");
        }
        for (a, b) in one_samples.iter().zip(&other_samples) {
            assert_eq!((a.index, &a.prediction), (b.index, &b.prediction));
            assert_eq!((a.choice, a.exact_match), (b.choice, b.exact_match));
        }
    }
}

#[test]
fn what_cannot_be_scored_is_named() {
    let options = EvalOptions::default();
    assert!(message(&[], &options).contains("no examples"));
    let good = Example::new("the king", "dog");
    let long = Example::new("dog ".repeat(CONTEXT), "cat");
    let text = message(&[good.clone(), long.clone()], &options);
    assert!(
        text.starts_with("example 1:") && text.contains("context of 256"),
        "{text}"
    );
    // With a maximum length the same example fits.
    let tokenizer = model_tokenizer();
    let shorter = EvalOptions {
        max_len: Some(64),
        ..EvalOptions::default()
    };
    run(&random(&tokenizer), &tokenizer, &[long], &shorter);
    let text = message(&[Example::new("", "dog")], &options);
    assert!(text.contains("give a prompt"), "{text}");
    let text = message(std::slice::from_ref(&good), &only(Metric::Accuracy));
    assert!(text.contains("choices"), "{text}");
    let none = EvalOptions {
        batch_tokens: 0,
        ..EvalOptions::default()
    };
    assert!(message(&[good], &none).contains("1 token or more"));
}

#[test]
fn a_broken_model_is_an_error_not_a_score() {
    let tokenizer = model_tokenizer();
    let mut model = random(&tokenizer);
    model
        .visit(&mut |name, _, tensor| {
            if name == "model.norm.weight" {
                *tensor = (&*tensor * f64::NAN)?;
            }
            Ok(())
        })
        .unwrap();
    let examples = [Example::new("the king", "dog")];
    let options = EvalOptions::default();
    let error = evaluate(&model, &tokenizer, &examples, &options, &mut |_, _| true);
    assert!(matches!(error, Err(Error::NotFinite { index: 0 })));
}

#[test]
fn the_caller_may_stop() {
    let tokenizer = model_tokenizer();
    let examples = Task::Math.examples(Split::Test, 8, 1);
    let mut options = EvalOptions::for_task(Task::Math);
    options.batch_tokens = 1;
    let mut calls = 0;
    let result = evaluate(
        &random(&tokenizer),
        &tokenizer,
        &examples,
        &options,
        &mut |done, _| {
            calls += 1;
            done < 3
        },
    );
    assert!(matches!(result, Err(Error::Interrupted)));
    // The batch beside the one after which the caller stopped may end, and no other begins.
    assert!((4..=5).contains(&calls), "{calls}");
}

#[test]
fn samples_come_back_from_their_file() {
    let tokenizer = model_tokenizer();
    let examples = Task::Commonsense.examples(Split::Test, 5, 2);
    let options = EvalOptions::for_task(Task::Commonsense);
    let (_, samples) = run(&random(&tokenizer), &tokenizer, &examples, &options);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/samples_commonsense.jsonl");
    write_samples(&path, &samples).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 5);
    for (line, sample) in text.lines().zip(&samples) {
        let read: Sample = serde_json::from_str(line).unwrap();
        assert_eq!((read.index, &read.prompt), (sample.index, &sample.prompt));
        assert_eq!(read.choice, sample.choice);
        assert!((read.nll - sample.nll).abs() < 1e-9);
    }
}

/// Against the log-softmax of the logits of every window by itself.
#[test]
fn text_is_scored_token_by_token_with_windows_as_the_draws() {
    let tokenizer = model_tokenizer();
    let model = random(&tokenizer);
    let text = "The king and the dog, the river, and 12 wolves near a lake.\n".repeat(7);
    let windows = text_rows(&tokenizer, &text, 20, None).unwrap();
    let (scores, samples) =
        evaluate_text(&model, &tokenizer, &windows, 64, &mut |_, _| true).unwrap();
    let mut rows = Vec::new();
    for window in &windows {
        let tokens = &window.tokens;
        let hidden = model.forward(Tokens::one(tokens), None, &mut |_, _, _| Ok(()));
        let logits: Vec<Vec<f32>> = model.logits(&hidden.unwrap()).unwrap().to_vec2().unwrap();
        let nll = |at: usize| {
            let logits = &logits[at - 1];
            let sum: f64 = logits.iter().map(|&v| f64::from(v).exp()).sum();
            sum.ln() - f64::from(logits[tokens[at] as usize])
        };
        let predicted = window.answer_start..tokens.len();
        rows.push((predicted.len() as f64, predicted.map(nll).sum::<f64>()));
    }
    let tokens: f64 = rows.iter().map(|row| row.0).sum();
    assert_eq!(tokens as usize, tokenizer.encode(&text).unwrap().len());
    let nll = rows.iter().map(|row| row.1).sum::<f64>() / tokens;
    let near = |metric: &str, want: f64| {
        let found = scores[metric].value;
        assert!(
            (found - want).abs() < 1e-5 * want,
            "{metric}: {found} {want}"
        );
    };
    near("nll", nll);
    near("perplexity", nll.exp());
    // No character is longer than a byte, so that none lies in two windows.
    let whole: String = samples.iter().map(|s| s.target.as_str()).collect();
    assert_eq!(whole, text);
    near(
        "bits_per_byte",
        nll * tokens / text.len() as f64 / std::f64::consts::LN_2,
    );
    let n = rows.len() as f64;
    let squares: f64 = rows.iter().map(|row| (row.1 - nll * row.0).powi(2)).sum();
    let stderr = (squares * n / (n - 1.0)).sqrt() / tokens;
    assert!((scores["nll"].stderr - stderr).abs() < 1e-5 * stderr);
    assert!((scores["perplexity"].stderr / scores["perplexity"].value - stderr).abs() < 1e-6);
    assert_eq!(scores["nll"].n, rows.len());

    let alone = evaluate_text(&model, &tokenizer, &windows, 1, &mut |_, _| true);
    assert!((alone.unwrap().0["nll"].value - scores["nll"].value).abs() < 1e-6);
    let one = evaluate_text(&model, &tokenizer, &windows[..1], 64, &mut |_, _| true);
    assert_eq!(one.unwrap().0["nll"].stderr, 0.0);
}

#[test]
fn text_that_cannot_be_scored_is_refused() {
    let tokenizer = model_tokenizer();
    let model = random(&tokenizer);
    let window = |tokens, answer_start| Encoded {
        tokens: vec![5; tokens],
        answer_start,
    };
    let score = |windows: &[Encoded]| {
        let scored = evaluate_text(&model, &tokenizer, windows, 64, &mut |_, _| true);
        scored.unwrap_err()
    };
    assert!(matches!(score(&[]), Error::Empty));
    let bare = score(&[window(4, 1), window(4, 0)]);
    assert!(matches!(bare, Error::Example { index: 1, .. }), "{bare}");
    let long = score(&[window(CONTEXT + 1, 1)]);
    assert!(matches!(long, Error::Example { index: 0, .. }), "{long}");
    let windows = [window(4, 1), window(5, 1)];
    let stopped = evaluate_text(&model, &tokenizer, &windows, 1, &mut |done, _| done < 1);
    assert!(matches!(stopped, Err(Error::Interrupted)));
}
