//! Observe: what the routers do on the task's training tokens (LightMoE §3.1, eq. 1–3).
//!
//! One pass over the weights, one layer in memory at a time. The hidden states of the samples travel
//! from layer to layer in files, of which the page cache keeps what fits; so a run that was stopped
//! goes on with the layer where it stopped.

use crate::memory::batch_tokens;
use crate::observations::{LayerObservations, Observations, OutputObservations};
use crate::states::{States, Work};
use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_models::{Bank, Checkpoint, Embedding, Layer, ModelConfig, Rotary, Routing, Tokens};
use rayon::prelude::*;
use std::path::Path;
use std::time::{Duration, Instant};

/// What [`observe`] needs beside the model and the samples.
#[derive(Debug, Clone, Copy)]
pub struct ObserveOptions<'a> {
    /// Names the model and the data.
    pub fingerprint: &'a str,
    /// Folder for what lies between two layers; it is removed at the end.
    pub state: &'a Path,
    /// The most memory to use, in bytes.
    pub max_memory: u64,
}

/// What [`observe`] saw, and what it took.
#[derive(Debug, Clone)]
pub struct Observed {
    /// The routing.
    pub observations: Observations,
    /// Reading and converting weights, in this run.
    pub read: Duration,
    /// All that is done with a layer once it is read, in this run.
    pub compute: Duration,
}

/// Samples of one batch, right-padded to `width`.
pub(crate) struct Batch<'a> {
    pub(crate) samples: &'a [&'a Vec<u32>],
    pub(crate) width: usize,
}

/// Runs `samples` (token ids, as in training, without padding) through the model and records the
/// routing of every MoE layer. `progress(done, total)` counts layers and may stop the work by
/// `false`; the same call goes on behind the last layer that was done.
///
/// # Errors
/// [`Error::Invalid`] if there are no samples, one is empty, or the memory is too little for a layer;
/// [`Error::Interrupted`] if the work was stopped; what reading the weights may bring.
pub fn observe(
    checkpoint: &Checkpoint,
    samples: &[Vec<u32>],
    options: &ObserveOptions<'_>,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Observed> {
    let config = checkpoint.config();
    if samples.is_empty() || samples.iter().any(Vec::is_empty) {
        return Err(Error::Invalid(
            "observe needs at least one sample, and none may be empty; give more training data"
                .to_owned(),
        ));
    }
    // Samples of like length together, so that little is padded.
    let mut order: Vec<&Vec<u32>> = samples.iter().collect();
    order.sort_by_key(|s| std::cmp::Reverse(s.len()));
    let most = batch_tokens(config, order[0].len(), options.max_memory)?;
    let work = Work::new(samples, options.fingerprint);
    // A run that goes on keeps the batches of the one before, if there is memory for them.
    let found = States::find(options.state, &work).filter(|found| found.batch_tokens <= most);
    let tokens = found.as_ref().map_or(most, |found| found.batch_tokens);
    let batches = batches(&order, tokens);
    let states = States::new(options.state, config.hidden_size, &batches);
    let (first, mut seen) = match states.resume(found.is_some())? {
        Some((layer, seen)) => (layer, seen),
        None => {
            states.begin(&work, tokens)?;
            embed(checkpoint, &batches, &states)?;
            let none = Observations {
                layers: Vec::new(),
                tokens: samples.iter().map(|s| s.len() as u64).sum(),
                samples: samples.len() as u64,
                fingerprint: options.fingerprint.to_owned(),
            };
            (0, none)
        }
    };
    let rotary = Rotary::new(config);
    let (mut read, mut compute) = (Duration::ZERO, Duration::ZERO);
    for l in first..config.num_layers {
        let begin = Instant::now();
        let layer = Layer::load(checkpoint, l)?;
        read += begin.elapsed();
        let begin = Instant::now();
        let mut sums = Sums::new(config);
        if let Some(bank) = layer.bank() {
            sums.weights(bank)?;
        }
        let mut next = states.writer(l + 1)?;
        for (i, batch) in batches.iter().enumerate() {
            let hidden = states.read(l, i, batch)?;
            let each = &mut |routing: &Routing, expert: usize, pairs: &[u32], y: &Tensor| {
                sums.outputs(routing, batch, expert, pairs, y)
            };
            let (hidden, routing) = layer.forward_observed(&hidden, config, &rotary, None, each)?;
            if let Some(routing) = routing {
                sums.add(&routing, batch)?;
            }
            next.push(&hidden)?;
        }
        if layer.bank().is_some() {
            seen.layers.push(sums.finish(l, samples));
        }
        next.finish(&seen)?;
        compute += begin.elapsed();
        if !progress(l + 1, config.num_layers) {
            return Err(Error::Interrupted);
        }
    }
    states.remove()?;
    Ok(Observed {
        observations: seen,
        read,
        compute,
    })
}

/// Writes the states before the first layer.
fn embed(checkpoint: &Checkpoint, batches: &[Batch<'_>], states: &States) -> Result<()> {
    let embedding = Embedding::load(checkpoint)?;
    let mut first = states.writer(0)?;
    for batch in batches {
        let mut ids = vec![0u32; batch.samples.len() * batch.width];
        for (row, sample) in ids.chunks_exact_mut(batch.width).zip(batch.samples) {
            row[..sample.len()].copy_from_slice(sample);
        }
        let rows = batch.samples.len();
        first.push(&embedding.embed(Tokens { ids: &ids, rows })?)?;
    }
    first.close()
}

/// Batches of at most `tokens` tokens, padding included, but of at least one sample.
fn batches<'a>(order: &'a [&'a Vec<u32>], tokens: usize) -> Vec<Batch<'a>> {
    let mut batches = Vec::new();
    let mut rest = order;
    while let Some(longest) = rest.first() {
        let width = longest.len();
        let (samples, later) = rest.split_at((tokens / width).clamp(1, rest.len()));
        rest = later;
        batches.push(Batch { samples, width });
    }
    batches
}

/// Weights that are summed in f32.
const ROW: usize = 1024;
/// Outputs of an expert that are summed by one task.
const ROWS: usize = 64;

/// Sums over some outputs of an expert.
#[derive(Default)]
struct RowSums {
    gated: f64,
    norm: f64,
    square: f64,
    sum: Vec<f64>,
}

/// Sums over the tokens of one layer.
struct Sums {
    experts: usize,
    gate_mass: Vec<f64>,
    selections: Vec<u64>,
    norm: f64,
    cosine: Vec<f64>,
    outputs: OutputObservations,
}

impl Sums {
    fn new(config: &ModelConfig) -> Self {
        let experts = config.moe.num_experts;
        Self {
            experts,
            gate_mass: vec![0.0; experts],
            selections: vec![0; experts],
            norm: 0.0,
            cosine: vec![0.0; experts * experts],
            outputs: OutputObservations::none(experts, config.hidden_size),
        }
    }

    /// Looks at the weights of the experts.
    fn weights(&mut self, bank: &Bank) -> Result<()> {
        let Some(dense) = &bank.dense else {
            return Ok(());
        };
        let of_expert = |i: usize| -> Result<f64> {
            let (mut absolute, mut square, mut count) = (0.0, 0.0, 0usize);
            for (_, stack) in dense.named() {
                let weights = stack.get(i)?.flatten_all()?.to_vec1::<f32>()?;
                // Row by row in f32, the rows in f64.
                for row in weights.chunks(ROW) {
                    absolute += f64::from(row.iter().map(|w| w.abs()).sum::<f32>());
                    square += f64::from(row.iter().map(|w| w * w).sum::<f32>());
                }
                count += weights.len();
            }
            Ok(match square > 0.0 {
                true => absolute / (count as f64 * square).sqrt(),
                false => 0.0,
            })
        };
        let experts = bank.dense_experts();
        let found: Vec<f64> = (0..experts.len())
            .into_par_iter()
            .map(of_expert)
            .collect::<Result<_>>()?;
        for (&expert, flatness) in experts.iter().zip(found) {
            self.outputs.flatness[expert] = flatness;
        }
        Ok(())
    }

    /// Adds the outputs `y: [rows, H]` of an expert at these places among the choices, padding
    /// excluded.
    fn outputs(
        &mut self,
        routing: &Routing,
        batch: &Batch<'_>,
        expert: usize,
        pairs: &[u32],
        y: &Tensor,
    ) -> lightmoe_models::Result<()> {
        let (rows, width) = y.dims2()?;
        let k = routing.chosen.len() / (batch.samples.len() * batch.width);
        let gates = routing.gates.to_vec1::<f32>()?;
        let values = y.flatten_all()?.to_vec1::<f32>()?;
        let seen = |&pair: &u32| {
            let token = pair as usize / k;
            token % batch.width < batch.samples[token / batch.width].len()
        };
        // The sums of some rows each, in parallel; added in order, so that they are always the same.
        let parts: Vec<RowSums> = pairs[..rows]
            .par_chunks(ROWS)
            .zip(values.par_chunks(ROWS * width))
            .map(|(pairs, values)| {
                let mut part = RowSums {
                    sum: vec![0.0; width],
                    ..RowSums::default()
                };
                let rows = pairs.iter().zip(values.chunks_exact(width));
                for (&pair, output) in rows.filter(|(pair, _)| seen(pair)) {
                    let token = pair as usize / k;
                    let of_token = gates[token * k..(token + 1) * k].iter();
                    let whole: f64 = of_token.map(|&g| f64::from(g)).sum();
                    let square: f64 = output.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
                    let share = f64::from(gates[pair as usize]) / whole.max(f64::MIN_POSITIVE);
                    part.gated += share * square.sqrt();
                    part.norm += square.sqrt();
                    part.square += square;
                    for (sum, &v) in part.sum.iter_mut().zip(output) {
                        *sum += f64::from(v);
                    }
                }
                part
            })
            .collect();
        let sum = &mut self.outputs.sum[expert * width..(expert + 1) * width];
        for part in parts {
            self.outputs.gated[expert] += part.gated;
            self.outputs.norm[expert] += part.norm;
            self.outputs.square[expert] += part.square;
            for (sum, v) in sum.iter_mut().zip(part.sum) {
                *sum += v;
            }
        }
        Ok(())
    }

    /// Adds the routing of a batch, padding excluded.
    fn add(&mut self, routing: &Routing, batch: &Batch<'_>) -> Result<()> {
        let width = batch.width;
        let gates = routing.gates.to_vec1::<f32>()?;
        let logits = routing.logits.flatten_all()?.to_vec1::<f32>()?;
        let k = gates.len() / (batch.samples.len() * width);
        for (row, sample) in batch.samples.iter().enumerate() {
            let tokens = row * width..row * width + sample.len();
            let pairs = tokens.start * k..tokens.end * k;
            for (&gate, &expert) in gates[pairs.clone()].iter().zip(&routing.chosen[pairs]) {
                self.gate_mass[expert as usize] += f64::from(gate);
                self.selections[expert as usize] += 1;
            }
            self.sample(&logits[tokens.start * self.experts..tokens.end * self.experts]);
        }
        Ok(())
    }

    /// Adds one sample's logits `[T, E]`: their norms, and the cosines of their columns.
    fn sample(&mut self, logits: &[f32]) {
        let e = self.experts;
        let mut gram = vec![0f64; e * e];
        for token in logits.chunks_exact(e) {
            let square: f64 = token.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            self.norm += square.sqrt();
            for a in 0..e {
                for b in a..e {
                    gram[a * e + b] += f64::from(token[a]) * f64::from(token[b]);
                }
            }
        }
        for a in 0..e {
            for b in a..e {
                let norms = (gram[a * e + a] * gram[b * e + b]).sqrt();
                // A column of zeros is like no other.
                let cosine = if norms > 0.0 {
                    gram[a * e + b] / norms
                } else {
                    0.0
                };
                self.cosine[a * e + b] += cosine;
                if a != b {
                    self.cosine[b * e + a] += cosine;
                }
            }
        }
    }

    fn finish(self, layer: usize, samples: &[Vec<u32>]) -> LayerObservations {
        let tokens: usize = samples.iter().map(Vec::len).sum();
        let samples = samples.len() as f64;
        LayerObservations {
            layer,
            gate_mass: self.gate_mass,
            selections: self.selections,
            router_norm: Some(self.norm / tokens as f64),
            similarity: Some(self.cosine.into_iter().map(|c| c / samples).collect()),
            outputs: Some(self.outputs),
        }
    }
}
