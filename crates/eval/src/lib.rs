//! Scores of a model on examples, with standard errors, computed as lm-evaluation-harness does
//! where it has the metric.
//!
//! Targets are deterministic, so exact match needs no generation: greedy decoding gives the target
//! if and only if, in one teacher-forced pass, every answer token has the highest logit. Only where
//! a wrong answer must be read (a program that differs and yet is right, chrF) is it generated.
//!
//! [`harness`] runs the standard benchmarks, described by files, as lm-evaluation-harness does;
//! [`divergence`] says how far a compressed model's predictions are from the original's,
//! and [`paired`] what two evaluations of the same items differ by.
//!
//! Invariant: the scores do not depend on how examples are batched (up to rounding of the model).

mod answers;
mod batches;
pub mod divergence;
mod error;
pub mod harness;
mod items;
mod likelihood;
mod load;
pub mod paired;
mod queues;
mod sample;
mod score;
mod side_by_side;
mod text;

pub use error::{Error, Result};
pub use load::{LayerLoad, expert_load};
pub use sample::{Sample, write_samples};
pub use score::{Score, Scores};
pub use text::evaluate_text;

use items::Items;
use lightmoe_data::{Example, Metric, Task};
use lightmoe_models::{LanguageModel, ModelTokenizer};

/// How to evaluate.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// What to compute besides `answer_nll`.
    pub metrics: Vec<Metric>,
    /// The task whose rule says which answers are right; without one, they must equal the target.
    pub task: Option<Task>,
    /// The most tokens of a batch, padding included; a longer example is a batch of its own.
    pub batch_tokens: usize,
    /// Longest example in tokens, end token included; a longer prompt loses its beginning. Without
    /// it, nothing is cut off.
    pub max_len: Option<usize>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            metrics: vec![Metric::ExactMatch],
            task: None,
            batch_tokens: 8192,
            max_len: None,
        }
    }
}

impl EvalOptions {
    /// The metrics and the rule of a built-in task.
    pub fn for_task(task: Task) -> Self {
        Self {
            metrics: task.metrics().to_vec(),
            task: Some(task),
            ..Self::default()
        }
    }
}

/// Counts finished sequences and lets the caller stop.
struct Progress<'a> {
    done: usize,
    total: usize,
    report: &'a mut (dyn FnMut(usize, usize) -> bool + Send),
}

impl Progress<'_> {
    fn advance(&mut self, count: usize) -> Result<()> {
        self.done += count;
        match (self.report)(self.done, self.total) {
            true => Ok(()),
            false => Err(Error::Interrupted),
        }
    }
}

/// Scores `model` on `examples`; the samples come in the order of the examples.
///
/// | score | what it is |
/// |---|---|
/// | `answer_nll` | always; mean over examples of the target's negative log-likelihood in nats per answer token (end token included), so every example counts the same however long it is |
/// | `exact_match` | share of examples whose greedy answer, end token included, is the target; for [`Task::Code`], or what [`Task::accepts`] |
/// | `acc` | share whose right choice is the likeliest of its `choices`, end token left out |
/// | `acc_norm` | the same by log-likelihood per UTF-8 byte of the choice |
/// | `chrf` | corpus chrF2 of the greedy answers, 0 to 100; error by bootstrap |
///
/// Among equal choices the first counts. Where wrong answers are generated (for `chrf`, and for
/// `exact_match` of [`Task::Code`]), an answer that is the target as text, though in other tokens,
/// is right as well.
///
/// `progress` sees how many sequences are done, of how many; the total grows when answers must be
/// generated. Its `false` stops the work.
///
/// # Errors
/// [`Error::Empty`] without examples; [`Error::Example`] and [`Error::Encode`] for an example that
/// is longer than `max_position_embeddings`, has an empty prompt, or has no choices though they are
/// to be ranked; [`Error::NotFinite`] if the model gives no numbers; [`Error::Interrupted`].
pub fn evaluate(
    model: &dyn LanguageModel,
    tokenizer: &ModelTokenizer,
    examples: &[Example],
    options: &EvalOptions,
    progress: &mut (dyn FnMut(usize, usize) -> bool + Send),
) -> Result<(Scores, Vec<Sample>)> {
    if options.batch_tokens == 0 {
        return Err(Error::Invalid(
            "a batch of 0 tokens holds nothing; set the batch size to 1 token or more".into(),
        ));
    }
    let context = model.config().max_position_embeddings;
    let items = Items::new(tokenizer, examples, options, context)?;
    let mut progress = Progress {
        done: 0,
        total: items.rows.len(),
        report: progress,
    };
    progress.advance(0)?;
    let answers = likelihood::score(model, &items.rows, options.batch_tokens, &mut |n| {
        progress.advance(n)
    })?;
    let mut samples = items.samples(examples, &answers)?;
    if is_generated(options) {
        let wrong: Vec<usize> = samples
            .iter()
            .filter(|sample| !sample.exact_match)
            .map(|sample| items.of_example[sample.index].answer)
            .collect();
        progress.total += wrong.len();
        let texts = answers::generate_answers(
            model,
            tokenizer,
            &items.rows,
            &wrong,
            options.batch_tokens,
            &mut |n| progress.advance(n),
        )?;
        for sample in &mut samples {
            if let Some(text) = texts.get(&items.of_example[sample.index].answer) {
                sample.exact_match = is_right(options.task, &examples[sample.index], text);
                sample.prediction = Some(text.clone());
            }
        }
    }
    Ok((scores(options, &samples), samples))
}

fn is_generated(options: &EvalOptions) -> bool {
    options.metrics.iter().any(|metric| match metric {
        Metric::Chrf => true,
        Metric::ExactMatch => options.task == Some(Task::Code),
        Metric::Accuracy => false,
    })
}

fn is_right(task: Option<Task>, example: &Example, answer: &str) -> bool {
    match task {
        Some(task) => task.accepts(example, answer),
        None => answer == example.completion.trim(),
    }
}

fn scores(options: &EvalOptions, samples: &[Sample]) -> Scores {
    let mean = |value: &dyn Fn(&Sample) -> f64| -> Score {
        Score::mean(&samples.iter().map(value).collect::<Vec<_>>())
    };
    let share =
        |holds: &dyn Fn(&Sample) -> bool| mean(&|sample| f64::from(u8::from(holds(sample))));
    let mut scores = Scores::new();
    let mut add = |name: &str, score: Score| scores.insert(name.to_owned(), score);
    add("answer_nll", mean(&|sample| sample.nll));
    for metric in &options.metrics {
        match metric {
            Metric::ExactMatch => {
                add("exact_match", share(&|sample| sample.exact_match));
            }
            Metric::Accuracy => {
                add("acc", share(&|sample| sample.choice == sample.right_choice));
                add(
                    "acc_norm",
                    share(&|sample| sample.choice_norm == sample.right_choice),
                );
            }
            Metric::Chrf => {
                let pairs: Vec<(&str, &str)> = samples
                    .iter()
                    .map(|s| (s.prediction.as_deref().unwrap_or(""), s.target.as_str()))
                    .collect();
                add("chrf", Score::chrf(&pairs));
            }
        }
    }
    scores
}
