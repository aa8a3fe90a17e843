//! One teacher-forced pass: the likelihood of every answer token, and whether each is the argmax.
//!
//! Symbols: `B` rows of a batch, `T` tokens of its longest row, `H` hidden size, `A` answer tokens,
//! `V` vocabulary.

use crate::{Error, Result};
use candle_core::{D, Tensor};
use lightmoe_data::Encoded;
use lightmoe_kernels::cross_entropy;
use lightmoe_models::{LanguageModel, Tokens};

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
    each: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Answer>> {
    let mut answers = vec![Answer::default(); rows.len()];
    for batch in batches(rows, batch_tokens) {
        let scored = score_batch(model, rows, &batch)?;
        for (&row, answer) in batch.iter().zip(scored) {
            answers[row] = answer;
        }
        each(batch.len())?;
    }
    Ok(answers)
}

/// What the model reads of a row: the last answer token is only predicted.
fn input(row: &Encoded) -> &[u32] {
    &row.tokens[..row.tokens.len().saturating_sub(1)]
}

/// Numbers of rows, longest first, so that a batch has at most `batch_tokens` tokens with padding,
/// or one row. Rows of which the model reads the same are together and count once.
pub(crate) fn batches(rows: &[Encoded], batch_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&row| (std::cmp::Reverse(rows[row].tokens.len()), input(&rows[row])));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    // Different inputs of the last batch.
    let mut inputs = 0;
    for row in order {
        match batches.last_mut() {
            Some(batch)
                if batch
                    .last()
                    .is_some_and(|&l| input(&rows[l]) == input(&rows[row])) =>
            {
                batch.push(row);
            }
            Some(batch) if (inputs + 1) * input(&rows[batch[0]]).len() <= batch_tokens => {
                inputs += 1;
                batch.push(row);
            }
            _ => {
                inputs = 1;
                batches.push(vec![row]);
            }
        }
    }
    batches
}

/// Scores the rows `batch`, which [`batches`] put together.
pub(crate) fn score_batch(
    model: &dyn LanguageModel,
    rows: &[Encoded],
    batch: &[usize],
) -> Result<Vec<Answer>> {
    let width = batch
        .iter()
        .map(|&row| input(&rows[row]).len())
        .max()
        .unwrap_or(0);
    let mut ids = Vec::with_capacity(batch.len() * width);
    let (mut positions, mut targets) = (Vec::new(), Vec::new());
    let mut last: Option<&[u32]> = None;
    for &row in batch {
        let row = &rows[row];
        if last != Some(input(row)) {
            last = Some(input(row));
            let end = ids.len() + width;
            ids.extend_from_slice(input(row));
            // The value of the padding does not matter: nothing on its left sees it.
            ids.resize(end, 0);
        }
        let first = ids.len() - width + row.answer_start - 1;
        let answer = &row.tokens[row.answer_start..];
        positions.extend((first..first + answer.len()).map(|at| at as u32));
        targets.extend_from_slice(answer);
    }
    let tokens = Tokens {
        rows: ids.len() / width.max(1),
        ids: &ids,
    };
    let hidden = model.forward(tokens, None, &mut |_, _, _| Ok(()))?;
    let mut scored = tokens_of(model, &hidden, &positions, &targets)?.into_iter();
    Ok(batch
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

/// Likelihood and greediness of `targets: [A]`, predicted at rows `positions: [A]` of
/// `hidden: [B · T, H]`.
fn tokens_of(
    model: &dyn LanguageModel,
    hidden: &Tensor,
    positions: &[u32],
    targets: &[u32],
) -> Result<Vec<(f64, bool)>> {
    let vocab = model.config().vocab_size;
    if let Some(id) = targets.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Invalid(format!(
            "token id {id} is outside the vocabulary of {vocab}; use the model's own tokenizer"
        )));
    }
    let part = (LOGITS / vocab.max(1)).max(1);
    let mut out = Vec::with_capacity(targets.len());
    for (positions, targets) in positions.chunks(part).zip(targets.chunks(part)) {
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
        let options = GenerateOptions {
            max_new_tokens: row.tokens.len() - row.answer_start,
            temperature: 0.0,
            top_p: None,
            seed: 0,
            eos: None,
        };
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
    fn batches_hold_every_row_once_and_keep_to_their_size() {
        let mut rng = lightmoe_models::random::stream(4, "rows");
        let rows: Vec<Encoded> = (0..50).map(|i| row(&mut rng, 9, 1 + i % 9)).collect();
        let all = batches(&rows, 24);
        for batch in &all {
            let mut inputs: Vec<&[u32]> = batch.iter().map(|&r| input(&rows[r])).collect();
            inputs.dedup();
            let width = inputs.iter().map(|input| input.len()).max().unwrap();
            assert!(inputs.len() == 1 || inputs.len() * width <= 24);
        }
        let mut seen = all.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..50).collect::<Vec<_>>());
        let mut inputs: Vec<&[u32]> = rows.iter().map(input).collect();
        inputs.sort_unstable();
        inputs.dedup();
        assert_eq!(batches(&rows, 1).len(), inputs.len());
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
        for (row, answer) in rows.iter().zip(&together) {
            let alone = score(&model, std::slice::from_ref(row), 1, &mut |_| Ok(())).unwrap();
            assert_eq!(
                (&answer.nll, answer.greedy),
                (&alone[0].nll, alone[0].greedy)
            );
        }
    }
}
