//! Random numbers: one seed, named streams, the same numbers on every machine; and what is drawn
//! from them, fresh adapters and fresh models.

use crate::bank::{Adapters, Bank, Projections};
use crate::config::ModelConfig;
use crate::decoder::{Decoder, Ends};
use crate::layer::Layer;
use crate::layout::LayerLayout;
use crate::{Result, names};
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
    /// a stream of its own, whichever others there are. They are f32 on `device`. `None` for no experts or rank zero.
    pub fn fresh(
        config: &ModelConfig,
        layer: usize,
        experts: &[usize],
        (rank, seed): (usize, u64),
        device: &Device,
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
            Ok(Tensor::stack(&each.collect::<Result<Vec<_>>>()?, 0)?.to_device(device)?)
        };
        let n = experts.len();
        let zeros = |out: usize| Tensor::zeros((n, out, rank), DType::F32, device);
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
    /// A model with random weights, to be trained from nothing, at the scale of [`scale`].
    pub fn random(config: &ModelConfig, seed: u64) -> Result<Self> {
        let draw = |name: &str, std: f64, shape: &[usize]| {
            gaussian(&mut stream(seed, &format!("init/{name}")), std, shape)
        };
        // Each from a stream of its own.
        let fresh = |place: &str, name: &str, shape: &[usize]| -> Result<Tensor> {
            let std = scale(name, shape, config);
            if let &[n] = shape {
                return Ok(match std > 0.0 {
                    true => Tensor::ones(n, DType::F32, &Device::Cpu)?,
                    false => Tensor::zeros(n, DType::F32, &Device::Cpu)?,
                });
            }
            let stream = match name {
                "mlp.gate" => "router",
                names::EMBED => "embed",
                names::HEAD => "head",
                _ => match name.strip_prefix("self_attn.") {
                    Some(short) => short.trim_end_matches("_proj"),
                    None => name.trim_start_matches("mlp.experts."),
                },
            };
            draw(&format!("{place}{stream}"), std, shape)
        };
        let (h, e) = (config.hidden_size, config.moe.num_experts);
        let f = config.moe.intermediate_size;
        let layers = (0..config.num_layers).map(|l| {
            let get = |name: &str, shape: &[usize]| fresh(&format!("{l}/"), name, shape);
            let experts = |projection: &str, shape: [usize; 3]| {
                get(&format!("mlp.experts.{projection}"), &shape)
            };
            let bank = || {
                let dense = Projections {
                    gate: experts("gate_proj", [e, f, h])?,
                    up: experts("up_proj", [e, f, h])?,
                    down: experts("down_proj", [e, h, f])?,
                };
                Ok(Bank::of_dense(&LayerLayout::dense(e), dense))
            };
            Layer::build(config, &get, config.is_moe_layer(l).then_some(bank))
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let ends = Ends::build(config, &|name, shape| fresh("", name, shape))?;
        Ok(Self::from_parts(config.clone(), ends, layers))
    }
}

/// The scale of a fresh parameter, by its name without `.weight`: for matrices the standard deviation
/// `1/sqrt(fan in)`, smaller by `sqrt(2·layers)` for those that lead into the residual stream (as
/// GPT-2 does); for vectors their value, one for norms and zero for biases.
pub fn scale(name: &str, shape: &[usize], config: &ModelConfig) -> f64 {
    let last = name.rsplit('.').next().unwrap_or(name);
    match (last, shape) {
        (_, [_]) if last.ends_with("bias") => 0.0,
        (_, [_] | []) => 1.0,
        ("o_proj" | "down_proj", &[.., width]) => {
            (1.0 / width as f64).sqrt() * (1.0 / (2.0 * config.num_layers as f64)).sqrt()
        }
        (_, &[.., width]) => (1.0 / width as f64).sqrt(),
    }
}
