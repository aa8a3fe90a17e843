//! From texts to tokens, as lm-evaluation-harness makes them.

use crate::{Error, Result};
use lightmoe_data::Encoded;
use lightmoe_data::records::Message;
use lightmoe_data::text::windows;
use lightmoe_models::{ChatMessage, ModelTokenizer};

/// What stands before a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BeginOfText {
    /// Nothing: the harness's default for models that are no Gemma.
    #[default]
    None,
    /// What the tokenizer puts around texts, mostly its token for it (`add_bos_token` in the harness).
    Token,
}

/// A conversation in the model's chat template.
///
/// # Errors
/// What the template says of it.
pub fn rendered(
    tokenizer: &ModelTokenizer,
    messages: &[Message],
) -> std::result::Result<String, String> {
    let messages: Vec<ChatMessage> = messages
        .iter()
        .map(|m| ChatMessage {
            role: m.role.clone(),
            content: m.content.clone(),
        })
        .collect();
    tokenizer.chat(&messages).map_err(|e| e.to_string())
}

/// Makes tokens of requests.
pub(crate) struct Encoder<'a> {
    pub(crate) tokenizer: &'a ModelTokenizer,
    pub(crate) begin: BeginOfText,
    /// Most tokens that the model reads at once.
    pub(crate) max_length: usize,
}

impl Encoder<'_> {
    pub(super) fn text(&self, text: &str) -> Result<Vec<u32>> {
        Ok(match self.begin {
            BeginOfText::None => self.tokenizer.encode(text)?,
            BeginOfText::Token => self.tokenizer.encode_with_special(text)?,
        })
    }

    /// What an empty context and the beginning of a text are predicted from.
    fn prefix(&self) -> u32 {
        self.tokenizer.bos.unwrap_or(self.tokenizer.eos)
    }

    /// A continuation with what stands before it: white space at the end of the context belongs to
    /// the continuation, and both are encoded together, then parted where the context alone ends.
    pub(crate) fn pair(&self, context: &str, continuation: &str) -> Result<Encoded> {
        let (mut tokens, answer) = match context.is_empty() {
            true => (vec![self.prefix()], self.text(continuation)?),
            false => {
                let before = self.text(context.trim_end())?;
                let mut whole = self.text(&format!("{context}{continuation}"))?;
                whole.drain(..before.len().min(whole.len()));
                // The context keeps the tokens that it has alone, though the two be one word.
                (before, whole)
            }
        };
        let answer_start = tokens.len();
        if answer_start == 0 {
            return Err(invalid(
                "the context is nothing but white space; give it a text",
            ));
        }
        if answer.is_empty() {
            return Err(invalid(
                "the continuation adds no token to the context, so it has no likelihood; give it a \
                 text",
            ));
        }
        if answer.len() > self.max_length {
            return Err(invalid(&format!(
                "the continuation has {} tokens, more than the {} that the model reads at once",
                answer.len(),
                self.max_length
            )));
        }
        tokens.extend(answer);
        // The last token is only predicted.
        let surplus = tokens.len().saturating_sub(self.max_length + 1);
        tokens.drain(..surplus);
        Ok(Encoded {
            tokens,
            answer_start: answer_start - surplus,
        })
    }

    /// Windows over a text, as [`windows`] makes them, the first one behind the token for the begin of
    /// text; each next one scores `stride` tokens more, or as many as it can hold.
    pub(crate) fn windows(&self, text: &str, stride: Option<usize>) -> Result<Vec<Encoded>> {
        let length = self.max_length;
        let stride = stride.unwrap_or(length);
        Ok(windows(&self.text(text)?, self.prefix(), length, stride))
    }

    /// The prompt of an answer of up to `most` tokens; a long one loses its beginning.
    pub(super) fn prompt(&self, context: &str, most: usize) -> Result<Vec<u32>> {
        let room = self.max_length.checked_sub(most).filter(|room| *room > 0);
        let room = room.ok_or_else(|| {
            invalid(&format!(
                "an answer may have {most} tokens, and the model reads {}; lower `max_gen_toks` in the \
                 task's `generation_kwargs`",
                self.max_length
            ))
        })?;
        let mut tokens = self.text(context)?;
        tokens.drain(..tokens.len().saturating_sub(room));
        match tokens.is_empty() {
            true => Err(invalid("the prompt is empty; give it a text")),
            false => Ok(tokens),
        }
    }
}

/// Refuses windows that would predict nothing.
pub(crate) fn check_windows(max_length: usize, stride: Option<usize>) -> Result<()> {
    match max_length == 0 || stride == Some(0) {
        true => Err(invalid(
            "windows and strides of 0 tokens predict nothing; use 1 or more",
        )),
        false => Ok(()),
    }
}

fn invalid(message: &str) -> Error {
    Error::Invalid(message.to_owned())
}
