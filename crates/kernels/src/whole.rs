//! What whole layers of experts are made of, and those in a few launches, where a GPU has them and nothing trains.

use crate::choice::Choice;
#[cfg(feature = "linked")]
use crate::cuda::{OnGpu, aligned};
use candle_core::{DType, Result, Tensor};

/// What a layer of experts computes with. Positions hold dense experts first, then adapted slots that share a
/// base, by ascending group, then adapted slots without one.
#[derive(Debug, Clone, Copy)]
pub struct LayerParts<'a> {
    /// `[E, H]`
    pub router: &'a Tensor,
    /// Added to the scores that choose, in families that have it: `[E]`.
    pub correction: Option<&'a Tensor>,
    /// How the family chooses.
    pub choice: Choice,
    /// Experts of a token, `K`.
    pub top_k: usize,
    /// Position of each expert, `None` of those that are never chosen: `[E]`.
    pub position: &'a [Option<usize>],
    /// Of the dense positions: gate and up `[n, F, H]`, down `[n, H, F]`.
    pub dense: Option<[&'a Tensor; 3]>,
    /// Of the groups, as `dense`.
    pub bases: Option<[&'a Tensor; 3]>,
    /// Group of each adapted position.
    pub groups: &'a [Option<usize>],
    /// Of the adapted positions.
    pub adapters: Option<AdapterParts<'a>>,
    /// What positions give beside what they compute, `[n, H]`, and which of them each position has. One that gives
    /// nothing else is an adapted position without a base and without components.
    pub vectors: Option<(&'a Tensor, &'a [Option<usize>])>,
    /// Adapters of the dense positions while they train, of one rank: `V`, gate and up `[n, R, H]` and down `[n, R, F]`,
    /// and `U`, gate and up `[n, F, R]` and down `[n, H, R]`.
    pub kept: Option<[[&'a Tensor; 3]; 2]>,
    /// The experts that the adapted positions replace, while they have a share.
    pub originals: Option<[&'a Tensor; 3]>,
    /// That share, `β`, zero without them; the bases have what is left (LightMoE, eq. 6).
    pub beta: f64,
}

impl<'a> LayerParts<'a> {
    /// All stacks of matrices, gate, up and down.
    #[cfg(feature = "linked")]
    pub(crate) fn stacks(&self) -> impl Iterator<Item = [&'a Tensor; 3]> + use<'a> {
        let adapters = self.adapters.as_ref().map(|of| [of.a, of.b]);
        let adapters = self.kept.into_iter().chain(adapters).flatten();
        let whole = [self.dense, self.bases, self.originals];
        whole.into_iter().flatten().chain(adapters)
    }
}

/// Adapters of slots of any ranks, their components one behind the other.
#[derive(Debug, Clone, Copy)]
pub struct AdapterParts<'a> {
    /// `V`: gate and up `[ΣR, H]`, down `[ΣR, F]`.
    pub a: [&'a Tensor; 3],
    /// `Uᵀ`: gate and up `[ΣR, F]`, down `[ΣR, H]`.
    pub b: [&'a Tensor; 3],
    /// Where the components of each slot begin, and the last end: `[n + 1]`.
    pub starts: &'a [usize],
}

/// A layer of experts that a GPU runs in a few launches, the router's product and choice among them: three for
/// up to 32 tokens, and one for vectors. Nothing waits for the host. It has no gradients.
#[derive(Debug)]
pub struct WholeLayer {
    #[cfg(feature = "linked")]
    layer: OnGpu,
    #[cfg(not(feature = "linked"))]
    never: std::convert::Infallible,
}

impl WholeLayer {
    /// The layer, if it can be run so: on a GPU from the A100 on, of 16-bit floats, its sizes multiples of 8, its
    /// router without digits that 16 bits do not hold, and nothing of it training. Three launches take adapters of
    /// ranks up to 128, which are filled up to one rank; wider ones take more. The numbers must stay what they are;
    /// of adapters it may keep a copy.
    ///
    /// # Errors
    /// If the GPU has no room for it.
    #[cfg(feature = "linked")]
    pub fn new(parts: &LayerParts<'_>) -> Result<Option<Self>> {
        Ok(OnGpu::new(parts)?.map(|layer| Self { layer }))
    }

    /// Nothing: the program is not linked with CUDA, so no tensor is on a GPU.
    ///
    /// # Errors
    /// None.
    #[cfg(not(feature = "linked"))]
    pub fn new(_: &LayerParts<'_>) -> Result<Option<Self>> {
        Ok(None)
    }

    /// The type of its matrices and of the rows that it takes.
    #[cfg(feature = "linked")]
    pub fn dtype(&self) -> DType {
        self.layer.dtype()
    }

    /// Never called: there is no such layer.
    #[cfg(not(feature = "linked"))]
    pub fn dtype(&self) -> DType {
        match self.never {}
    }

    /// `Σ g·y` over the experts that the router chooses for each row of `x: [T, H]`: `[T, H]`.
    ///
    /// # Errors
    /// If `x` has another width, type or device than the layer, or something before it trains.
    #[cfg(feature = "linked")]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if x.track_op() {
            candle_core::bail!("a whole layer of experts has no gradients")
        }
        aligned(x)?.apply_op1_no_bwd(&self.layer)
    }

    /// Never called: there is no such layer.
    ///
    /// # Errors
    /// None.
    #[cfg(not(feature = "linked"))]
    pub fn forward(&self, _: &Tensor) -> Result<Tensor> {
        match self.never {}
    }
}
