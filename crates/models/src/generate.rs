//! Token-by-token generation with a key-value cache and candle's sampler. Where an answer ends, a
//! waiting prompt takes its place (continuous batching, Orca, Yu et al., OSDI 2022).

use crate::cache::{Cache, Span};
use crate::config::RopeScaling;
use crate::decoder::{LanguageModel, Tokens};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use std::ops::Range;

/// Prompts enter where one in so many places is free: whenever some do, all that is kept is moved.
const FREE: usize = 8;

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
    /// The most prompts to work on at a time; the others wait, in their order.
    pub at_once: usize,
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
            at_once: usize::MAX,
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

/// What is told of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step<'a> {
    /// Its answer so far, whose last token is new.
    Token(&'a [u32]),
    /// Its answer, which is whole; nothing is told where no tokens are asked for.
    Whole(&'a [u32]),
}

/// What to do after a step.
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
/// new token of the first prompt and may stop the work by `false`. Prompts that begin together are read
/// as if all were as long as the longest, so prompts in order of their lengths take the least time.
pub fn generate(
    model: &dyn LanguageModel,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    each: &mut dyn FnMut(u32) -> bool,
) -> Result<Vec<Vec<u32>>> {
    generate_rows(model, prompts, options, &mut |row, step| match step {
        Step::Token([.., token]) if row == 0 && !each(*token) => Ok(Next::Stop),
        _ => Ok(Next::Continue),
    })
}

/// As [`generate`]; `each` sees the number of every prompt that gets a new token or whose answer is whole.
/// What the answer to a prompt is does not depend on the other prompts.
///
/// # Errors
/// For an empty prompt and one that fills the context, and what the model and `each` bring.
pub fn generate_rows(
    model: &dyn LanguageModel,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    each: &mut dyn FnMut(usize, Step<'_>) -> Result<Next>,
) -> Result<Vec<Vec<u32>>> {
    Ok(go_on(model, model.cache(), prompts, options, each)?.0)
}

/// As [`generate_rows`], where `cache` is empty or holds a beginning of the only prompt, shorter than it;
/// also returns what was read of the prompts that were the last to go on.
pub(crate) fn go_on(
    model: &dyn LanguageModel,
    cache: Cache,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    each: &mut dyn FnMut(usize, Step<'_>) -> Result<Next>,
) -> Result<(Vec<Vec<u32>>, Cache)> {
    let context = model.config().max_position_embeddings;
    if prompts.iter().map(Vec::len).min().unwrap_or(0) == 0 {
        return Err(Error::Invalid(
            "generation needs prompts of at least one token; give a text".into(),
        ));
    }
    if let Some(full) = prompts.iter().map(Vec::len).find(|len| *len >= context) {
        return Err(Error::Invalid(format!(
            "a prompt of {full} tokens fills the context of {context}; shorten it"
        )));
    }
    let waiting = match options.max_new_tokens {
        0 => 0..0,
        _ => 0..prompts.len(),
    };
    let numbers = 0..prompts.len() as u64;
    let generation = Generation {
        model,
        prompts,
        options,
        each,
        // One for each prompt, so that an answer does not depend on what is generated beside it.
        samplers: numbers.map(|prompt| options.sampler(prompt)).collect(),
        answers: vec![Vec::new(); prompts.len()],
        waiting,
        is_stopped: false,
    };
    generation.run(cache)
}

/// A prompt whose answer is being made.
struct Row {
    prompt: usize,
    /// What was read of it and its answer.
    read: Span,
    /// What is to be read next.
    token: u32,
}

struct Generation<'a> {
    model: &'a dyn LanguageModel,
    prompts: &'a [Vec<u32>],
    options: &'a GenerateOptions,
    each: &'a mut dyn FnMut(usize, Step<'_>) -> Result<Next>,
    samplers: Vec<LogitsProcessor>,
    answers: Vec<Vec<u32>>,
    /// Prompts that nothing was read of.
    waiting: Range<usize>,
    is_stopped: bool,
}

impl Generation<'_> {
    fn run(mut self, mut cache: Cache) -> Result<(Vec<Vec<u32>>, Cache)> {
        let mut rows: Vec<Row> = Vec::new();
        loop {
            let entering = self.entering(rows.len());
            if self.is_stopped || entering.is_empty() && rows.is_empty() {
                return Ok((self.answers, cache));
            }
            if !entering.is_empty() {
                self.waiting.start = entering.end;
                if rows.is_empty() {
                    // But for the beginning of the only prompt, what is kept is of no use.
                    if entering.start > 0 {
                        cache = self.model.cache();
                    }
                    rows = self.read(entering, &mut cache)?;
                } else {
                    let mut fresh = self.model.cache();
                    let entered = self.read(entering, &mut fresh)?;
                    rows.extend(entered.into_iter().map(|row| row.of_cache(1)));
                    cache = settle(vec![cache, fresh], &mut rows)?;
                }
            } else {
                // Whole answers take no more time.
                cache = settle(vec![cache], &mut rows)?;
                let ids: Vec<u32> = rows.iter().map(|row| row.token).collect();
                rows.iter_mut().for_each(|row| row.read.positions.end += 1);
                rows = self.forward(&ids, rows, &mut cache)?;
            }
        }
    }

    /// The waiting prompts that begin now, beside `busy` others.
    fn entering(&self, busy: usize) -> Range<usize> {
        let begin = self.waiting.start;
        let places = self.options.at_once.max(1);
        let most = self.waiting.len().min(places.saturating_sub(busy));
        let count = match self.model.config().rope_scaling {
            // Its angles depend on how long the whole sequence is, so all must be of one length.
            RopeScaling::Long(_) if busy > 0 => 0,
            _ if busy > 0 && most < self.waiting.len().min(places / FREE) => 0,
            RopeScaling::Long(_) => {
                let lengths = self.prompts[begin..begin + most].iter().map(Vec::len);
                let first = self.prompts.get(begin).map_or(0, Vec::len);
                lengths.take_while(|&length| length == first).count()
            }
            _ => most,
        };
        begin..begin + count
    }

    /// Reads what `cache` has not of the prompts, with padding behind the shorter ones.
    fn read(&mut self, entering: Range<usize>, cache: &mut Cache) -> Result<Vec<Row>> {
        let (known, prompts) = (cache.len(), self.prompts);
        let longest = prompts[entering.clone()].iter().map(Vec::len).max();
        let width = longest.unwrap_or(0) - known;
        let mut ids = Vec::with_capacity(entering.len() * width);
        let mut rows = Vec::with_capacity(entering.len());
        for prompt in entering {
            let unread = &prompts[prompt][known..];
            ids.extend_from_slice(unread);
            // The value of the padding does not matter: nothing on its left sees it.
            ids.resize(ids.len() + width - unread.len(), 0);
            rows.push(Row {
                prompt,
                read: Span {
                    cache: 0,
                    row: rows.len(),
                    positions: 0..prompts[prompt].len(),
                },
                token: 0,
            });
        }
        let lengths: Vec<usize> = rows
            .iter()
            .map(|row| row.read.positions.len() - known)
            .collect();
        cache.expect(&lengths);
        self.forward(&ids, rows, cache)
    }

    /// Reads tokens of all rows, up to the ends of their spans, and gives the rows that go on.
    fn forward(&mut self, ids: &[u32], rows: Vec<Row>, cache: &mut Cache) -> Result<Vec<Row>> {
        let (known, width) = (cache.len(), ids.len() / rows.len());
        let tokens = Tokens {
            ids,
            rows: rows.len(),
        };
        let hidden = (self.model).hidden_states(tokens, Some(cache))?;
        let ends = rows.iter().map(|row| row.read.positions.end - known);
        let last = ends
            .enumerate()
            .map(|(r, end)| (r * width + end - 1) as u32);
        let last = Tensor::new(last.collect::<Vec<_>>(), hidden.device())?;
        let logits = self.model.logits(&hidden.index_select(&last, 0)?)?;
        let mut staying = Vec::with_capacity(rows.len());
        for (r, row) in rows.into_iter().enumerate() {
            let token = self.samplers[row.prompt].sample(&logits.get(r)?)?;
            let answer = &mut self.answers[row.prompt];
            let mut next = Next::EndRow;
            if !self.options.ends.contains(&token) {
                answer.push(token);
                next = (self.each)(row.prompt, Step::Token(answer))?;
                let context = self.model.config().max_position_embeddings;
                let is_full = row.read.positions.len() + 1 == context;
                if next == Next::Continue
                    && (is_full || answer.len() == self.options.max_new_tokens)
                {
                    next = Next::EndRow;
                }
            }
            if next == Next::EndRow {
                next = match (self.each)(row.prompt, Step::Whole(answer))? {
                    Next::Stop => Next::Stop,
                    _ => Next::EndRow,
                };
            }
            match next {
                Next::Continue => staying.push(Row { token, ..row }),
                Next::EndRow => {}
                Next::Stop => {
                    self.is_stopped = true;
                    return Ok(Vec::new());
                }
            }
        }
        Ok(staying)
    }
}

impl Row {
    fn of_cache(mut self, number: usize) -> Self {
        self.read.cache = number;
        self
    }
}

/// One cache of all rows.
fn settle(caches: Vec<Cache>, rows: &mut [Row]) -> Result<Cache> {
    let mut spans: Vec<Span> = rows.iter().map(|row| row.read.clone()).collect();
    let cache = Cache::gather(caches, &mut spans)?;
    for (row, span) in rows.iter_mut().zip(spans) {
        row.read = span;
    }
    Ok(cache)
}
