//! Token-wise cross entropy with a backward that never stores the log-probabilities.

use crate::composed;
use crate::lanes::{max, simd, sum};
use crate::real::{Real, dispatch, slice, storage, tensor, view};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

struct CrossEntropy {
    targets: Arc<[u32]>,
}

simd! {
    fn log_sum_exp<T: Real>(row: &[T]) -> T {
        let top = max(row);
        top + sum(row, |v| (v - top).fast_exp()).ln()
    }
}

simd! {
    /// `d = g · softmax(row)`
    fn scaled_softmax<T: Real>(d: &mut [T], row: &[T], g: T) {
        let top = max(row);
        for (d, &v) in d.iter_mut().zip(row) {
            *d = (v - top).fast_exp();
        }
        let scale = g / sum(d, |v| v);
        d.iter_mut().for_each(|d| *d *= scale);
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let (rows, vocab) = layout.shape().dims2()?;
        let loss = dispatch!(logits.dtype(), self.name(), T => {
            let loss: Vec<T> = slice::<T>(logits, layout)?
                .par_chunks(vocab.max(1))
                .zip(&self.targets[..])
                .map(|(row, &target)| log_sum_exp(row) - row[target as usize])
                .collect();
            storage(loss)
        });
        Ok((loss, Shape::from(rows)))
    }

    fn bwd(&self, logits: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (vocab, shape) = (logits.dim(1)?, logits.shape());
        let grad = grad.contiguous()?;
        let (vl, vg) = (view(logits), view(&grad));
        dispatch!(logits.dtype(), self.name(), T => {
            let (logits, grad) = (vl.slice::<T>()?, vg.slice::<T>()?);
            let mut d = vec![<T as num_traits::Zero>::zero(); logits.len()];
            d.par_chunks_mut(vocab.max(1))
                .zip(logits.par_chunks(vocab.max(1)))
                .zip(grad.par_iter().zip(&self.targets[..]))
                .for_each(|((d, row), (&g, &target))| {
                    scaled_softmax(d, row, g);
                    d[target as usize] -= g;
                });
            Ok(Some(tensor(d, shape)?))
        })
    }
}

/// Negative log-likelihood in nats of each target: `logits: [T, V]`, `targets: [T]`, result `[T]`.
pub fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let (rows, vocab) = logits.dims2()?;
    if rows != targets.len() || targets.iter().any(|&t| t as usize >= vocab) {
        candle_core::bail!(
            "cross_entropy: {} targets do not fit logits [{rows}, {vocab}]",
            targets.len()
        )
    }
    if composed::is_for(logits) {
        return composed::cross_entropy(logits, targets);
    }
    logits.contiguous()?.apply_op1(CrossEntropy {
        targets: targets.into(),
    })
}
