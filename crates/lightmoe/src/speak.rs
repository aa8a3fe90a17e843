//! A model that speaks: the text appears as it is made.

use crate::cli::SpeakArgs;
use crate::progress::stopped;
use anyhow::{Context, Result};
use lightmoe_models::{
    Conversation, GenerateOptions, LanguageModel, ModelTokenizer, Next, TextStream,
};
use std::fmt;
use std::io::Write;
use std::time::{Duration, Instant};

/// A model in a conversation.
pub struct Speaker<'a> {
    conversation: Conversation<'a>,
    tokenizer: &'a ModelTokenizer,
    options: GenerateOptions,
    stop: Vec<String>,
}

/// What was said, and how long it took.
pub struct Answer {
    /// The text.
    pub text: String,
    tokens: usize,
    prompt: usize,
    known: usize,
    /// Until the first token.
    reading: Duration,
    /// From the first token to the last.
    speaking: Duration,
}

impl<'a> Speaker<'a> {
    /// A model that speaks as the options say.
    pub fn new(
        model: &'a dyn LanguageModel,
        tokenizer: &'a ModelTokenizer,
        args: SpeakArgs,
    ) -> Self {
        let mut ends = tokenizer.ends.clone();
        // Special tokens are no part of the text, so a text that is one is looked for as a token.
        let as_token = |text: &String| tokenizer.inner.token_to_id(text);
        ends.extend(args.stop.iter().filter_map(as_token));
        Self {
            conversation: Conversation::new(model),
            tokenizer,
            options: GenerateOptions {
                temperature: args.temperature,
                top_k: args.top_k,
                top_p: args.top_p,
                seed: args.seed,
                ..GenerateOptions::greedy(args.max_new_tokens, ends)
            },
            stop: args.stop,
        }
    }

    /// Continues `prompt` and writes the text as it comes; Ctrl-C ends it.
    ///
    /// # Errors
    /// If the prompt does not fit the model, or the text cannot be written.
    pub fn answer(&mut self, prompt: &str, out: &mut dyn Write) -> Result<Answer> {
        let prompt = self.tokenizer.encode(prompt)?;
        let mut stream = TextStream::new(self.tokenizer, &self.stop);
        let mut text = String::new();
        let mut show = |piece: &str| {
            text.push_str(piece);
            out.write_all(piece.as_bytes()).and_then(|()| out.flush())
        };
        let begin = Instant::now();
        let (mut first, mut last, mut written) = (None, begin, Ok(()));
        let turn = self
            .conversation
            .answer(&prompt, &self.options, &mut |token| {
                last = Instant::now();
                first.get_or_insert(last);
                written = show(&stream.push(token)?);
                Ok(match written.is_err() || stream.is_ended() || stopped() {
                    true => Next::Stop,
                    false => Next::Continue,
                })
            })?;
        written
            .and_then(|()| show(&stream.finish().map_err(std::io::Error::other)?))
            .context("cannot write the answer")?;
        let first = first.unwrap_or_else(Instant::now);
        Ok(Answer {
            text,
            tokens: turn.tokens.len(),
            prompt: prompt.len(),
            known: turn.known,
            reading: first - begin,
            speaking: last.saturating_duration_since(first),
        })
    }
}

/// Speed: of reading, and of each token after the first, which comes of reading.
impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.tokens)?;
        if self.tokens > 1 {
            let rate = (self.tokens - 1) as f64 / self.speaking.as_secs_f64();
            write!(f, ", {rate:.1} tokens/s")?;
        }
        write!(
            f,
            "; {} tokens of the prompt read in {:.2} s",
            self.prompt - self.known,
            self.reading.as_secs_f64()
        )?;
        match self.known {
            0 => Ok(()),
            known => write!(f, ", {known} known before"),
        }
    }
}
