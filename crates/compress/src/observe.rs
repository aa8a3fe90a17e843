//! Observe: what the routers do on the task's training tokens (LightMoE §3.1, eq. 1–3).
//!
//! One layer's weights are in memory at a time; the hidden states of the samples travel from layer
//! to layer.

use crate::observations::{LayerObservations, Observations};
use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_models::{Checkpoint, Ends, Layer, Routing, Tokens};

/// Tokens that run through a layer at once, padding included.
const BATCH_TOKENS: usize = 8192;

/// Sequences of one batch, right-padded: their lengths and their hidden states `[B, T, H]`.
struct Batch {
    lengths: Vec<usize>,
    hidden: Tensor,
}

/// Sums over the tokens of one layer.
struct Sums {
    experts: usize,
    gate_mass: Vec<f64>,
    selections: Vec<u64>,
    norm: f64,
    cosine: Vec<f64>,
}

/// Runs `samples` (token ids, as in training, without padding) through the model and records the
/// routing of every MoE layer. `progress(done, total)` counts layers and may stop the work by
/// `false`.
///
/// # Errors
/// [`Error::Invalid`] if there are no samples or one is empty, [`Error::Interrupted`] if the work was
/// stopped; what reading the weights may bring.
pub fn observe(
    checkpoint: &Checkpoint,
    samples: &[Vec<u32>],
    fingerprint: &str,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Observations> {
    let config = checkpoint.config();
    if samples.is_empty() || samples.iter().any(Vec::is_empty) {
        return Err(Error::Invalid(
            "observe needs at least one sample, and none may be empty; give more training data"
                .to_owned(),
        ));
    }
    let ends = Ends::load(checkpoint)?;
    let mut batches = batches(&ends, samples)?;
    let mut layers = Vec::new();
    for l in 0..config.num_layers {
        let layer = Layer::load(checkpoint, l)?;
        let mut sums = Sums::new(config.moe.num_experts);
        for batch in &mut batches {
            let (hidden, routing) = layer.forward(&batch.hidden, config, ends.rope(), None)?;
            sums.add(&routing, &batch.lengths, hidden.dim(1)?)?;
            batch.hidden = hidden;
        }
        layers.push(sums.finish(l, samples));
        if !progress(l + 1, config.num_layers) {
            return Err(Error::Interrupted);
        }
    }
    Ok(Observations {
        layers,
        tokens: samples.iter().map(|s| s.len() as u64).sum(),
        samples: samples.len() as u64,
        fingerprint: fingerprint.to_owned(),
    })
}

/// Samples of like length together, so that little is padded.
fn batches(ends: &Ends, samples: &[Vec<u32>]) -> Result<Vec<Batch>> {
    let mut order: Vec<&Vec<u32>> = samples.iter().collect();
    order.sort_by_key(|s| std::cmp::Reverse(s.len()));
    let mut batches = Vec::new();
    let mut rest = &order[..];
    while let Some(longest) = rest.first() {
        let width = longest.len();
        let rows = (BATCH_TOKENS / width).clamp(1, rest.len());
        let (now, later) = rest.split_at(rows);
        rest = later;
        let mut ids = vec![0u32; rows * width];
        for (row, sample) in ids.chunks_exact_mut(width).zip(now) {
            row[..sample.len()].copy_from_slice(sample);
        }
        batches.push(Batch {
            lengths: now.iter().map(|s| s.len()).collect(),
            hidden: ends.embed(Tokens { ids: &ids, rows })?,
        });
    }
    Ok(batches)
}

impl Sums {
    fn new(experts: usize) -> Self {
        Self {
            experts,
            gate_mass: vec![0.0; experts],
            selections: vec![0; experts],
            norm: 0.0,
            cosine: vec![0.0; experts * experts],
        }
    }

    /// Adds the routing of a batch of `width` positions a row, padding excluded.
    fn add(&mut self, routing: &Routing, lengths: &[usize], width: usize) -> Result<()> {
        let gates = routing.gates.to_vec1::<f32>()?;
        let logits = routing.logits.flatten_all()?.to_vec1::<f32>()?;
        let k = gates.len() / (lengths.len() * width);
        for (row, &length) in lengths.iter().enumerate() {
            let tokens = row * width..row * width + length;
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
        }
    }
}
