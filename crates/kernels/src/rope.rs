//! Rotary position embedding with a backward.

use crate::composed;
use crate::real::{Real, dispatch, slice, storage, tensor, view};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

/// Which two numbers of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// `i` and `i + D/2`: the "rotate half" convention of `transformers`.
    Halves,
    /// `2i` and `2i + 1` (DeepSeek-V2 and V3).
    Adjacent,
}

/// The angles of a model's rotary embedding.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[D/2]` angle per position of each pair. In f32, as `transformers` rounds it.
    frequencies: Arc<[f32]>,
    pairs: RopePairs,
    /// Factor on the rotated numbers (the attention factor of YaRN and LongRoPE).
    scale: f64,
    /// Longest context.
    positions: usize,
    /// The last table that was brought to a device: all layers ask for the same.
    kept: Arc<Mutex<Option<Kept>>>,
}

/// A table on a device, and what it is of.
#[derive(Debug, Clone)]
struct Kept {
    offsets: Vec<usize>,
    len: usize,
    on: Device,
    /// `[B or 1, len, D/2]` each.
    table: [Tensor; 2],
}

impl Rope {
    /// Plain angles: `head_dim` is `D` (even), `theta` the base, `positions` the longest context.
    pub fn new(head_dim: usize, theta: f64, positions: usize) -> Self {
        Self::of_frequencies(&Self::plain(head_dim, theta), positions)
    }

    /// `theta^(-2i/D)`: `[D/2]`.
    pub fn plain(head_dim: usize, theta: f64) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32)
            .collect()
    }

    /// Given angles per position, `[D/2]`.
    pub fn of_frequencies(frequencies: &[f32], positions: usize) -> Self {
        Self {
            frequencies: frequencies.into(),
            pairs: RopePairs::Halves,
            scale: 1.0,
            positions,
            kept: Arc::default(),
        }
    }

    /// Whether all angles of the context, and the factor, are finite numbers.
    pub fn is_finite(&self) -> bool {
        let last = self.positions as f32;
        let mut angles = self.frequencies.iter().map(|&frequency| last * frequency);
        (self.scale as f32).is_finite() && angles.all(f32::is_finite)
    }

    /// With a factor on the rotated numbers.
    pub fn with_scale(self, scale: f64) -> Self {
        let kept = Arc::default();
        Self {
            scale,
            kept,
            ..self
        }
    }

    /// With other pairs.
    pub fn with_pairs(self, pairs: RopePairs) -> Self {
        Self { pairs, ..self }
    }

    /// Cosines and sines of `len` positions from `offset`: `[len, D/2]`, scaled. Made for each call:
    /// this costs little beside the attention, a table of a long context costs memory.
    fn table(&self, offset: usize, len: usize) -> Vec<(f64, f64)> {
        let scale = self.scale;
        (offset..offset + len)
            .into_par_iter()
            .flat_map_iter(|p| {
                self.frequencies.iter().map(move |&frequency| {
                    // `transformers` rounds the angle to f32.
                    let angle = p as f32 * frequency;
                    (
                        f64::from(angle.cos()) * scale,
                        f64::from(angle.sin()) * scale,
                    )
                })
            })
            .collect()
    }
}

struct ApplyRope {
    rope: Rope,
    /// Of all rows, or of each.
    offsets: Vec<usize>,
    /// `1.0` rotates, `-1.0` rotates back (the gradient of a rotation is its inverse).
    direction: f64,
}

impl ApplyRope {
    /// Checks that `x: [B, T, heads, D]` fits.
    fn check(&self, shape: &Shape) -> Result<()> {
        let (rows, len, _, dim) = shape.dims4()?;
        if ![1, rows].contains(&self.offsets.len()) {
            candle_core::bail!(
                "rope: {} offsets for {rows} rows; give one for all or one for each",
                self.offsets.len()
            )
        }
        let width = 2 * self.rope.frequencies.len();
        let last = self.offsets.iter().max().copied().unwrap_or(0);
        if dim == 0 || dim != width || last + len > self.rope.positions {
            candle_core::bail!(
                "rope: {len} tokens from position {last} of heads of {dim} do not fit a context of {} \
                 positions and head size {width}; shorten the input to the model's context",
                self.rope.positions,
            )
        }
        Ok(())
    }

    /// Cosines and sines of `len` positions of each row, `[B or 1, len, D/2]`.
    fn table(&self, len: usize) -> Vec<(f64, f64)> {
        let offsets = self.offsets.iter();
        offsets.flat_map(|&at| self.rope.table(at, len)).collect()
    }

    /// The same on a device, in f32.
    fn table_on(&self, len: usize, device: &Device) -> Result<[Tensor; 2]> {
        let mut kept = (self.rope.kept.lock()).unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = kept.as_ref()
            && kept.offsets == self.offsets
            && kept.len == len
            && kept.on.same_device(device)
        {
            return Ok(kept.table.clone());
        }
        let numbers = self.table(len).into_iter();
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            numbers.map(|(cos, sin)| (cos as f32, sin as f32)).unzip();
        let shape = (self.offsets.len(), len, self.rope.frequencies.len());
        let table = [
            Tensor::from_vec(cos, shape, device)?,
            Tensor::from_vec(sin, shape, device)?,
        ];
        *kept = Some(Kept {
            offsets: self.offsets.clone(),
            len,
            on: device.clone(),
            table: table.clone(),
        });
        Ok(table)
    }

    fn rotate<T: Real>(&self, x: &[T], (len, heads): (usize, usize)) -> Vec<T> {
        let half = self.rope.frequencies.len();
        let row = (heads * 2 * half).max(1);
        let table = self.table(len);
        let positions = self.offsets.len() * len;
        // The places of pair `j` in a head.
        let (step, apart) = match self.rope.pairs {
            RopePairs::Halves => (1, half),
            RopePairs::Adjacent => (2, 1),
        };
        let mut y = vec![T::zero(); x.len()];
        y.par_chunks_mut(row)
            .zip(x.par_chunks(row))
            .enumerate()
            .for_each(|(i, (y, x))| {
                let angles = &table[i % positions * half..][..half];
                for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                    for (j, &(cos, sin)) in angles.iter().enumerate() {
                        let (cos, sin) = (T::from_f64(cos), T::from_f64(sin * self.direction));
                        let (a, b) = (x[j * step], x[j * step + apart]);
                        y[j * step] = a * cos - b * sin;
                        y[j * step + apart] = b * cos + a * sin;
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
        let (_, len, heads, _) = layout.shape().dims4()?;
        let y = dispatch!(x.dtype(), self.name(), T => {
            storage(self.rotate::<T>(slice(x, layout)?, (len, heads)))
        });
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (_, len, heads, _) = x.dims4()?;
        let back = Self {
            rope: self.rope.clone(),
            offsets: self.offsets.clone(),
            direction: -self.direction,
        };
        let dy = dy.contiguous()?;
        let view = view(&dy);
        dispatch!(x.dtype(), self.name(), T => {
            Ok(Some(tensor(back.rotate::<T>(view.slice()?, (len, heads)), x.shape())?))
        })
    }
}

/// Rotates queries or keys `x: [B, T, heads, D]`; the first token of every row stands at the one position
/// in `offsets`, or that of each row at its own.
pub fn apply_rope(x: &Tensor, rope: &Rope, offsets: &[usize]) -> Result<Tensor> {
    let op = ApplyRope {
        rope: rope.clone(),
        offsets: offsets.to_vec(),
        direction: 1.0,
    };
    op.check(x.shape())?;
    if composed::is_for(x) {
        let table = op.table_on(x.dim(1)?, x.device())?;
        return composed::rotate(x, &table, rope.pairs);
    }
    x.contiguous()?.apply_op1(op)
}
