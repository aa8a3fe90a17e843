//! One decoder layer: attention, then the mixture of experts, each on the normed residual stream.
//!
//! Follows the decoder layers of `transformers`, whose families differ in the facts of
//! [`crate::ModelConfig`] alone.

use crate::attention::{LayerCache, SelfAttention};
use crate::bank::Bank;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::shared::SharedExpert;
use crate::{Error, Result, names};
use candle_core::{D, Tensor};
use lightmoe_kernels::{Rope, linear, rms_norm, top_k};

/// What a parameter belongs to; decides who trains it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterKind {
    /// Embedding and output head.
    Embedding,
    /// Attention projections.
    Attention,
    /// Norm weights.
    Norm,
    /// The router.
    Router,
    /// Matrices of dense slots.
    Expert,
    /// The expert that every token passes, and its gate.
    SharedExpert,
    /// Shared bases.
    Base,
    /// Low-rank adapters.
    Adapter,
}

/// What is called with each parameter of a part: its name within the part, its kind, itself.
pub type Visitor<'a> = dyn FnMut(&str, ParameterKind, &mut Tensor) -> Result<()> + 'a;

/// Where the tensors of a layer come from, by name within the layer and shape: a checkpoint, or
/// fresh random numbers.
pub(crate) type Source<'a> = dyn Fn(&str, &[usize]) -> Result<Tensor> + 'a;

/// What the router decided for the tokens of a batch.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Raw router outputs `[T, E]`.
    pub logits: Tensor,
    /// Softmax of the logits `[T, E]`.
    pub probabilities: Tensor,
    /// Chosen experts `[T · K]`, best first.
    pub chosen: Vec<u32>,
    /// Their gates, the factors of their outputs: `[T · K]`.
    pub gates: Tensor,
}

/// The weights of one decoder layer.
#[derive(Debug, Clone)]
pub struct Layer {
    pub(crate) input_norm: Tensor,
    pub(crate) attention: SelfAttention,
    pub(crate) post_norm: Tensor,
    pub(crate) router: Tensor,
    pub(crate) shared: Option<SharedExpert>,
    /// The experts.
    pub bank: Bank,
}

impl Layer {
    /// Reads layer `layer` of a checkpoint.
    pub fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self> {
        let config = checkpoint.config();
        config.check_runnable()?;
        let h = config.hidden_size;
        let get =
            |rest: &str, shape: &[usize]| checkpoint.tensor(&names::layer(layer, rest), shape);
        let layout = checkpoint.layout().layers.get(&layer).ok_or_else(|| {
            Error::Invalid(format!("layer {layer} is no MoE layer; choose another"))
        })?;
        Ok(Self {
            input_norm: get("input_layernorm", &[h])?,
            attention: SelfAttention::build(config, &get)?,
            post_norm: get("post_attention_layernorm", &[h])?,
            router: get("mlp.gate", &[config.moe.num_experts, h])?,
            shared: SharedExpert::build(config, &get)?,
            bank: Bank::load(checkpoint, layer, layout)?,
        })
    }

    /// `x: [B, T, H]` → (`[B, T, H]`, what the router decided). With a cache the tokens continue it.
    pub fn forward(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rope: &Rope,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Routing)> {
        let normed = rms_norm(x, &self.input_norm, config.rms_norm_eps)?;
        let x = (x + self.attention.forward(&normed, config, rope, cache)?)?;
        let (b, t, h) = x.dims3()?;
        let flat = rms_norm(&x, &self.post_norm, config.rms_norm_eps)?.reshape((b * t, h))?;
        let routing = self.route(&flat, config)?;
        let mut y = self.bank.forward(&flat, &routing.gates, &routing.chosen)?;
        if let Some(shared) = &self.shared {
            y = (y + shared.forward(&flat)?)?;
        }
        Ok(((x + y.reshape((b, t, h))?)?, routing))
    }

    fn route(&self, x: &Tensor, config: &ModelConfig) -> Result<Routing> {
        let k = config.moe.top_k;
        let logits = linear(x, &self.router)?;
        let probabilities = candle_nn::ops::softmax(&logits, D::Minus1)?;
        let chosen = top_k(&logits, k)?;
        let (tokens, experts) = logits.dims2()?;
        let index: Vec<u32> = chosen
            .iter()
            .enumerate()
            .map(|(i, &e)| (i / k * experts) as u32 + e)
            .collect();
        let index = Tensor::new(index, logits.device())?;
        let mut gates = probabilities.flatten_all()?.index_select(&index, 0)?;
        if config.moe.renormalize {
            let by_token = gates.reshape((tokens, k))?;
            gates = by_token
                .broadcast_div(&by_token.sum_keepdim(1)?)?
                .flatten_all()?;
        }
        Ok(Routing {
            logits,
            probabilities,
            chosen,
            gates,
        })
    }

    /// Every parameter with its name within the layer, to train, replace or inspect it. Stacked
    /// expert tensors come as one parameter each.
    pub fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        use ParameterKind::{Adapter, Base, Expert, Norm, Router};
        f("input_layernorm", Norm, &mut self.input_norm)?;
        self.attention.visit(f)?;
        f("post_attention_layernorm", Norm, &mut self.post_norm)?;
        f("mlp.gate", Router, &mut self.router)?;
        if let Some(shared) = &mut self.shared {
            shared.visit(f)?;
        }
        let bank = &mut self.bank;
        let mut stack = |what: &str, kind, stack: Option<&mut crate::bank::Projections>| {
            for (name, tensor) in stack.into_iter().flat_map(|s| s.named_mut()) {
                f(&format!("mlp.{what}.{name}"), kind, tensor)?;
            }
            Ok::<_, Error>(())
        };
        stack("experts", Expert, bank.dense.as_mut())?;
        stack("bases", Base, bank.bases.as_mut())?;
        for (what, adapters) in [
            ("kept", &mut bank.dense_adapters),
            ("replaced", &mut bank.adapters),
        ] {
            if let Some(adapters) = adapters {
                stack(&format!("{what}.lora_A"), Adapter, Some(&mut adapters.a))?;
                stack(&format!("{what}.lora_B"), Adapter, Some(&mut adapters.b))?;
            }
        }
        Ok(())
    }

    /// The layer's tensors.
    pub fn tensors(&self, layer: usize) -> Result<Vec<(String, Tensor)>> {
        let mut out = self.tensors_beside_bank(layer)?;
        out.extend(self.bank.tensors(layer)?);
        Ok(out)
    }

    /// The tensors of all that compression leaves alone: everything but the bank.
    pub fn tensors_beside_bank(&self, layer: usize) -> Result<Vec<(String, Tensor)>> {
        let mut out = Vec::new();
        // Visiting wants a mutable layer; cloning one copies handles, not weights.
        self.clone().visit(&mut |name, kind, tensor| {
            use ParameterKind::{Attention, Norm, Router, SharedExpert};
            if matches!(kind, Attention | Norm | Router | SharedExpert) {
                out.push((names::layer(layer, name), tensor.clone()));
            }
            Ok(())
        })?;
        Ok(out)
    }
}
