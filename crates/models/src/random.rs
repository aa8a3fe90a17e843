//! Random numbers: one seed, named streams, the same numbers on every machine; and what is drawn
//! from them, fresh adapters and fresh models.

use crate::attention::SelfAttention;
use crate::bank::{Adapters, Bank, Projections};
use crate::config::ModelConfig;
use crate::decoder::{Decoder, Ends};
use crate::layer::Layer;
use crate::layout::LayerLayout;
use crate::shared::SharedExpert;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// The random stream `name` of a run with this seed. Streams of different names are independent, so
/// one more draw here changes nothing there.
pub fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    // FNV-1a, stable across versions and machines.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&hash.to_le_bytes());
    ChaCha8Rng::from_seed(bytes)
}

/// Gaussian f32 numbers of the given standard deviation.
pub fn gaussian(rng: &mut ChaCha8Rng, std: f64, shape: &[usize]) -> Result<Tensor> {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|_| (rng.sample::<f64, _>(StandardNormal) * std) as f32)
        .collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

impl Adapters {
    /// Fresh adapters for `experts` of one layer: `lora_A` Gaussian with standard deviation
    /// `1/sqrt(in)`, `lora_B` zero, so they change nothing yet (LightMoE §3.3). Each expert draws from
    /// a stream of its own, whichever others there are. `None` for no experts or rank zero.
    pub fn fresh(
        config: &ModelConfig,
        layer: usize,
        experts: &[usize],
        rank: usize,
        seed: u64,
    ) -> Result<Option<Self>> {
        if experts.is_empty() || rank == 0 {
            return Ok(None);
        }
        let (h, f) = (config.hidden_size, config.moe.intermediate_size);
        let a = |projection: &str, width: usize| -> Result<Tensor> {
            let each = experts.iter().map(|expert| {
                let name = format!("adapter/{layer}/{expert}/{projection}");
                gaussian(
                    &mut stream(seed, &name),
                    (1.0 / width as f64).sqrt(),
                    &[rank, width],
                )
            });
            Ok(Tensor::stack(&each.collect::<Result<Vec<_>>>()?, 0)?)
        };
        let n = experts.len();
        let zeros = |out: usize| Tensor::zeros((n, out, rank), DType::F32, &Device::Cpu);
        Ok(Some(Self {
            a: Projections {
                gate: a("gate_proj", h)?,
                up: a("up_proj", h)?,
                down: a("down_proj", f)?,
            },
            b: Projections {
                gate: zeros(f)?,
                up: zeros(f)?,
                down: zeros(h)?,
            },
        }))
    }
}

impl Decoder {
    /// A model with random weights, to be trained from nothing: matrices with standard deviation
    /// `0.02·sqrt(...)` scaled to `1/sqrt(fan in)`, projections into the residual stream smaller by
    /// `sqrt(2·layers)` (as GPT-2 does), norms one.
    pub fn random(config: &ModelConfig, seed: u64) -> Result<Self> {
        config.check_runnable()?;
        let (h, e) = (config.hidden_size, config.moe.num_experts);
        let inverse = |fan_in: usize| (1.0 / fan_in as f64).sqrt();
        let residual = (1.0 / (2.0 * config.num_layers as f64)).sqrt();
        let draw = |name: &str, std: f64, shape: &[usize]| {
            gaussian(&mut stream(seed, &format!("init/{name}")), std, shape)
        };
        let ones = |n: usize| Tensor::ones(n, DType::F32, &Device::Cpu);
        let f = config.moe.intermediate_size;
        if config.first_dense_layers > 0 {
            return Err(Error::Invalid(
                "a random model has no dense layers; set `first_k_dense_replace` to 0".into(),
            ));
        }
        let layers = (0..config.num_layers).map(|l| {
            let at = |what: &str| format!("{l}/{what}");
            let dense = Projections {
                gate: draw(&at("gate_proj"), inverse(h), &[e, f, h])?,
                up: draw(&at("up_proj"), inverse(h), &[e, f, h])?,
                down: draw(&at("down_proj"), inverse(f) * residual, &[e, h, f])?,
            };
            // Norms are one, biases zero, matrices Gaussian, each from a stream of its own.
            let fresh = |name: &str, shape: &[usize]| -> Result<Tensor> {
                let stream = match name.strip_prefix("self_attn.") {
                    Some(short) => short.trim_end_matches("_proj"),
                    None => name,
                };
                match (name.rsplit('.').next().unwrap_or(name), shape) {
                    ("bias", _) => Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?),
                    (_, &[n]) => Ok(ones(n)?),
                    ("o_proj" | "down_proj", &[_, width]) => {
                        draw(&at(stream), inverse(width) * residual, shape)
                    }
                    _ => draw(&at(stream), inverse(h), shape),
                }
            };
            Ok(Layer {
                input_norm: ones(h)?,
                attention: SelfAttention::build(config, &fresh)?,
                post_norm: ones(h)?,
                router: draw(&at("router"), inverse(h), &[e, h])?,
                shared: SharedExpert::build(config, &fresh)?,
                bank: Bank::of_dense(&LayerLayout::dense(e), dense),
            })
        });
        let vocab = config.vocab_size;
        let head = (!config.tie_word_embeddings)
            .then(|| draw("head", inverse(h), &[vocab, h]))
            .transpose()?;
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let ends = Ends::new(
            config,
            draw("embed", inverse(h), &[vocab, h])?,
            ones(h)?,
            head,
        );
        Ok(Self::from_parts(config.clone(), ends, layers))
    }
}
