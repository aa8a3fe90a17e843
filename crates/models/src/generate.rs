//! Token-by-token generation with a key-value cache and candle's sampler.

use crate::decoder::{Cache, LanguageModel, Tokens};
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
    /// Only so many tokens, the likeliest, are drawn from.
    pub top_k: Option<usize>,
    /// Nucleus: the smallest set of tokens with this probability, of what `top_k` leaves.
    pub top_p: Option<f64>,
    /// Seed of the first prompt's sampler; each next prompt has the next number.
    pub seed: u64,
    /// Stop after any of these tokens.
    pub ends: Vec<u32>,
}

impl GenerateOptions {
    /// The likeliest token each time.
    pub fn greedy(max_new_tokens: usize, ends: Vec<u32>) -> Self {
        Self {
            max_new_tokens,
            temperature: 0.0,
            top_k: None,
            top_p: None,
            seed: 0,
            ends,
        }
    }

    /// That of a prompt by number.
    fn sampler(&self, prompt: u64) -> LogitsProcessor {
        let temperature = self.temperature;
        let sampling = match (self.top_k, self.top_p) {
            _ if temperature <= 0.0 => Sampling::ArgMax,
            (None, None) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        };
        LogitsProcessor::from_sampling(self.seed.wrapping_add(prompt), sampling)
    }
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

/// Continues `prompts` and returns the new tokens of each (up to and without the one that ends it). `each` sees every
/// new token of the first prompt and may stop the work by `false`. Prompts of about one length take
/// the least time: they are read together up to the shortest one's end.
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
///
/// # Errors
/// For an empty prompt and one that fills the context, and what the model and `each` bring.
pub fn generate_rows(
    model: &dyn LanguageModel,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    each: &mut dyn FnMut(usize, &[u32]) -> Result<Next>,
) -> Result<Vec<Vec<u32>>> {
    go_on(model, &mut model.cache(), prompts, options, each)
}

/// As [`generate_rows`], where `cache` holds a beginning of every prompt, shorter than the shortest; it
/// is left with what was read of the rows that were the last to go on.
pub(crate) fn go_on(
    model: &dyn LanguageModel,
    cache: &mut Cache,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    each: &mut dyn FnMut(usize, &[u32]) -> Result<Next>,
) -> Result<Vec<Vec<u32>>> {
    let context = model.config().max_position_embeddings;
    let shortest = prompts.iter().map(Vec::len).min().unwrap_or(0);
    if shortest == 0 {
        return Err(Error::Invalid(
            "generation needs prompts of at least one token; give a text".into(),
        ));
    }
    if let Some(full) = prompts.iter().map(Vec::len).find(|len| *len >= context) {
        return Err(Error::Invalid(format!(
            "a prompt of {full} tokens fills the context of {context}; shorten it"
        )));
    }
    // One for each prompt, so that an answer does not depend on what is generated beside it.
    let mut samplers: Vec<LogitsProcessor> = (0..prompts.len() as u64)
        .map(|row| options.sampler(row))
        .collect();
    let mut out = vec![Vec::new(); prompts.len()];
    let mut active: Vec<u32> = match options.max_new_tokens {
        0 => Vec::new(),
        _ => (0..prompts.len() as u32).collect(),
    };
    let begin = cache.len();
    let mut input: Vec<u32> = prompts
        .iter()
        .flat_map(|p| &p[begin..shortest])
        .copied()
        .collect();
    // Tokens that every row has been read up to.
    let mut read = shortest;
    while !active.is_empty() {
        let (rows, width) = (active.len(), input.len() / active.len());
        let tokens = Tokens { ids: &input, rows };
        let hidden = model.forward(tokens, Some(cache), &mut |_, _, _| Ok(()))?;
        let last: Vec<u32> = (1..=rows).map(|r| (r * width - 1) as u32).collect();
        let logits =
            model.logits(&hidden.index_select(&Tensor::new(last, hidden.device())?, 0)?)?;
        input.clear();
        let mut staying = Vec::with_capacity(rows);
        for (place, &row) in (0..).zip(&active) {
            let row = row as usize;
            // A longer prompt is still read while shorter ones have their answers begun.
            if let Some(&token) = prompts[row].get(read) {
                input.push(token);
                staying.push(place);
                continue;
            }
            let token = samplers[row].sample(&logits.get(place as usize)?)?;
            if options.ends.contains(&token) {
                continue;
            }
            out[row].push(token);
            let is_whole = match each(row, &out[row])? {
                Next::Continue => out[row].len() == options.max_new_tokens || read + 1 == context,
                Next::EndRow => true,
                Next::Stop => return Ok(out),
            };
            if !is_whole {
                input.push(token);
                staying.push(place);
            }
        }
        read += 1;
        // Whole answers take no more time.
        if staying.len() < rows && !staying.is_empty() {
            *cache = cache.select(&staying)?;
        }
        active = staying
            .iter()
            .map(|&place| active[place as usize])
            .collect();
    }
    Ok(out)
}
