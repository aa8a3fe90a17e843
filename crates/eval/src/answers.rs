//! Answers that must be read, not only compared: they are generated, greedily.

use crate::Result;
use crate::queues::queues;
use crate::side_by_side::{lock, side_by_side};
use lightmoe_data::Encoded;
use lightmoe_models::{GenerateOptions, LanguageModel, ModelTokenizer, generate};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// A generated answer may be this many tokens longer than the longest target.
const MARGIN: usize = 16;

/// Generates the answers of the rows `wanted` and returns their texts, by row, without white space
/// around them. Prompts run together, with at most `batch_tokens` tokens at a time, or one prompt. `each` is
/// told how many answers were finished.
pub(crate) fn generate_answers(
    model: &dyn LanguageModel,
    tokenizer: &ModelTokenizer,
    rows: &[Encoded],
    wanted: &[usize],
    batch_tokens: usize,
    each: &mut (dyn FnMut(usize) -> Result<()> + Send),
) -> Result<BTreeMap<usize, String>> {
    // Of all rows, not only the wanted ones, so that the limit depends on the task alone.
    let longest = rows.iter().map(|row| row.tokens.len() - row.answer_start);
    let most = longest.max().unwrap_or(0) + MARGIN;
    let mut order = wanted.to_vec();
    order.sort_by_key(|&row| Reverse(rows[row].answer_start));
    let queues = queues(&order, |row| rows[row].answer_start, most, batch_tokens);
    let mut texts = BTreeMap::new();
    let shared = Mutex::new((&mut texts, each));
    side_by_side(model, queues.len(), &|number| {
        let queue = &queues[number];
        let prompt = |&row: &usize| rows[row].tokens[..rows[row].answer_start].to_vec();
        let prompts: Vec<Vec<u32>> = queue.prompts.iter().map(prompt).collect();
        let options = GenerateOptions {
            at_once: queue.at_once,
            ..GenerateOptions::greedy(most, tokenizer.ends.clone())
        };
        let answers = generate(model, &prompts, &options, &mut |_| true)?;
        let (texts, each) = &mut *lock(&shared);
        for (&row, answer) in queue.prompts.iter().zip(answers) {
            texts.insert(row, tokenizer.decode(&answer)?.trim().to_owned());
        }
        each(queue.prompts.len())
    })?;
    Ok(texts)
}
