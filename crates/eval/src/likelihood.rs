//! One teacher-forced pass: the likelihood of every answer token, and whether each is the argmax.
//!
//! Symbols: `B` rows of a batch, `T` tokens of its longest row, `H` hidden size, `A` answer tokens,
//! `V` vocabulary.

use crate::batches::{Batch, batches};
use crate::side_by_side::{lock, side_by_side};
use crate::{Error, Result};
use candle_core::{D, Tensor};
use lightmoe_data::Encoded;
use lightmoe_kernels::cross_entropy;
use lightmoe_models::config::RopeScaling;
use lightmoe_models::{LanguageModel, Tokens};
use std::sync::Mutex;

/// The most logits held at once (64 MiB of f32): answer rows go through the head in parts.
const LOGITS: usize = 1 << 24;

/// The answer of one row.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    /// Negative log-likelihood in nats of each answer token.
    pub(crate) nll: Vec<f64>,
    /// Whether every answer token has the highest logit (the first of equal ones), so that greedy
    /// decoding gives the answer.
    pub(crate) greedy: bool,
}

/// Scores the answers of `rows`, in their order. Every row must have a prompt token. `each` is told
/// how many rows a batch finished.
pub(crate) fn score(
    model: &dyn LanguageModel,
    rows: &[Encoded],
    batch_tokens: usize,
    each: &mut (dyn FnMut(usize) -> Result<()> + Send),
) -> Result<Vec<Answer>> {
    let batches = batches(rows, batch_tokens);
    let mut answers = vec![Answer::default(); rows.len()];
    let shared = Mutex::new((&mut answers, each));
    side_by_side(model, batches.len(), &|number| {
        let batch = &batches[number];
        let scored = score_batch(model, rows, batch)?;
        let (answers, each) = &mut *lock(&shared);
        for (&row, answer) in batch.rows.iter().zip(scored) {
            answers[row] = answer;
        }
        each(batch.rows.len())
    })?;
    Ok(answers)
}

/// What the model reads of a row: the last answer token is only predicted.
pub(crate) fn input(row: &Encoded) -> &[u32] {
    &row.tokens[..row.tokens.len().saturating_sub(1)]
}

/// Scores the rows of a batch. What its rows have in common is read first, once for each beginning,
/// and then the rest of each row.
pub(crate) fn score_batch(
    model: &dyn LanguageModel,
    rows: &[Encoded],
    batch: &Batch,
) -> Result<Vec<Answer>> {
    let shared = match model.config().rope_scaling {
        // Its angles depend on how long the whole row is.
        RopeScaling::Long(_) => 0,
        _ => batch.shared,
    };
    let laid = Laid::new(rows, batch, shared);
    let mut cache = None;
    if let Some(rows) = laid.beginnings.len().checked_div(shared) {
        let tokens = Tokens {
            rows,
            ids: &laid.beginnings,
        };
        let mut read = model.cache();
        model.hidden_states(tokens, Some(&mut read))?;
        cache = Some(read.select(&laid.of_beginning)?);
    }
    let hidden = model.hidden_states(laid.tokens(), cache.as_mut())?;
    let mut scored = tokens_of(model, &hidden, &laid)?.into_iter();
    Ok(batch
        .rows
        .iter()
        .map(|&row| {
            let count = rows[row].tokens.len() - rows[row].answer_start;
            let tokens: Vec<(f64, bool)> = scored.by_ref().take(count).collect();
            Answer {
                greedy: tokens.iter().all(|token| token.1),
                nll: tokens.into_iter().map(|token| token.0).collect(),
            }
        })
        .collect())
}

/// A batch as the model reads it.
pub(crate) struct Laid {
    /// What the rows begin with, once each.
    beginnings: Vec<u32>,
    /// By row that is read, the number of its beginning.
    of_beginning: Vec<u32>,
    /// What follows the beginnings, `[B, T]`.
    ids: Vec<u32>,
    /// Where of `[B · T]` each answer token is predicted, `[A]`, the rows of the batch in turn.
    positions: Vec<u32>,
    /// The answer tokens, `[A]`.
    pub(crate) targets: Vec<u32>,
}

impl Laid {
    /// Lays out a batch, the first `shared` tokens of its rows apart. Rows with the same input, which
    /// are together, are read once.
    pub(crate) fn new(rows: &[Encoded], batch: &Batch, shared: usize) -> Self {
        let longest = batch.rows.iter().map(|&row| input(&rows[row]).len()).max();
        let width = longest.unwrap_or(0) - shared;
        let mut laid = Self {
            beginnings: Vec::new(),
            of_beginning: Vec::new(),
            ids: Vec::new(),
            positions: Vec::new(),
            targets: Vec::new(),
        };
        let mut last: Option<&[u32]> = None;
        for &row in &batch.rows {
            let row = &rows[row];
            if last != Some(input(row)) {
                let (beginning, rest) = input(row).split_at(shared);
                if last.is_none_or(|last| last[..shared] != *beginning) {
                    laid.beginnings.extend_from_slice(beginning);
                }
                last = Some(input(row));
                let beginnings = laid.beginnings.len() / shared.max(1);
                laid.of_beginning.push(beginnings.saturating_sub(1) as u32);
                let end = laid.ids.len() + width;
                laid.ids.extend_from_slice(rest);
                // The value of the padding does not matter: nothing on its left sees it.
                laid.ids.resize(end, 0);
            }
            let first = laid.ids.len() - width + row.answer_start - 1 - shared;
            let answer = &row.tokens[row.answer_start..];
            let positions = (first..first + answer.len()).map(|at| at as u32);
            laid.positions.extend(positions);
            laid.targets.extend_from_slice(answer);
        }
        laid
    }

    /// What is read behind the beginnings.
    pub(crate) fn tokens(&self) -> Tokens<'_> {
        Tokens {
            rows: self.of_beginning.len(),
            ids: &self.ids,
        }
    }

    /// Positions and answer tokens in parts whose logits may be held.
    ///
    /// # Errors
    /// If an answer has a token that the vocabulary has not.
    pub(crate) fn parts(&self, vocab: usize) -> Result<impl Iterator<Item = (&[u32], &[u32])>> {
        if let Some(id) = self.targets.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::Invalid(format!(
                "token id {id} is outside the vocabulary of {vocab}; use the model's own tokenizer"
            )));
        }
        let part = (LOGITS / vocab.max(1)).max(1);
        Ok(self.positions.chunks(part).zip(self.targets.chunks(part)))
    }
}

/// Likelihood and greediness of each answer token of a batch, predicted from `hidden: [B · T, H]`.
fn tokens_of(model: &dyn LanguageModel, hidden: &Tensor, laid: &Laid) -> Result<Vec<(f64, bool)>> {
    let mut out = Vec::with_capacity(laid.targets.len());
    for (positions, targets) in laid.parts(model.config().vocab_size)? {
        let index = Tensor::new(positions, hidden.device())?;
        let logits = model.logits(&hidden.index_select(&index, 0)?)?;
        let nll: Vec<f32> = cross_entropy(&logits, targets)?.to_vec1()?;
        // The sampler of `generate` takes this very argmax.
        let best: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
        let greedy = best
            .iter()
            .zip(targets)
            .map(|(best, target)| best == target);
        out.extend(nll.into_iter().map(f64::from).zip(greedy));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightmoe_models::Decoder;
    use lightmoe_models::{GenerateOptions, ModelConfig, generate};
    use rand::Rng;
    use rand_chacha::ChaCha8Rng;
    use std::path::Path;

    const EOS: u32 = 0;

    fn model(vocab: usize) -> Decoder {
        let raw = serde_json::json!({
            "model_type": "olmoe", "vocab_size": vocab, "hidden_size": 16,
            "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2,
            "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        });
        let config = ModelConfig::from_json(&raw, Path::new("config.json")).unwrap();
        Decoder::random(&config, 3).unwrap()
    }

    fn row(rng: &mut ChaCha8Rng, vocab: u32, answer: usize) -> Encoded {
        let prompt = rng.random_range(1..7);
        let mut tokens: Vec<u32> = (1..prompt + answer)
            .map(|_| rng.random_range(1..vocab))
            .collect();
        tokens.push(EOS);
        Encoded {
            tokens,
            answer_start: prompt,
        }
    }

    fn greedy(model: &Decoder, row: &Encoded) -> Vec<u32> {
        let options = GenerateOptions::greedy(row.tokens.len() - row.answer_start, Vec::new());
        let prompt = vec![row.tokens[..row.answer_start].to_vec()];
        generate(model, &prompt, &options, &mut |_| true)
            .unwrap()
            .remove(0)
    }

    #[test]
    fn greedy_exactly_where_generation_gives_the_answer() {
        // A vocabulary of four, so that chance makes hits; and rows that are made of hits.
        let (model, mut rng) = (model(4), lightmoe_models::random::stream(1, "rows"));
        let mut rows: Vec<Encoded> = (0..300).map(|i| row(&mut rng, 4, 1 + i % 3)).collect();
        for i in 0..60 {
            let mut row = row(&mut rng, 4, 6);
            let made = greedy(&model, &row);
            row.tokens.splice(row.answer_start.., made);
            if i % 2 == 0 {
                let at = rng.random_range(row.answer_start..row.tokens.len());
                row.tokens[at] = (row.tokens[at] + 1) % 4;
            }
            rows.push(row);
        }
        let answers = score(&model, &rows, 64, &mut |_| Ok(())).unwrap();
        let mut hits = 0;
        for (row, answer) in rows.iter().zip(&answers) {
            let generated = greedy(&model, row) == row.tokens[row.answer_start..];
            assert_eq!(answer.greedy, generated, "{row:?}");
            hits += usize::from(generated);
        }
        assert!(hits > 40 && hits < 300, "{hits}");
    }

    #[test]
    fn the_batch_changes_nothing_and_the_numbers_are_the_log_softmax() {
        let (model, mut rng) = (model(50), lightmoe_models::random::stream(2, "rows"));
        let rows: Vec<Encoded> = (0..40).map(|i| row(&mut rng, 50, 1 + i % 5)).collect();
        let mut done = 0;
        let large = score(&model, &rows, 4096, &mut |n| {
            done += n;
            Ok(())
        })
        .unwrap();
        assert_eq!(done, rows.len());
        let alone = score(&model, &rows, 1, &mut |_| Ok(())).unwrap();
        for (i, row) in rows.iter().enumerate() {
            assert_eq!(large[i].greedy, alone[i].greedy);
            assert_eq!(large[i].nll.len(), row.tokens.len() - row.answer_start);
            let hidden = model
                .forward(Tokens::one(&row.tokens), None, &mut |_, _, _| Ok(()))
                .unwrap();
            let logits: Vec<Vec<f32>> = model.logits(&hidden).unwrap().to_vec2().unwrap();
            for (k, &target) in row.tokens[row.answer_start..].iter().enumerate() {
                let logits = &logits[row.answer_start - 1 + k];
                let sum: f64 = logits.iter().map(|&v| f64::from(v).exp()).sum();
                let want = sum.ln() - f64::from(logits[target as usize]);
                assert!((large[i].nll[k] - want).abs() < 1e-5);
                assert!((alone[i].nll[k] - want).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn what_the_model_reads_the_same_is_read_once() {
        let (model, mut rng) = (model(50), lightmoe_models::random::stream(5, "rows"));
        let mut rows = vec![row(&mut rng, 50, 2), row(&mut rng, 50, 3)];
        for last in 1..4 {
            let mut twin = rows[0].clone();
            *twin.tokens.last_mut().unwrap() = last;
            rows.push(twin);
        }
        // The same tokens, but more of them are the answer.
        rows.push(Encoded {
            tokens: rows[0].tokens.clone(),
            answer_start: rows[0].answer_start.saturating_sub(1).max(1),
        });
        assert_eq!(batches(&rows, 1).len(), 2);
        let together = score(&model, &rows, 1, &mut |_| Ok(())).unwrap();
        assert_as_alone(&model, &rows, &together);
    }

    #[test]
    fn what_rows_have_in_common_is_read_once() {
        let (model, mut rng) = (model(50), lightmoe_models::random::stream(6, "rows"));
        // Three items of four choices, two of them behind contexts of about one length.
        let mut rows = Vec::new();
        for length in [20, 21, 33] {
            let context: Vec<u32> = (0..length).map(|_| rng.random_range(1..50)).collect();
            for choice in 1..5 {
                let choice = (0..choice).map(|_| rng.random_range(1..50));
                rows.push(Encoded {
                    tokens: context.iter().copied().chain(choice).collect(),
                    answer_start: length,
                });
            }
        }
        let shared: Vec<usize> = batches(&rows, 4096).iter().map(|b| b.shared).collect();
        assert_eq!(shared, [32, 16]);
        let together = score(&model, &rows, 4096, &mut |_| Ok(())).unwrap();
        assert_as_alone(&model, &rows, &together);
    }

    #[track_caller]
    fn assert_as_alone(model: &Decoder, rows: &[Encoded], together: &[Answer]) {
        for (row, answer) in rows.iter().zip(together) {
            let alone = score(model, std::slice::from_ref(row), 1, &mut |_| Ok(())).unwrap();
            assert_eq!(answer.greedy, alone[0].greedy);
            assert_eq!(answer.nll.len(), alone[0].nll.len());
            for (a, b) in answer.nll.iter().zip(&alone[0].nll) {
                assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}
