//! Memory for the gradients of a layer.

use super::Result;
use super::block::{Adapted, Projections, Shape};
use super::device::{Element, Gpu};
use cudarc::driver::CudaSlice;

/// Which parameters train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trained {
    /// The matrices of dense experts.
    pub dense: bool,
    /// Shared bases.
    pub bases: bool,
    /// Adapters.
    pub adapters: bool,
}

/// The gradients of a layer, and what is in between. Gradients of parameters that do not train are not
/// written.
#[derive(Debug)]
pub struct Gradients<T> {
    pub(super) shape: Shape,
    pub(super) tokens: usize,
    /// Of the inputs, by way of the experts, `[T, H]`.
    pub x: CudaSlice<T>,
    /// Of the gate of each choice, `[T · K]`.
    pub gates: CudaSlice<f32>,
    /// Of the dense experts, as their matrices lie.
    pub dense: Projections<CudaSlice<f32>>,
    /// Of the bases.
    pub bases: Projections<CudaSlice<f32>>,
    /// Of the adapters.
    pub adapters: Adapted<CudaSlice<f32>>,
    /// Pre-activations of rows, then their gradients, `[S, F]`.
    pub(super) gate: CudaSlice<T>,
    pub(super) up: CudaSlice<T>,
    /// The same summed over the rows of each pair, `[pairs, F]`.
    pub(super) pair_gate: CudaSlice<T>,
    pub(super) pair_up: CudaSlice<T>,
    /// Gradient of what the bases gave back, `[pairs, F]`.
    pub(super) pair_dh: CudaSlice<T>,
    /// `dout·U` of the down adapters, `[S, R]`.
    pub(super) low_down: CudaSlice<T>,
    /// Gradients of `V·x`, side by side, `[S, 2R]`.
    pub(super) low: CudaSlice<T>,
}

impl<T: Element> Gradients<T> {
    /// Memory for the gradients of `tokens` at once, of `trained` parameters.
    ///
    /// # Errors
    /// If there is not enough.
    pub fn new(gpu: &Gpu, shape: Shape, tokens: usize, trained: Trained) -> Result<Self> {
        let Shape {
            hidden: h,
            inner: f,
            rank: r,
            ..
        } = shape;
        shape.check()?;
        shape.check_rows(tokens)?;
        let (rows, pairs) = (shape.rows(tokens), shape.pairs(tokens));
        let low = if shape.adapted > 0 { rows * r } else { 0 };
        let parameters = |trained: bool, n: usize, gate: usize, down: usize| -> Result<_> {
            let n = if trained { n } else { 0 };
            Ok(Projections {
                gate: gpu.alloc(n * gate)?,
                up: gpu.alloc(n * gate)?,
                down: gpu.alloc(n * down)?,
            })
        };
        Ok(Self {
            shape,
            tokens,
            x: gpu.alloc(tokens * h)?,
            gates: gpu.alloc(rows)?,
            dense: parameters(trained.dense, shape.dense, f * h, h * f)?,
            bases: parameters(trained.bases, shape.groups, f * h, h * f)?,
            adapters: Adapted {
                a: parameters(trained.adapters, shape.adapted, r * h, r * f)?,
                b: parameters(trained.adapters, shape.adapted, f * r, h * r)?,
            },
            gate: gpu.alloc(rows * f)?,
            up: gpu.alloc(rows * f)?,
            pair_gate: gpu.alloc(pairs * f)?,
            pair_up: gpu.alloc(pairs * f)?,
            pair_dh: gpu.alloc(pairs * f)?,
            low_down: gpu.alloc(low)?,
            low: gpu.alloc(2 * low)?,
        })
    }
}
