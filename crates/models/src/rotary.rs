//! The angles of a model: plain, by YaRN (arXiv 2309.00071) or by LongRoPE (arXiv 2402.13753).

use crate::config::{Attention, ModelConfig};
use lightmoe_kernels::{Rope, RopePairs};

/// How the rotary embedding is stretched beyond the context of the first training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Low frequencies are interpolated, high ones left alone.
    Yarn(Yarn),
    /// Each frequency has a factor of its own.
    Long(LongRope),
}

/// YaRN: a pair that turns fewer than `beta_slow` times within the original context is slowed by
/// `factor`, one that turns more than `beta_fast` times is left alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// How much longer the context became.
    pub factor: f64,
    /// The context of the first training, in tokens.
    pub original: usize,
    /// Turns from which a pair is left alone.
    pub beta_fast: f64,
    /// Turns up to which a pair is slowed in full.
    pub beta_slow: f64,
    /// Whether the bounds of the ramp are rounded outwards to whole pairs.
    pub truncate: bool,
    /// Factor on the rotated numbers.
    pub attention_factor: f64,
    /// DeepSeek's second temperature: its [`Yarn::mscale`], squared, scales the attention scores;
    /// 0 for none.
    pub mscale_all_dim: f64,
}

/// LongRoPE: divisors of each frequency, for sequences within the original context and beyond it.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// `[D/2]`, within.
    pub short: Vec<f64>,
    /// `[D/2]`, beyond.
    pub long: Vec<f64>,
    /// Factor on the rotated numbers within.
    pub short_scale: f64,
    /// Factor on the rotated numbers beyond.
    pub long_scale: f64,
    /// The context of the first training, in tokens.
    pub original: usize,
}

impl Yarn {
    /// `0.1 · weight · ln(factor) + 1`; one where nothing is stretched.
    pub fn mscale(factor: f64, weight: f64) -> f64 {
        match factor > 1.0 {
            true => 0.1 * weight * factor.ln() + 1.0,
            false => 1.0,
        }
    }

    /// The frequencies `[D/2]` of plain ones.
    fn stretch(&self, plain: &[f32], theta: f64) -> Vec<f32> {
        let pairs = plain.len() as f64;
        // The pair that turns `turns` times within the original context.
        let pair = |turns: f64| {
            let wavelength = self.original as f64 / (turns * std::f64::consts::TAU);
            pairs * wavelength.ln() / theta.ln()
        };
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(2.0 * pairs - 1.0));
        // Bounds that meet make a step.
        let width = if low == high { 0.001 } else { high - low };
        let each = plain.iter().enumerate().map(|(i, &frequency)| {
            let slowed = ((i as f64 - low) / width).clamp(0.0, 1.0);
            let frequency = f64::from(frequency);
            (frequency / self.factor * slowed + frequency * (1.0 - slowed)) as f32
        });
        each.collect()
    }
}

/// The rotary embedding of a model.
#[derive(Debug, Clone)]
pub struct Rotary {
    within: Rope,
    /// From which length on another one holds.
    beyond: Option<(usize, Rope)>,
}

impl Rotary {
    /// That of `config`.
    pub fn new(config: &ModelConfig) -> Self {
        let (width, pairs) = match config.attention {
            Attention::GroupedQuery { .. } => (config.head_dim, RopePairs::Halves),
            Attention::MultiHeadLatent {
                qk_rope_head_dim, ..
            } => (qk_rope_head_dim, RopePairs::Adjacent),
        };
        let plain = Rope::plain(width, config.rope_theta);
        let rope = |frequencies: &[f32], scale| {
            Rope::of_frequencies(frequencies, config.max_position_embeddings)
                .with_scale(scale)
                .with_pairs(pairs)
        };
        let divided = |factors: &[f64]| -> Vec<f32> {
            let each = plain.iter().zip(factors);
            each.map(|(&f, by)| (f64::from(f) / by) as f32).collect()
        };
        let (within, beyond) = match &config.rope_scaling {
            RopeScaling::None => (rope(&plain, 1.0), None),
            RopeScaling::Yarn(yarn) => {
                let stretched = yarn.stretch(&plain, config.rope_theta);
                (rope(&stretched, yarn.attention_factor), None)
            }
            RopeScaling::Long(long) => (
                rope(&divided(&long.short), long.short_scale),
                Some((long.original, rope(&divided(&long.long), long.long_scale))),
            ),
        };
        Self { within, beyond }
    }

    /// Whether all angles of the context are finite numbers.
    pub(crate) fn is_finite(&self) -> bool {
        let beyond = self.beyond.as_ref().map(|(_, rope)| rope);
        [Some(&self.within), beyond]
            .into_iter()
            .flatten()
            .all(Rope::is_finite)
    }

    /// The angles for sequences that are `length` tokens long with this call, earlier ones in the
    /// cache included. As in the published models, keys that a shorter call left in the cache keep
    /// the angles of that call.
    pub fn of_length(&self, length: usize) -> &Rope {
        match &self.beyond {
            Some((original, beyond)) if length > *original => beyond,
            _ => &self.within,
        }
    }
}
