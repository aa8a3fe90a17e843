//! Some of what each expert was given: enough to tell what a slot in its place misses of it on average, which
//! is the slot's bias.
//!
//! Of every expert the inputs of up to [`MOST`] tokens that chose it, with their gates: those that drew the
//! lowest numbers, so that each is as likely to be there, however many follow. A folder beside the
//! observations, one file a layer: `inputs-<l>.safetensors` with `inputs.<e>` `[n, H]` and `gates.<e>` `[n]`,
//! f32, of every expert that a token chose.

use crate::beside::{self, Block};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use lightmoe_models::random::stream;
use lightmoe_models::{ModelConfig, Routing, TensorFile, to_be_read};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use std::path::{Path, PathBuf};

/// The most tokens of an expert.
const MOST: usize = 128;

/// Numbers that the inputs of a layer hold, while they are collected and written.
pub(crate) fn numbers(config: &ModelConfig) -> usize {
    2 * MOST * config.moe.num_experts * config.hidden_size
}

fn file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("inputs-{layer}.safetensors"))
}

/// The inputs of one layer, read expert by expert.
pub(crate) struct Inputs {
    file: TensorFile,
    width: usize,
}

impl Inputs {
    /// Opens the file of layer `layer` in the folder beside the observations of this fingerprint.
    ///
    /// # Errors
    /// If it is missing or damaged, or belongs to other observations.
    pub(crate) fn open(
        config: &ModelConfig,
        folder: Option<&Path>,
        layer: usize,
        fingerprint: &str,
    ) -> Result<Self> {
        let path = folder.map(|folder| file(folder, layer));
        let path = path.filter(|path| path.is_file()).ok_or_else(|| {
            Error::Invalid(format!(
                "a bias is what a slot misses of its expert, and layer {layer} was observed without the inputs \
                 that tell; observe with `--bias true`"
            ))
        })?;
        Ok(Self {
            file: beside::open(path, fingerprint)?,
            width: config.hidden_size,
        })
    }

    /// Inputs `[n, H]` of `expert` and their gates `[n]`; `None` if no token chose it.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(crate) fn of(&self, expert: usize) -> Result<Option<(Tensor, Vec<f32>)>> {
        let (inputs, gates) = (format!("inputs.{expert}"), format!("gates.{expert}"));
        let Some(&[count]) = self.file.shape(&gates) else {
            return Ok(None);
        };
        let shape = [count, self.width];
        let values = self.file.values(&inputs, &shape)?;
        let x = Tensor::from_vec(values, &shape[..], &Device::Cpu)?;
        Ok(Some((x, self.file.values(&gates, &[count])?)))
    }
}

/// A token that an expert keeps.
struct Kept {
    /// What it drew.
    number: u64,
    gate: f32,
    /// `[H]`
    input: Vec<f32>,
}

/// The inputs of one layer while it is observed.
pub(crate) struct InputSums {
    random: ChaCha8Rng,
    experts: Vec<Vec<Kept>>,
}

impl InputSums {
    /// For layer `layer`.
    pub(crate) fn new(config: &ModelConfig, layer: usize) -> Self {
        Self {
            random: stream(0, &format!("inputs/{layer}")),
            experts: (0..config.moe.num_experts).map(|_| Vec::new()).collect(),
        }
    }

    /// Takes its share of the tokens at `places` of `x: [T, H]`.
    pub(crate) fn add(
        &mut self,
        x: &Tensor,
        routing: &Routing,
        places: &[u32],
    ) -> lightmoe_models::Result<()> {
        let k = routing.chosen.len() / x.dim(0)?;
        let gates = routing.gates.to_vec1::<f32>()?;
        let x = to_be_read(x)?;
        for &place in places {
            let mut input = None;
            let pairs = place as usize * k..(place as usize + 1) * k;
            for (&expert, &gate) in routing.chosen[pairs.clone()].iter().zip(&gates[pairs]) {
                let number = self.random.random();
                let kept = &mut self.experts[expert as usize];
                let highest = kept.iter().enumerate().max_by_key(|(_, kept)| kept.number);
                let out = highest.map(|(at, kept)| (at, kept.number));
                let out = out.filter(|_| kept.len() == MOST);
                if out.is_some_and(|(_, highest)| highest < number) {
                    continue;
                }
                let input = match &input {
                    Some(input) => input,
                    None => input.insert(x.get(place as usize)?.to_vec1::<f32>()?),
                };
                let new = Kept {
                    number,
                    gate,
                    input: Vec::clone(input),
                };
                match out {
                    Some((at, _)) => kept[at] = new,
                    None => kept.push(new),
                }
            }
        }
        Ok(())
    }

    /// Writes the file of the layer into `folder`, whole or not at all.
    pub(crate) fn save(self, folder: &Path, layer: usize, fingerprint: &str) -> Result<()> {
        let mut tensors = Vec::new();
        for (expert, kept) in self.experts.into_iter().enumerate() {
            let count = kept.len();
            if count == 0 {
                continue;
            }
            let gates: Vec<f32> = kept.iter().map(|kept| kept.gate).collect();
            let inputs: Vec<f32> = kept.into_iter().flat_map(|kept| kept.input).collect();
            let width = inputs.len() / count;
            for (what, values, shape) in [
                ("inputs", inputs, vec![count, width]),
                ("gates", gates, vec![count]),
            ] {
                let values = Some(Tensor::from_vec(values, &shape[..], &Device::Cpu)?);
                tensors.push((format!("{what}.{expert}"), Block { values, shape }));
            }
        }
        beside::save(file(folder, layer), tensors, fingerprint)
    }
}
