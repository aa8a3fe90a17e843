//! Slots whose gate and up matrices are mixed from a few basis matrices of the layer (MoBE, arXiv
//! 2508.05257): `W_i = A_i · silu(Σ_m softmax(w_i)_m · B_m)`. The down projection stays the expert's own.
//!
//! The nonlinearity works element by element, so row `k` of the bases and column `k` of the transforms
//! make one *component*, as in a low-rank adapter; while training, the last few may train alone.

use crate::Result;
use candle_core::{D, Tensor};
use lightmoe_kernels::{Segment, as_rows, grouped_linear};
use std::sync::Arc;

/// The gate or the up matrices of `n` slots over `M` bases of `R` rows.
#[derive(Debug, Clone)]
pub struct Mixture {
    /// `B_m`: `[M, R, H]`; while training, the components that train.
    pub bases: Tensor,
    /// `w_i`: `[n, M]`, before the softmax.
    pub weights: Tensor,
    /// `A_i`: `[n, F, R]`; while training, the components that train.
    pub transforms: Tensor,
    /// Bases and transforms of the first components, which do not train.
    frozen: Option<(Tensor, Tensor)>,
}

/// The slots of a layer that are mixed.
#[derive(Debug, Clone)]
pub struct MixedSlots {
    /// The gate matrices.
    pub gate: Mixture,
    /// The up matrices.
    pub up: Mixture,
    /// The down matrices, `[n, H, F]`.
    pub down: Tensor,
    /// `lora_A` `[n, R', F]` and `lora_B` `[n, H, R']` of the down matrices, while training.
    pub down_adapters: Option<(Tensor, Tensor)>,
}

impl Mixture {
    /// Of all components.
    pub fn new(bases: Tensor, weights: Tensor, transforms: Tensor) -> Self {
        Self {
            bases,
            weights,
            transforms,
            frozen: None,
        }
    }

    /// Bases and transforms with all components.
    fn whole(&self) -> Result<(Tensor, Tensor)> {
        Ok(match &self.frozen {
            None => (self.bases.clone(), self.transforms.clone()),
            Some((bases, transforms)) => (
                Tensor::cat(&[&bases.to_dtype(self.bases.dtype())?, &self.bases], 1)?,
                Tensor::cat(
                    &[
                        &transforms.to_dtype(self.transforms.dtype())?,
                        &self.transforms,
                    ],
                    2,
                )?,
            ),
        })
    }

    /// What transforms are multiplied with, for slots of these `weights`: `[n, R, H]`.
    fn mixed(bases: &Tensor, weights: &Tensor) -> Result<Tensor> {
        let (count, rank, width) = bases.dims3()?;
        let bases = as_rows(bases)?;
        let shares = candle_nn::ops::softmax(&as_rows(weights)?, D::Minus1)?;
        let sums = shares.matmul(&bases.reshape((count, rank * width))?)?;
        Ok(sums.reshape(((), rank, width))?.silu()?)
    }

    /// The matrices multiplied out: `[n, F, H]`.
    pub fn products(&self) -> Result<Tensor> {
        let (bases, transforms) = self.whole()?;
        Ok(transforms.matmul(&Self::mixed(&bases, &self.weights)?)?)
    }

    /// `W_i · x` of sorted rows. Only the slots that have rows are mixed.
    pub(super) fn apply(&self, x: &Tensor, segments: &Arc<[Segment]>) -> Result<Tensor> {
        let (bases, transforms) = self.whole()?;
        let chosen = || segments.iter().filter(|segment| segment.len > 0);
        let slots: Vec<u32> = chosen().map(|segment| segment.group as u32).collect();
        let weights = self
            .weights
            .index_select(&super::index(&slots, &self.weights)?, 0)?;
        let renumbered: Arc<[Segment]> = chosen()
            .enumerate()
            .map(|(group, segment)| Segment { group, ..*segment })
            .collect();
        let low = grouped_linear(x, &Self::mixed(&bases, &weights)?, &renumbered)?;
        Ok(grouped_linear(&low, &transforms, segments)?)
    }

    /// Lets the last `trained` components train, and no others.
    fn freeze(&mut self, trained: usize) -> Result<()> {
        let rank = self.bases.dim(1)?;
        let first = rank.saturating_sub(trained);
        if first > 0 {
            let part = |t: &Tensor, dim, start, len| t.narrow(dim, start, len)?.contiguous();
            self.frozen = Some((
                part(&self.bases, 1, 0, first)?,
                part(&self.transforms, 2, 0, first)?,
            ));
            self.bases = part(&self.bases, 1, first, rank - first)?;
            self.transforms = part(&self.transforms, 2, first, rank - first)?;
        }
        Ok(())
    }

    /// Puts the components together again.
    fn join(&mut self) -> Result<()> {
        (self.bases, self.transforms) = self.whole()?;
        self.frozen = None;
        Ok(())
    }
}

impl MixedSlots {
    /// Whether something of it has a gradient.
    pub(super) fn has_gradients(&self) -> bool {
        let mixtures = self
            .named()
            .into_iter()
            .flat_map(|(_, of)| [&of.bases, &of.weights, &of.transforms]);
        let adapters = self.down_adapters.iter().flat_map(|(a, b)| [a, b]);
        let mut all = mixtures.chain(adapters).chain([&self.down]);
        all.any(Tensor::track_op)
    }

    /// Both mixtures with their names, in the order of [`crate::names::MIXED`].
    pub fn named(&self) -> [(&'static str, &Mixture); 2] {
        [("gate_proj", &self.gate), ("up_proj", &self.up)]
    }

    /// The same, to change them.
    pub fn named_mut(&mut self) -> [(&'static str, &mut Mixture); 2] {
        [("gate_proj", &mut self.gate), ("up_proj", &mut self.up)]
    }

    /// `W_down · h` of sorted rows.
    pub(super) fn down(&self, h: &Tensor, segments: &Arc<[Segment]>) -> Result<Tensor> {
        let y = grouped_linear(h, &self.down, segments)?;
        let Some((a, b)) = &self.down_adapters else {
            return Ok(y);
        };
        let low = grouped_linear(h, a, segments)?;
        Ok((y + grouped_linear(&low, b, segments)?)?)
    }

    /// Lets the last `trained` components of both mixtures train, and no others.
    pub(super) fn freeze_components(&mut self, trained: usize) -> Result<()> {
        let mut mixtures = self.named_mut().into_iter();
        mixtures.try_for_each(|(_, mixture)| mixture.freeze(trained))
    }

    /// Puts the components of both together again.
    pub(super) fn join_components(&mut self) -> Result<()> {
        let mut mixtures = self.named_mut().into_iter();
        mixtures.try_for_each(|(_, mixture)| mixture.join())
    }

    /// Merges the adapters of the down matrices.
    pub(super) fn merge_adapters(&mut self) -> Result<()> {
        if let Some((a, b)) = self.down_adapters.take() {
            let change = b.detach().matmul(&a.detach())?;
            // Rounded once, if at all.
            let whole = (self.down.detach().to_dtype(change.dtype())? + change)?;
            self.down = whole.to_dtype(self.down.dtype())?;
        }
        Ok(())
    }

    /// Whether it computes with what only training has.
    pub(super) fn trains(&self) -> bool {
        let mut mixtures = self.named().into_iter();
        self.down_adapters.is_some() || mixtures.any(|(_, mixture)| mixture.frozen.is_some())
    }
}
