//! The way back: the gradients of the loss on labels that the model itself draws, from the head to the
//! first layer with experts, and what errors of the experts of each layer cost by them (see
//! [`crate::damage`]).
//!
//! A layer is read again, run on the states that went into it, and differentiated by these alone, so one
//! layer and one batch are in memory, as on the way out.

use super::Pass;
use crate::damage::{DamageSums, WeightedTokens};
use crate::memory::LOGITS;
use crate::observations::Observations;
use crate::states::{Keep, Values};
use crate::{Error, Result};
use candle_core::{D, Tensor, Var};
use lightmoe_kernels::{cross_entropy, return_freed_memory};
use lightmoe_models::random::stream;
use lightmoe_models::{Bank, Checkpoint, Ends, Layer, LayerObserver, Routing};
use rand::Rng;
use std::ops::Range;
use std::path::Path;

/// How much flatter than the model's own the distribution is that labels are drawn from, so that what
/// the model is sure of is heard too.
const TEMPERATURE: f64 = 2.0;

/// What the way back goes along.
pub(super) struct Way<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    /// Where the answer of each sample begins, in the order of the batches.
    pub(super) answers: &'a [usize],
    /// Folder for what is observed.
    pub(super) folder: &'a Path,
    /// Whether slots may have biases.
    pub(super) bias: bool,
}

/// Gives the experts of one layer their weights as it runs.
struct Look<'a> {
    sums: &'a mut DamageSums,
    tokens: &'a WeightedTokens<'a>,
}

impl LayerObserver for Look<'_> {
    fn block(&mut self, bank: &Bank, x: &Tensor, routing: &Routing) -> lightmoe_models::Result<()> {
        self.sums.add(bank, x, routing, self.tokens)
    }
}

impl Way<'_> {
    /// Goes back through all layers; `seen` has the observations of the way out, and what an earlier run
    /// came to stands in the states.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no sample has a token to predict; [`Error::Interrupted`]; what reading the
    /// model may bring.
    pub(super) fn go(
        &self,
        pass: &Pass<'_>,
        mut seen: Observations,
        progress: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Observations> {
        let (states, layers) = (pass.states, pass.config.num_layers);
        let first = pass.config.moe_layers().next().unwrap_or(layers);
        let predicted = self.predicted(pass);
        if predicted == 0 {
            return Err(Error::Invalid(
                "no sample has a token to predict, so nothing says what errors cost; give samples with \
                 an answer, or of two tokens and more"
                    .to_owned(),
            ));
        }
        let mut next = layers;
        if let Some((done, found)) = states.returned()? {
            (next, seen) = (done, found);
        } else {
            self.head(pass)?;
        }
        for number in (first..next).rev() {
            let layer = Layer::load(self.checkpoint, number)?;
            let tokens = seen.tokens as usize;
            let mut sums = layer
                .bank()
                .map(|_| DamageSums::new(pass.config, tokens, self.bias));
            self.layer(pass, &layer, number, predicted, sums.as_mut())?;
            if let (Some(sums), Some(bank)) = (sums, layer.bank()) {
                let damage = sums.finish(bank, self.folder, number, &seen.fingerprint)?;
                let own = seen.layers.iter_mut().find(|own| own.layer == number);
                if let Some(own) = own {
                    own.damage = Some(damage);
                }
            }
            states.record(&seen, Values::Gradient, number, Keep::Last)?;
            states.forget(Values::Hidden, number + 1)?;
            if pass.is_tight {
                drop(layer);
                return_freed_memory();
            }
            if !progress(layers - number) {
                return Err(Error::Interrupted);
            }
        }
        Ok(seen)
    }

    /// How many tokens of all samples are predicted.
    fn predicted(&self, pass: &Pass<'_>) -> usize {
        let samples = pass.batches.iter().flat_map(|batch| batch.samples);
        let of =
            |(sample, &answer): (&&Vec<u32>, &usize)| predicted_places(sample.len(), answer).len();
        samples.zip(self.answers).map(of).sum()
    }

    /// The gradients by what comes out of the last layer.
    fn head(&self, pass: &Pass<'_>) -> Result<()> {
        let ends = Ends::load(self.checkpoint)?;
        let layers = pass.config.num_layers;
        let chunk = (LOGITS / pass.config.vocab_size.max(1)).max(1);
        let mut writer = pass.states.writer(Values::Gradient, layers)?;
        let mut sample = 0;
        for (i, batch) in pass.batches.iter().enumerate() {
            let hidden = pass.read(Values::Hidden, layers, i)?;
            let hidden = hidden.flatten_to(1)?;
            let mut gradient = hidden.zeros_like()?;
            for row in 0..batch.samples.len() {
                let mut random = stream(0, &format!("labels/{sample}"));
                let places = predicted_places(batch.samples[row].len(), self.answers[sample]);
                let first = row * batch.width + places.start;
                for start in (0..places.len()).step_by(chunk) {
                    let count = chunk.min(places.len() - start);
                    let x = Var::from_tensor(&hidden.narrow(0, first + start, count)?)?;
                    let logits = ends.head(&x)?;
                    let labels = draw(&logits, &mut random)?;
                    let grads = cross_entropy(&logits, &labels)?.sum_all()?.backward()?;
                    if let Some(found) = grads.get(&x) {
                        gradient = gradient.slice_scatter(found, 0, first + start)?;
                    }
                }
                sample += 1;
            }
            let shape = (batch.samples.len(), batch.width, pass.config.hidden_size);
            writer.push(&gradient.reshape(shape)?)?;
        }
        writer.close()
    }

    /// The gradients by what goes into a layer, from those by what comes out of it, of the loss on
    /// `predicted` tokens; the experts' sums see it run.
    fn layer(
        &self,
        pass: &Pass<'_>,
        layer: &Layer,
        number: usize,
        predicted: usize,
        mut sums: Option<&mut DamageSums>,
    ) -> Result<()> {
        let mut writer = pass.states.writer(Values::Gradient, number)?;
        let half = 0.5 / predicted as f64;
        for (i, batch) in pass.batches.iter().enumerate() {
            let x = Var::from_tensor(&pass.read(Values::Hidden, number, i)?)?;
            let gradient = pass.read(Values::Gradient, number + 1, i)?;
            let tokens = batch.held();
            let held = Tensor::new(&tokens[..], gradient.device())?;
            let of_held = gradient.flatten_to(1)?.index_select(&held, 0)?;
            let weights = (of_held.sqr()?.sum(D::Minus1)? * half)?.to_vec1::<f32>()?;
            let tokens = WeightedTokens {
                tokens: &tokens,
                weights: &weights,
                gradients: Some(&of_held),
            };
            let mut look = sums.as_deref_mut().map(|sums| Look {
                sums,
                tokens: &tokens,
            });
            let observer: &mut dyn LayerObserver = match &mut look {
                Some(look) => look,
                None => &mut (),
            };
            let (out, _) = layer.forward_observed(&x, pass.config, pass.rotary, None, observer)?;
            let grads = (out * gradient)?.sum_all()?.backward()?;
            let found = grads.get(&x).cloned();
            writer.push(&found.map_or_else(|| x.zeros_like(), Ok)?)?;
            if pass.is_tight {
                // The sums grow between what comes and goes with each batch. What is asked for again at
                // once would take longer, so nothing is returned where there is room.
                drop(grads);
                return_freed_memory();
            }
        }
        writer.close()
    }
}

/// The places of a sample of `len` tokens whose next token is of the answer.
fn predicted_places(len: usize, answer: usize) -> Range<usize> {
    let end = len.saturating_sub(1);
    answer.saturating_sub(1).min(end)..end
}

/// A label for each row of `logits: [T, V]`.
fn draw(logits: &Tensor, random: &mut impl Rng) -> Result<Vec<u32>> {
    let rows = logits.to_vec2::<f32>()?;
    let label = |row: Vec<f32>| {
        let most = row.iter().copied().fold(f32::MIN, f32::max);
        let power = |&l: &f32| (f64::from(l - most) / TEMPERATURE).exp();
        let mut left = random.random::<f64>() * row.iter().map(power).sum::<f64>();
        let found = row.iter().position(|l| {
            left -= power(l);
            left < 0.0
        });
        found.unwrap_or(row.len() - 1) as u32
    };
    Ok(rows.into_iter().map(label).collect())
}
