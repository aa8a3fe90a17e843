//! How far a compressed model went from the original, by what both predict on the same text.
//!
//! A score of a benchmark moves when an answer changes; the distance of the two distributions over
//! the next token moves before that. It is taken whole, and layer by layer: the original with one
//! layer of the compressed model in it says what that layer alone costs at the output.
//!
//! Both models are read side by side, a layer of each at a time, and what differs (the compressed
//! model, and the original with one other layer) runs along. So a pass reads every layer once, also
//! where models lie on disk, and logits are held for a part of a batch alone.
//!
//! Symbols: `B` rows of a batch, `T` tokens of its longest row, `H` hidden size, `A` predicted tokens,
//! `V` vocabulary.

mod distance;
mod tally;

pub use tally::{Distance, Estimate, LayerDistance, Perplexity, Quantiles};

use crate::batches::batches;
use crate::harness::BeginOfText;
use crate::harness::encode::{Encoder, check_windows};
use crate::likelihood::Laid;
use crate::{Error, Progress, Result};
use candle_core::Tensor;
use distance::{Predicted, distances};
use lightmoe_data::Encoded;
use lightmoe_models::{LanguageModel, Layer, ModelConfig, ModelTokenizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tally::Tally;

/// The two models.
#[derive(Clone, Copy)]
pub struct ModelPair<'a> {
    /// What is measured against.
    pub original: &'a dyn LanguageModel,
    /// What was made of it.
    pub compressed: &'a dyn LanguageModel,
}

/// What is put into the original.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swaps {
    /// Nothing: the whole compressed model is compared alone.
    None,
    /// Each layer of the compressed model by itself as well.
    EachLayer,
}

/// What came of a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Divergence {
    /// Windows of a text, or answers to items.
    pub rows: usize,
    /// Predicted tokens.
    pub tokens: usize,
    /// The compressed model.
    pub whole: Distance,
    /// How the KL divergences of its tokens spread.
    pub kl_quantiles: Quantiles,
    /// Of both models.
    pub perplexity: Perplexity,
    /// The original with one layer of the compressed model, by layer; empty if that was not asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerDistance>,
}

/// The windows of a text, as perplexities take them: at most `max_length` tokens are read at once,
/// and each window predicts `stride` tokens more [default: as many as it can].
///
/// # Errors
/// For windows without room, and a text that cannot be made into tokens.
pub fn text_rows(
    tokenizer: &ModelTokenizer,
    text: &str,
    max_length: usize,
    stride: Option<usize>,
) -> Result<Vec<Encoded>> {
    check_windows(max_length, stride)?;
    let encoder = Encoder {
        tokenizer,
        begin: BeginOfText::None,
        max_length,
    };
    encoder.windows(text, stride)
}

/// The distance between the models on `rows`, whose tokens from `answer_start` on are predicted.
///
/// A batch has at most `batch_tokens` tokens, or one row. `progress` sees how many layers of batches
/// are done, of how many; its `false` stops the work.
///
/// # Errors
/// [`Error::Empty`] without rows; [`Error::Invalid`] for models of different shapes and a row that no
/// token stands before; [`Error::NoNumbers`]; [`Error::Interrupted`].
pub fn divergence(
    models: ModelPair<'_>,
    rows: &[Encoded],
    swaps: Swaps,
    batch_tokens: usize,
    progress: &mut (dyn FnMut(usize, usize) -> bool + Send),
) -> Result<Divergence> {
    if rows.is_empty() {
        return Err(Error::Empty);
    }
    if batch_tokens == 0 || rows.iter().any(|row| row.answer_start == 0) {
        return Err(Error::Invalid(
            "a token is predicted from at least one before it, in batches of 1 token or more"
                .into(),
        ));
    }
    models.check()?;
    let layers = models.original.config().num_layers;
    let batches = batches(rows, batch_tokens);
    let mut progress = Progress {
        done: 0,
        total: batches.len() * layers,
        report: progress,
    };
    progress.advance(0)?;
    // Of the compressed model, then of the original with each layer.
    let variants = match swaps {
        Swaps::None => 1,
        Swaps::EachLayer => 1 + layers,
    };
    let mut tallies = vec![Tally::new(rows.len()); variants];
    let mut kls = Vec::new();
    for batch in &batches {
        let laid = Laid::new(rows, batch, 0);
        let hidden = models.run(&laid, swaps, &mut progress)?;
        let of_row: Vec<usize> = batch
            .rows
            .iter()
            .flat_map(|&row| vec![row; rows[row].tokens.len() - rows[row].answer_start])
            .collect();
        let mut done = 0;
        for (positions, targets) in laid.parts(models.original.config().vocab_size)? {
            let index = Tensor::new(positions, hidden.original.device())?;
            let logits = |model: &dyn LanguageModel, hidden: &Tensor| -> Result<Vec<f32>> {
                let rows = hidden.index_select(&index, 0)?;
                Ok(model.ends().head(&rows)?.flatten_all()?.to_vec1()?)
            };
            let original = Predicted::new(logits(models.original, &hidden.original)?, targets);
            let of_row = &of_row[done..done + targets.len()];
            done += targets.len();
            for (number, (tally, hidden)) in tallies.iter_mut().zip(&hidden.variants).enumerate() {
                // A layer in the original speaks through the original's head.
                let model = match number {
                    0 => models.compressed,
                    _ => models.original,
                };
                let tokens = distances(&original, &logits(model, hidden)?)?;
                tally.add(of_row, &tokens);
                if number == 0 {
                    kls.extend(tokens.iter().map(|token| token.kl));
                }
            }
        }
    }
    let (whole, layers) = tallies.split_first().ok_or(Error::Empty)?;
    Ok(Divergence {
        rows: rows.len(),
        tokens: kls.len(),
        whole: whole.distance(),
        kl_quantiles: Quantiles::of(kls),
        perplexity: whole.perplexity(),
        layers: layers
            .iter()
            .enumerate()
            .map(|(layer, tally)| LayerDistance {
                layer,
                distance: tally.distance(),
            })
            .collect(),
    })
}

/// What comes out of the last layer, `[B · T, H]` each.
struct Hidden {
    original: Tensor,
    /// The compressed model, then the original with each of its layers.
    variants: Vec<Tensor>,
}

impl ModelPair<'_> {
    /// Whether a layer of one model may stand in the other, and both predict the same tokens.
    fn check(&self) -> Result<()> {
        let (original, compressed) = (self.original.config(), self.compressed.config());
        for (what, of) in [
            (
                "vocabulary",
                (|c| c.vocab_size) as fn(&ModelConfig) -> usize,
            ),
            ("hidden size", |c| c.hidden_size),
            ("number of layers", |c| c.num_layers),
        ] {
            let (a, b) = (of(original), of(compressed));
            if a != b {
                return Err(Error::Invalid(format!(
                    "the {what} is {a} in the original and {b} in the compressed model; compare a \
                     model with the one that it was made from"
                )));
            }
        }
        Ok(())
    }

    fn run(&self, laid: &Laid, swaps: Swaps, progress: &mut Progress<'_>) -> Result<Hidden> {
        let pass = |model: &dyn LanguageModel, layer: &Layer, x: &Tensor| -> Result<Tensor> {
            let y = layer.hidden_states(x, model.config(), model.ends().rotary(), None)?;
            Ok(y)
        };
        let mut original = self.original.ends().embed(laid.tokens())?;
        let mut variants = vec![self.compressed.ends().embed(laid.tokens())?];
        for number in 0..self.original.config().num_layers {
            let own = self.original.layer(number)?;
            let other = self.compressed.layer(number)?;
            variants[0] = pass(self.compressed, &other, &variants[0])?;
            for swapped in &mut variants[1..] {
                *swapped = pass(self.original, &own, swapped)?;
            }
            if swaps == Swaps::EachLayer {
                variants.push(pass(self.compressed, &other, &original)?);
            }
            original = pass(self.original, &own, &original)?;
            progress.advance(1)?;
        }
        let flat = |x: &Tensor| x.flatten_to(1);
        Ok(Hidden {
            original: flat(&original)?,
            variants: variants
                .iter()
                .map(flat)
                .collect::<candle_core::Result<_>>()?,
        })
    }
}

#[cfg(test)]
mod tests;
