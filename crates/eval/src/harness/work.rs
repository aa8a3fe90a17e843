//! The requests of all tasks as rows of tokens, and what came of each.

use super::HarnessOptions;
use super::cache::{RequestCache, hash_prompt, hash_row};
use super::encode::Encoder;
use super::found::{Found, Place, RowScore};
use super::journal::Journal;
use crate::batches::batches_of;
use crate::likelihood::score_batch;
use crate::queues::{Queue, queues};
use crate::side_by_side::{lock, side_by_side};
use crate::{Error, Progress, Result};
use lightmoe_data::Encoded;
use lightmoe_data::harness::{Item, Prompts, Request, TaskConfig};
use lightmoe_models::{GenerateOptions, LanguageModel, ModelTokenizer, Next, Step, generate_rows};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::cmp::Reverse;
use std::sync::{Mutex, PoisonError};

/// Most tokens of an answer, where the task does not say: the harness's number.
const ANSWER_TOKENS: usize = 256;

/// All that the model is to do.
#[derive(Default)]
pub(super) struct Work {
    rows: Vec<Encoded>,
    prompts: Vec<Prompt>,
}

/// A prompt whose answer is generated.
pub(super) struct Prompt {
    pub(super) tokens: Vec<u32>,
    /// Texts that end the answer.
    pub(super) until: Vec<String>,
    /// Most tokens of the answer.
    pub(super) most: usize,
    /// How its tokens are drawn, if they are.
    pub(super) draw: Option<Draw>,
}

/// One of the answers that are drawn for a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Draw {
    /// Temperature and `top_p`.
    pub(super) sampling: (f64, Option<f64>),
    /// Its own among those of the task; those of a request follow each other.
    pub(super) seed: u64,
}

/// A request as tokens.
enum Encoding {
    Rows(Vec<Encoded>),
    Prompt(Vec<u32>),
}

/// Where results go.
pub(super) struct Stores<'a> {
    pub(super) journal: Journal,
    pub(super) cache: Option<&'a RequestCache>,
}

/// What batches that run side by side have in common.
struct State<'a, 'p> {
    found: Found,
    stores: Stores<'a>,
    progress: &'a mut Progress<'p>,
}

impl Work {
    /// Adds the requests of a task; their places, by item.
    ///
    /// # Errors
    /// [`Error::Example`] for a request that has no tokens to score or does not fit the model.
    pub(super) fn add(
        &mut self,
        task: &TaskConfig,
        prompts: &Prompts,
        encoder: &Encoder<'_>,
        stride: Option<usize>,
    ) -> Result<Vec<Vec<Place>>> {
        let generation = task.generation();
        let most = generation.max_gen_toks.unwrap_or(ANSWER_TOKENS);
        let mut until = generation.until;
        // The end token as text, which generation never returns, ends an answer written out, too.
        until.push(encoder.tokenizer.decode_all(&[encoder.tokenizer.eos])?);
        until.retain(|text| !text.is_empty());
        let (repeats, sampling) = (task.repeats(), task.generation().sampling());
        let encode = |request: &Request| -> Result<Encoding> {
            Ok(match request {
                Request::Loglikelihood {
                    context,
                    continuation,
                } => Encoding::Rows(vec![encoder.pair(context, continuation)?]),
                Request::Rolling { text } => {
                    Encoding::Rows(encoder.windows(text, stride.or(task.stride))?)
                }
                Request::Generate { context } => Encoding::Prompt(encoder.prompt(context, most)?),
            })
        };
        let items = prompts.items.par_iter().map(|item| {
            let encodings = item.requests.iter().map(encode);
            let encoded = encodings.collect::<Result<_>>();
            encoded.map_err(|e| of_document(item, e))
        });
        let items: Vec<Result<Vec<Encoding>>> = items.collect();
        let mut seeds = 0..;
        let mut place = |encoding: Encoding| match encoding {
            Encoding::Rows(rows) => {
                let begin = self.rows.len();
                self.rows.extend(rows);
                Place::Rows(begin..self.rows.len())
            }
            Encoding::Prompt(tokens) => {
                let begin = self.prompts.len();
                for seed in seeds.by_ref().take(repeats) {
                    self.prompts.push(Prompt {
                        tokens: tokens.clone(),
                        until: until.clone(),
                        most,
                        draw: sampling.map(|sampling| Draw { sampling, seed }),
                    });
                }
                Place::Prompts(begin..self.prompts.len())
            }
        };
        let items = items.into_iter();
        items
            .map(|encodings| Ok(encodings?.into_iter().map(&mut place).collect()))
            .collect()
    }

    /// A hash of all requests: results of one work are of no use to another.
    pub(super) fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        self.rows.iter().for_each(|row| hash_row(row, &mut hash));
        for prompt in &self.prompts {
            hash_prompt(prompt, &mut hash);
        }
        super::hex(&hash.finalize())
    }

    /// Rows and prompts together.
    pub(super) fn requests(&self) -> usize {
        self.rows.len() + self.prompts.len()
    }

    /// What the journal knows; of a work that it knows nothing of, what the cache does, which the journal
    /// is told.
    fn known(&self, stores: &mut Stores<'_>) -> Result<Found> {
        let mut found = stores.journal.found(self.rows.len(), self.prompts.len());
        if let Some(cache) = stores.cache.filter(|_| stores.journal.is_new()) {
            let [rows, prompts] = &mut found.cached;
            for (number, row) in self.rows.iter().enumerate() {
                found.rows[number] = cache.row(row);
                rows.extend(found.rows[number].map(|_| number));
            }
            for (number, prompt) in self.prompts.iter().enumerate() {
                found.answers[number] = cache.answer(prompt);
                prompts.extend(found.answers[number].as_ref().map(|_| number));
            }
            stores.journal.add_rows(&found.cached[0], &found)?;
            stores.journal.add_answers(&found.cached[1], &found)?;
        }
        Ok(found)
    }

    /// Does what is not known yet. Of the batches of rows (without those that the cache knew) only whole ones
    /// are left out, since likelihoods depend in their last digits on the batch: so a resumed run computes
    /// what an undisturbed one would. Answers to prompts do not depend on each other.
    ///
    /// # Errors
    /// What the model and the journal bring; not an interruption, after which `Found` has gaps.
    pub(super) fn run(
        &self,
        model: &dyn LanguageModel,
        tokenizer: &ModelTokenizer,
        options: &HarnessOptions<'_>,
        mut stores: Stores<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<Found> {
        progress.total = self.requests();
        let found = self.known(&mut stores)?;
        let [rows, prompts] = [self.rows.len(), self.prompts.len()];
        let rows = left_out(rows, &found.cached[0]);
        let prompts = left_out(prompts, &found.cached[1]);
        let cached = self.requests() - rows.len() - prompts.len();
        let state = Mutex::new(State {
            found,
            stores,
            progress,
        });
        let told = lock(&state).progress.advance(cached);
        let ended = told
            .and_then(|()| self.score(model, rows, options, &state))
            .and_then(|()| self.generate(model, tokenizer, prompts, options, &state));
        match ended {
            Ok(()) | Err(Error::Interrupted) => {
                let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
                Ok(state.found)
            }
            Err(e) => Err(e),
        }
    }

    fn score(
        &self,
        model: &dyn LanguageModel,
        rows: Vec<usize>,
        options: &HarnessOptions<'_>,
        state: &Mutex<State<'_, '_>>,
    ) -> Result<()> {
        let batches = batches_of(&self.rows, rows, options.batch_tokens);
        side_by_side(model, batches.len(), &|number| {
            let batch = &batches[number];
            let is_known = |row: &usize| lock(state).found.rows[*row].is_some();
            if batch.rows.iter().all(is_known) {
                return lock(state).progress.advance(batch.rows.len());
            }
            let scored = score_batch(model, &self.rows, batch)?;
            let state = &mut *lock(state);
            for (&row, answer) in batch.rows.iter().zip(scored) {
                state.found.rows[row] = Some(RowScore::of(&answer)?);
            }
            let (stores, found) = (&mut state.stores, &state.found);
            stores.journal.add_rows(&batch.rows, found)?;
            if let Some(cache) = stores.cache {
                let scored = |&row: &usize| Some((&self.rows[row], found.rows[row]?));
                cache.add_rows(batch.rows.iter().filter_map(scored))?;
            }
            state.progress.advance(batch.rows.len())
        })
    }

    fn generate(
        &self,
        model: &dyn LanguageModel,
        tokenizer: &ModelTokenizer,
        prompts: Vec<usize>,
        options: &HarnessOptions<'_>,
        state: &Mutex<State<'_, '_>>,
    ) -> Result<()> {
        let is_unknown = |prompt: &usize| lock(state).found.answers[*prompt].is_none();
        let (unknown, known): (Vec<usize>, Vec<usize>) = prompts.into_iter().partition(is_unknown);
        lock(state).progress.advance(known.len())?;
        let queues = self.prompt_queues(unknown, options.batch_tokens);
        side_by_side(model, queues.len(), &|number| {
            self.answer(model, tokenizer, &queues[number], state)
        })
    }

    /// Prompts of one kind, longest first; drawn answers are with others to the same request only, whose
    /// seeds follow each other.
    fn prompt_queues(&self, mut order: Vec<usize>, batch_tokens: usize) -> Vec<Queue> {
        let kind = |prompt: usize| (self.prompts[prompt].most, &self.prompts[prompt].until);
        let length = |prompt: usize| self.prompts[prompt].tokens.len();
        order.sort_by_key(|&prompt| (kind(prompt), Reverse(length(prompt))));
        let goes_with = |prompt: usize, next: usize| {
            let (prompt, next) = (&self.prompts[prompt], &self.prompts[next]);
            match (prompt.draw, next.draw) {
                (None, None) => true,
                (Some(a), Some(b)) => {
                    let seed = a.seed + 1;
                    prompt.tokens == next.tokens && b == Draw { seed, ..a }
                }
                _ => false,
            }
        };
        order
            .chunk_by(|&a, &b| kind(a) == kind(b) && goes_with(a, b))
            .flat_map(|same| queues(same, length, kind(same[0]).0, batch_tokens))
            .collect()
    }

    /// Finds the answers to the prompts of a queue, each of which is kept as soon as it is whole.
    fn answer(
        &self,
        model: &dyn LanguageModel,
        tokenizer: &ModelTokenizer,
        queue: &Queue,
        state: &Mutex<State<'_, '_>>,
    ) -> Result<()> {
        let first = &self.prompts[queue.prompts[0]];
        let (until, most) = (&first.until, first.most);
        let prompts: Vec<Vec<u32>> = (queue.prompts.iter())
            .map(|&prompt| self.prompts[prompt].tokens.clone())
            .collect();
        let draw = first.draw;
        let options = GenerateOptions {
            temperature: draw.map_or(0.0, |draw| draw.sampling.0),
            top_p: draw.and_then(|draw| draw.sampling.1),
            seed: draw.map_or(0, |draw| draw.seed),
            at_once: queue.at_once,
            ..GenerateOptions::greedy(most, vec![tokenizer.eos])
        };
        let step = |prompt: usize, step: Step<'_>| match step {
            Step::Token(tokens) => {
                lock(state).progress.advance(0)?;
                let text = tokenizer.decode_all(tokens)?;
                let is_whole = until.iter().any(|end| text.contains(end.as_str()));
                Ok(if is_whole {
                    Next::EndRow
                } else {
                    Next::Continue
                })
            }
            Step::Whole(tokens) => {
                let text = cut(tokenizer.decode(tokens)?, until);
                self.keep(queue.prompts[prompt], text, &mut lock(state))?;
                Ok(Next::Continue)
            }
        };
        // What the model calls an error is its own.
        let mut failed = Ok(());
        generate_rows(model, &prompts, &options, &mut |prompt, now| {
            Ok(step(prompt, now).unwrap_or_else(|e| {
                failed = Err(e);
                Next::Stop
            }))
        })?;
        failed
    }

    /// Keeps the answer to a prompt.
    fn keep(&self, prompt: usize, answer: String, state: &mut State<'_, '_>) -> Result<()> {
        let (stores, found) = (&mut state.stores, &mut state.found);
        found.answers[prompt] = Some(answer.clone());
        stores.journal.add_answers(&[prompt], found)?;
        if let Some(cache) = stores.cache {
            cache.add_answers([(&self.prompts[prompt], answer)].into_iter())?;
        }
        state.progress.advance(1)
    }
}

/// A text up to the first of what ends it.
fn cut(mut text: String, until: &[String]) -> String {
    for end in until {
        text.truncate(text.find(end.as_str()).unwrap_or(text.len()));
    }
    text
}

/// Numbers below `count` but for `without`, which ascend.
fn left_out(count: usize, without: &[usize]) -> Vec<usize> {
    let is_left = |number: &usize| without.binary_search(number).is_err();
    (0..count).filter(is_left).collect()
}

/// What is wrong with a request, with the document that it was made of.
pub(super) fn of_document(item: &Item, error: Error) -> Error {
    match error {
        Error::Invalid(message) => Error::Document {
            path: item.doc.path.clone(),
            line: item.doc.line,
            message,
        },
        other => other,
    }
}
