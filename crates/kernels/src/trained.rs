//! Whole layers of experts that train, where a GPU has them: the host learns nothing of where tokens go.

#[cfg(feature = "linked")]
use crate::cuda::{TrainedOnGpu, aligned};
use crate::whole::LayerParts;
use candle_core::{DType, Result, Tensor};

/// A layer of experts on a GPU whose parameters may train. Nothing waits for the host, forward or backward, and of
/// what lies between the products nothing is kept for the backward pass.
#[derive(Debug)]
pub struct TrainedLayer {
    #[cfg(feature = "linked")]
    layer: TrainedOnGpu,
    #[cfg(not(feature = "linked"))]
    never: std::convert::Infallible,
}

#[cfg(feature = "linked")]
impl TrainedLayer {
    /// The layer, if it can be run so: on a GPU from the A100 on, its sizes multiples of 8 and its ranks at most 128;
    /// what does not train of 16-bit floats, what trains of these or of f32. Parameters that train are read when it
    /// runs, the others must stay what they are.
    ///
    /// # Errors
    /// If the GPU has no room for it.
    pub fn new(parts: &LayerParts<'_>) -> Result<Option<Self>> {
        Ok(TrainedOnGpu::new(parts)?.map(|layer| Self { layer }))
    }

    /// The type of its rows.
    pub fn dtype(&self) -> DType {
        self.layer.dtype()
    }

    /// The positions that the router's outputs `logits: [T, E]` choose, best first: `[T, K]`, of u32. They have no
    /// gradient.
    ///
    /// # Errors
    /// If the logits have another shape, or are not on the GPU.
    pub fn choose(&self, logits: &Tensor) -> Result<Tensor> {
        self.layer.choose(logits)
    }

    /// `Σ g·y` over the experts at the `chosen` positions `[T, K]` of each row of `x: [T, H]`, with their gates
    /// `[T · K]`: `[T, H]`, with gradients of `x`, the gates, and what trains of the layer.
    ///
    /// # Errors
    /// If shapes or types do not fit, or the GPU has no room for what lies between the products.
    pub fn forward(&self, x: &Tensor, gates: &Tensor, chosen: &Tensor) -> Result<Tensor> {
        self.layer.forward(x, gates, &aligned(chosen)?)
    }

    /// A number that has the gradients of `Σ y·dy`, with `y: [T, H]` what [`TrainedLayer::forward`] gives, and is not
    /// that sum: `y` is not computed. `[1]`, of f32.
    ///
    /// # Errors
    /// As [`TrainedLayer::forward`].
    pub fn pull(&self, x: &Tensor, gates: &Tensor, chosen: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.layer.pull(x, gates, &aligned(chosen)?, dy)
    }
}

/// Never made: the program is not linked with CUDA, so no tensor is on a GPU.
#[cfg(not(feature = "linked"))]
impl TrainedLayer {
    /// Nothing.
    ///
    /// # Errors
    /// None.
    pub fn new(_: &LayerParts<'_>) -> Result<Option<Self>> {
        Ok(None)
    }

    /// Never called.
    pub fn dtype(&self) -> DType {
        match self.never {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn choose(&self, _: &Tensor) -> Result<Tensor> {
        match self.never {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn forward(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Tensor> {
        match self.never {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn pull(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Tensor> {
        match self.never {}
    }
}
