//! The attention of a layer: grouped queries, rotary positions; biases, norms of queries and keys and
//! a sliding window where the family has them.

use crate::config::{Attention, ModelConfig, ProjectionBias, QkNorm};
use crate::layer::{ParameterKind, Source, Visitor};
use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_kernels::{
    Rope, apply_rope, causal_attention, linear, rms_norm, sliding_window_attention,
};

/// Keys and values of one layer seen so far, `[B, S, kv_heads, D]` each.
#[derive(Debug, Clone, Default)]
pub struct LayerCache(Option<(Tensor, Tensor)>);

impl LayerCache {
    fn append(&mut self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let (k, v) = match self.0.take() {
            Some((old_k, old_v)) => (
                Tensor::cat(&[&old_k, &k], 1)?,
                Tensor::cat(&[&old_v, &v], 1)?,
            ),
            None => (k, v),
        };
        // Without their history, or a model under training would keep the graph of every step.
        self.0 = Some((k.detach(), v.detach()));
        Ok((k, v))
    }

    /// Number of cached positions.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |(k, _)| k.dims()[1])
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The weights of one attention.
#[derive(Debug, Clone)]
pub(crate) struct SelfAttention {
    /// Queries, keys, values and output.
    projections: [Projection; 4],
    /// Of queries and keys.
    norms: Option<[Tensor; 2]>,
}

/// `[out, in]` and, where there is one, a bias `[out]`.
#[derive(Debug, Clone)]
struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Projection {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = linear(x, &self.weight)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

/// The names of the projections, in their order.
const PROJECTIONS: [&str; 4] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
];
const NORMS: [&str; 2] = ["self_attn.q_norm", "self_attn.k_norm"];

/// The facts of grouped-query attention; another kind is an error.
fn facts(config: &ModelConfig) -> Result<(QkNorm, ProjectionBias, Option<usize>)> {
    match config.attention {
        Attention::GroupedQuery {
            qk_norm,
            bias,
            sliding_window,
            ..
        } => Ok((qk_norm, bias, sliding_window)),
        Attention::MultiHeadLatent { .. } => Err(Error::Invalid(
            "latent attention cannot run yet; use a model with grouped queries".into(),
        )),
    }
}

impl SelfAttention {
    /// Takes the weights from `get`.
    pub(crate) fn build(config: &ModelConfig, get: &Source<'_>) -> Result<Self> {
        let (qk_norm, bias, _) = facts(config)?;
        let (h, d) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_heads * d, config.num_kv_heads * d);
        let shapes = [[q, h], [kv, h], [kv, h], [h, q]];
        let biased = match bias {
            ProjectionBias::None => 0,
            ProjectionBias::QueryKeyValue => 3,
            ProjectionBias::All => 4,
        };
        let projection = |i: usize| -> Result<Projection> {
            let bias = format!("{}.bias", PROJECTIONS[i]);
            Ok(Projection {
                weight: get(PROJECTIONS[i], &shapes[i])?,
                bias: (i < biased)
                    .then(|| get(&bias, &shapes[i][..1]))
                    .transpose()?,
            })
        };
        let norms = match qk_norm {
            QkNorm::None => None,
            QkNorm::WholeProjection => Some([get(NORMS[0], &[q])?, get(NORMS[1], &[kv])?]),
            QkNorm::PerHead => Some([get(NORMS[0], &[d])?, get(NORMS[1], &[d])?]),
        };
        Ok(Self {
            projections: [
                projection(0)?,
                projection(1)?,
                projection(2)?,
                projection(3)?,
            ],
            norms,
        })
    }

    /// `x: [B, T, H]`, normed → `[B, T, H]`. With a cache the tokens continue it.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rope: &Rope,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let (qk_norm, _, window) = facts(config)?;
        let (b, t, _) = x.dims3()?;
        let (heads, kv_heads, d) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let offset = cache.as_ref().map_or(0, |c| c.len());
        let [q, k, v, o] = &self.projections;
        // Queries or keys: projected, normed as a whole or per head, rotated.
        let rotated = |projection: &Projection, heads: usize, norm: Option<&Tensor>| {
            let mut x = projection.forward(x)?;
            if qk_norm == QkNorm::PerHead {
                x = x.reshape((b, t, heads, d))?;
            }
            if let Some(norm) = norm {
                x = rms_norm(&x, norm, config.rms_norm_eps)?;
            }
            Ok::<_, Error>(apply_rope(&x.reshape((b, t, heads, d))?, rope, offset)?)
        };
        let norms = self.norms.as_ref();
        let q = rotated(q, heads, norms.map(|n| &n[0]))?;
        let k = rotated(k, kv_heads, norms.map(|n| &n[1]))?;
        let v = v.forward(x)?.reshape((b, t, kv_heads, d))?;
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v)?,
            None => (k, v),
        };
        let scale = 1.0 / (d as f64).sqrt();
        let y = match window {
            Some(window) => sliding_window_attention(&q, &k, &v, scale, window)?,
            None => causal_attention(&q, &k, &v, scale)?,
        };
        o.forward(&y.reshape((b, t, heads * d))?)
    }

    /// Every parameter.
    pub(crate) fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        for (name, projection) in PROJECTIONS.iter().zip(&mut self.projections) {
            f(name, ParameterKind::Attention, &mut projection.weight)?;
            if let Some(bias) = &mut projection.bias {
                f(&format!("{name}.bias"), ParameterKind::Attention, bias)?;
            }
        }
        for (name, norm) in NORMS.iter().zip(self.norms.iter_mut().flatten()) {
            f(name, ParameterKind::Norm, norm)?;
        }
        Ok(())
    }
}
