//! Whole layers on candle's tensors, queued on candle's own stream.

use super::Result;
use super::block::{Adapted, Block, Frame, Projections, Shape, Weights};
use super::device::{Element, Gpu, lock};
use super::held::Held;
use super::made::held;
use super::route::Scores;
use super::tensors::{numbers, stored};
use super::workspace::Workspace;
use crate::padded::{PIECE, common_rank, in_pieces, padded, whole_pieces};
use crate::whole::{AdapterParts, LayerParts};
use candle_core::cuda::CudaDType;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Error, Layout, Result as Candle,
    Shape as Dims, Tensor,
};
use half::{bf16, f16};
use std::sync::Arc;

const NAME: &str = "layer of experts";
/// Tokens at once, so that what lies between the kernels stays small beside a model.
const TOKENS: usize = 8192;
/// The widest adapters that the kernels take where all have one rank.
const RANK: usize = 128;

/// A layer on candle's stream.
#[derive(Debug)]
pub(crate) struct OnGpu {
    gpu: Arc<Gpu>,
    block: Typed,
}

#[derive(Debug)]
enum Typed {
    Bf16(Block<bf16>),
    F16(Block<f16>),
}

/// The sizes of a layer, if the kernels take them.
pub(super) fn shape(parts: &LayerParts<'_>) -> Candle<Option<Shape>> {
    let (experts, hidden) = parts.router.dims2()?;
    let sizes = |of: Option<[&Tensor; 3]>| -> Candle<(usize, usize)> {
        Ok(match of {
            Some([gate, ..]) => (gate.dim(0)?, gate.dim(1)?),
            None => (0, 0),
        })
    };
    let ((whole, inner), (bases, of_bases)) = (sizes(parts.dense)?, sizes(parts.bases)?);
    let of_adapters = match &parts.adapters {
        Some(adapters) => adapters.b[0].dim(1)?,
        None => 0,
    };
    let (kept, own_rank) = match &parts.kept {
        Some([[gate, ..], _]) => (whole, gate.dim(1)?),
        None => (0, 0),
    };
    let starts = parts.adapters.as_ref().map_or(&[0][..], |a| a.starts);
    let rank = common_rank(starts).max(own_rank.next_multiple_of(PIECE));
    let shape = Shape {
        hidden,
        inner: inner.max(of_bases).max(of_adapters),
        experts,
        top_k: parts.top_k,
        dense: whole - kept,
        adapted: kept + parts.groups.len(),
        kept,
        groups: bases,
        rank,
        // So wide they are not filled up.
        ranked: (rank > RANK).then(|| whole_pieces(starts).last().copied().unwrap_or(0)),
    };
    Ok(shape.check().is_ok().then_some(shape))
}

/// The GPU that a tensor is on, if kernels run on it.
pub(super) fn gpu(of: &Tensor) -> Candle<Option<Arc<Gpu>>> {
    match of.device() {
        Device::Cuda(device) => Gpu::of(device).map_err(Error::wrap),
        _ => Ok(None),
    }
}

/// The layer but for its weights.
pub(super) fn frame(gpu: &Gpu, shape: Shape, parts: &LayerParts<'_>) -> Candle<Frame> {
    let correction = parts.correction.map(|c| c.to_dtype(DType::F32)?.to_vec1());
    let correction: Option<Vec<f32>> = correction.transpose()?;
    let scores = Scores::new(gpu, parts.choice, parts.position, correction.as_deref());
    let kept = std::iter::repeat_n(None, shape.kept);
    let groups: Vec<_> = kept.chain(parts.groups.iter().copied()).collect();
    let frame = scores.and_then(|scores| Frame::new(gpu, shape, scores, &groups));
    let frame = frame.and_then(|frame| match (&parts.adapters, shape.ranked) {
        (Some(adapters), Some(_)) => frame.ranked(gpu, &whole_pieces(adapters.starts)),
        _ => Ok(frame),
    });
    frame.map_err(Error::wrap)
}

/// Stacks as they are; nothing for none.
pub(super) fn stacks<T: Element + CudaDType>(
    gpu: &Gpu,
    of: Option<[&Tensor; 3]>,
) -> Candle<Projections<Held<T>>> {
    let one = |w: Option<&Tensor>| match w {
        Some(w) => held(&w.detach()),
        None => Ok(gpu.alloc(0).map_err(Error::wrap)?.into()),
    };
    let [gate, up, down] = of.map_or([None; 3], |of| of.map(Some));
    Ok(Projections {
        gate: one(gate)?,
        up: one(up)?,
        down: one(down)?,
    })
}

impl OnGpu {
    /// As [`crate::WholeLayer::new`].
    pub(crate) fn new(parts: &LayerParts<'_>) -> Candle<Option<Self>> {
        let (Some(shape), Some(dtype)) = (shape(parts)?, dtype(parts)) else {
            return Ok(None);
        };
        let Some(gpu) = gpu(parts.router)? else {
            return Ok(None);
        };
        let exact = parts.router.to_dtype(dtype)?;
        let rounded = parts.router.ne(&exact.to_dtype(parts.router.dtype())?)?;
        if rounded
            .to_dtype(DType::F32)?
            .sum_all()?
            .to_scalar::<f32>()?
            > 0.0
        {
            return Ok(None);
        }
        let block = match dtype {
            DType::BF16 => Typed::Bf16(block(&gpu, shape, parts, &exact)?),
            _ => Typed::F16(block(&gpu, shape, parts, &exact)?),
        };
        Ok(Some(Self { gpu, block }))
    }

    /// Of rows and matrices.
    pub(crate) fn dtype(&self) -> DType {
        match self.block {
            Typed::Bf16(_) => DType::BF16,
            Typed::F16(_) => DType::F16,
        }
    }
}

/// The 16-bit type that all matrices have, if they have one, and nothing trains.
fn dtype(parts: &LayerParts<'_>) -> Option<DType> {
    if parts.kept.is_some() || parts.originals.is_some() {
        return None;
    }
    let vectors = parts.vectors.map(|(vectors, _)| vectors);
    let stacks: Vec<&Tensor> = parts.stacks().flatten().chain(vectors).collect();
    let dtype = stacks.first()?.dtype();
    let same = stacks.iter().all(|t| t.dtype() == dtype);
    let mut all = stacks
        .iter()
        .copied()
        .chain([parts.router])
        .chain(parts.correction);
    let still = all.all(|t| !t.track_op() && t.device().same_device(parts.router.device()));
    (same && still && matches!(dtype, DType::BF16 | DType::F16)).then_some(dtype)
}

fn block<T: Element + CudaDType>(
    gpu: &Arc<Gpu>,
    shape: Shape,
    parts: &LayerParts<'_>,
    router: &Tensor,
) -> Candle<Block<T>> {
    let weights = Weights {
        router: held(router)?,
        dense: stacks(gpu, parts.dense)?,
        kept: stacks(gpu, None)?,
        bases: stacks(gpu, parts.bases)?,
        adapters: match (&parts.adapters, shape.adapted) {
            (_, 0) => Adapted {
                a: stacks(gpu, None)?,
                b: stacks(gpu, None)?,
            },
            (adapters, _) => adapted(gpu, shape, adapters.as_ref(), router)?,
        },
        originals: None,
    };
    let block = frame(gpu, shape, parts)?.with(weights);
    let block = match parts.vectors {
        Some((vectors, of_position)) => {
            let vectors = held(&vectors.detach())?;
            block.and_then(|block| block.with_vectors(gpu, vectors, of_position))
        }
        None => block,
    };
    block.map_err(Error::wrap)
}

/// Adapters as the kernels take them, all of one rank or each of its own; zeros where there are none.
fn adapted<T: Element + CudaDType>(
    gpu: &Gpu,
    shape: Shape,
    adapters: Option<&AdapterParts<'_>>,
    like: &Tensor,
) -> Candle<Adapted<Held<T>>> {
    let (n, rank) = (shape.adapted, shape.rank);
    if let (Some(_), Some(adapters)) = (shape.ranked, adapters) {
        let whole = |of: [&Tensor; 3]| -> Candle<Projections<Held<T>>> {
            let [gate, up, down] = of.map(|stack| in_pieces(stack, adapters.starts));
            stacks(gpu, Some([&gate?, &up?, &down?]))
        };
        return Ok(Adapted {
            a: whole(adapters.a)?,
            b: whole(adapters.b)?,
        });
    }
    let stack = |of: Option<&Tensor>, width: usize| -> Candle<Tensor> {
        let all = match (of, adapters) {
            (Some(stack), Some(adapters)) => padded(stack, adapters.starts, rank)?,
            _ => Tensor::zeros((n * rank, width), like.dtype(), like.device())?,
        };
        all.reshape((n, rank, width))
    };
    let [h, f] = [shape.hidden, shape.inner];
    let a = |i: usize, width| held(&stack(adapters.map(|of| of.a[i]), width)?);
    let b = |i: usize, width| {
        let stack = stack(adapters.map(|of| of.b[i]), width)?;
        held(&stack.transpose(1, 2)?.contiguous()?)
    };
    Ok(Adapted {
        a: Projections {
            gate: a(0, h)?,
            up: a(1, h)?,
            down: a(2, f)?,
        },
        b: Projections {
            gate: b(0, f)?,
            up: b(1, f)?,
            down: b(2, h)?,
        },
    })
}

impl OnGpu {
    fn queue<T: Element + CudaDType>(
        &self,
        block: &Block<T>,
        storage: &CudaStorage,
        layout: &Layout,
    ) -> Candle<(CudaStorage, Dims)> {
        let (tokens, width) = layout.shape().dims2()?;
        let hidden = block.shape().hidden;
        if width != hidden {
            candle_core::bail!("{NAME}: rows of {width} for a hidden size of {hidden}")
        }
        let x = numbers::<T>((storage, layout), tokens * hidden)?;
        let gpu = &*self.gpu;
        let out = gpu.filled(tokens * hidden, |out| {
            (0..tokens).step_by(TOKENS).try_for_each(|first| {
                let count = TOKENS.min(tokens - first);
                let part = first * hidden..(first + count) * hidden;
                let x = x.slice(part.clone());
                let y = &mut out.slice_mut(part);
                gpu.with_workspace(block, count, |work| block.forward(gpu, &x, count, work, y))
            })
        });
        stored(out, (tokens, hidden), storage.device.clone())
    }
}

impl CustomOp1 for OnGpu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Candle<(CpuStorage, Dims)> {
        candle_core::bail!("{NAME}: its input is not on the GPU")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Candle<(CudaStorage, Dims)> {
        match &self.block {
            Typed::Bf16(block) => self.queue(block, x, layout),
            Typed::F16(block) => self.queue(block, x, layout),
        }
    }
}

impl Gpu {
    /// Runs `work` with memory for `tokens` of a layer. It is kept for the next call, and grows: layers run one after the
    /// other. After an error it is not: a launch that was queued may have left blocks counted that the missing one would
    /// have cleared.
    pub(super) fn with_workspace<T: Element, R>(
        &self,
        block: &Block<T>,
        tokens: usize,
        work: impl FnOnce(&mut Workspace<T>) -> Result<R>,
    ) -> Result<R> {
        let (shape, needs_own) = (block.shape(), block.needs_own());
        let mut kept = lock(&self.workspaces);
        let place = kept.entry(T::KIND).or_default();
        let old = place
            .take()
            .and_then(|old| old.downcast::<Workspace<T>>().ok());
        let mut mine = match old {
            Some(old) if old.fits(shape, tokens) && (old.own.is_some() || !needs_own) => old,
            old => {
                let needs_own = needs_own || old.as_ref().is_some_and(|old| old.own.is_some());
                let tokens = tokens.next_power_of_two();
                let (shape, tokens) = match &old {
                    Some(old) => old.larger(shape, tokens),
                    None => (*shape, tokens),
                };
                drop(old);
                Box::new(match needs_own {
                    true => Workspace::annealed(self, shape, tokens)?,
                    false => Workspace::new(self, shape, tokens)?,
                })
            }
        };
        let done = work(&mut mine)?;
        *place = Some(mine);
        Ok(done)
    }
}
