//! Which sets of experts to remove, several layers together: the KT-reception field of MoE-I²
//! (arXiv 2411.01016, section 3.1). The best set of a layer need not be the best beside those of the
//! layers around it; so of a few good sets of each layer in a block, the combination is taken that
//! together moves the output of the block least.
//!
//! A block's input is the beginning of some sequences as they are there in the original model. It lies
//! beside the observations of the first layer of each block: `sequences-<l>.safetensors` with `hidden`
//! `[N, H]`, one sequence behind the other, and `lengths` `[sequences]`, f32.

use crate::beside::{self, Block};
use crate::observations::Observations;
use crate::observe::Batch;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use lightmoe_models::{Checkpoint, Layer, ModelConfig, Rotary, to_be_read};
use std::path::{Path, PathBuf};

/// Layers with experts in a block: `T` of the paper.
pub const BLOCK: usize = 3;
/// Tokens that run through a block.
pub const MOST_TOKENS: usize = 1024;
/// Sequences of a batch.
const BATCH: usize = 16;

/// The layers with experts, block by block.
fn blocks(config: &ModelConfig) -> Vec<Vec<usize>> {
    let layers: Vec<usize> = config.moe_layers().collect();
    layers.chunks(BLOCK).map(<[usize]>::to_vec).collect()
}

fn file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("sequences-{layer}.safetensors"))
}

/// Numbers that one layer's sequences hold.
pub(crate) fn numbers(config: &ModelConfig) -> usize {
    MOST_TOKENS * config.hidden_size
}

/// The sequences at the beginning of a block, while its first layer is observed.
pub(crate) struct SequenceSums {
    width: usize,
    /// One of so many sequences is taken.
    stride: usize,
    /// Sequences so far.
    seen: usize,
    hidden: Vec<f32>,
    lengths: Vec<usize>,
}

impl SequenceSums {
    /// For a layer that `tokens` tokens will pass; `None` if no block begins there.
    pub(crate) fn new(config: &ModelConfig, layer: usize, tokens: usize) -> Option<Self> {
        let begins = blocks(config).iter().any(|block| block[0] == layer);
        begins.then(|| Self {
            width: config.hidden_size,
            stride: tokens.div_ceil(MOST_TOKENS).max(1),
            seen: 0,
            hidden: Vec::new(),
            lengths: Vec::new(),
        })
    }

    /// Takes its share of the sequences of `hidden: [B, T, H]`, as far as there is room: attention looks
    /// back only, so what a sequence begins with is right without the rest.
    pub(crate) fn add(&mut self, hidden: &Tensor, batch: &Batch<'_>) -> Result<()> {
        for (row, sample) in batch.samples.iter().enumerate() {
            let picked = self.seen.is_multiple_of(self.stride);
            self.seen += 1;
            let room = MOST_TOKENS - self.lengths.iter().sum::<usize>();
            let length = sample.len().min(room);
            if picked && length > 0 {
                let states = to_be_read(&hidden.get(row)?.narrow(0, 0, length)?)?;
                self.hidden.extend(states.flatten_all()?.to_vec1::<f32>()?);
                self.lengths.push(length);
            }
        }
        Ok(())
    }

    /// Writes the file of the layer into `folder`, whole or not at all.
    pub(crate) fn save(self, folder: &Path, layer: usize, fingerprint: &str) -> Result<()> {
        let lengths: Vec<f32> = self.lengths.iter().map(|&n| n as f32).collect();
        let rows = self.hidden.len() / self.width;
        let block = |name: &str, values: Vec<f32>, shape: Vec<usize>| {
            let values = Some(Tensor::from_vec(values, &shape[..], &Device::Cpu)?);
            Ok::<_, Error>((name.to_owned(), Block { values, shape }))
        };
        let count = lengths.len();
        let tensors = vec![
            block("hidden", self.hidden, vec![rows, self.width])?,
            block("lengths", lengths, vec![count])?,
        ];
        beside::save(file(folder, layer), tensors, fingerprint)
    }
}

/// Right-padded sequences on their way through a block.
struct Sequences {
    lengths: Vec<usize>,
    /// `[B, T, H]` each.
    batches: Vec<Tensor>,
}

impl Sequences {
    /// Those that observing left at `layer`.
    fn open(observations: &Observations, config: &ModelConfig, layer: usize) -> Result<Self> {
        let path = observations.moments.as_ref().map(|f| file(f, layer));
        let path = path.filter(|path| path.is_file()).ok_or_else(|| {
            Error::Invalid(format!(
                "the method needs sequences, and layer {layer} was observed without; observe with \
                 `--samples`"
            ))
        })?;
        let file = beside::open(path.clone(), &observations.fingerprint)?;
        let damaged = |message: String| Error::Observations {
            path: path.clone(),
            message: format!("{message}; observe again"),
        };
        let count = match file.shape("lengths") {
            Some(&[count]) => count,
            _ => return Err(damaged("no tensor `lengths`".to_owned())),
        };
        let lengths = file.values("lengths", &[count])?;
        let lengths: Vec<usize> = lengths.into_iter().map(|n| n as usize).collect();
        let possible = |length: &usize| (1..=MOST_TOKENS).contains(length);
        let rows = lengths
            .iter()
            .fold(0, |sum: usize, &n| sum.saturating_add(n));
        if !lengths.iter().all(possible) || !possible(&rows) {
            return Err(damaged(format!(
                "{rows} tokens in {count} sequences, expected up to {MOST_TOKENS} and none empty"
            )));
        }
        let hidden = file.values("hidden", &[rows, config.hidden_size])?;
        let hidden = Tensor::from_vec(hidden, (rows, config.hidden_size), &Device::Cpu)?;
        let mut start = 0;
        let batch = |lengths: &[usize]| {
            let width = lengths.iter().copied().max().unwrap_or(0);
            let rows = lengths.iter().map(|&length| {
                let states = hidden.narrow(0, start, length)?;
                start += length;
                states.pad_with_zeros(0, 0, width - length)
            });
            Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let batches = lengths.chunks(BATCH).map(batch);
        Ok(Self {
            batches: batches.collect::<candle_core::Result<_>>()?,
            lengths,
        })
    }

    /// The square of how far `states` are from `other`, padding excluded.
    fn distance(&self, states: &[Tensor], other: &[Tensor]) -> Result<f64> {
        let mut sum = 0.0;
        let batches = self.lengths.chunks(BATCH).zip(states).zip(other);
        for ((lengths, states), other) in batches {
            for (row, &length) in lengths.iter().enumerate() {
                let part = |t: &Tensor| t.get(row)?.narrow(0, 0, length);
                let square = (part(states)? - part(other)?)?.sqr()?.sum_all()?;
                sum += f64::from(square.to_scalar::<f32>()?);
            }
        }
        Ok(sum)
    }
}

/// A choice for the layers of a block so far.
struct Choice {
    /// Places in the layers' candidates.
    picks: Vec<usize>,
    /// What comes of it: `[B, T, H]` each.
    states: Vec<Tensor>,
}

/// Of `candidates`, the sets of experts that each layer with experts may lose, the places of those
/// that are to be taken: in each block the combination that moves its output least; of equals the
/// first. `progress(done, total)` counts layers with experts and may stop the work by `false`.
///
/// # Errors
/// [`Error::Invalid`] if the `observations` were made without samples, [`Error::Interrupted`] if the
/// work was stopped; if files are damaged, or belong to other observations.
pub fn choose(
    checkpoint: &Checkpoint,
    observations: &Observations,
    candidates: &[Vec<Vec<usize>>],
    progress: &dyn Fn(usize, usize) -> bool,
) -> Result<Vec<usize>> {
    let config = checkpoint.config();
    let rotary = Rotary::new(config);
    let mut chosen: Vec<usize> = Vec::new();
    for block in blocks(config) {
        let sequences = Sequences::open(observations, config, block[0])?;
        let mut original = sequences.batches.clone();
        let mut choices = vec![Choice {
            picks: Vec::new(),
            states: original.clone(),
        }];
        for l in block[0]..=block[block.len() - 1] {
            let layer = Layer::load(checkpoint, l)?;
            let run = |states: &[Tensor], removed: &[usize]| -> Result<Vec<Tensor>> {
                let forward = |x| layer.forward_without(x, config, &rotary, removed);
                Ok(states
                    .iter()
                    .map(forward)
                    .collect::<std::result::Result<_, _>>()?)
            };
            original = run(&original, &[])?;
            // A layer without experts between the others has one way to go on.
            let place = block.iter().position(|&of_block| of_block == l);
            let sets = place.map(|place| &candidates[chosen.len() + place]);
            let mut next = Vec::new();
            for choice in &choices {
                let mut push = |pick: Option<usize>, removed: &[usize]| {
                    let picks = choice.picks.iter().copied().chain(pick).collect();
                    let states = run(&choice.states, removed)?;
                    next.push(Choice { picks, states });
                    Ok::<_, Error>(())
                };
                match sets {
                    None => push(None, &[])?,
                    Some(sets) => {
                        for (pick, set) in sets.iter().enumerate() {
                            push(Some(pick), set)?;
                        }
                    }
                }
            }
            choices = next;
            let done = chosen.len() + place.map_or(0, |place| place + 1);
            if !progress(done, candidates.len()) {
                return Err(Error::Interrupted);
            }
        }
        let distance = |choice: &Choice| sequences.distance(&choice.states, &original);
        let distances = choices.iter().map(distance).collect::<Result<Vec<_>>>()?;
        let best = (0..choices.len()).min_by(|&a, &b| distances[a].total_cmp(&distances[b]));
        chosen.extend(best.into_iter().flat_map(|best| &choices[best].picks));
    }
    Ok(chosen)
}
