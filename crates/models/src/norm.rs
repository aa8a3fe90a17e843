//! The norms of the residual stream: RMS norm, or layer norm with a bias (Phi-MoE).

use crate::Result;
use crate::config::{ModelConfig, NormKind};
use crate::decoder::at_least_f32;
use crate::layer::{ParameterKind, Source, Visitor};
use candle_core::{D, Tensor};
use lightmoe_kernels::rms_norm;

/// A norm over the last dimension, and its epsilon.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    name: &'static str,
    eps: f64,
    /// `[H]`
    weight: Tensor,
    /// `[H]`; only a layer norm has one.
    bias: Option<Tensor>,
}

impl Norm {
    /// The norm `name`, as the family has it.
    pub(crate) fn build(
        name: &'static str,
        config: &ModelConfig,
        get: &Source<'_>,
    ) -> Result<Self> {
        let shape = [config.hidden_size];
        let biased = config.norm == NormKind::Layer;
        Ok(Self {
            name,
            eps: config.norm_eps,
            weight: get(name, &shape)?,
            bias: biased
                .then(|| get(&format!("{name}.bias"), &shape))
                .transpose()?,
        })
    }

    /// `x: [.., H]` → the same shape.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Some(bias) = &self.bias else {
            return Ok(rms_norm(x, &self.weight, self.eps)?);
        };
        // A layer norm is the RMS norm of what is left without the mean.
        let wide = at_least_f32(x.clone())?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
        let normed = rms_norm(&centred, &self.weight, self.eps)?;
        let shifted = normed.broadcast_add(&bias.to_dtype(normed.dtype())?)?;
        Ok(shifted.to_dtype(x.dtype())?)
    }

    /// Every parameter.
    pub(crate) fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        f(self.name, ParameterKind::Norm, &mut self.weight)?;
        match &mut self.bias {
            Some(bias) => f(&format!("{}.bias", self.name), ParameterKind::Norm, bias),
            None => Ok(()),
        }
    }
}
