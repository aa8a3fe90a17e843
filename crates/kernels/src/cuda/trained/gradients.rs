//! The gradients of a layer, as the tensors that its inputs and parameters are.

use super::super::block::Projections;
use super::super::device::Element;
use super::super::gradients::{Gradients, Trained};
use super::super::made::{held, made};
use super::{Layer, Run, Three};
use crate::padded::without_padding;
use candle_core::cuda::CudaDType;
use candle_core::{Error, Result, Tensor};
use cudarc::driver::CudaSlice;

impl<T: Element + CudaDType> Layer<T> {
    /// The gradients of `x`, of the gates, and of what trains.
    pub(super) fn gradients(&self, run: &Run<T>, dy: &Tensor) -> Result<Vec<Tensor>> {
        // Packed once more: kept from the forward pass it would be a second copy of all that trains.
        let (gpu, block, shape) = (&*self.gpu, self.packed()?, self.frame.shape);
        let (tokens, _) = dy.dims2()?;
        let dout = held::<T>(dy)?;
        let adapters = [
            self.kept.as_ref(),
            self.replaced.as_ref().map(|of| &of.factors),
        ];
        let [of_kept, of_replaced] = adapters.map(|of| self.trains(of));
        let trained = Trained {
            dense: self.dense.is_some(),
            bases: self.bases.is_some(),
            adapters: of_kept.iter().chain(&of_replaced).any(|&trains| trains),
        };
        let gradients = gpu.with_workspace(&block, tokens, |work| {
            let mut gradients = Gradients::new(gpu, shape, tokens, trained)?;
            block.route_given(gpu, &run.chosen, &run.gates, tokens, work)?;
            block.backward(gpu, &run.x, &dout, tokens, trained, work, &mut gradients)?;
            Ok(gradients)
        });
        let Gradients {
            x,
            gates,
            dense,
            bases,
            adapters,
            ..
        } = gradients.map_err(Error::wrap)?;
        let [h, f, rank] = [shape.hidden, shape.inner, shape.rank];
        let mut all = vec![
            made(gpu, x, (tokens, h), dy)?,
            made(gpu, gates, tokens * shape.top_k, dy)?,
        ];
        let stacks =
            |of: Projections<CudaSlice<f32>>, n: usize, up: [usize; 2], down: [usize; 2]| {
                let one = |w, [rows, columns]: [usize; 2]| made(gpu, w, (n, rows, columns), dy);
                Ok::<_, Error>([one(of.gate, up)?, one(of.up, up)?, one(of.down, down)?])
            };
        for (parameters, of, n) in [
            (&self.dense, dense, shape.dense),
            (&self.bases, bases, shape.groups),
        ] {
            if parameters.is_some() {
                all.extend(stacks(of, n, [f, h], [h, f])?);
            }
        }
        if trained.adapters {
            let (n, kept) = (shape.adapted, shape.kept);
            let a = stacks(adapters.a, n, [rank, h], [rank, f])?;
            let b = stacks(adapters.b, n, [f, rank], [h, rank])?;
            if let Some(factors) = &self.kept {
                for (i, part) in a.iter().enumerate().filter(|_| of_kept[0]) {
                    all.push(
                        part.narrow(0, 0, kept)?
                            .narrow(1, 0, factors[0][i].dim(1)?)?,
                    );
                }
                for (i, part) in b.iter().enumerate().filter(|_| of_kept[1]) {
                    all.push(
                        part.narrow(0, 0, kept)?
                            .narrow(2, 0, factors[1][i].dim(2)?)?,
                    );
                }
            }
            if let Some(of) = &self.replaced {
                let rows = |part: &Tensor| {
                    let width = part.dim(2)?;
                    let rows = part.reshape(((n - kept) * rank, width))?;
                    without_padding(&rows, &of.starts, rank)
                };
                for part in a.iter().filter(|_| of_replaced[0]) {
                    all.push(rows(&part.narrow(0, kept, n - kept)?)?);
                }
                for part in b.iter().filter(|_| of_replaced[1]) {
                    all.push(rows(&part.narrow(0, kept, n - kept)?.transpose(1, 2)?)?);
                }
            }
        }
        let types = self.trained();
        for (gradient, parameter) in all[2..].iter_mut().zip(types) {
            *gradient = gradient.to_dtype(parameter.dtype())?;
        }
        Ok(all)
    }

    fn trains(&self, factors: Option<&[Three; 2]>) -> [bool; 2] {
        let trains = |i: usize| factors.is_some_and(|of| of[i][0].track_op());
        [trains(0), trains(1)]
    }
}
