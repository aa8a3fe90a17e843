//! The shared expert: a SwiGLU block that every token passes beside its chosen experts, scaled by a
//! sigmoid gate of its own where the family has one (Qwen2-MoE).

use crate::Result;
use crate::config::ModelConfig;
use crate::layer::{ParameterKind, Source, Visitor};
use candle_core::Tensor;
use lightmoe_kernels::{linear, swiglu};

const PROJECTIONS: [&str; 3] = [
    "mlp.shared_expert.gate_proj",
    "mlp.shared_expert.up_proj",
    "mlp.shared_expert.down_proj",
];
const GATE: &str = "mlp.shared_expert_gate";

/// The weights of a shared expert.
#[derive(Debug, Clone)]
pub(crate) struct SharedExpert {
    /// Gate and up `[F, H]`, down `[H, F]`.
    projections: [Tensor; 3],
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
        let [gate, up, down] = PROJECTIONS;
        Ok(Some(Self {
            projections: [get(gate, &[f, h])?, get(up, &[f, h])?, get(down, &[h, f])?],
            gate: config
                .moe
                .shared_gate
                .then(|| get(GATE, &[1, h]))
                .transpose()?,
        }))
    }

    /// `x: [T, H]` → `[T, H]`
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up, down] = &self.projections;
        let y = linear(&swiglu(&linear(x, gate)?, &linear(x, up)?)?, down)?;
        let Some(gate) = &self.gate else {
            return Ok(y);
        };
        // The logistic function of operations whose gradient candle has.
        let share = (linear(x, gate)?.neg()?.exp()? + 1.0)?.recip()?;
        Ok(y.broadcast_mul(&share)?)
    }

    /// Every parameter.
    pub(crate) fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        let named = PROJECTIONS.iter().zip(&mut self.projections);
        for (name, tensor) in named.chain(self.gate.iter_mut().map(|gate| (&GATE, gate))) {
            f(name, ParameterKind::SharedExpert, tensor)?;
        }
        Ok(())
    }
}
