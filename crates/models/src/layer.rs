//! One decoder layer: attention, then the mixture of experts or a plain MLP, each on the normed
//! residual stream.
//!
//! Follows the decoder layers of `transformers`, whose families differ in the facts of
//! [`crate::ModelConfig`] alone.

mod unobserved;

use crate::attention::{LayerCache, SelfAttention};
use crate::bank::{Bank, ExpertRows, Whole};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::mlp::{Mlp, SharedExpert};
use crate::norm::Norm;
use crate::rotary::Rotary;
use crate::router::{Router, Routing};
use crate::{Error, Result, names};
use candle_core::Tensor;

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
    /// What a router adds to its scores before it chooses.
    RouterCorrection,
    /// The MLP of a dense layer.
    Mlp,
    /// Matrices of dense slots.
    Expert,
    /// The expert that every token passes, and its gate.
    SharedExpert,
    /// Shared bases.
    Base,
    /// Low-rank adapters, biases, and what mixed slots have beside bases.
    Adapter,
    /// Vectors in place of experts.
    Constant,
    /// Vectors of experts that only scale.
    Scale,
}

/// What is called with each parameter of a part: its name within the part, its kind, itself.
pub type Visitor<'a> = dyn FnMut(&str, ParameterKind, &mut Tensor) -> Result<()> + 'a;

/// What looks on while the experts of a layer run.
pub trait LayerObserver {
    /// Before they run: the experts, what they are given `[T, H]`, and what the router decided.
    fn block(&mut self, _bank: &Bank, _x: &Tensor, _routing: &Routing) -> Result<()> {
        Ok(())
    }

    /// Each dense expert that was chosen.
    fn expert(&mut self, _routing: &Routing, _rows: &ExpertRows<'_>) -> Result<()> {
        Ok(())
    }
}

/// Nobody looks.
impl LayerObserver for () {}

/// Where the tensors of a layer come from, by name within the layer and shape: a checkpoint, or
/// fresh random numbers.
pub(crate) type Source<'a> = dyn Fn(&str, &[usize]) -> Result<Tensor> + 'a;

/// The weights of one decoder layer.
#[derive(Debug, Clone)]
pub struct Layer {
    input_norm: Norm,
    attention: SelfAttention,
    post_norm: Norm,
    feed_forward: FeedForward,
}

/// What follows the attention.
#[derive(Debug, Clone)]
#[allow(
    clippy::large_enum_variant,
    reason = "a model has few layers, and nearly all are the large variant"
)]
enum FeedForward {
    Dense(Mlp),
    Experts {
        router: Router,
        shared: Option<SharedExpert>,
        bank: Bank,
        whole: Whole,
    },
}

/// What the experts and the shared one give of normed rows `[T, H]`.
fn with_shared(y: Tensor, shared: Option<&SharedExpert>, normed: &Tensor) -> Result<Tensor> {
    Ok(match shared {
        Some(shared) => (y + shared.forward(normed)?)?,
        None => y,
    })
}

impl Layer {
    /// Reads layer `layer` of a checkpoint.
    pub fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self> {
        let config = checkpoint.config();
        let get =
            |rest: &str, shape: &[usize]| checkpoint.tensor(&names::layer(layer, rest), shape);
        let layout = checkpoint.layout().layers.get(&layer);
        let bank = layout.map(|layout| move || Bank::load(checkpoint, layer, layout));
        Self::build(config, &get, bank)
    }

    /// Takes the weights from `get` and the experts from `bank`; a layer without is dense.
    pub(crate) fn build(
        config: &ModelConfig,
        get: &Source<'_>,
        bank: Option<impl FnOnce() -> Result<Bank>>,
    ) -> Result<Self> {
        Ok(Self {
            input_norm: Norm::build("input_layernorm", config, get)?,
            attention: SelfAttention::build(config, get)?,
            post_norm: Norm::build("post_attention_layernorm", config, get)?,
            feed_forward: match bank {
                None => FeedForward::Dense(Mlp::dense(config, get)?),
                Some(bank) => FeedForward::Experts {
                    router: Router::build(config, get)?,
                    shared: SharedExpert::build(config, get)?,
                    bank: bank()?,
                    whole: Whole::default(),
                },
            },
        })
    }

    /// The experts; `None` for a dense layer.
    pub fn bank(&self) -> Option<&Bank> {
        match &self.feed_forward {
            FeedForward::Dense(_) => None,
            FeedForward::Experts { bank, .. } => Some(bank),
        }
    }

    /// The experts, to change them.
    pub fn bank_mut(&mut self) -> Option<&mut Bank> {
        match &mut self.feed_forward {
            FeedForward::Dense(_) => None,
            FeedForward::Experts { bank, .. } => Some(bank),
        }
    }

    /// What the router adds to the scores by which it chooses, `[E]`, in families that have it.
    pub fn router_correction(&self) -> Option<&Tensor> {
        match &self.feed_forward {
            FeedForward::Dense(_) => None,
            FeedForward::Experts { router, .. } => router.correction(),
        }
    }

    /// `x: [B, T, H]` → (`[B, T, H]`, what the router decided, if there is one). With a cache the
    /// tokens continue it.
    pub fn forward(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Option<Routing>)> {
        self.run(x, config, rotary, cache, None, None)
    }

    /// The same as [`Layer::forward`], while `observer` looks at the experts.
    pub fn forward_observed(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        cache: Option<&mut LayerCache>,
        observer: &mut dyn LayerObserver,
    ) -> Result<(Tensor, Option<Routing>)> {
        self.run(x, config, rotary, cache, Some(observer), None)
    }

    /// `x: [B, T, H]` → `[B, T, H]` as if the experts `removed` were gone, and no others.
    pub fn forward_without(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        removed: &[usize],
    ) -> Result<Tensor> {
        let (out, _) = self.run(x, config, rotary, None, None, Some(removed))?;
        Ok(out)
    }

    fn run(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        cache: Option<&mut LayerCache>,
        observer: Option<&mut dyn LayerObserver>,
        removed: Option<&[usize]>,
    ) -> Result<(Tensor, Option<Routing>)> {
        let (x, normed) = self.attended(x, config, rotary, cache)?;
        let (y, routing) = self.fed(&normed, config, observer, removed)?;
        Ok(((&x + y.reshape(x.shape())?)?, routing))
    }

    /// The residual stream behind the attention, `[B, T, H]`, and its norm, `[B · T, H]`.
    fn attended(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Tensor)> {
        let normed = self.input_norm.forward(x)?;
        let x = (x + self.attention.forward(&normed, config, rotary, cache)?)?;
        let normed = self.post_norm.forward(&x)?.flatten_to(1)?;
        Ok((x, normed))
    }

    /// What follows the attention, of normed rows `[T, H]`, step by step.
    fn fed(
        &self,
        normed: &Tensor,
        config: &ModelConfig,
        observer: Option<&mut dyn LayerObserver>,
        removed: Option<&[usize]>,
    ) -> Result<(Tensor, Option<Routing>)> {
        let (router, shared, bank) = match &self.feed_forward {
            FeedForward::Dense(mlp) => return Ok((mlp.forward(normed)?, None)),
            FeedForward::Experts {
                router,
                shared,
                bank,
                ..
            } => (router, shared, bank),
        };
        let removed = removed.unwrap_or(bank.removed_experts());
        let routing = router.route(normed, &config.moe, removed)?;
        let (gates, chosen) = (&routing.gates, &routing.chosen);
        let y = match observer {
            None => bank.forward(normed, gates, chosen)?,
            Some(observer) => {
                observer.block(bank, normed, &routing)?;
                let each = &mut |rows: &ExpertRows<'_>| observer.expert(&routing, rows);
                bank.forward_observed(normed, gates, chosen, each)?
            }
        };
        Ok((with_shared(y, shared.as_ref(), normed)?, Some(routing)))
    }

    /// Every parameter with its name within the layer, to train, replace or inspect it. Stacked
    /// expert tensors come as one parameter each.
    pub fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        use ParameterKind::{Adapter, Base, Expert};
        self.input_norm.visit(f)?;
        self.attention.visit(f)?;
        self.post_norm.visit(f)?;
        let bank = match &mut self.feed_forward {
            FeedForward::Dense(mlp) => return mlp.visit(ParameterKind::Mlp, f),
            FeedForward::Experts {
                router,
                shared,
                bank,
                ..
            } => {
                router.visit(f)?;
                if let Some(shared) = shared {
                    shared.visit(f)?;
                }
                bank
            }
        };
        for (name, tensor) in bank.scales.iter_mut().flat_map(|s| s.named_mut()) {
            f(&format!("mlp.scales.{name}"), ParameterKind::Scale, tensor)?;
        }
        if let Some(constants) = &mut bank.constants {
            f("mlp.constants", ParameterKind::Constant, constants)?;
        }
        if let Some(biases) = &mut bank.biases {
            f("mlp.biases", Adapter, biases)?;
        }
        if let Some(mixed) = &mut bank.mixed {
            for (name, mixture) in mixed.named_mut() {
                f(&format!("mlp.basis.{name}"), Base, &mut mixture.bases)?;
                let own = [
                    ("transform", &mut mixture.transforms),
                    ("mixing", &mut mixture.weights),
                ];
                for (what, tensor) in own {
                    f(&format!("mlp.mixed.{what}.{name}"), Adapter, tensor)?;
                }
            }
            f("mlp.mixed.down_proj", Expert, &mut mixed.down)?;
            if let Some((a, b)) = &mut mixed.down_adapters {
                f("mlp.mixed.lora_A.down_proj", Adapter, a)?;
                f("mlp.mixed.lora_B.down_proj", Adapter, b)?;
            }
        }
        let mut stack = |what: &str, kind, stack: Option<&mut crate::bank::Projections>| {
            for (name, tensor) in stack.into_iter().flat_map(|s| s.named_mut()) {
                f(&format!("mlp.{what}.{name}"), kind, tensor)?;
            }
            Ok::<_, Error>(())
        };
        stack("experts", Expert, bank.dense.as_mut())?;
        // A base that trains through an adapter stays as it is; of a factored one all trains.
        let base = match (&bank.base_adapters, bank.factored_bases()) {
            (Some(_), None) => Expert,
            _ => Base,
        };
        stack("bases", base, bank.bases.as_mut())?;
        for (what, adapters) in [
            ("kept", &mut bank.dense_adapters),
            ("shared", &mut bank.base_adapters),
        ] {
            if let Some(adapters) = adapters {
                stack(&format!("{what}.lora_A"), Adapter, Some(&mut adapters.a))?;
                stack(&format!("{what}.lora_B"), Adapter, Some(&mut adapters.b))?;
            }
        }
        if let Some(adapters) = &mut bank.adapters {
            stack("replaced.lora_A", Adapter, Some(&mut adapters.a))?;
            stack("replaced.lora_B", Adapter, Some(&mut adapters.b))?;
        }
        if let Some(factored) = &mut bank.factored {
            let (a, b) = (&mut factored.factors.a, &mut factored.factors.b);
            stack("shared.lora_A", Adapter, Some(a))?;
            stack("shared.lora_B", Adapter, Some(b))?;
            stack("bases.rows", Base, Some(&mut factored.rows))?;
        }
        Ok(())
    }

    /// The layer's tensors.
    pub fn tensors(&self, layer: usize) -> Result<Vec<(String, Tensor)>> {
        let mut out = Vec::new();
        // Visiting wants a mutable layer; cloning one copies handles, not weights.
        self.clone().visit(&mut |name, kind, tensor| {
            use ParameterKind::{Adapter, Base, Constant, Expert, Scale};
            if !matches!(kind, Expert | Base | Adapter | Constant | Scale) {
                out.push((names::layer(layer, name), tensor.clone()));
            }
            Ok(())
        })?;
        if let Some(bank) = self.bank() {
            out.extend(bank.tensors(layer)?);
        }
        Ok(out)
    }
}
