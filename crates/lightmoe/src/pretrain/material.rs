//! What a model is pre-trained on, with its tokenizer.

use super::{PretrainRecipe, TextFiles};
use anyhow::Result;
use lightmoe_data::text::{find_documents, pack, read_documents, train_tokenizer, windows};
use lightmoe_data::tokenizer::{EOS_ID, PAD_ID};
use lightmoe_data::{Batch, PackedStream, Sampler, tokenizer};
use serde_json::Value;
use std::collections::BTreeSet;

/// Text as batches, and its tokenizer as files.
pub(super) struct Material {
    /// Tokens of the tokenizer.
    pub vocab_size: usize,
    /// `tokenizer.json`
    pub tokenizer: String,
    /// `tokenizer_config.json`
    pub tokenizer_config: Value,
    /// Hash of the text, where the recipe does not determine it.
    pub fingerprint: Option<String>,
    batches: Batches,
}

enum Batches {
    BuiltIn(Box<PackedStream>),
    Text(Sampler),
}

impl Material {
    /// The text that a recipe asks for.
    ///
    /// # Errors
    /// If files cannot be read, or there is nothing to make batches of.
    pub(super) fn of(recipe: &PretrainRecipe) -> Result<Self> {
        let (rows, length) = (recipe.training.rows, recipe.training.length);
        let (tokenizer, tokenizer_config, fingerprint, batches) = match &recipe.text {
            None => {
                let stream = PackedStream::new(rows, length, recipe.seed)?;
                let config = tokenizer::tokenizer_config();
                (
                    tokenizer::build()?,
                    config,
                    None,
                    Batches::BuiltIn(Box::new(stream)),
                )
            }
            Some(text) => {
                let documents = text.documents()?;
                let tokenizer = train_tokenizer(&documents, text.vocab_size)?;
                let tokens = pack(&tokenizer, EOS_ID, &documents)?;
                let windows = windows(&tokens, EOS_ID, length - 1, length - 1);
                let sampler = Sampler::new(windows, rows, recipe.seed)?;
                let batches = Batches::Text(sampler.with_pad(PAD_ID));
                let fingerprint = crate::fingerprint(&documents)?;
                let config = tokenizer::plain_config();
                (tokenizer, config, Some(fingerprint), batches)
            }
        };
        Ok(Self {
            vocab_size: tokenizer.get_vocab_size(true),
            tokenizer: tokenizer
                .to_string(true)
                .map_err(|e| anyhow::anyhow!("tokenizer: {e}"))?,
            tokenizer_config,
            fingerprint,
            batches,
        })
    }

    /// The batch of `step`, counted from 0, a function of seed and step alone.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub(super) fn batch(&self, step: usize) -> lightmoe_data::Result<Batch> {
        match &self.batches {
            Batches::BuiltIn(stream) => stream.batch(step),
            Batches::Text(sampler) => Ok(sampler.batch(step)),
        }
    }
}

impl TextFiles {
    fn documents(&self) -> lightmoe_data::Result<Vec<String>> {
        let (mut documents, mut seen) = (Vec::new(), BTreeSet::new());
        for pattern in &self.files {
            for path in find_documents(pattern)? {
                // Patterns may overlap; a file counts once.
                if seen.insert(path.clone()) {
                    documents.extend(read_documents(&path)?);
                }
            }
        }
        Ok(documents)
    }
}
