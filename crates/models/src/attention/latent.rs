//! Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from one
//! narrow latent, beside one rotated key that the heads share. The cache holds these two.

use super::{LayerCache, Place};
use crate::Result;
use crate::config::ModelConfig;
use crate::layer::{ParameterKind, Source, Visitor};
use crate::rotary::Rotary;
use candle_core::{D, Tensor};
use lightmoe_kernels::{apply_rope, attention, linear, rms_norm};

/// Epsilon of the norms on the latents; no configuration has a key for it.
const EPS: f64 = 1e-6;

const Q: &str = "self_attn.q_proj";
const Q_A: &str = "self_attn.q_a_proj";
const Q_NORM: &str = "self_attn.q_a_layernorm";
const Q_B: &str = "self_attn.q_b_proj";
const KV_A: &str = "self_attn.kv_a_proj_with_mqa";
const KV_NORM: &str = "self_attn.kv_a_layernorm";
const KV_B: &str = "self_attn.kv_b_proj";
const O: &str = "self_attn.o_proj";

/// The weights of one attention.
#[derive(Debug, Clone)]
pub(crate) struct LatentAttention {
    query: Query,
    /// `[R + rope, H]`: the latent, and the key that the heads share.
    kv_a: Tensor,
    /// `[R]`
    kv_norm: Tensor,
    /// `[heads · (nope + v), R]`
    kv_b: Tensor,
    /// `[H, heads · v]`
    o: Tensor,
    widths: Widths,
}

/// Queries `[heads · (nope + rope)]`: from the hidden state, or from a latent of rank `Q`.
#[derive(Debug, Clone)]
enum Query {
    Whole(Tensor),
    Latent {
        /// `[Q, H]`
        a: Tensor,
        /// `[Q]`
        norm: Tensor,
        /// `[heads · (nope + rope), Q]`
        b: Tensor,
    },
}

/// The parts of queries, keys and values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widths {
    /// The latent of keys and values.
    pub(super) latent: usize,
    /// The rotated part of a head.
    pub(super) rope: usize,
    /// Its other part.
    pub(super) nope: usize,
    /// A head of values.
    pub(super) value: usize,
}

impl LatentAttention {
    /// Takes the weights from `get`.
    pub(super) fn build(
        config: &ModelConfig,
        q_lora_rank: Option<usize>,
        widths: Widths,
        get: &Source<'_>,
    ) -> Result<Self> {
        let Widths {
            latent,
            rope,
            nope,
            value,
        } = widths;
        let (h, heads) = (config.hidden_size, config.num_heads);
        let queries = heads * (nope + rope);
        Ok(Self {
            query: match q_lora_rank {
                None => Query::Whole(get(Q, &[queries, h])?),
                Some(rank) => Query::Latent {
                    a: get(Q_A, &[rank, h])?,
                    norm: get(Q_NORM, &[rank])?,
                    b: get(Q_B, &[queries, rank])?,
                },
            },
            kv_a: get(KV_A, &[latent + rope, h])?,
            kv_norm: get(KV_NORM, &[latent])?,
            kv_b: get(KV_B, &[heads * (nope + value), latent])?,
            o: get(O, &[h, heads * value])?,
            widths,
        })
    }

    /// `x: [B, T, H]`, normed → `[B, T, H]`. With a cache the tokens continue it.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        mut cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let w = self.widths;
        let heads = config.num_heads;
        let place = Place::new(cache.as_deref_mut(), None);
        let (rope, offsets) = (rotary.of_length(place.behind + t), &place.offsets);
        let q = match &self.query {
            Query::Whole(q) => linear(x, q)?,
            Query::Latent { a, norm, b } => linear(&rms_norm(&linear(x, a)?, norm, EPS)?, b)?,
        };
        let q = q.reshape((b, t, heads, w.nope + w.rope))?;
        let q_rotated = apply_rope(&q.narrow(D::Minus1, w.nope, w.rope)?, rope, offsets)?;
        let q = Tensor::cat(&[&q.narrow(D::Minus1, 0, w.nope)?, &q_rotated], 3)?;

        let kv = linear(x, &self.kv_a)?;
        let latent = rms_norm(&kv.narrow(D::Minus1, 0, w.latent)?, &self.kv_norm, EPS)?;
        let key = kv.narrow(D::Minus1, w.latent, w.rope)?;
        let key = apply_rope(&key.reshape((b, t, 1, w.rope))?, rope, offsets)?;
        let (latent, key) = match cache {
            Some(cache) => cache.append(latent.unsqueeze(2)?, key)?,
            None => (latent.unsqueeze(2)?, key),
        };
        let seen = latent.dim(1)?;
        let kv = linear(&latent.squeeze(2)?, &self.kv_b)?;
        let kv = kv.reshape((b, seen, heads, w.nope + w.value))?;
        let key = key.broadcast_as((b, seen, heads, w.rope))?;
        let k = Tensor::cat(&[&kv.narrow(D::Minus1, 0, w.nope)?, &key], 3)?;
        let v = kv.narrow(D::Minus1, w.nope, w.value)?;

        // The kernel wants heads of one width; zeros add nothing to a score or a sum.
        let width = (w.nope + w.rope).max(w.value);
        let [q, k, v] = [q, k, v].map(|x| widened(&x, width));
        let y = attention(&q?, &k?, &v?, config.attention_scale(), place.seen)?;
        let y = y.narrow(D::Minus1, 0, w.value)?.contiguous()?;
        Ok(linear(&y.reshape((b, t, heads * w.value))?, &self.o)?)
    }

    /// Every parameter.
    pub(super) fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        use ParameterKind::{Attention, Norm};
        match &mut self.query {
            Query::Whole(q) => f(Q, Attention, q)?,
            Query::Latent { a, norm, b } => {
                f(Q_A, Attention, a)?;
                f(Q_NORM, Norm, norm)?;
                f(Q_B, Attention, b)?;
            }
        }
        f(KV_A, Attention, &mut self.kv_a)?;
        f(KV_NORM, Norm, &mut self.kv_norm)?;
        f(KV_B, Attention, &mut self.kv_b)?;
        f(O, Attention, &mut self.o)
    }
}

/// `x: [.., D]` with zeros up to `width`.
fn widened(x: &Tensor, width: usize) -> Result<Tensor> {
    let missing = width - x.dim(D::Minus1)?;
    Ok(match missing {
        0 => x.contiguous()?,
        _ => x.pad_with_zeros(D::Minus1, 0, missing)?,
    })
}
