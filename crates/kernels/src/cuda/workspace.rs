//! Memory between the kernels of a layer.

use super::Result;
use super::block::Shape;
use super::decode::{DECODE_TOKENS, SPLITS};
use super::device::{Element, Gpu};
use super::grouped::Path;
use super::route::Tables;
use cudarc::driver::CudaSlice;

/// Memory between the kernels of a layer, for any layer whose sizes are no larger than those of its shape.
#[derive(Debug)]
pub struct Workspace<T> {
    pub(super) shape: Shape,
    pub(super) tokens: usize,
    /// How many tokens the tables are about.
    pub(super) routed: usize,
    /// Which of the grouped products is used.
    pub path: Path,
    /// Router outputs, `[T, E]`; of few tokens, parts of their sums.
    pub(super) logits: CudaSlice<f32>,
    /// Where the blocks of a launch wait for each other.
    pub(super) barrier: CudaSlice<u32>,
    pub(super) tables: Tables,
    /// What the down projections are given, `[S, F]`.
    pub(super) h: CudaSlice<T>,
    /// What the bases make of their pairs, `[pairs, F]`.
    pub(super) pre_gate: CudaSlice<T>,
    pub(super) pre_up: CudaSlice<T>,
    /// `V·x` of gate and up, side by side, `[S, 2R]`.
    pub(super) low: CudaSlice<T>,
    /// `g·V·h` of down, `[S, R]`.
    pub(super) low_down: CudaSlice<T>,
    /// `Σ g·h` of each pair, `[pairs, F]`.
    pub(super) pair_h: CudaSlice<T>,
    /// What the base makes of it, `[pairs, H]`.
    pub(super) pair_y: CudaSlice<T>,
    /// Weighted outputs of rows, `[S, H]`.
    pub(super) y: CudaSlice<T>,
    /// What whole experts do in adapted slots, while they have a share, or what adapters of ranks of their own do.
    pub(super) own: Option<Own<T>>,
}

/// The rows of slots' whole experts.
#[derive(Debug)]
pub(super) struct Own<T> {
    /// Pre-activations, `[S, F]`; backward, `gate` has the gradient of what `down` was given.
    pub(super) gate: CudaSlice<T>,
    pub(super) up: CudaSlice<T>,
    /// Weighted outputs, or the gradients of inputs, `[S, H]`.
    pub(super) y: CudaSlice<T>,
}

impl<T: Element> Workspace<T> {
    /// Memory for up to `tokens` at once.
    ///
    /// # Errors
    /// If there is not enough.
    pub fn new(gpu: &Gpu, shape: Shape, tokens: usize) -> Result<Self> {
        shape.check()?;
        shape.check_rows(tokens)?;
        let (rows, pairs) = (shape.rows(tokens), shape.pairs(tokens));
        // Rows of slots and pairs are only there where there are slots.
        let low = if shape.adapted > 0 {
            rows * shape.rank
        } else {
            0
        };
        Ok(Self {
            shape: shape.room(),
            tokens,
            routed: 0,
            path: Path::best(gpu),
            logits: gpu.alloc(tokens.max(DECODE_TOKENS.min(tokens) * SPLITS) * shape.experts)?,
            barrier: gpu.upload(&[0, 0])?,
            tables: Tables::new(gpu, &shape, tokens)?,
            h: gpu.alloc(rows * shape.inner)?,
            pre_gate: gpu.alloc(pairs * shape.inner)?,
            pre_up: gpu.alloc(pairs * shape.inner)?,
            low: gpu.alloc(2 * low)?,
            low_down: gpu.alloc(low)?,
            pair_h: gpu.alloc(pairs * shape.inner)?,
            pair_y: gpu.alloc(pairs * shape.hidden)?,
            y: gpu.alloc(rows * shape.hidden)?,
            own: None,
        })
    }

    /// Whether `tokens` of a layer of this shape have room.
    pub(super) fn fits(&self, shape: &Shape, tokens: usize) -> bool {
        self.shape.covers(&shape.room()) && tokens <= self.tokens
    }

    /// What has room for them, and for what has room here unless that is too much for one layer.
    #[cfg(feature = "linked")]
    pub(super) fn larger(&self, shape: &Shape, tokens: usize) -> (Shape, usize) {
        let both = self.shape.widest(&shape.room());
        match both.check() {
            Ok(()) => (both, tokens.max(self.tokens)),
            Err(_) => (*shape, tokens),
        }
    }

    /// The same with memory for whole experts that have a share in adapted slots, and for adapters of ranks of their own.
    ///
    /// # Errors
    /// If there is not enough.
    pub fn annealed(gpu: &Gpu, shape: Shape, tokens: usize) -> Result<Self> {
        let work = Self::new(gpu, shape, tokens)?;
        let rows = shape.rows(tokens);
        let own = Own {
            gate: gpu.alloc(rows * shape.inner)?,
            up: gpu.alloc(rows * shape.inner)?,
            y: gpu.alloc(rows * shape.hidden)?,
        };
        Ok(Self {
            own: Some(own),
            ..work
        })
    }
}
