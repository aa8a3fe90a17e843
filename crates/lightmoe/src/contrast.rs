//! The original and the result of a run on the same test items: the load of every expert, and what
//! both answer. For the report alone; nothing is decided by it.

use crate::items::Items;
use crate::pipeline::{Fit, INTERRUPTED, fit, load_model};
use crate::progress::{Progress, stopped};
use crate::recipe::Recipe;
use crate::source::TaskData;
use crate::versioned;
use anyhow::{Result, anyhow, ensure};
use lightmoe_data::Encoded;
use lightmoe_eval::{EvalOptions, LayerLoad, expert_load};
use lightmoe_models::folder::write_file;
use lightmoe_models::{
    Checkpoint, GenerateOptions, LanguageModel, ModelTokenizer, Next, generate_rows,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of the layout of `contrast.json`.
const SCHEMA_VERSION: u32 = 1;
/// Test items that are answered.
const ANSWERS: usize = 8;
/// The most tokens of an answer.
const ANSWER_TOKENS: usize = 64;

/// The whole of `contrast.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Contrast {
    /// Version of this layout.
    #[schemars(extend("const" = SCHEMA_VERSION))]
    pub schema_version: u32,
    /// The task whose test items were read, in their order.
    pub task: String,
    /// How many of them.
    pub examples: usize,
    /// Their tokens, prompts and right answers.
    pub tokens: u64,
    /// Every layer with experts, ascending.
    pub load: Vec<LoadPair>,
    /// What both answer to the first of these items; empty for text, which asks nothing, and where a
    /// model did not fit memory, since every token would have read all of its weights again.
    pub answers: Vec<AnswerPair>,
}

/// How many tokens chose each expert of a layer, in either model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LoadPair {
    /// The layer's number in the model.
    pub layer: usize,
    /// In the original, `[E]`.
    pub original: Vec<u64>,
    /// In the result, `[E]`.
    pub result: Vec<u64>,
}

/// One test item and what either model answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AnswerPair {
    /// The prompt.
    pub prompt: String,
    /// The right answer.
    pub target: String,
    /// The original's, greedy.
    pub original: Answer,
    /// The result's, greedy.
    pub result: Answer,
}

/// What a model answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Whether it ended by itself; else it was cut off.
    pub whole: bool,
}

impl Contrast {
    /// Reads the file.
    ///
    /// # Errors
    /// If it cannot be read, is no such file, or is of another version.
    pub fn load(path: &Path) -> Result<Self> {
        versioned::load(path, SCHEMA_VERSION, "remove it")
    }
}

/// The first test items of a run, up to the `contrast_tokens` of its recipe.
///
/// # Errors
/// If one has an answer that does not fit the longest sequence.
pub fn contrast_rows(
    data: &TaskData,
    tokenizer: &ModelTokenizer,
    recipe: &Recipe,
) -> Result<Vec<Encoded>> {
    let mut rows = data.test.encoded(tokenizer, recipe.max_length)?;
    let mut tokens = 0;
    let within = rows.iter().take_while(|row| {
        tokens += row.tokens.len();
        tokens <= recipe.contrast_tokens
    });
    let within = within.count();
    // An item that is longer than all that is asked for is still one to look at.
    rows.truncate(within.max(1));
    Ok(rows)
}

/// Stage contrast: reads the test items of `recipe`, up to its `contrast_tokens`, with both models →
/// `target`.
///
/// # Errors
/// If an item does not fit the models' context, a model is damaged, or the work was stopped.
pub fn contrast_stage(
    original: &Checkpoint,
    result: &Checkpoint,
    data: &TaskData,
    recipe: &Recipe,
    target: &Path,
) -> Result<()> {
    let tokenizer = ModelTokenizer::load(original.dir(), original.config().eos_token_id)?;
    let rows = contrast_rows(data, &tokenizer, recipe)?;
    let answers = match (&data.test, fit(&[original]), fit(&[result])) {
        (Items::Examples(_), Fit::Whole, Fit::Whole) => Answers::First,
        _ => Answers::None,
    };
    let look = |what: &str, checkpoint| look(what, checkpoint, &rows, &tokenizer, answers);
    let (before, before_answers) = look("original", original)?;
    let (after, after_answers) = look("result", result)?;
    let texts = data
        .test
        .examples()
        .iter()
        .zip(before_answers.into_iter().zip(after_answers));
    let contrast = Contrast {
        schema_version: SCHEMA_VERSION,
        task: data.name.clone(),
        examples: rows.len(),
        tokens: rows.iter().map(|row| row.tokens.len() as u64).sum(),
        load: before
            .into_iter()
            .zip(after)
            .map(|(original, result)| LoadPair {
                layer: original.layer,
                original: original.tokens,
                result: result.tokens,
            })
            .collect(),
        answers: texts
            .map(|(example, (original, result))| AnswerPair {
                prompt: example.prompt.clone(),
                target: example.completion.clone(),
                original,
                result,
            })
            .collect(),
    };
    let mut text = serde_json::to_vec(&contrast)?;
    text.push(b'\n');
    Ok(write_file(target, &text)?)
}

/// Which test items are answered.
#[derive(Clone, Copy)]
enum Answers {
    /// The first [`ANSWERS`].
    First,
    /// No one.
    None,
}

/// The loads of a model on `rows`, and its answers.
fn look(
    what: &str,
    checkpoint: &Checkpoint,
    rows: &[Encoded],
    tokenizer: &ModelTokenizer,
    answers: Answers,
) -> Result<(Vec<LayerLoad>, Vec<Answer>)> {
    let model = load_model(checkpoint)?;
    let bar = Progress::new(what, rows.len());
    let sequences: Vec<Vec<u32>> = rows.iter().map(|row| row.tokens.clone()).collect();
    let batch = EvalOptions::default().batch_tokens;
    let each = &mut |done, all| bar.of(done, all);
    let load = expert_load(&*model, &sequences, batch, each).map_err(|e| match stopped() {
        true => anyhow!(INTERRUPTED),
        false => e.into(),
    })?;
    let answers = match answers {
        Answers::First => answer(&*model, &rows[..rows.len().min(ANSWERS)], tokenizer)?,
        Answers::None => Vec::new(),
    };
    Ok((load, answers))
}

fn answer(
    model: &dyn LanguageModel,
    rows: &[Encoded],
    tokenizer: &ModelTokenizer,
) -> Result<Vec<Answer>> {
    let prompts: Vec<Vec<u32>> = rows
        .iter()
        .map(|row| row.tokens[..row.answer_start].to_vec())
        .collect();
    // An item whose prompt was cut off whole has nothing to answer.
    if prompts.iter().any(Vec::is_empty) {
        return Ok(Vec::new());
    }
    let options = GenerateOptions::greedy(ANSWER_TOKENS, tokenizer.ends.clone());
    let made = generate_rows(model, &prompts, &options, &mut |_, _| {
        Ok(match stopped() {
            true => Next::Stop,
            false => Next::Continue,
        })
    })?;
    ensure!(!stopped(), INTERRUPTED);
    let context = model.config().max_position_embeddings;
    let read = made.iter().zip(&prompts).map(|(ids, prompt)| {
        let cut = ids.len() == ANSWER_TOKENS || prompt.len() + ids.len() == context;
        Ok(Answer {
            text: tokenizer.decode(ids)?.trim().to_owned(),
            whole: !cut,
        })
    });
    read.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in a conversation: `generation_config.json` may name more tokens that end an answer than one.
    #[test]
    fn every_token_that_ends_an_answer_ends_one() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/olmoe-nano");
        let checkpoint = Checkpoint::open(Path::new(folder)).unwrap();
        let model = load_model(&checkpoint).unwrap();
        let mut tokenizer =
            ModelTokenizer::load(checkpoint.dir(), checkpoint.config().eos_token_id).unwrap();
        let tokens = tokenizer.encode("Compute 3 + 4.\n").unwrap();
        let rows = [Encoded {
            answer_start: tokens.len(),
            tokens,
        }];
        let first = answer(&*model, &rows, &tokenizer).unwrap().remove(0);
        assert!(!first.text.is_empty());
        // The token that the answer begins with ends it, too.
        let options = GenerateOptions::greedy(1, Vec::new());
        let prompts = [rows[0].tokens.clone()];
        let made = generate_rows(&*model, &prompts, &options, &mut |_, _| Ok(Next::Continue));
        tokenizer.ends.push(made.unwrap()[0][0]);
        let ended = answer(&*model, &rows, &tokenizer).unwrap().remove(0);
        assert_eq!((ended.text.as_str(), ended.whole), ("", true));
    }
}
