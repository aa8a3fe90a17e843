//! From an example to tokens.

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::{Error, Result};

/// A prompt and what is to follow it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    /// The given text.
    pub prompt: String,
    /// The text to learn or to compare with.
    pub completion: String,
    /// For multiple choice, the completions to be ranked by likelihood, of which one
    /// is `completion`; empty otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<String>,
}

impl Example {
    /// An example without choices.
    pub fn new(prompt: impl Into<String>, completion: impl Into<String>) -> Self {
        Self {
            prompt: prompt.into(),
            completion: completion.into(),
            choices: Vec::new(),
        }
    }

    /// The text trained on: [`render`] of prompt and completion.
    pub fn text(&self) -> String {
        render(&self.prompt, &self.completion)
    }
}

/// The exact text of a prompt with its completion.
///
/// The prompt is left as it is. One space goes between the two, unless the prompt is
/// empty or ends in white space, or the completion begins with white space.
pub fn render(prompt: &str, completion: &str) -> String {
    format!("{prompt}{}", continuation(prompt, completion))
}

/// What [`render`] writes after the prompt: the completion, with the space that may
/// precede it.
pub fn continuation(prompt: &str, completion: &str) -> String {
    let is_joined = prompt.is_empty()
        || prompt.ends_with(char::is_whitespace)
        || completion.starts_with(char::is_whitespace);
    format!("{}{completion}", if is_joined { "" } else { " " })
}

/// An example as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Prompt, completion and end token.
    pub tokens: Vec<u32>,
    /// Index of the completion's first token; the loss is on `tokens[answer_start..]`.
    pub answer_start: usize,
}

/// Encodes `example` with the end token `eos`.
///
/// Prompt and completion are tokenised apart, as they are in generation, and no
/// special token is added: a prompt that needs one says so in its text. With
/// `max_len` (tokens, the end token included), a longer prompt loses its beginning.
///
/// # Errors
/// [`Error::TooLong`] if the completion alone exceeds `max_len`;
/// [`Error::Tokenizer`] if the tokenizer fails.
pub fn encode(
    tokenizer: &Tokenizer,
    eos: u32,
    example: &Example,
    max_len: Option<usize>,
) -> Result<Encoded> {
    let answer = continuation(&example.prompt, &example.completion);
    let mut tokens = text_ids(tokenizer, &example.prompt)?;
    let mut answer = text_ids(tokenizer, &answer)?;
    answer.push(eos);
    if let Some(limit) = max_len {
        let room = limit.checked_sub(answer.len()).ok_or(Error::TooLong {
            needed: answer.len(),
            limit,
        })?;
        tokens.drain(..tokens.len().saturating_sub(room));
    }
    let answer_start = tokens.len();
    tokens.append(&mut answer);
    Ok(Encoded {
        tokens,
        answer_start,
    })
}

/// Ids of `text`, without special tokens of the tokenizer's own.
pub(crate) fn text_ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    tokenizer
        .encode_fast(text, false)
        .map(|encoding| encoding.get_ids().to_vec())
        .map_err(|error| Error::Tokenizer(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer;

    #[test]
    fn one_space_at_most_joins_prompt_and_completion() {
        assert_eq!(render("Answer:", "4"), "Answer: 4");
        assert_eq!(render("Answer:", " 4"), "Answer: 4");
        assert_eq!(render("<assistant>\n", "4"), "<assistant>\n4");
        assert_eq!(render("", "4"), "4");
    }

    #[test]
    fn a_limit_cuts_the_prompt_and_never_the_answer() {
        let tokenizer = tokenizer::build().unwrap();
        let example = Example::new("Say: 1 2 3 4\nAnswer:", "5 6");
        let whole = encode(&tokenizer, 0, &example, None).unwrap();
        assert_eq!(whole.tokens.len() - whole.answer_start, 3);
        let cut = encode(&tokenizer, 0, &example, Some(5)).unwrap();
        assert_eq!(cut.answer_start, 2);
        assert_eq!(cut.tokens, whole.tokens[whole.tokens.len() - 5..]);
        assert_eq!(encode(&tokenizer, 0, &example, Some(50)).unwrap(), whole);
        let error = encode(&tokenizer, 0, &example, Some(2)).unwrap_err();
        assert!(matches!(
            error,
            Error::TooLong {
                needed: 3,
                limit: 2
            }
        ));
    }
}
