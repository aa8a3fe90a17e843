//! A layer with its parameters as they are when it runs.

use super::super::block::{Adapted, Block, Projections, Weights};
use super::super::device::{Element, Gpu};
use super::super::held::Held;
use super::super::made::held;
use super::super::pack::{From, Job, Source, pack};
use super::Layer;
use candle_core::cuda::CudaDType;
use candle_core::{DType, Error, Result, Tensor};
use std::any::Any;
use std::marker::PhantomData;

impl<T: Element + CudaDType> Layer<T> {
    /// The layer with its parameters as they are now.
    pub(super) fn packed(&self) -> Result<Block<T>> {
        let gpu = &*self.gpu;
        let shape = self.frame.shape;
        let [h, f, rank] = [shape.hidden, shape.inner, shape.rank];
        let mut weights: Weights<T> = self.weights.clone();
        let mut packing = Packing::<T> {
            gpu,
            jobs: Vec::new(),
            sources: Vec::new(),
            element: PhantomData,
        };
        let widths = [(f, h), (f, h), (h, f)];
        for (from, to) in [
            (&self.dense, &mut weights.dense),
            (&self.bases, &mut weights.bases),
        ] {
            let Some(from) = from else { continue };
            *to = packing.three(|packing, i| {
                let (rows, width) = widths[i];
                let n = from[i].dim(0)?;
                let (source, to) = (packing.source(&from[i])?, gpu.alloc(n * rows * width));
                let mut to = to.map_err(Error::wrap)?;
                let at = gpu.address_mut(&mut to);
                let sizes = [n, rows, width];
                packing
                    .jobs
                    .push(Job::rows(source, Source::Rows(rows), at, sizes));
                Ok(to.into())
            })?;
        }
        if shape.adapted > 0 {
            let n = shape.adapted;
            let mut stack = |factor: usize| {
                packing.three(|packing, i| {
                    let (rows, columns) = widths[i];
                    let width = if factor == 0 { columns } else { rows };
                    let mut to = gpu.alloc::<T>(n * rank * width).map_err(Error::wrap)?;
                    let at = gpu.address_mut(&mut to);
                    let behind = at.skip::<T>(shape.kept * rank * width);
                    let job = if factor == 0 { Job::rows } else { Job::columns };
                    if let Some(kept) = &self.kept {
                        let (from, own) = (&kept[factor][i], kept[0][i].dim(1)?);
                        let source = match factor {
                            0 => Source::Rows(own),
                            _ => Source::Columns(own),
                        };
                        let from = packing.source(from)?;
                        packing
                            .jobs
                            .push(job(from, source, at, [shape.kept, rank, width]));
                    }
                    let (from, source) = match &self.replaced {
                        Some(of) => (
                            packing.source(&of.factors[factor][i])?,
                            Source::Ranked(gpu.address(&of.on_gpu)),
                        ),
                        None => (From::Zeros, Source::Rows(rank)),
                    };
                    let sizes = [n - shape.kept, rank, width];
                    packing.jobs.push(job(from, source, behind, sizes));
                    Ok(to.into())
                })
            };
            weights.adapters = Adapted {
                a: stack(0)?,
                b: stack(1)?,
            };
        }
        // SAFETY: tensors and stacks have these sizes, which the layer was made of and the block checks.
        unsafe { pack::<T>(gpu, &packing.jobs) }.map_err(Error::wrap)?;
        let block = self.frame.with(weights).and_then(|mut block| {
            block.anneal(self.beta)?;
            Ok(block)
        });
        block.map_err(Error::wrap)
    }
}

/// What is packed in one launch.
struct Packing<'a, T> {
    gpu: &'a Gpu,
    jobs: Vec<Job>,
    /// The sources, which must be there until the launch is queued.
    sources: Vec<Box<dyn Any>>,
    element: PhantomData<T>,
}

impl<T: Element + CudaDType> Packing<'_, T> {
    fn source(&mut self, tensor: &Tensor) -> Result<From> {
        let tensor = tensor.detach();
        let (kept, from): (Box<dyn Any>, From) = match tensor.dtype() {
            DType::F32 => {
                let numbers = held::<f32>(&tensor)?;
                let at = self.gpu.address(&numbers);
                (Box::new(numbers), From::Wide(at))
            }
            _ => {
                let numbers = held::<T>(&tensor)?;
                let at = self.gpu.address(&numbers);
                (Box::new(numbers), From::Narrow(at))
            }
        };
        self.sources.push(kept);
        Ok(from)
    }

    fn three(
        &mut self,
        mut one: impl FnMut(&mut Self, usize) -> Result<Held<T>>,
    ) -> Result<Projections<Held<T>>> {
        Ok(Projections {
            gate: one(self, 0)?,
            up: one(self, 1)?,
            down: one(self, 2)?,
        })
    }
}
