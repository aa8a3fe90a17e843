//! The attention of a layer: grouped queries, or queries and keys from latents.

mod grouped;
mod latent;

use crate::Result;
use crate::config::{Attention, ModelConfig};
use crate::layer::{Source, Visitor};
use crate::rotary::Rotary;
use candle_core::Tensor;
use grouped::GroupedAttention;
use latent::LatentAttention;

/// What one layer keeps of the tokens seen so far, two tensors `[B, S, .., ..]`: keys and values of
/// grouped attention, or the latent and the rotated part of the keys.
#[derive(Debug, Clone, Default)]
pub struct LayerCache(Option<(Tensor, Tensor)>);

impl LayerCache {
    /// Adds new tokens behind those kept and returns all.
    fn append(&mut self, a: Tensor, b: Tensor) -> Result<(Tensor, Tensor)> {
        let (a, b) = match self.0.take() {
            Some((old_a, old_b)) => (
                Tensor::cat(&[&old_a, &a], 1)?,
                Tensor::cat(&[&old_b, &b], 1)?,
            ),
            None => (a, b),
        };
        // Without their history, or a model under training would keep the graph of every step.
        self.0 = Some((a.detach(), b.detach()));
        Ok((a, b))
    }

    /// The cached tokens of some rows, in the order given; a row may be taken more than once.
    pub(crate) fn select(&self, rows: &Tensor) -> Result<Self> {
        Ok(Self(match &self.0 {
            Some((a, b)) => Some((a.index_select(rows, 0)?, b.index_select(rows, 0)?)),
            None => None,
        }))
    }

    /// Keeps the first `len` positions.
    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        if let Some((a, b)) = &self.0
            && len < self.len()
        {
            self.0 = match len {
                0 => None,
                _ => Some((a.narrow(1, 0, len)?, b.narrow(1, 0, len)?)),
            };
        }
        Ok(())
    }

    /// Number of cached positions.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |(a, _)| a.dims()[1])
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The weights of one attention.
#[derive(Debug, Clone)]
pub(crate) enum SelfAttention {
    Grouped(GroupedAttention),
    Latent(LatentAttention),
}

impl SelfAttention {
    /// Takes the weights from `get`.
    pub(crate) fn build(config: &ModelConfig, get: &Source<'_>) -> Result<Self> {
        Ok(match config.attention {
            Attention::GroupedQuery {
                qk_norm,
                bias,
                clip_qkv: clip,
                sliding_window: window,
            } => {
                let facts = grouped::Facts {
                    qk_norm,
                    bias,
                    clip,
                    window,
                };
                Self::Grouped(GroupedAttention::build(config, facts, get)?)
            }
            Attention::MultiHeadLatent {
                q_lora_rank,
                kv_lora_rank: latent,
                qk_rope_head_dim: rope,
                qk_nope_head_dim: nope,
                v_head_dim: value,
            } => {
                let widths = latent::Widths {
                    latent,
                    rope,
                    nope,
                    value,
                };
                Self::Latent(LatentAttention::build(config, q_lora_rank, widths, get)?)
            }
        })
    }

    /// `x: [B, T, H]`, normed → `[B, T, H]`. With a cache the tokens continue it.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        match self {
            Self::Grouped(attention) => attention.forward(x, config, rotary, cache),
            Self::Latent(attention) => attention.forward(x, config, rotary, cache),
        }
    }

    /// Every parameter.
    pub(crate) fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        match self {
            Self::Grouped(attention) => attention.visit(f),
            Self::Latent(attention) => attention.visit(f),
        }
    }
}
