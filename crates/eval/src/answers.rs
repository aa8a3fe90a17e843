//! Answers that must be read, not only compared: they are generated, greedily.

use crate::Result;
use crate::side_by_side::{lock, side_by_side};
use lightmoe_data::Encoded;
use lightmoe_models::{GenerateOptions, LanguageModel, ModelTokenizer, generate};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// A generated answer may be this many tokens longer than the longest target.
const MARGIN: usize = 16;

/// Generates the answers of the rows `wanted` and returns their texts, by row, without white space
/// around them. Prompts of one length run together, with at most `batch_tokens` tokens a batch, or
/// one prompt. `each` is told how many answers a batch finished.
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
    let options = GenerateOptions::greedy(longest.max().unwrap_or(0) + MARGIN, vec![tokenizer.eos]);
    let mut by_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for &row in wanted {
        let length = rows[row].answer_start;
        by_length.entry(length).or_default().push(row);
    }
    let batches: Vec<&[usize]> = by_length
        .iter()
        .flat_map(|(length, group)| {
            let most = batch_tokens / (length + options.max_new_tokens);
            group.chunks(most.max(1))
        })
        .collect();
    let mut texts = BTreeMap::new();
    let shared = Mutex::new((&mut texts, each));
    side_by_side(model, batches.len(), &|number| {
        let batch = batches[number];
        let prompt = |&row: &usize| rows[row].tokens[..rows[row].answer_start].to_vec();
        let prompts: Vec<Vec<u32>> = batch.iter().map(prompt).collect();
        let answers = generate(model, &prompts, &options, &mut |_| true)?;
        let (texts, each) = &mut *lock(&shared);
        for (&row, answer) in batch.iter().zip(answers) {
            texts.insert(row, tokenizer.decode(&answer)?.trim().to_owned());
        }
        each(batch.len())
    })?;
    Ok(texts)
}
