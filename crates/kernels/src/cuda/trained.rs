//! Whole layers that train, on candle's tensors and stream.

mod gradients;
mod packed;

use super::block::{Adapted, Frame, Shape, Weights};
use super::device::{Element, Gpu};
use super::held::Held;
use super::made::{aligned, held, made};
use super::route::choose;
use super::whole;
use crate::composed::given_many;
use crate::whole::LayerParts;
use candle_core::cuda::CudaDType;
use candle_core::{DType, Error, Result, Tensor};
use cudarc::driver::CudaSlice;
use half::{bf16, f16};
use std::sync::Arc;

const NAME: &str = "layer of experts that trains";

/// Gate, up and down.
type Three = [Tensor; 3];

/// A layer of either type.
#[derive(Debug)]
pub(crate) enum TrainedOnGpu {
    Bf16(Arc<Layer<bf16>>),
    F16(Arc<Layer<f16>>),
}

/// A layer whose parameters change.
#[derive(Debug)]
pub(crate) struct Layer<T> {
    gpu: Arc<Gpu>,
    frame: Frame,
    /// The share of the replaced experts.
    beta: f32,
    /// Those that are as kernels take them.
    weights: Weights<T>,
    /// Those that are not, because they train: they are packed whenever the layer runs.
    dense: Option<Three>,
    bases: Option<Three>,
    /// `V` and `U` of the kept experts.
    kept: Option<[Three; 2]>,
    replaced: Option<Replaced>,
}

/// What a layer ran with.
#[derive(Debug)]
struct Run<T> {
    x: Held<T>,
    gates: Held<f32>,
    chosen: Held<u32>,
}

/// Adapters of replaced experts.
#[derive(Debug)]
struct Replaced {
    /// `V` and `Uᵀ`.
    factors: [Three; 2],
    starts: Arc<[usize]>,
    on_gpu: CudaSlice<u32>,
}

impl TrainedOnGpu {
    /// As [`crate::TrainedLayer::new`].
    pub(crate) fn new(parts: &LayerParts<'_>) -> Result<Option<Self>> {
        // Those of ranks of their own have no gradients, nor do vectors.
        let has_gradients = |shape: &Shape| shape.ranked.is_none() && parts.vectors.is_none();
        let shape = whole::shape(parts)?.filter(has_gradients);
        let (Some(shape), Some(dtype)) = (shape, dtype(parts)) else {
            return Ok(None);
        };
        check(parts, &shape)?;
        let Some(gpu) = whole::gpu(parts.router)? else {
            return Ok(None);
        };
        Ok(Some(match dtype {
            DType::BF16 => Self::Bf16(Arc::new(Layer::new(gpu, shape, parts, dtype)?)),
            _ => Self::F16(Arc::new(Layer::new(gpu, shape, parts, dtype)?)),
        }))
    }

    /// Of rows.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::Bf16(_) => DType::BF16,
            Self::F16(_) => DType::F16,
        }
    }

    /// As [`crate::TrainedLayer::choose`].
    pub(crate) fn choose(&self, logits: &Tensor) -> Result<Tensor> {
        match self {
            Self::Bf16(layer) => layer.choose(logits),
            Self::F16(layer) => layer.choose(logits),
        }
    }

    /// As [`crate::TrainedLayer::forward`].
    pub(crate) fn forward(&self, x: &Tensor, gates: &Tensor, chosen: &Tensor) -> Result<Tensor> {
        match self {
            Self::Bf16(layer) => layer.forward(x, gates, chosen),
            Self::F16(layer) => layer.forward(x, gates, chosen),
        }
    }

    /// As [`crate::TrainedLayer::pull`].
    pub(crate) fn pull(
        &self,
        x: &Tensor,
        gates: &Tensor,
        chosen: &Tensor,
        dy: &Tensor,
    ) -> Result<Tensor> {
        match self {
            Self::Bf16(layer) => layer.pull(x, gates, chosen, dy),
            Self::F16(layer) => layer.pull(x, gates, chosen, dy),
        }
    }
}

/// Stops where a stack has not the shape that the kernels will read.
fn check(parts: &LayerParts<'_>, shape: &Shape) -> Result<()> {
    let (h, f) = (shape.hidden, shape.inner);
    let fit = |what: &str, of: Option<[&Tensor; 3]>, expected: [[usize; 2]; 3], n: usize| {
        for (w, [rows, columns]) in of.into_iter().flatten().zip(expected) {
            if w.dims() != [n, rows, columns] {
                let is = w.dims();
                candle_core::bail!("{NAME}: {what} {is:?}; [{n}, {rows}, {columns}] was expected")
            }
        }
        Ok(())
    };
    let whole = [[f, h], [f, h], [h, f]];
    let replaced = shape.adapted - shape.kept;
    fit("experts", parts.dense, whole, shape.dense + shape.kept)?;
    fit("bases", parts.bases, whole, shape.groups)?;
    fit("replaced experts", parts.originals, whole, replaced)?;
    if let Some([a, b]) = parts.kept {
        let r = a[0].dim(1)?;
        fit(
            "V of kept experts",
            Some(a),
            [[r, h], [r, h], [r, f]],
            shape.kept,
        )?;
        fit(
            "U of kept experts",
            Some(b),
            [[f, r], [f, r], [h, r]],
            shape.kept,
        )?;
    }
    let Some(adapters) = &parts.adapters else {
        return Ok(());
    };
    let starts = adapters.starts;
    let components = starts.last().copied().unwrap_or(0);
    let of_slots = starts.len() == replaced + 1 && starts.is_sorted();
    for (of, widths) in [(adapters.a, [h, h, f]), (adapters.b, [f, f, h])] {
        for (w, width) in of.into_iter().zip(widths) {
            if !of_slots || w.dims() != [components, width] {
                candle_core::bail!(
                    "{NAME}: adapters {:?} of {replaced} slots that begin at {starts:?}; [{components}, {width}] was \
                     expected",
                    w.dims()
                )
            }
        }
    }
    Ok(())
}

fn three(of: [&Tensor; 3]) -> Three {
    of.map(Tensor::clone)
}

/// What is as it stays.
fn still(of: Option<[&Tensor; 3]>) -> Option<[&Tensor; 3]> {
    of.filter(|of| !of[0].track_op())
}

/// What has to be packed, as it trains.
fn packed(of: Option<[&Tensor; 3]>) -> Option<Three> {
    of.filter(|of| of[0].track_op()).map(three)
}

/// The 16-bit type of what does not train, if all of it has one: what trains is f32, or of that type. Of each
/// three matrices all train, or none, and whole experts beside adapters stay as they are.
fn dtype(parts: &LayerParts<'_>) -> Option<DType> {
    let alike = |of: [&Tensor; 3]| of.iter().all(|w| w.track_op() == of[0].track_op());
    let beside = parts.dense.filter(|_| parts.kept.is_some());
    let mut beside = beside.into_iter().chain(parts.originals);
    if !parts.stacks().all(alike) || beside.any(|of| of[0].track_op()) {
        return None;
    }
    let all: Vec<&Tensor> = parts.stacks().flatten().collect();
    let narrow = all.iter().map(|w| w.dtype());
    let mut narrow = narrow.chain([parts.router.dtype()]);
    let dtype = narrow.find(|&dtype| dtype != DType::F32)?;
    let fits = |w: &&Tensor| {
        let place = w.device().same_device(parts.router.device());
        place && (w.dtype() == dtype || w.track_op() && w.dtype() == DType::F32)
    };
    (matches!(dtype, DType::BF16 | DType::F16) && all.iter().all(fits)).then_some(dtype)
}

impl<T: Element + CudaDType> Layer<T> {
    fn new(gpu: Arc<Gpu>, shape: Shape, parts: &LayerParts<'_>, dtype: DType) -> Result<Self> {
        let stacks = |of| whole::stacks::<T>(&gpu, of);
        let (dense, kept) = match parts.kept {
            Some(_) => (None, parts.dense),
            None => (parts.dense, None),
        };
        let weights = Weights {
            router: held(&parts.router.detach().to_dtype(dtype)?)?,
            dense: stacks(still(dense))?,
            kept: stacks(kept)?,
            bases: stacks(still(parts.bases))?,
            adapters: Adapted {
                a: stacks(None)?,
                b: stacks(None)?,
            },
            originals: parts.originals.map(|of| stacks(Some(of))).transpose()?,
        };
        let replaced = parts.adapters.as_ref().map(|adapters| {
            let starts: Vec<u32> = adapters.starts.iter().map(|&at| at as u32).collect();
            Ok::<_, Error>(Replaced {
                factors: [three(adapters.a), three(adapters.b)],
                starts: adapters.starts.into(),
                on_gpu: gpu.upload(&starts).map_err(Error::wrap)?,
            })
        });
        Ok(Self {
            frame: whole::frame(&gpu, shape, parts)?,
            beta: parts.beta as f32,
            weights,
            dense: packed(dense),
            bases: packed(parts.bases),
            kept: parts.kept.map(|of| of.map(three)),
            replaced: replaced.transpose()?,
            gpu,
        })
    }

    fn choose(&self, logits: &Tensor) -> Result<Tensor> {
        let (tokens, _) = logits.dims2()?;
        let numbers = held::<f32>(&logits.detach().to_dtype(DType::F32)?)?;
        let chosen = choose::<T>(&self.gpu, &self.frame, &numbers, tokens);
        let (chosen, _) = chosen.map_err(Error::wrap)?;
        made(&self.gpu, chosen, (tokens, self.frame.shape.top_k), logits)
    }

    fn forward(self: &Arc<Self>, x: &Tensor, gates: &Tensor, chosen: &Tensor) -> Result<Tensor> {
        let (run, block) = (self.run(x, gates, chosen)?, self.packed()?);
        let (gpu, shape) = (&*self.gpu, self.frame.shape);
        let tokens = x.dim(0)?;
        let value = gpu.filled(tokens * shape.hidden, |out| {
            gpu.with_workspace(&block, tokens, |work| {
                block.route_given(gpu, &run.chosen, &run.gates, tokens, work)?;
                block.forward_routed(gpu, &run.x, tokens, work, out, &mut |_| Ok(()))
            })
        });
        let value = made(gpu, value.map_err(Error::wrap)?, (tokens, shape.hidden), x)?;
        self.with_gradients([x, gates], value, move |layer, dy| {
            layer.gradients(&run, dy)
        })
    }

    fn pull(
        self: &Arc<Self>,
        x: &Tensor,
        gates: &Tensor,
        chosen: &Tensor,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let (run, dy) = (self.run(x, gates, chosen)?, aligned(&dy.detach())?);
        let value = Tensor::zeros(1, DType::F32, x.device())?;
        self.with_gradients([x, gates], value, move |layer, of_sum| {
            let dy = dy.broadcast_mul(&of_sum.to_dtype(dy.dtype())?)?;
            layer.gradients(&run, &dy)
        })
    }

    fn run(&self, x: &Tensor, gates: &Tensor, chosen: &Tensor) -> Result<Run<T>> {
        Ok(Run {
            x: held(&x.detach())?,
            gates: held(&gates.detach().to_dtype(DType::F32)?)?,
            chosen: held(chosen)?,
        })
    }

    /// A result of the layer with the gradients of `x` and gates, and of what trains.
    fn with_gradients(
        self: &Arc<Self>,
        [x, gates]: [&Tensor; 2],
        value: Tensor,
        gradients: impl Fn(&Self, &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let trained = self.trained();
        let inputs: Vec<&Tensor> = [x, gates].into_iter().chain(&trained).collect();
        let (layer, gates_type) = (self.clone(), gates.dtype());
        given_many(NAME, &inputs, value, move |dy| {
            let mut all = gradients(&layer, dy)?;
            all[1] = all[1].to_dtype(gates_type)?;
            Ok(all)
        })
    }

    /// What trains, in the order of gradients.
    fn trained(&self) -> Vec<Tensor> {
        let whole = self.dense.iter().chain(&self.bases);
        let replaced = self.replaced.iter().map(|of| &of.factors);
        let adapters = self.kept.iter().chain(replaced).flatten();
        let trains = |of: &&Three| of[0].track_op();
        whole
            .chain(adapters)
            .filter(trains)
            .flatten()
            .cloned()
            .collect()
    }
}
