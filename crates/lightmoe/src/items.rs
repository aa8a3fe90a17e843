//! What a split of the data holds: examples with right answers, or windows of text.

use crate::recipe::Recipe;
use crate::source::read_records;
use anyhow::Result;
use lightmoe_data::text::{is_text, read_documents, shuffle};
use lightmoe_data::{Encoded, Example, encode};
use lightmoe_eval::divergence::text_rows;
use lightmoe_eval::{EvalOptions, Sample, Scores, evaluate, evaluate_text};
use lightmoe_models::{LanguageModel, ModelTokenizer};
use std::path::Path;

/// What a split of the data holds.
#[derive(Debug, Clone)]
pub enum Items {
    /// Prompts with right answers, which are to be learned.
    Examples(Vec<Example>),
    /// Windows of text, in the order of the text, each token of which is to be learned in one of them.
    Text(Vec<Encoded>),
}

impl Items {
    /// Reads a file of the user's own: records, their messages rendered by the model's chat template, or
    /// text, in windows of the recipe's longest sequence. A document begins with the token for the begin
    /// of text, and every window has one token more before those that it predicts.
    ///
    /// # Errors
    /// If the file cannot be read or a line of it is damaged; for a record whose answer does not fit the
    /// longest sequence, and a longest sequence of one token.
    pub fn read(path: &Path, recipe: &Recipe, tokenizer: &ModelTokenizer) -> Result<Self> {
        if !is_text(path)? {
            return Ok(Self::Examples(read_records(path, recipe, tokenizer)?));
        }
        Ok(Self::Text(read_windows(path, recipe, tokenizer)?))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Examples(examples) => examples.len(),
            Self::Text(windows) => windows.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The examples; none where there is text.
    pub fn examples(&self) -> &[Example] {
        match self {
            Self::Examples(examples) => examples,
            Self::Text(_) => &[],
        }
    }

    /// As they are trained on: the windows of a text in an order that `seed` decides, so that the first of
    /// them, on which a model is observed, are of the whole text.
    #[must_use]
    pub fn to_train(mut self, seed: u64) -> Self {
        if let Self::Text(windows) = &mut self {
            shuffle(windows, seed);
        }
        self
    }

    /// As tokens.
    ///
    /// # Errors
    /// If an example has an answer that does not fit `max_length`.
    pub fn encoded(&self, tokenizer: &ModelTokenizer, max_length: usize) -> Result<Vec<Encoded>> {
        Ok(match self {
            Self::Text(windows) => windows.clone(),
            Self::Examples(examples) => {
                let encode = |e| encode(&tokenizer.inner, tokenizer.eos, e, Some(max_length));
                let encoded = examples.iter().map(encode);
                encoded.collect::<lightmoe_data::Result<_>>()?
            }
        })
    }

    /// Scores a model on them; of text, `options` says the size of a batch alone.
    ///
    /// # Errors
    /// As [`evaluate`] and [`evaluate_text`].
    pub fn score(
        &self,
        model: &dyn LanguageModel,
        tokenizer: &ModelTokenizer,
        options: &EvalOptions,
        progress: &mut (dyn FnMut(usize, usize) -> bool + Send),
    ) -> lightmoe_eval::Result<(Scores, Vec<Sample>)> {
        match self {
            Self::Examples(examples) => evaluate(model, tokenizer, examples, options, progress),
            Self::Text(windows) => {
                evaluate_text(model, tokenizer, windows, options.batch_tokens, progress)
            }
        }
    }
}

/// The windows of the documents of a file.
///
/// # Errors
/// If the file cannot be read or a line of it is no document; for a longest sequence of one token.
pub(crate) fn read_windows(
    path: &Path,
    recipe: &Recipe,
    tokenizer: &ModelTokenizer,
) -> Result<Vec<Encoded>> {
    // A window has one token more than the model predicts in it.
    let length = recipe.max_length - 1;
    let mut windows = Vec::new();
    for document in read_documents(path)? {
        windows.extend(text_rows(tokenizer, &document, length, None)?);
    }
    Ok(windows)
}
