//! Token-by-token generation with a key-value cache and candle's sampler.

use crate::decoder::{LanguageModel, Tokens};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_transformers::generation::{LogitsProcessor, Sampling};

/// How to generate.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// The most tokens to add.
    pub max_new_tokens: usize,
    /// Zero is greedy.
    pub temperature: f64,
    /// Nucleus: the smallest set of tokens with this probability.
    pub top_p: Option<f64>,
    /// Seed of the sampler.
    pub seed: u64,
    /// Stop after this token.
    pub eos: Option<u32>,
}

/// What to do after a new token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Go on.
    Continue,
    /// This prompt's answer is whole.
    EndRow,
    /// Return what there is.
    Stop,
}

/// Continues `prompts`, all of one length, and returns the new tokens of each (up to and without
/// `eos`). `each` sees every new token of the first prompt and may stop the work by `false`.
pub fn generate(
    model: &dyn LanguageModel,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    each: &mut dyn FnMut(u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    generate_rows(model, prompts, options, &mut |row, answer| match answer {
        [.., token] if row == 0 && !each(*token) => Ok(Next::Stop),
        _ => Ok(Next::Continue),
    })
}

/// As [`generate`]; `each` sees the number of every prompt with a new token, and its answer so far.
pub fn generate_rows(
    model: &dyn LanguageModel,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    each: &mut dyn FnMut(usize, &[u32]) -> Result<Next>,
) -> Result<Vec<Vec<u32>>> {
    let len = prompts.first().map_or(0, Vec::len);
    if len == 0 || prompts.iter().any(|p| p.len() != len) {
        return Err(Error::Invalid(
            "generation needs prompts of one length and at least one token; sort them by length"
                .into(),
        ));
    }
    let room = model.config().max_position_embeddings.saturating_sub(len);
    if room == 0 {
        return Err(Error::Invalid(format!(
            "a prompt of {len} tokens fills the context of {}; shorten it",
            model.config().max_position_embeddings
        )));
    }
    let sampling = match (options.temperature, options.top_p) {
        (t, _) if t <= 0.0 => Sampling::ArgMax,
        (temperature, Some(p)) => Sampling::TopP { p, temperature },
        (temperature, None) => Sampling::All { temperature },
    };
    let mut sampler = LogitsProcessor::from_sampling(options.seed, sampling);
    let rows = prompts.len();
    let mut out = vec![Vec::new(); rows];
    let mut done = vec![false; rows];
    let mut cache = model.cache();
    let mut input: Vec<u32> = prompts.concat();
    let mut width = len;
    for _ in 0..options.max_new_tokens.min(room) {
        let tokens = Tokens { ids: &input, rows };
        let hidden = model.forward(tokens, Some(&mut cache), &mut |_, _, _| Ok(()))?;
        let last: Vec<u32> = (1..=rows).map(|r| (r * width - 1) as u32).collect();
        let logits =
            model.logits(&hidden.index_select(&Tensor::new(last, hidden.device())?, 0)?)?;
        input.clear();
        for row in 0..rows {
            let token = sampler.sample(&logits.get(row)?)?;
            done[row] |= Some(token) == options.eos;
            if !done[row] {
                out[row].push(token);
                match each(row, &out[row])? {
                    Next::Continue => {}
                    Next::EndRow => done[row] = true,
                    Next::Stop => return Ok(out),
                }
            }
            input.push(token);
        }
        if done.iter().all(|&d| d) {
            break;
        }
        width = 1;
    }
    Ok(out)
}
