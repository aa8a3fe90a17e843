//! Rotary position embedding in the "rotate half" convention of `transformers`, with a backward.

use crate::real::{Real, dispatch, slice, storage, tensor, view};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Cosines and sines of every position, made once per model.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[positions, D/2]` pairs of (cos, sin).
    table: Arc<[(f64, f64)]>,
    half: usize,
}

impl Rope {
    /// `head_dim` is `D` (even), `theta` the base, `positions` the longest context.
    pub fn new(head_dim: usize, theta: f64, positions: usize) -> Self {
        let half = head_dim / 2;
        let table = (0..positions)
            .flat_map(|p| {
                (0..half).map(move |i| {
                    // `transformers` rounds the inverse frequency and the angle to f32.
                    let inv = (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32;
                    let angle = p as f32 * inv;
                    (f64::from(angle.cos()), f64::from(angle.sin()))
                })
            })
            .collect();
        Self { table, half }
    }

    fn positions(&self) -> usize {
        self.table.len() / self.half.max(1)
    }
}

struct ApplyRope {
    rope: Rope,
    offset: usize,
    /// `1.0` rotates, `-1.0` rotates back (the gradient of an orthogonal map is its inverse).
    direction: f64,
}

impl ApplyRope {
    fn rotate<T: Real>(&self, x: &[T], (len, heads): (usize, usize)) -> Vec<T> {
        let half = self.rope.half;
        let row = (heads * 2 * half).max(1);
        let mut y = vec![T::zero(); x.len()];
        y.par_chunks_mut(row)
            .zip(x.par_chunks(row))
            .enumerate()
            .for_each(|(i, (y, x))| {
                let at = (self.offset + i % len) * half;
                for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                    for j in 0..half {
                        let (cos, sin) = self.rope.table[at + j];
                        let (cos, sin) = (T::from_f64(cos), T::from_f64(sin * self.direction));
                        let (a, b) = (x[j], x[j + half]);
                        y[j] = a * cos - b * sin;
                        y[j + half] = b * cos + a * sin;
                    }
                }
            });
        y
    }
}

impl CustomOp1 for ApplyRope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (_, len, heads, dim) = layout.shape().dims4()?;
        if dim == 0 || dim != 2 * self.rope.half || self.offset + len > self.rope.positions() {
            candle_core::bail!(
                "rope: {len} tokens from position {} of heads of {dim} do not fit a table of {} \
                 positions and head size {}; shorten the input to the model's context",
                self.offset,
                self.rope.positions(),
                2 * self.rope.half
            )
        }
        let y = dispatch!(x.dtype(), self.name(), T => {
            storage(self.rotate::<T>(slice(x, layout)?, (len, heads)))
        });
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (_, len, heads, _) = x.dims4()?;
        let back = Self {
            rope: self.rope.clone(),
            offset: self.offset,
            direction: -self.direction,
        };
        let dy = dy.contiguous()?;
        let view = view(&dy);
        dispatch!(x.dtype(), self.name(), T => {
            Ok(Some(tensor(back.rotate::<T>(view.slice()?, (len, heads)), x.shape())?))
        })
    }
}

/// Rotates queries or keys `x: [B, T, heads, D]` whose first token stands at position `offset`.
pub fn apply_rope(x: &Tensor, rope: &Rope, offset: usize) -> Result<Tensor> {
    x.contiguous()?.apply_op1(ApplyRope {
        rope: rope.clone(),
        offset,
        direction: 1.0,
    })
}
