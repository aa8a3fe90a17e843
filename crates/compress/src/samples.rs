//! A sample of the tokens of each layer, with what every expert would give: enough to tell, without the
//! model, how far the output of the layer moves if any set of experts is gone.
//!
//! The experts of a layer give a token `Σ c_e·y_e`, where `c_e` is the gate of a chosen expert and zero
//! for the others. Without some experts the router decides again, and the output moves by `Σ Δc_e·y_e`.
//! The square of that is `Δcᵀ·G·Δc` with the Gram matrix `G[a, b] = ⟨y_a, y_b⟩` of the token. The
//! sample keeps `G` and the router's logits, from which the router's own rules give `Δc`.
//!
//! A folder beside the observations, one file a layer: `samples-<l>.safetensors` with `logits` `[S, E]`,
//! `gram` `[S, E, E]` and, where the router has one, `correction` `[E]`, f32.

use crate::Result;
use crate::beside::{self, Block};
use candle_core::{Device, Tensor};
use lightmoe_models::config::MoeConfig;
use lightmoe_models::{Bank, ModelConfig, Routing, route_logits};
use std::path::{Path, PathBuf};

/// The most tokens of a sample.
const MOST_TOKENS: usize = 512;
/// The most numbers of a sample's Gram matrices.
const MOST_NUMBERS: usize = 4 << 20;

/// How many of `tokens` the sample of a layer holds.
fn size(moe: &MoeConfig, tokens: usize) -> usize {
    let most = (MOST_NUMBERS / (moe.num_experts * moe.num_experts)).max(1);
    tokens.min(MOST_TOKENS).min(most)
}

/// Tokens whose outputs of all experts are held at a time.
fn rows(config: &ModelConfig) -> usize {
    (MOST_NUMBERS / (config.moe.num_experts * config.hidden_size)).max(1)
}

/// Numbers that sampling holds: the Gram matrices and the outputs that go into some of them, twice.
pub(crate) fn numbers(config: &ModelConfig) -> usize {
    let experts = config.moe.num_experts;
    let gram = size(&config.moe, usize::MAX) * experts * experts;
    gram + 2 * rows(config) * experts * config.hidden_size
}

pub(crate) fn file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("samples-{layer}.safetensors"))
}

/// The sampled tokens of one layer.
#[derive(Debug)]
pub struct Sample {
    moe: MoeConfig,
    /// `[S, E]`
    logits: Tensor,
    /// `[E]`
    correction: Option<Tensor>,
    /// `[S * E * E]` row-major.
    gram: Vec<f32>,
    /// `[S * E]` the gates of the original.
    gates: Vec<f32>,
}

impl Sample {
    /// Opens that of a layer of observations of `tokens` tokens.
    ///
    /// # Errors
    /// If the file is damaged, or belongs to other observations.
    pub(crate) fn open(
        path: PathBuf,
        fingerprint: &str,
        moe: &MoeConfig,
        tokens: u64,
    ) -> Result<Self> {
        let file = beside::open(path, fingerprint)?;
        let (experts, size) = (moe.num_experts, size(moe, tokens as usize));
        let tensor = |name: &str, shape: &[usize]| -> Result<Tensor> {
            Ok(Tensor::from_vec(
                file.values(name, shape)?,
                shape,
                &Device::Cpu,
            )?)
        };
        let logits = tensor("logits", &[size, experts])?;
        let correction = file
            .shape("correction")
            .map(|_| tensor("correction", &[experts]))
            .transpose()?;
        let gates = gates(
            &route_logits(logits.clone(), correction.as_ref(), moe, &[])?,
            experts,
        )?;
        Ok(Self {
            moe: moe.clone(),
            gram: file.values("gram", &[size, experts, experts])?,
            logits,
            correction,
            gates,
        })
    }

    /// How far the layer's output moves without the experts `removed`: the Frobenius norm over the
    /// sampled tokens.
    ///
    /// # Errors
    /// If the tensor library fails.
    pub fn loss(&self, removed: &[usize]) -> Result<f64> {
        let experts = self.moe.num_experts;
        let logits = self.logits.clone();
        let routing = route_logits(logits, self.correction.as_ref(), &self.moe, removed)?;
        let gates = gates(&routing, experts)?;
        let mut sum = 0.0;
        let tokens = gates
            .chunks_exact(experts)
            .zip(self.gates.chunks_exact(experts));
        for ((now, then), gram) in tokens.zip(self.gram.chunks_exact(experts * experts)) {
            let moved = now
                .iter()
                .zip(then)
                .map(|(now, then)| f64::from(now - then));
            let moved: Vec<(usize, f64)> = moved.enumerate().filter(|(_, d)| *d != 0.0).collect();
            for &(a, da) in &moved {
                let row = &gram[a * experts..(a + 1) * experts];
                sum += da
                    * moved
                        .iter()
                        .map(|&(b, db)| db * f64::from(row[b]))
                        .sum::<f64>();
            }
        }
        Ok(sum.max(0.0).sqrt())
    }
}

/// `[T * E]` row-major: the gates of the chosen experts, zero for the others.
fn gates(routing: &Routing, experts: usize) -> Result<Vec<f32>> {
    let tokens = routing.logits.dim(0)?;
    let k = routing.chosen.len() / tokens.max(1);
    let mut gates = vec![0.0; tokens * experts];
    let chosen = routing.chosen.iter().zip(routing.gates.to_vec1::<f32>()?);
    for (pair, (&expert, gate)) in chosen.enumerate() {
        gates[pair / k * experts + expert as usize] = gate;
    }
    Ok(gates)
}

/// The sample of one layer while it is observed.
pub(crate) struct SampleSums {
    /// Tokens of the layer, and of the sample.
    tokens: usize,
    size: usize,
    /// Tokens at a time.
    rows: usize,
    experts: usize,
    /// Tokens so far.
    seen: usize,
    logits: Vec<f32>,
    gram: Vec<f32>,
}

impl SampleSums {
    /// For a layer that `tokens` tokens will pass.
    pub(crate) fn new(config: &ModelConfig, tokens: usize) -> Self {
        Self {
            tokens,
            size: size(&config.moe, tokens),
            rows: rows(config),
            experts: config.moe.num_experts,
            seen: 0,
            logits: Vec::new(),
            gram: Vec::new(),
        }
    }

    /// Takes its share of the tokens at `places` of `x: [T, H]`, evenly spread over the layer's.
    pub(crate) fn add(
        &mut self,
        bank: &Bank,
        x: &Tensor,
        routing: &Routing,
        places: &[u32],
    ) -> lightmoe_models::Result<()> {
        if bank.dense_experts().len() < self.experts {
            return Err(lightmoe_models::Error::Invalid(
                "a sample needs the outputs of all experts, and some are gone; observe the original \
                 model"
                    .to_owned(),
            ));
        }
        let before = |token: usize| token * self.size / self.tokens;
        let picked: Vec<u32> = (self.seen..)
            .zip(places)
            .filter(|&(token, _)| before(token + 1) > before(token))
            .map(|(_, &place)| place)
            .collect();
        self.seen += places.len();
        for some in picked.chunks(self.rows) {
            let some = Tensor::new(some, x.device())?;
            let y = Tensor::stack(&bank.outputs(&x.index_select(&some, 0)?)?, 1)?;
            let gram = y.matmul(&y.transpose(1, 2)?)?;
            self.gram.extend(gram.flatten_all()?.to_vec1::<f32>()?);
            let logits = routing.logits.index_select(&some, 0)?;
            self.logits.extend(logits.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    /// Writes the file of the layer into `folder`, whole or not at all.
    pub(crate) fn save(
        self,
        folder: &Path,
        layer: usize,
        fingerprint: &str,
        correction: Option<&Tensor>,
    ) -> Result<()> {
        let (s, e) = (self.size, self.experts);
        let block = |name: &str, values: Tensor| {
            let shape = values.dims().to_vec();
            let values = Some(values);
            (name.to_owned(), Block { values, shape })
        };
        let mut tensors = vec![
            block(
                "logits",
                Tensor::from_vec(self.logits, (s, e), &Device::Cpu)?,
            ),
            block(
                "gram",
                Tensor::from_vec(self.gram, (s, e, e), &Device::Cpu)?,
            ),
        ];
        tensors.extend(correction.map(|values| block("correction", values.clone())));
        beside::save(file(folder, layer), tensors, fingerprint)
    }
}
