//! Examples as rows of tokens, and rows back to samples.

use crate::likelihood::Answer;
use crate::{Error, EvalOptions, Result, Sample};
use lightmoe_data::{Encoded, Example, Metric, encode};
use lightmoe_models::ModelTokenizer;

/// Every sequence to score.
pub(crate) struct Items {
    /// The sequences.
    pub(crate) rows: Vec<Encoded>,
    /// Which of them belong to each example.
    pub(crate) of_example: Vec<Item>,
}

/// The rows of one example.
pub(crate) struct Item {
    /// Row of the target.
    pub(crate) answer: usize,
    /// Row of each choice, the target's own for the right one; empty if choices are not ranked.
    choices: Vec<usize>,
    /// Which choice is the target.
    right: Option<usize>,
}

impl Items {
    /// Encodes and checks everything, so that nothing fails for an example's sake later on.
    pub(crate) fn new(
        tokenizer: &ModelTokenizer,
        examples: &[Example],
        options: &EvalOptions,
        context: usize,
    ) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::Empty);
        }
        let is_ranked = options.metrics.contains(&Metric::Accuracy);
        let mut rows = Vec::new();
        let mut of_example = Vec::with_capacity(examples.len());
        for (index, example) in examples.iter().enumerate() {
            let fail = |message: String| Error::Example { index, message };
            let mut add = |example: &Example| -> Result<usize> {
                let row = encode(&tokenizer.inner, tokenizer.eos, example, options.max_len)
                    .map_err(|source| Error::Encode { index, source })?;
                check(&row, context).map_err(fail)?;
                rows.push(row);
                Ok(rows.len() - 1)
            };
            let answer = add(example)?;
            let (mut choices, mut right) = (Vec::new(), None);
            if is_ranked {
                right = Some(right_choice(example).map_err(fail)?);
                for choice in &example.choices {
                    choices.push(match *choice == example.completion {
                        true => answer,
                        false => add(&Example::new(&example.prompt, choice))?,
                    });
                }
            }
            of_example.push(Item {
                answer,
                choices,
                right,
            });
        }
        Ok(Self { rows, of_example })
    }

    /// What the likelihoods of all rows say of each example.
    pub(crate) fn samples(&self, examples: &[Example], answers: &[Answer]) -> Result<Vec<Sample>> {
        let samples = self.of_example.iter().zip(examples).enumerate();
        samples
            .map(|(index, (item, example))| item.sample(index, example, answers))
            .collect()
    }
}

impl Item {
    fn sample(&self, index: usize, example: &Example, answers: &[Answer]) -> Result<Sample> {
        let answer = &answers[self.answer];
        // Ranked without the end token, as the harness does.
        let choice_nll: Vec<f64> = self
            .choices
            .iter()
            .map(|&row| {
                answers[row]
                    .nll
                    .split_last()
                    .map_or(0.0, |(_, rest)| rest.iter().sum())
            })
            .collect();
        let lengths = example.choices.iter().map(|choice| choice.len() as f64);
        let per_byte: Vec<f64> = choice_nll.iter().zip(lengths).map(|(l, n)| l / n).collect();
        let nll = answer.nll.iter().sum::<f64>() / answer.nll.len() as f64;
        if !nll.is_finite() || choice_nll.iter().any(|value| !value.is_finite()) {
            return Err(Error::NotFinite { index });
        }
        Ok(Sample {
            index,
            prompt: example.prompt.clone(),
            target: example.completion.clone(),
            prediction: answer.greedy.then(|| example.completion.trim().to_owned()),
            exact_match: answer.greedy,
            nll,
            answer_tokens: answer.nll.len(),
            choice: smallest(&choice_nll),
            choice_norm: smallest(&per_byte),
            right_choice: self.right,
            choice_nll,
        })
    }
}

/// The first of the smallest.
fn smallest(values: &[f64]) -> Option<usize> {
    (0..values.len()).min_by(|&a, &b| values[a].total_cmp(&values[b]))
}

/// What is wrong with a row, if it cannot be scored.
pub(crate) fn check(row: &Encoded, context: usize) -> std::result::Result<(), String> {
    let length = row.tokens.len();
    if row.answer_start == 0 {
        return Err(
            "no token of the prompt is left to answer; give a prompt, or raise the maximum length"
                .into(),
        );
    }
    if length > context {
        return Err(format!(
            "{length} tokens are more than the model's context of {context} \
             (`max_position_embeddings`); set a maximum length, or leave the example out"
        ));
    }
    Ok(())
}

fn right_choice(example: &Example) -> std::result::Result<usize, String> {
    if example.choices.iter().any(String::is_empty) {
        return Err("a choice is empty, and has no likelihood; remove it".into());
    }
    let found = example
        .choices
        .iter()
        .position(|c| *c == example.completion);
    found.ok_or_else(|| {
        format!(
            "none of its {} choices is the completion; add it to `choices`, or leave the accuracy \
             out",
            example.choices.len()
        )
    })
}
