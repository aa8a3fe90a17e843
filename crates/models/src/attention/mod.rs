//! The attention of a layer: grouped queries, or queries and keys from latents.

mod grouped;
mod latent;

use crate::Result;
use crate::cache::Places;
use crate::config::{Attention, ModelConfig};
use crate::layer::{Source, Visitor};
use crate::rotary::Rotary;
use candle_core::Tensor;
use grouped::GroupedAttention;
use latent::LatentAttention;
use lightmoe_kernels::Seen;
use std::sync::Arc;

/// Positions that a cache grows by, so that a token more seldom moves those before it.
pub(crate) const GROWTH: usize = 64;

/// What one layer keeps of the tokens seen so far, two tensors `[B, S, .., ..]`: keys and values of
/// grouped attention, or the latent and the rotated part of the keys. They are written in place, so a
/// cache has no copies that share them.
#[derive(Debug, Default)]
pub struct LayerCache {
    /// With room behind the tokens.
    kept: Option<(Tensor, Tensor)>,
    len: usize,
    /// By row, the first position that is no padding. Empty: no row has any.
    starts: Arc<[usize]>,
    /// By row, how many of the tokens that are read next are no padding. Empty: all.
    lengths: Arc<[usize]>,
}

impl LayerCache {
    /// The tokens that are read next end with padding: by row, so many do not.
    pub(crate) fn expect(&mut self, lengths: Arc<[usize]>) {
        self.lengths = lengths;
    }

    /// Adds new tokens behind those kept and returns all.
    fn append(&mut self, a: Tensor, b: Tensor) -> Result<(Tensor, Tensor)> {
        let before = self.len;
        self.len += a.dim(1)?;
        let Some((old_a, old_b)) = self.kept.take() else {
            self.kept = Some((a.detach().contiguous()?, b.detach().contiguous()?));
            return Ok((a, b));
        };
        let added = |old: Tensor, new: &Tensor| -> Result<(Tensor, Tensor)> {
            let missing = self.len.saturating_sub(old.dim(1)?);
            let kept = match missing {
                0 => old,
                _ => old.pad_with_zeros(1, 0, missing.next_multiple_of(GROWTH))?,
            };
            // Without their history, or a model under training would keep the graph of every step.
            kept.slice_set(&new.detach().contiguous()?, 1, before)?;
            let all = match new.track_op() {
                true => Tensor::cat(&[&kept.narrow(1, 0, before)?, new], 1)?,
                false => kept.narrow(1, 0, self.len)?,
            };
            Ok((kept, all))
        };
        let ((kept_a, a), (kept_b, b)) = (added(old_a, &a)?, added(old_b, &b)?);
        self.kept = Some((kept_a, kept_b));
        Ok((a, b))
    }

    /// What is kept at some places of several caches, as a new one.
    pub(crate) fn gather(parts: &[&Self], places: &Places) -> Result<Self> {
        let starts = &places.starts;
        let kept = parts.iter().filter_map(|part| part.kept.as_ref());
        let (a, b): (Vec<&Tensor>, Vec<&Tensor>) = kept.map(|(a, b)| (a, b)).unzip();
        let gathered = |parts: Vec<&Tensor>| -> Result<Tensor> {
            let flat = parts.iter().map(|part| part.flatten(0, 1));
            let flat = flat.collect::<candle_core::Result<Vec<_>>>()?;
            let all = Tensor::cat(&flat, 0)?;
            let rows = all.index_select(&Tensor::new(&places.index[..], all.device())?, 0)?;
            let (_, x, y) = rows.dims3()?;
            Ok(rows.reshape((starts.len(), (), x, y))?)
        };
        Ok(Self {
            kept: Some((gathered(a)?, gathered(b)?)),
            len: places.len,
            // Where there is no padding, nothing is to be looked up.
            starts: match starts.iter().all(|&start| start == 0) {
                true => Arc::default(),
                false => starts.clone(),
            },
            lengths: Arc::default(),
        })
    }

    /// Keeps the first `len` positions.
    pub(crate) fn truncate(&mut self, len: usize) {
        match len {
            0 => *self = Self::default(),
            _ => self.len = self.len.min(len),
        }
    }

    /// Number of cached positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first position of a row that is no padding.
    pub(crate) fn start(&self, row: usize) -> usize {
        self.starts.get(row).copied().unwrap_or(0)
    }

    /// Number of rows, and of the positions that each has room for.
    pub(crate) fn room(&self) -> (usize, usize) {
        (self.kept.as_ref()).map_or((0, 0), |(a, _)| (a.dims()[0], a.dims()[1]))
    }
}

/// Where new tokens stand.
struct Place {
    /// Tokens of the cache.
    behind: usize,
    /// The position of the first new token of all rows, or of each.
    offsets: Vec<usize>,
    /// What a token sees.
    seen: Seen,
}

impl Place {
    /// Behind what is cached, seen as far as a `window` reaches.
    fn new(cache: Option<&mut LayerCache>, window: Option<usize>) -> Self {
        let (behind, starts, lengths) = cache.map_or_else(Default::default, |cache| {
            let lengths = std::mem::take(&mut cache.lengths);
            (cache.len(), cache.starts.clone(), lengths)
        });
        let offsets = match starts.len() {
            0 => vec![behind],
            _ => starts.iter().map(|start| behind - start).collect(),
        };
        Self {
            behind,
            offsets,
            seen: Seen {
                window,
                starts,
                lengths,
            },
        }
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
