//! One fused AdamW update (Loshchilov & Hutter, decoupled weight decay) of one parameter.

use crate::composed;
use crate::lanes::simd;
use crate::real::{Real, slice};
use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;
use std::sync::Mutex;

const CHUNK: usize = 1 << 13;

/// First and second moments of one parameter, in f32: the running means of its gradient and of its square.
/// They lie where the parameter does, from the first update on; before that they are zero.
#[derive(Debug, Clone, Default)]
pub struct Moments {
    /// On the host; empty before the first update.
    first: Vec<f32>,
    second: Vec<f32>,
    /// Elsewhere, in the shape of the parameter.
    away: Option<[Tensor; 2]>,
}

impl Moments {
    /// Known ones, of as many elements as the parameter has.
    pub fn new(first: Vec<f32>, second: Vec<f32>) -> Self {
        Self {
            first,
            second,
            away: None,
        }
    }

    /// Both, of a parameter of `count` elements.
    pub fn values(&self, count: usize) -> Result<[Vec<f32>; 2]> {
        if let Some([first, second]) = &self.away {
            let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
            return Ok([values(first)?, values(second)?]);
        }
        let values = |known: &Vec<f32>| {
            let mut values = known.clone();
            values.resize(count, 0.0);
            values
        };
        Ok([values(&self.first), values(&self.second)])
    }

    /// Checks that those on the host, if there are any, are of a parameter of `count` elements.
    fn check(&self, count: usize) -> Result<()> {
        let lengths = [self.first.len(), self.second.len()];
        if lengths != [0; 2] && lengths != [count; 2] {
            let [first, second] = lengths;
            candle_core::bail!(
                "adamw: moments of {first} and {second} elements do not fit a parameter of {count}"
            )
        }
        Ok(())
    }

    /// Those beside a parameter that is not on the host, or copies there: those of the host stay until an update
    /// has succeeded, since there may be no room.
    fn away(&self, parameter: &Tensor) -> Result<[Tensor; 2]> {
        if let Some(away) = &self.away {
            if away[0].shape() != parameter.shape() {
                candle_core::bail!(
                    "adamw: moments of {:?} do not fit a parameter of {:?}",
                    away[0].shape(),
                    parameter.shape()
                )
            }
            return Ok(away.clone());
        }
        let count = parameter.elem_count();
        self.check(count)?;
        let [first, second] = self.values(count)?;
        let tensor = |values| Tensor::from_vec(values, parameter.shape(), parameter.device());
        Ok([tensor(first)?, tensor(second)?])
    }
}

/// The settings of one update.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// 1-based number of the step, for the bias correction.
    pub step: usize,
    /// Factor on the gradient (gradient clipping).
    pub grad_scale: f64,
}

struct Update<'a> {
    settings: AdamW,
    moments: Mutex<&'a mut Moments>,
}

simd! {
    fn update_chunk<T: Real>(state: [&mut [T]; 3], grad: &[T], constants: [T; 7]) {
        let [b1, b2, eps, step_size, root, keep, scale] = constants;
        let (c1, c2) = (T::one() - b1, T::one() - b2);
        let [p, m, v] = state;
        for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(grad) {
            let g = g * scale;
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * g * g;
            *p = keep * *p - step_size * *m / (v.sqrt() * root + eps);
        }
    }
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, lp: &Layout, g: &CpuStorage, lg: &Layout) -> Result<()> {
        let s = &self.settings;
        let grad = slice::<f32>(g, lg)?;
        let (CpuStorage::F32(param), Some((start, end))) = (p, lp.contiguous_offsets()) else {
            candle_core::bail!("adamw: a contiguous f32 parameter was expected")
        };
        let param = &mut param[start..end];
        let Ok(mut moments) = self.moments.lock() else {
            candle_core::bail!("adamw: the moments are poisoned")
        };
        let moments = &mut **moments;
        moments.check(param.len())?;
        moments.first.resize(param.len(), 0.0);
        moments.second.resize(param.len(), 0.0);
        let correction = |beta: f64| 1.0 - beta.powi(s.step as i32);
        let step_size = (s.lr / correction(s.beta1)) as f32;
        let root = (1.0 / correction(s.beta2).sqrt()) as f32;
        let (b1, b2, eps) = (s.beta1 as f32, s.beta2 as f32, s.eps as f32);
        let (keep, scale) = ((1.0 - s.lr * s.weight_decay) as f32, s.grad_scale as f32);
        param
            .par_chunks_mut(CHUNK)
            .zip(grad.par_chunks(CHUNK))
            .zip(
                moments
                    .first
                    .par_chunks_mut(CHUNK)
                    .zip(moments.second.par_chunks_mut(CHUNK)),
            )
            .for_each(|((p, g), (m, v))| {
                update_chunk([p, m, v], g, [b1, b2, eps, step_size, root, keep, scale]);
            });
        Ok(())
    }
}

impl AdamW {
    /// Updates `parameter` and its `moments` in place; parameter and gradient are f32 of one shape.
    pub fn update(&self, parameter: &Tensor, grad: &Tensor, moments: &mut Moments) -> Result<()> {
        if parameter.shape() != grad.shape() {
            candle_core::bail!(
                "adamw: parameter is {:?} but its gradient is {:?}",
                parameter.shape(),
                grad.shape()
            )
        }
        if self.step == 0 {
            candle_core::bail!("adamw: the first step is number 1")
        }
        if composed::is_for(parameter) {
            let [first, second] = moments.away(parameter)?;
            let [new, first, second] = composed::adamw(self, parameter, grad, [&first, &second])?;
            parameter.slice_set(&new.contiguous()?, 0, 0)?;
            *moments = Moments {
                away: Some([first, second]),
                ..Moments::default()
            };
            return Ok(());
        }
        let update = Update {
            settings: *self,
            moments: Mutex::new(moments),
        };
        parameter.inplace_op2(&grad.contiguous()?, &update)
    }
}
