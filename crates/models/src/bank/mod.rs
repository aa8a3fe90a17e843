//! The expert bank: one slot per router output, whatever became of the expert behind it.
//!
//! Slots stand in *positions*: dense slots first, then adapted slots by group, those without one,
//! mixed ones, constants, and removed slots last, so that the rows of each form, and of each group, are
//! consecutive after sorting by position. A dense slot computes with its own matrices; an adapted
//! slot with `β·W + (1−β)·B + U·V`, where `W` is the expert it replaces (only while `β > 0`), `B` the
//! base its group shares, if it has one, and `U·V` its adapter (LightMoE, eq. 6–7). A mixed slot
//! computes gate and up with a transform of its own and bases that it shares with all mixed slots
//! ([`Mixture`]). A constant slot gives its vector whatever the input, and a removed one is never
//! chosen. While training, dense slots may carry adapters too.
//!
//! An adapted slot may have a bias, a vector that is added to what it gives, at a share of `1 − β`: it
//! stands for what the slot misses of the expert on average, which is nothing beside the expert itself.
//!
//! Bases may be stored as factors and a few rows ([`Factored`]).
//!
//! A shared base may train through an adapter of its own, and a factorised slot by a few of its
//! components; both end with the training.
//!
//! The adapters of adapted slots may be of different ranks: their components lie one after the other, and
//! none takes the memory or the time of a wider one.
//!
//! The products with a base run once per token and group: the gate and up inputs of a token's
//! slots are the same, and the down projection is linear, so `Σ g·(B·h) = B·(Σ g·h)`.

use crate::decoder::at_least_f32;
use crate::layout::FactoredBases;
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;
use std::sync::Arc;

pub(crate) mod components;
mod factored;
mod forward;
mod mixture;
mod scales;
mod whole;

pub use factored::{Factored, largest_rows};
pub use forward::ExpertRows;
pub use mixture::{MixedSlots, Mixture};
pub use scales::Scales;
pub(crate) use whole::{Form, Whole};

/// The three matrices of `n` experts, stacked.
#[derive(Debug, Clone)]
pub struct Projections {
    /// `[n, F, H]`
    pub gate: Tensor,
    /// `[n, F, H]`
    pub up: Tensor,
    /// `[n, H, F]`
    pub down: Tensor,
}

impl Projections {
    /// The three with their Hugging Face names.
    pub fn named(&self) -> [(&'static str, &Tensor); 3] {
        [
            ("gate_proj", &self.gate),
            ("up_proj", &self.up),
            ("down_proj", &self.down),
        ]
    }

    /// The three after `f`.
    pub fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            gate: f(&self.gate)?,
            up: f(&self.up)?,
            down: f(&self.down)?,
        })
    }

    /// The same, to change them.
    pub fn named_mut(&mut self) -> [(&'static str, &mut Tensor); 3] {
        [
            ("gate_proj", &mut self.gate),
            ("up_proj", &mut self.up),
            ("down_proj", &mut self.down),
        ]
    }
}

/// Takes one of the three matrices.
type Pick = fn(&Projections) -> &Tensor;

/// Low-rank adapters of `n` experts: `lora_A` `[n, R, in]`, `lora_B` `[n, out, R]` (scale 1).
#[derive(Debug, Clone)]
pub struct Adapters {
    /// `V` of the paper: gate and up `[n, R, H]`, down `[n, R, F]`.
    pub a: Projections,
    /// `U` of the paper: gate and up `[n, F, R]`, down `[n, H, R]`.
    pub b: Projections,
}

/// Low-rank adapters of `n` slots, each of a rank of its own (scale 1): the components of all, slot by slot,
/// in either factor as rows.
#[derive(Debug, Clone)]
pub struct RankedAdapters {
    /// `V` of the paper: gate and up `[ΣR, H]`, down `[ΣR, F]`.
    pub a: Projections,
    /// `Uᵀ` of the paper: gate and up `[ΣR, F]`, down `[ΣR, H]`.
    pub b: Projections,
    /// Where the components of each slot begin, and the last end: `[n + 1]`.
    pub starts: Arc<[usize]>,
}

/// The experts of one layer.
#[derive(Debug, Clone)]
pub struct Bank {
    /// Which slot stands where.
    pub(crate) order: Order,
    /// Matrices of the dense positions.
    pub dense: Option<Projections>,
    /// Adapters of the dense positions, while training.
    pub dense_adapters: Option<Adapters>,
    /// Shared bases; of factored ones the sparse part, while training.
    pub bases: Option<Projections>,
    /// Adapters of the bases, while training; of factored ones their factors.
    pub base_adapters: Option<Adapters>,
    /// Shared bases that are stored as factors and rows.
    pub factored: Option<Factored>,
    /// The shape of factored bases.
    pub(crate) factored_bases: Option<FactoredBases>,
    /// Adapters of the adapted positions; while training, the components that train.
    pub adapters: Option<RankedAdapters>,
    /// The components that do not train, while training.
    pub(crate) frozen: Option<RankedAdapters>,
    /// Vectors of experts that only scale; `None` where every chosen expert runs.
    pub scales: Option<Scales>,
    /// Matrices of the mixed positions.
    pub mixed: Option<MixedSlots>,
    /// Vectors of the constant positions, `[n, H]`.
    pub constants: Option<Tensor>,
    /// Vectors of the adapted positions that have a bias, `[n, H]`.
    pub biases: Option<Tensor>,
    /// The experts that the adapted positions replace, while `beta > 0`.
    pub originals: Option<Projections>,
    /// Share of the originals.
    pub beta: f64,
    /// Whether the adapters stand for what the originals give, so that their share is `1 − β`; beside
    /// them they count whole.
    pub adapters_fade_in: bool,
}

/// The positions of a layer's slots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Order {
    /// Expert of each position: `[E]`.
    pub(crate) experts: Vec<usize>,
    /// Position of each expert: `[E]`.
    pub(crate) position: Vec<usize>,
    /// Group of each adapted position that has one, ascending.
    pub(crate) groups: Vec<usize>,
    /// Rank of each adapted position.
    pub(crate) ranks: Vec<usize>,
    /// The adapted positions that have a bias, ascending.
    pub(crate) biased: Vec<usize>,
    /// How many positions are dense, mixed, and constant; what is left is removed.
    pub(crate) dense: usize,
    pub(crate) mixed: usize,
    pub(crate) constants: usize,
}

impl Order {
    /// The adapted positions.
    fn adapted(&self) -> Range<usize> {
        self.dense..self.dense + self.ranks.len()
    }

    /// The mixed positions.
    fn mixed(&self) -> Range<usize> {
        let start = self.adapted().end;
        start..start + self.mixed
    }

    /// The constant positions.
    fn constant(&self) -> Range<usize> {
        let start = self.mixed().end;
        start..start + self.constants
    }
}

impl Bank {
    /// Number of experts.
    pub fn len(&self) -> usize {
        self.order.experts.len()
    }

    /// Whether there are no experts.
    pub fn is_empty(&self) -> bool {
        self.order.experts.is_empty()
    }

    /// The experts of the dense positions, in order.
    pub fn dense_experts(&self) -> &[usize] {
        &self.order.experts[..self.order.dense]
    }

    /// The experts of the adapted positions, in order of their group, those without one last.
    pub fn adapted_experts(&self) -> &[usize] {
        &self.order.experts[self.order.adapted()]
    }

    /// The group of each adapted expert that has one, in the order of [`Bank::adapted_experts`].
    pub fn groups(&self) -> &[usize] {
        &self.order.groups
    }

    /// The number of shared bases.
    pub fn base_count(&self) -> usize {
        self.groups().iter().max().map_or(0, |group| group + 1)
    }

    /// The experts of the mixed positions, in order.
    pub fn mixed_experts(&self) -> &[usize] {
        &self.order.experts[self.order.mixed()]
    }

    /// The experts of the constant positions, in order.
    pub fn constant_experts(&self) -> &[usize] {
        &self.order.experts[self.order.constant()]
    }

    /// The experts of the adapted positions that have a bias, in order.
    pub fn biased_experts(&self) -> impl Iterator<Item = usize> + '_ {
        let positions = self.order.biased.iter();
        positions.map(|&position| self.order.experts[position])
    }

    /// The experts that may not be chosen.
    pub fn removed_experts(&self) -> &[usize] {
        &self.order.experts[self.order.constant().end..]
    }

    /// Sets the share of the originals, brought into `0..=1`; at zero they are dropped from memory
    /// (LightMoE §3.3).
    pub fn anneal(&mut self, beta: f64) {
        self.beta = beta.clamp(0.0, 1.0);
        if self.beta == 0.0 {
            self.originals = None;
        }
    }

    /// Adds the adapters of dense positions, of bases and of the down matrices of mixed positions to
    /// their matrices, and drops the adapters.
    pub fn merge_adapters(&mut self) -> Result<()> {
        if let Some(mixed) = &mut self.mixed {
            mixed.merge_adapters()?;
        }
        self.dense = merged(self.dense.take(), self.dense_adapters.take())?;
        self.bases = merged(self.bases.take(), self.base_adapters.take())?;
        Ok(())
    }

    /// Whether something of it has a gradient.
    fn has_gradients(&self) -> bool {
        let factored = self.factored.as_ref();
        let own = self.dense_adapters.iter().chain(&self.base_adapters);
        let own = own.chain(factored.map(|of| &of.factors));
        let own = own.flat_map(|of| [&of.a, &of.b]);
        let ranked = self.adapters.iter().chain(&self.frozen);
        let ranked = ranked.flat_map(|of| [&of.a, &of.b]);
        let whole = self.dense.iter().chain(&self.bases).chain(&self.originals);
        let whole = whole.chain(factored.map(|of| &of.rows));
        let stacks = whole.chain(own).chain(ranked);
        let mut stacks = stacks.flat_map(|of| [&of.gate, &of.up, &of.down]);
        let scales = self.scales.as_ref();
        stacks.any(Tensor::track_op)
            || scales.is_some_and(|of| of.named().iter().any(|(_, scale)| scale.track_op()))
            || self
                .constants
                .iter()
                .chain(&self.biases)
                .any(Tensor::track_op)
            || self.mixed.as_ref().is_some_and(MixedSlots::has_gradients)
    }

    /// Whether it computes with what only training has.
    pub(crate) fn trains(&self) -> bool {
        self.dense_adapters.is_some()
            || self.base_adapters.is_some()
            || self.frozen.is_some()
            || self.mixed.as_ref().is_some_and(MixedSlots::trains)
    }

    /// The originals that take part now.
    pub(crate) fn blended(&self) -> Result<Option<&Projections>> {
        if self.beta <= 0.0 || self.order.ranks.is_empty() {
            return Ok(None);
        }
        let originals = self.originals.as_ref().ok_or_else(|| {
            Error::Invalid(format!(
                "the expert bank has no originals, but their share is {}; load them, or anneal to \
                 zero",
                self.beta
            ))
        });
        originals.map(Some)
    }
}

impl Adapters {
    /// `U·V` of every expert, not rounded to 16 bits.
    pub fn products(&self) -> Result<Projections> {
        let product = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
            let (a, b) = (at_least_f32(a.detach())?, at_least_f32(b.detach())?);
            Ok(b.matmul(&a)?)
        };
        Ok(Projections {
            gate: product(&self.a.gate, &self.b.gate)?,
            up: product(&self.a.up, &self.b.up)?,
            down: product(&self.a.down, &self.b.down)?,
        })
    }
}

/// The matrices with their adapters added.
fn merged(weights: Option<Projections>, adapters: Option<Adapters>) -> Result<Option<Projections>> {
    let (Some(weights), Some(adapters)) = (&weights, adapters) else {
        return Ok(weights);
    };
    let mut sum = weights.map(|w| Ok(w.detach()))?;
    for ((_, w), (_, product)) in sum
        .named_mut()
        .into_iter()
        .zip(adapters.products()?.named())
    {
        // Rounded once, if at all.
        *w = (w.to_dtype(product.dtype())? + product)?.to_dtype(w.dtype())?;
    }
    Ok(Some(sum))
}

/// Places among the rows of `of`, where it is.
fn index(values: &[u32], of: &Tensor) -> Result<Tensor> {
    Ok(Tensor::new(values, of.device())?)
}

fn missing(what: &str) -> Error {
    Error::Invalid(format!(
        "the expert bank has no {what}; build the checkpoint again"
    ))
}
