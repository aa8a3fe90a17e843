//! Plain SwiGLU blocks: the MLP of a dense layer, and the shared expert that every token passes
//! beside its chosen ones, scaled by a sigmoid gate of its own where the family has one (Qwen2-MoE).

use crate::Result;
use crate::config::ModelConfig;
use crate::decoder::at_least_f32;
use crate::layer::{ParameterKind, Source, Visitor};
use candle_core::Tensor;
use lightmoe_kernels::{linear, swiglu};

/// Name of the shared expert within its layer.
const SHARED: &str = "mlp.shared_expert";
const SHARED_GATE: &str = "mlp.shared_expert_gate";

/// `down · (silu(gate · x) ∘ up · x)`
#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    /// Of the block within its layer.
    name: &'static str,
    /// Gate and up `[F, H]`, down `[H, F]`.
    projections: [Tensor; 3],
}

const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

impl Mlp {
    /// The MLP of a dense layer.
    pub(crate) fn dense(config: &ModelConfig, get: &Source<'_>) -> Result<Self> {
        let width = config.dense_intermediate_size;
        Self::build("mlp", config.hidden_size, width, get)
    }

    fn build(name: &'static str, h: usize, f: usize, get: &Source<'_>) -> Result<Self> {
        let of = |i: usize, shape: [usize; 2]| get(&format!("{name}.{}", PROJECTIONS[i]), &shape);
        Ok(Self {
            name,
            projections: [of(0, [f, h])?, of(1, [f, h])?, of(2, [h, f])?],
        })
    }

    /// `x: [T, H]` → `[T, H]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up, down] = &self.projections;
        Ok(linear(&swiglu(&linear(x, gate)?, &linear(x, up)?)?, down)?)
    }

    /// Every parameter, as `kind`.
    pub(crate) fn visit(&mut self, kind: ParameterKind, f: &mut Visitor<'_>) -> Result<()> {
        let named = PROJECTIONS.iter().zip(&mut self.projections);
        for (projection, tensor) in named {
            f(&format!("{}.{projection}", self.name), kind, tensor)?;
        }
        Ok(())
    }
}

/// The weights of a shared expert.
#[derive(Debug, Clone)]
pub(crate) struct SharedExpert {
    mlp: Mlp,
    /// `[1, H]`
    gate: Option<Tensor>,
}

impl SharedExpert {
    /// Takes the weights from `get`; `None` for a family without.
    pub(crate) fn build(config: &ModelConfig, get: &Source<'_>) -> Result<Option<Self>> {
        let (h, f) = (config.hidden_size, config.moe.shared_intermediate_size);
        if f == 0 {
            return Ok(None);
        }
        let gated = config.moe.shared_gate;
        Ok(Some(Self {
            mlp: Mlp::build(SHARED, h, f, get)?,
            gate: gated.then(|| get(SHARED_GATE, &[1, h])).transpose()?,
        }))
    }

    /// `x: [T, H]` → `[T, H]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.mlp.forward(x)?;
        match &self.gate {
            Some(gate) => {
                let share = sigmoid(&at_least_f32(linear(x, gate)?)?)?;
                Ok(y.broadcast_mul(&share.to_dtype(y.dtype())?)?)
            }
            None => Ok(y),
        }
    }

    /// Every parameter.
    pub(crate) fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        self.mlp.visit(ParameterKind::SharedExpert, f)?;
        match &mut self.gate {
            Some(gate) => f(SHARED_GATE, ParameterKind::SharedExpert, gate),
            None => Ok(()),
        }
    }
}

/// The logistic function, of operations whose gradient candle has.
pub(crate) fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}
