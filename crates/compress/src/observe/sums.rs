//! The sums over the tokens of one layer.

use super::{Batch, ObserveOptions, Sensitivity, Statistics};
use crate::Result;
use crate::damage::{DamageSums, WeightedTokens};
use crate::factor::{Metric, singular_values};
use crate::inputs::InputSums;
use crate::moments::MomentSums;
use crate::observations::{Components, LayerObservations, OutputObservations};
use crate::reception::SequenceSums;
use crate::samples::SampleSums;
use candle_core::{D, Tensor};
use lightmoe_models::{
    Bank, ExpertRows, Layer, LayerObserver, ModelConfig, Projections, Routing, to_be_read,
};
use rayon::prelude::*;

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
    weighted: Vec<f64>,
}

/// Sums over the tokens of one layer.
pub(super) struct Sums {
    experts: usize,
    gate_mass: Vec<f64>,
    selections: Vec<u64>,
    norm: f64,
    cosine: Vec<f64>,
    logit_gram: Vec<f64>,
    outputs: OutputObservations,
    /// Sums of outputs over all tokens.
    all_outputs: Option<Vec<f64>>,
    moments: Option<MomentSums>,
    sample: Option<SampleSums>,
    sequences: Option<SequenceSums>,
    inputs: Option<InputSums>,
    damage: Option<RelativeDamage>,
}

/// What errors cost by the size of the states that they are added to.
struct RelativeDamage {
    sums: DamageSums,
    /// Of all samples.
    tokens: usize,
    /// Of the batch under way: `½·H/(N·‖x_t‖²)` of each token that goes into the layer.
    weights: Vec<f32>,
}

/// Sums, and the batch that adds to them.
pub(super) struct BatchSums<'a> {
    pub(super) sums: &'a mut Sums,
    pub(super) batch: &'a Batch<'a>,
}

impl LayerObserver for BatchSums<'_> {
    fn block(&mut self, bank: &Bank, x: &Tensor, routing: &Routing) -> lightmoe_models::Result<()> {
        let (sums, batch) = (&mut *self.sums, self.batch);
        sums.routing(routing, batch)?;
        if let Some(all) = &mut sums.all_outputs {
            let x = x.index_select(&Tensor::new(batch.held(), x.device())?, 0)?;
            let width = x.dim(1)?;
            let found = bank.output_sums(&x)?;
            for (&expert, sum) in bank.dense_experts().iter().zip(found) {
                let row = &mut all[expert * width..(expert + 1) * width];
                row.iter_mut()
                    .zip(sum)
                    .for_each(|(all, v)| *all += f64::from(v));
            }
        }
        if let Some(sample) = &mut sums.sample {
            sample.add(bank, x, routing, &batch.held())?;
        }
        if let Some(inputs) = &mut sums.inputs {
            inputs.add(x, routing, &batch.held())?;
        }
        if let Some(RelativeDamage { sums, weights, .. }) = &mut sums.damage {
            let tokens = WeightedTokens {
                tokens: &batch.held(),
                weights,
                gradients: None,
            };
            sums.add(bank, x, routing, &tokens)?;
        }
        Ok(())
    }

    fn expert(&mut self, routing: &Routing, rows: &ExpertRows<'_>) -> lightmoe_models::Result<()> {
        let (sums, batch) = (&mut *self.sums, self.batch);
        sums.outputs(routing, batch, rows)?;
        if let Some(moments) = &mut sums.moments {
            let k = routing.chosen.len() / (batch.samples.len() * batch.width);
            let places = rows.pairs.iter().enumerate();
            let seen = places.filter(|(_, pair)| batch.holds(**pair as usize / k));
            let seen: Vec<u32> = seen.map(|(place, _)| place as u32).collect();
            if !seen.is_empty() {
                moments.add(rows, &Tensor::new(seen, rows.x.device())?)?;
            }
        }
        Ok(())
    }
}

impl Sums {
    /// For layer `number`, which `tokens` tokens will pass.
    pub(super) fn new(
        config: &ModelConfig,
        statistics: Statistics,
        number: usize,
        tokens: usize,
    ) -> Self {
        let experts = config.moe.num_experts;
        Self {
            experts,
            gate_mass: vec![0.0; experts],
            selections: vec![0; experts],
            norm: 0.0,
            cosine: vec![0.0; experts * experts],
            logit_gram: vec![0.0; experts * experts],
            outputs: OutputObservations::none(experts, config.hidden_size),
            all_outputs: statistics
                .all_outputs
                .then(|| vec![0.0; experts * config.hidden_size]),
            moments: statistics.moments.then(|| MomentSums::new(config)),
            sample: statistics.samples.then(|| SampleSums::new(config, tokens)),
            sequences: statistics
                .samples
                .then(|| SequenceSums::new(config, number, tokens))
                .flatten(),
            inputs: statistics.bias.then(|| InputSums::new(config, number)),
            damage: (statistics.damage == Some(Sensitivity::Relative)).then(|| RelativeDamage {
                sums: DamageSums::new(config, tokens, statistics.bias),
                tokens,
                weights: Vec::new(),
            }),
        }
    }

    /// Looks at what goes into the layer, `[B, T, H]`.
    pub(super) fn input(&mut self, hidden: &Tensor, batch: &Batch<'_>) -> Result<()> {
        if let Some(damage) = &mut self.damage {
            let held = Tensor::new(batch.held(), hidden.device())?;
            let squares = hidden.flatten_to(1)?.sqr()?.mean(D::Minus1)?;
            let squares = squares.index_select(&held, 0)?.to_vec1::<f32>()?;
            let whole = 0.5 / damage.tokens as f32;
            let weight = |square: f32| whole / square.max(f32::MIN_POSITIVE);
            damage.weights = squares.into_iter().map(weight).collect();
        }
        match &mut self.sequences {
            Some(sequences) => sequences.add(hidden, batch),
            None => Ok(()),
        }
    }

    /// Looks at the weights of the experts.
    pub(super) fn weights(&mut self, bank: &Bank) -> Result<()> {
        let Some(dense) = &bank.dense else {
            return Ok(());
        };
        let of_expert = |i: usize| -> Result<f64> {
            let (mut absolute, mut square, mut count) = (0.0, 0.0, 0usize);
            for (_, stack) in dense.named() {
                let weights = to_be_read(&stack.get(i)?)?
                    .flatten_all()?
                    .to_vec1::<f32>()?;
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

    /// Adds the outputs of an expert, padding excluded.
    fn outputs(
        &mut self,
        routing: &Routing,
        batch: &Batch<'_>,
        rows: &ExpertRows<'_>,
    ) -> candle_core::Result<()> {
        let (expert, width) = (rows.expert, rows.y.dim(1)?);
        let k = routing.chosen.len() / (batch.samples.len() * batch.width);
        let gates = routing.gates.to_vec1::<f32>()?;
        let values = to_be_read(rows.y)?.flatten_all()?.to_vec1::<f32>()?;
        // The sums of some rows each, in parallel; added in order, so that they are always the same.
        let parts: Vec<RowSums> = rows
            .pairs
            .par_chunks(ROWS)
            .zip(values.par_chunks(ROWS * width))
            .map(|(pairs, values)| {
                let mut part = RowSums {
                    sum: vec![0.0; width],
                    weighted: vec![0.0; width],
                    ..RowSums::default()
                };
                let rows = pairs.iter().zip(values.chunks_exact(width));
                for (&pair, output) in rows.filter(|(pair, _)| batch.holds(**pair as usize / k)) {
                    let token = pair as usize / k;
                    let of_token = gates[token * k..(token + 1) * k].iter();
                    let whole: f64 = of_token.map(|&g| f64::from(g)).sum();
                    let square: f64 = output.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
                    let gate = f64::from(gates[pair as usize]);
                    let share = gate / whole.max(f64::MIN_POSITIVE);
                    part.gated += share * square.sqrt();
                    part.norm += square.sqrt();
                    part.square += square;
                    let both = part.sum.iter_mut().zip(&mut part.weighted);
                    for ((sum, weighted), &v) in both.zip(output) {
                        *sum += f64::from(v);
                        *weighted += gate * f64::from(v);
                    }
                }
                part
            })
            .collect();
        let of_expert = expert * width..(expert + 1) * width;
        let sum = &mut self.outputs.sum[of_expert.clone()];
        let weighted = &mut self.outputs.weighted[of_expert];
        for part in parts {
            self.outputs.gated[expert] += part.gated;
            self.outputs.norm[expert] += part.norm;
            self.outputs.square[expert] += part.square;
            sum.iter_mut().zip(part.sum).for_each(|(sum, v)| *sum += v);
            let more = weighted.iter_mut().zip(part.weighted);
            more.for_each(|(sum, v)| *sum += v);
        }
        Ok(())
    }

    /// Adds the routing of a batch, padding excluded.
    fn routing(&mut self, routing: &Routing, batch: &Batch<'_>) -> candle_core::Result<()> {
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
                self.logit_gram[a * e + b] += gram[a * e + b];
                if a != b {
                    self.logit_gram[b * e + a] += gram[a * e + b];
                }
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

    /// Ends the sums of layer `number`; moments and sample go into the folder of the state.
    pub(super) fn finish(
        self,
        number: usize,
        samples: &[Vec<u32>],
        layer: &Layer,
        options: &ObserveOptions<'_>,
    ) -> Result<LayerObservations> {
        let tokens: usize = samples.iter().map(Vec::len).sum();
        let samples = samples.len() as f64;
        let mut spectra = None;
        let folder = super::moments_in(options.state);
        if let Some(sample) = self.sample {
            let correction = layer.router_correction();
            sample.save(&folder, number, options.fingerprint, correction)?;
        }
        if let Some(sequences) = self.sequences {
            sequences.save(&folder, number, options.fingerprint)?;
        }
        if let Some(inputs) = self.inputs {
            inputs.save(&folder, number, options.fingerprint)?;
        }
        if let Some(moments) = &self.moments {
            moments.save(&folder, number, options.fingerprint)?;
            if let Some(bank) = layer.bank() {
                spectra = Some(of_weights(bank, moments)?);
            }
        }
        let mut damage = None;
        if let (Some(relative), Some(bank)) = (self.damage, layer.bank()) {
            let sums = relative.sums;
            damage = Some(sums.finish(bank, &folder, number, options.fingerprint)?);
        }
        let mean = |sum: Vec<f64>| sum.into_iter().map(|v| v / tokens as f64).collect();
        Ok(LayerObservations {
            layer: number,
            gate_mass: self.gate_mass,
            selections: self.selections,
            router_norm: Some(self.norm / tokens as f64),
            similarity: Some(self.cosine.into_iter().map(|c| c / samples).collect()),
            logit_gram: Some(self.logit_gram),
            outputs: Some(self.outputs),
            all_outputs: self.all_outputs.map(mean),
            spectra,
            damage,
        })
    }
}

/// The spectra of the dense experts; those of other slots are zero.
fn of_weights(bank: &Bank, moments: &MomentSums) -> Result<Components> {
    let Some(dense) = &bank.dense else {
        return Err(crate::Error::Invalid(
            "a layer without dense experts has no spectra; observe the original model".to_owned(),
        ));
    };
    let experts = bank.dense_experts();
    let spectra = |(i, &expert): (usize, &usize)| -> Result<[Vec<f64>; 3]> {
        let [input, hidden] = moments.expert(expert)?;
        let of = |pick: fn(&Projections) -> &Tensor, metric| {
            singular_values(&to_be_read(&pick(dense).get(i)?)?, metric)
        };
        let [input, hidden] = [input, hidden].map(Metric::of_inputs);
        Ok([
            of(|p| &p.gate, &input)?,
            of(|p| &p.up, &input)?,
            of(|p| &p.down, &hidden)?,
        ])
    };
    let found: Vec<[Vec<f64>; 3]> = experts
        .par_iter()
        .enumerate()
        .map(spectra)
        .collect::<Result<_>>()?;
    let width = found.first().map_or(0, |[gate, ..]| gate.len());
    let mut all = Components::none(bank.len(), width);
    for (&expert, spectra) in experts.iter().zip(&found) {
        all.set(expert, spectra);
    }
    Ok(all)
}
