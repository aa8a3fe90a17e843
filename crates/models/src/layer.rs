//! One decoder layer: attention with QK-norm and rotary positions, then the mixture of experts.
//!
//! Follows `OlmoeDecoderLayer` of `transformers` and the OLMoE paper (arXiv 2409.02060).

use crate::bank::Bank;
use crate::checkpoint::Checkpoint;
use crate::config::{Attention, ModelConfig, QkNorm};
use crate::{Error, Result, names};
use candle_core::{D, Tensor};
use lightmoe_kernels::{Rope, apply_rope, causal_attention, linear, rms_norm, top_k};

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
    /// Shared bases.
    Base,
    /// Low-rank adapters.
    Adapter,
}

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

/// The weights of one decoder layer.
#[derive(Debug, Clone)]
pub struct Layer {
    pub(crate) input_norm: Tensor,
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) o: Tensor,
    pub(crate) qk_norm: Option<(Tensor, Tensor)>,
    pub(crate) post_norm: Tensor,
    pub(crate) router: Tensor,
    /// The experts.
    pub bank: Bank,
}

impl Layer {
    /// Reads layer `layer` of a checkpoint.
    pub fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self> {
        let config = checkpoint.config();
        config.check_runnable()?;
        let (h, d) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_heads * d, config.num_kv_heads * d);
        let get =
            |rest: &str, shape: &[usize]| checkpoint.tensor(&names::layer(layer, rest), shape);
        let layout = checkpoint.layout().layers.get(&layer).ok_or_else(|| {
            Error::Invalid(format!("layer {layer} is no MoE layer; choose another"))
        })?;
        let qk_norm = match Self::has_qk_norm(config) {
            true => Some((
                get("self_attn.q_norm", &[q])?,
                get("self_attn.k_norm", &[kv])?,
            )),
            _ => None,
        };
        Ok(Self {
            input_norm: get("input_layernorm", &[h])?,
            q: get("self_attn.q_proj", &[q, h])?,
            k: get("self_attn.k_proj", &[kv, h])?,
            v: get("self_attn.v_proj", &[kv, h])?,
            o: get("self_attn.o_proj", &[h, q])?,
            qk_norm,
            post_norm: get("post_attention_layernorm", &[h])?,
            router: get("mlp.gate", &[config.moe.num_experts, h])?,
            bank: Bank::load(checkpoint, layer, layout)?,
        })
    }

    pub(crate) fn has_qk_norm(config: &ModelConfig) -> bool {
        matches!(
            config.attention,
            Attention::GroupedQuery {
                qk_norm: QkNorm::WholeProjection,
                ..
            }
        )
    }

    /// `x: [B, T, H]` → (`[B, T, H]`, what the router decided). With a cache the tokens continue it.
    pub fn forward(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rope: &Rope,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Routing)> {
        let x = (x + self.attention(x, config, rope, cache)?)?;
        let (b, t, h) = x.dims3()?;
        let flat = rms_norm(&x, &self.post_norm, config.rms_norm_eps)?.reshape((b * t, h))?;
        let routing = self.route(&flat, config)?;
        let y = self.bank.forward(&flat, &routing.gates, &routing.chosen)?;
        Ok(((x + y.reshape((b, t, h))?)?, routing))
    }

    fn attention(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rope: &Rope,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let (heads, kv_heads, d) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let x = rms_norm(x, &self.input_norm, config.rms_norm_eps)?;
        let (mut q, mut k) = (linear(&x, &self.q)?, linear(&x, &self.k)?);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = rms_norm(&q, q_norm, config.rms_norm_eps)?;
            k = rms_norm(&k, k_norm, config.rms_norm_eps)?;
        }
        let v = linear(&x, &self.v)?.reshape((b, t, kv_heads, d))?;
        let offset = cache.as_ref().map_or(0, |c| c.len());
        let q = apply_rope(&q.reshape((b, t, heads, d))?, rope, offset)?;
        let k = apply_rope(&k.reshape((b, t, kv_heads, d))?, rope, offset)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v)?,
            None => (k, v),
        };
        let y = causal_attention(&q, &k, &v, 1.0 / (d as f64).sqrt())?;
        Ok(linear(&y.reshape((b, t, heads * d))?, &self.o)?)
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
    pub fn visit(
        &mut self,
        f: &mut dyn FnMut(&str, ParameterKind, &mut Tensor) -> Result<()>,
    ) -> Result<()> {
        use ParameterKind::{Adapter, Attention, Base, Expert, Norm, Router};
        f("input_layernorm", Norm, &mut self.input_norm)?;
        f("self_attn.q_proj", Attention, &mut self.q)?;
        f("self_attn.k_proj", Attention, &mut self.k)?;
        f("self_attn.v_proj", Attention, &mut self.v)?;
        f("self_attn.o_proj", Attention, &mut self.o)?;
        if let Some((q_norm, k_norm)) = &mut self.qk_norm {
            f("self_attn.q_norm", Norm, q_norm)?;
            f("self_attn.k_norm", Norm, k_norm)?;
        }
        f("post_attention_layernorm", Norm, &mut self.post_norm)?;
        f("mlp.gate", Router, &mut self.router)?;
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

    /// The layer's tensors under the names of the checkpoint.
    pub fn tensors(&self, layer: usize) -> Result<Vec<(String, Tensor)>> {
        let mut out = Vec::new();
        // Visiting wants a mutable layer; cloning one copies handles, not weights.
        self.clone().visit(&mut |name, kind, tensor| {
            use ParameterKind::{Attention, Norm, Router};
            if matches!(kind, Attention | Norm | Router) {
                out.push((names::layer(layer, name), tensor.clone()));
            }
            Ok(())
        })?;
        out.extend(self.bank.tensors(layer)?);
        Ok(out)
    }
}
