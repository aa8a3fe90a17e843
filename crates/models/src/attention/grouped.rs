//! Grouped-query attention with rotary positions; biases, norms of queries and keys, clipping and a
//! sliding window where the family has them.

use super::{LayerCache, Place};
use crate::config::{ModelConfig, ProjectionBias, QkNorm};
use crate::layer::{ParameterKind, Source, Visitor};
use crate::rotary::Rotary;
use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_kernels::{apply_rope, attention, linear, rms_norm};

/// The weights of one attention.
#[derive(Debug, Clone)]
pub(crate) struct GroupedAttention {
    /// Queries, keys, values and output.
    projections: [Projection; 4],
    /// Of queries and keys.
    norms: Option<[Tensor; 2]>,
    facts: Facts,
}

/// What the family says of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) qk_norm: QkNorm,
    pub(super) bias: ProjectionBias,
    /// Queries, keys and values are clamped to `[-clip, clip]`.
    pub(super) clip: Option<f64>,
    /// Keys that a query sees.
    pub(super) window: Option<usize>,
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
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?)?,
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

impl GroupedAttention {
    /// Takes the weights from `get`.
    pub(super) fn build(config: &ModelConfig, facts: Facts, get: &Source<'_>) -> Result<Self> {
        let (h, d) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_heads * d, config.num_kv_heads * d);
        let shapes = [[q, h], [kv, h], [kv, h], [h, q]];
        let biased = match facts.bias {
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
        let norms = match facts.qk_norm {
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
            facts,
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
        let (heads, kv_heads, d) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let place = Place::new(cache.as_deref_mut(), self.facts.window);
        let rope = rotary.of_length(place.behind + t);
        let [q, k, v, o] = &self.projections;
        // Queries or keys: projected, normed as a whole or per head, rotated.
        let rotated = |projection: &Projection, heads: usize, norm: Option<&Tensor>| {
            let mut x = projection.forward(x)?;
            if self.facts.qk_norm == QkNorm::PerHead {
                x = x.reshape((b, t, heads, d))?;
            }
            if let Some(norm) = norm {
                x = rms_norm(&x, norm, config.norm_eps)?;
            }
            let x = self.clipped(x)?.reshape((b, t, heads, d))?;
            Ok::<_, Error>(apply_rope(&x, rope, &place.offsets)?)
        };
        let norms = self.norms.as_ref();
        let q = rotated(q, heads, norms.map(|n| &n[0]))?;
        let k = rotated(k, kv_heads, norms.map(|n| &n[1]))?;
        let v = self.clipped(v.forward(x)?)?.reshape((b, t, kv_heads, d))?;
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v)?,
            None => (k, v),
        };
        let y = attention(&q, &k, &v, config.attention_scale(), place.seen)?;
        o.forward(&y.reshape((b, t, heads * d))?)
    }

    fn clipped(&self, x: Tensor) -> Result<Tensor> {
        Ok(match self.facts.clip {
            Some(clip) => x.clamp(-clip, clip)?,
            None => x,
        })
    }

    /// Every parameter.
    pub(super) fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
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
