//! The gated activation of every expert here: `h = silu(gate) · up`, fused, with its backward.

use crate::composed;
use crate::lanes::simd;
use crate::real::{Real, dispatch, same_dtype, slice, storage, tracked, view};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

const CHUNK: usize = 1 << 14;

struct SwiGlu;

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).fast_exp())
}

simd! {
    fn forward_chunk<T: Real>(h: &mut [T], gate: &[T], up: &[T]) {
        for ((h, &g), &u) in h.iter_mut().zip(gate).zip(up) {
            *h = g * sigmoid(g) * u;
        }
    }
}

simd! {
    fn backward_chunk<T: Real>(dg: &mut [T], du: &mut [T], gate: &[T], up: &[T], dh: &[T]) {
        let outputs = dg.iter_mut().zip(du);
        for ((dg, du), ((&g, &u), &dh)) in outputs.zip(gate.iter().zip(up).zip(dh)) {
            let s = sigmoid(g);
            *du = dh * g * s;
            *dg = dh * u * s * (T::one() + g * (T::one() - s));
        }
    }
}

simd! {
    fn silu_chunk<T: Real>(x: &mut [T], slope: &mut [T]) {
        for (x, slope) in x.iter_mut().zip(slope) {
            let s = sigmoid(*x);
            *x *= s;
            // silu' = σ + silu · (1 − σ)
            *slope = s + *x * (T::one() - s);
        }
    }
}

/// Puts `silu(x)` in place of each `x` and its derivative there into `slope`, for gradients that are written
/// out; on the calling thread.
pub fn silu_with_slope(x: &mut [f32], slope: &mut [f32]) {
    silu_chunk(x, slope);
}

fn forward<T: Real>(gate: &[T], up: &[T]) -> Vec<T> {
    let mut h = vec![T::zero(); gate.len()];
    h.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)))
        .for_each(|(h, (g, u))| forward_chunk(h, g, u));
    h
}

fn backward<T: Real>(gate: &[T], up: &[T], dh: &[T]) -> (Vec<T>, Vec<T>) {
    let (mut dg, mut du) = (vec![T::zero(); gate.len()], vec![T::zero(); up.len()]);
    dg.par_chunks_mut(CHUNK)
        .zip(du.par_chunks_mut(CHUNK))
        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)))
        .zip(dh.par_chunks(CHUNK))
        .for_each(|(((dg, du), (g, u)), dh)| backward_chunk(dg, du, g, u, dh));
    (dg, du)
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        lg: &Layout,
        up: &CpuStorage,
        lu: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        same_dtype(self.name(), gate.dtype(), up.dtype())?;
        if lg.shape() != lu.shape() {
            candle_core::bail!(
                "swiglu: gate is {:?} but up is {:?}",
                lg.shape(),
                lu.shape()
            )
        }
        let h = dispatch!(gate.dtype(), self.name(), T => {
            storage(forward::<T>(slice(gate, lg)?, slice(up, lu)?))
        });
        Ok((h, lg.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _res: &Tensor,
        dh: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dh = dh.contiguous()?;
        let (vg, vu, vd) = (view(gate), view(up), view(&dh));
        dispatch!(gate.dtype(), self.name(), T => {
            let (dg, du) = backward::<T>(vg.slice()?, vu.slice()?, vd.slice()?);
            Ok((tracked(gate, dg)?, tracked(up, du)?))
        })
    }
}

/// `silu(gate) · up`, element by element; any shape, equal for both.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if composed::is_for(gate) {
        return composed::swiglu(gate, up);
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu)
}
