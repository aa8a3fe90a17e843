//! What lies between the products of a model, on candle's tensors of 16-bit floats: sums back to tokens,
//! activations, norms.

use super::Result;
use super::compile::TOKENS;
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::held::Held;
use super::made::{held, made};
use crate::Dispatch;
use candle_core::cuda::CudaDType;
use candle_core::{DType, Error, Result as Candle, Tensor};
use cudarc::driver::{CudaSlice, DeviceRepr};
use half::{bf16, f16};

/// `SumRows` of tokens.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SumRows {
    rows: Address,
    weights: Address,
    out: Address,
    starts: Address,
    index: Address,
    outputs: u32,
    width: u32,
}

/// `SpreadRows` of tokens.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SpreadRows {
    dout: Address,
    rows: Address,
    weights: Address,
    targets: Address,
    d_rows: Address,
    d_weights: Address,
    count: u32,
    width: u32,
}

/// `Swiglu` of tokens.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Swiglu {
    gate: Address,
    up: Address,
    dh: Address,
    h: Address,
    d_up: Address,
    pieces: u64,
}

/// `NormGradient` of tokens.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct NormGradient {
    x: Address,
    weight: Address,
    dy: Address,
    dx: Address,
    width: u32,
    eps: f32,
}

/// `Entropy` of tokens.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Entropy {
    logits: Address,
    targets: Address,
    sums: Address,
    losses: Address,
    dlosses: Address,
    dlogits: Address,
    width: u32,
}

arguments!(SumRows: 48, SpreadRows: 56, Swiglu: 48, NormGradient: 40, Entropy: 56);

impl Entropy {
    /// That of logits and targets; what goes which way is still to be named.
    fn of(gpu: &Gpu, logits: &Held<f32>, targets: &CudaSlice<u32>, width: usize) -> Self {
        Self {
            logits: gpu.address(logits),
            targets: gpu.address(targets),
            sums: Address::NULL,
            losses: Address::NULL,
            dlosses: Address::NULL,
            dlogits: Address::NULL,
            width: width as u32,
        }
    }
}

/// `run` for the 16-bit type of a tensor.
macro_rules! of_type {
    ($tensor:expr, $run:ident($($argument:expr),*)) => {
        match $tensor.dtype() {
            DType::BF16 => $run::<bf16>($($argument),*),
            _ => $run::<f16>($($argument),*),
        }
    };
}

/// `y[targets[s]] = Σ weights[s] · rows[s]`, by ascending `s`: rows `[S, W]`, weights `[S]` of f32 or none, result
/// `[outputs, W]`. Widths are multiples of 8.
pub(crate) fn sum_rows(
    gpu: &Gpu,
    rows: &Tensor,
    weights: Option<&Tensor>,
    targets: &[u32],
    outputs: usize,
) -> Candle<Tensor> {
    of_type!(rows, sum_rows_of(gpu, rows, weights, targets, outputs))
}

fn sum_rows_of<T: Element + CudaDType>(
    gpu: &Gpu,
    rows: &Tensor,
    weights: Option<&Tensor>,
    targets: &[u32],
    outputs: usize,
) -> Candle<Tensor> {
    let width = rows.dim(1)?;
    let of_rows = held::<T>(rows)?;
    let of_weights = weights.map(held::<f32>).transpose()?;
    let identity: Vec<usize> = (0..outputs).collect();
    let sorted = Dispatch::new(targets, 1, &identity, outputs);
    let starts: Vec<u32> = sorted.starts.iter().map(|&start| start as u32).collect();
    let run = || -> Result<_> {
        let mut out = gpu.alloc::<T>(outputs * width)?;
        let (starts, index) = (gpu.upload(&starts)?, gpu.upload(&sorted.pairs)?);
        let argument = SumRows {
            rows: gpu.address(&of_rows),
            weights: (of_weights.as_ref()).map_or(Address::NULL, |w| gpu.address(w)),
            out: gpu.address_mut(&mut out),
            starts: gpu.address(&starts),
            index: gpu.address(&index),
            outputs: outputs as u32,
            width: width as u32,
        };
        queue::<T, _>(gpu, "sum_rows", outputs, &argument)?;
        Ok(out)
    };
    made(gpu, run().map_err(Error::wrap)?, (outputs, width), rows)
}

/// The gradients of [`sum_rows`], those that are wanted: of the rows, `weights[s] · dout[targets[s]]`, and of the
/// weights, f32.
pub(crate) fn spread_rows(
    gpu: &Gpu,
    dout: &Tensor,
    rows: &Tensor,
    weights: &Tensor,
    targets: &[u32],
    wanted: [bool; 2],
) -> Candle<[Option<Tensor>; 2]> {
    of_type!(
        dout,
        spread_rows_of(gpu, dout, rows, weights, targets, wanted)
    )
}

fn spread_rows_of<T: Element + CudaDType>(
    gpu: &Gpu,
    dout: &Tensor,
    rows: &Tensor,
    weights: &Tensor,
    targets: &[u32],
    wanted: [bool; 2],
) -> Candle<[Option<Tensor>; 2]> {
    let (count, width) = rows.dims2()?;
    let (of_dout, of_rows, of_weights) =
        (held::<T>(dout)?, held::<T>(rows)?, held::<f32>(weights)?);
    let run = || -> Result<_> {
        let targets = gpu.upload(targets)?;
        let d_rows = wanted[0].then(|| gpu.alloc::<T>(count * width));
        let d_weights = wanted[1].then(|| gpu.alloc::<f32>(count));
        let (mut d_rows, mut d_weights) = (d_rows.transpose()?, d_weights.transpose()?);
        let argument = SpreadRows {
            dout: gpu.address(&of_dout),
            rows: gpu.address(&of_rows),
            weights: gpu.address(&of_weights),
            targets: gpu.address(&targets),
            d_rows: (d_rows.as_mut()).map_or(Address::NULL, |d| gpu.address_mut(d)),
            d_weights: (d_weights.as_mut()).map_or(Address::NULL, |d| gpu.address_mut(d)),
            count: count as u32,
            width: width as u32,
        };
        queue::<T, _>(gpu, "spread_rows", count.div_ceil(8), &argument)?;
        Ok((d_rows, d_weights))
    };
    let (d_rows, d_weights) = run().map_err(Error::wrap)?;
    let d_rows = d_rows.map(|d| made(gpu, d, (count, width), rows));
    let d_weights = d_weights.map(|d| made(gpu, d, count, rows));
    Ok([d_rows.transpose()?, d_weights.transpose()?])
}

/// `silu(gate) · up`, of a multiple of 8 numbers.
pub(crate) fn swiglu(gpu: &Gpu, gate: &Tensor, up: &Tensor) -> Candle<Tensor> {
    let [h, _] = of_type!(gate, swiglu_of(gpu, gate, up, None))?;
    h.ok_or_else(|| Error::msg("swiglu: no result"))
}

/// The gradients of `gate` and `up`.
pub(crate) fn swiglu_gradients(
    gpu: &Gpu,
    gate: &Tensor,
    up: &Tensor,
    dh: &Tensor,
) -> Candle<[Option<Tensor>; 2]> {
    of_type!(gate, swiglu_of(gpu, gate, up, Some(dh)))
}

fn swiglu_of<T: Element + CudaDType>(
    gpu: &Gpu,
    gate: &Tensor,
    up: &Tensor,
    dh: Option<&Tensor>,
) -> Candle<[Option<Tensor>; 2]> {
    let count = gate.elem_count();
    let (of_gate, of_up) = (held::<T>(gate)?, held::<T>(up)?);
    let of_dh = dh.map(held::<T>).transpose()?;
    let run = || -> Result<_> {
        let mut h = gpu.alloc::<T>(count)?;
        let d_up = of_dh.is_some().then(|| gpu.alloc::<T>(count));
        let mut d_up = d_up.transpose()?;
        let argument = Swiglu {
            gate: gpu.address(&of_gate),
            up: gpu.address(&of_up),
            dh: (of_dh.as_ref()).map_or(Address::NULL, |dh| gpu.address(dh)),
            h: gpu.address_mut(&mut h),
            d_up: (d_up.as_mut()).map_or(Address::NULL, |d| gpu.address_mut(d)),
            pieces: (count / 8) as u64,
        };
        queue::<T, _>(gpu, "swiglu", (count / 8).div_ceil(256), &argument)?;
        Ok((h, d_up))
    };
    let (h, d_up) = run().map_err(Error::wrap)?;
    let d_up = d_up.map(|d| made(gpu, d, gate.shape().clone(), gate));
    Ok([
        Some(made(gpu, h, gate.shape().clone(), gate)?),
        d_up.transpose()?,
    ])
}

/// The gradient of the inputs of an RMS norm over rows of a multiple of 8 numbers.
pub(crate) fn norm_gradient(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    eps: f64,
) -> Candle<Tensor> {
    of_type!(x, norm_gradient_of(gpu, x, weight, dy, eps))
}

fn norm_gradient_of<T: Element + CudaDType>(
    gpu: &Gpu,
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    eps: f64,
) -> Candle<Tensor> {
    let width = weight.elem_count();
    let [of_x, of_weight, of_dy] = [held::<T>(x)?, held(weight)?, held(dy)?];
    let run = || -> Result<_> {
        let mut dx = gpu.alloc::<T>(x.elem_count())?;
        let argument = NormGradient {
            x: gpu.address(&of_x),
            weight: gpu.address(&of_weight),
            dy: gpu.address(&of_dy),
            dx: gpu.address_mut(&mut dx),
            width: width as u32,
            eps: eps as f32,
        };
        queue::<T, _>(gpu, "norm_gradient", x.elem_count() / width, &argument)?;
        Ok(dx)
    };
    made(gpu, run().map_err(Error::wrap)?, x.shape().clone(), x)
}

/// The cross entropy of each row of `logits: [rows, W]`, f32, with its target, `[rows]`, and the logarithm of the sum of
/// its exponentials, which the way back needs.
pub(crate) fn cross_entropy(gpu: &Gpu, logits: &Tensor, targets: &[u32]) -> Candle<[Tensor; 2]> {
    let (rows, width) = logits.dims2()?;
    let of_logits = held::<f32>(logits)?;
    let run = || -> Result<_> {
        let targets = gpu.upload(targets)?;
        let (mut losses, mut sums) = (gpu.alloc::<f32>(rows)?, gpu.alloc::<f32>(rows)?);
        let argument = Entropy {
            sums: gpu.address_mut(&mut sums),
            losses: gpu.address_mut(&mut losses),
            ..Entropy::of(gpu, &of_logits, &targets, width)
        };
        queue::<bf16, _>(gpu, "cross_entropy", rows, &argument)?;
        Ok((losses, sums))
    };
    let (losses, sums) = run().map_err(Error::wrap)?;
    Ok([
        made(gpu, losses, rows, logits)?,
        made(gpu, sums, rows, logits)?,
    ])
}

/// The gradient of `logits`.
pub(crate) fn cross_entropy_gradient(
    gpu: &Gpu,
    logits: &Tensor,
    targets: &[u32],
    sums: &Tensor,
    dlosses: &Tensor,
) -> Candle<Tensor> {
    let (rows, width) = logits.dims2()?;
    let [of_logits, of_sums, of_dlosses] = [held::<f32>(logits)?, held(sums)?, held(dlosses)?];
    let run = || -> Result<_> {
        let targets = gpu.upload(targets)?;
        let mut dlogits = gpu.alloc::<f32>(rows * width)?;
        let argument = Entropy {
            sums: gpu.address(&of_sums),
            dlosses: gpu.address(&of_dlosses),
            dlogits: gpu.address_mut(&mut dlogits),
            ..Entropy::of(gpu, &of_logits, &targets, width)
        };
        queue::<bf16, _>(gpu, "cross_entropy", rows, &argument)?;
        Ok(dlogits)
    };
    made(gpu, run().map_err(Error::wrap)?, (rows, width), logits)
}

/// `grid` blocks of 256 threads.
fn queue<T: Element, A: DeviceRepr>(
    gpu: &Gpu,
    name: &'static str,
    grid: usize,
    argument: &A,
) -> Result<()> {
    let kernel = gpu.kernel(&TOKENS, T::KIND, name, 0)?;
    let launch = Launch {
        grid,
        block: 256,
        shared: 0,
    };
    // SAFETY: all operands have the sizes of the argument.
    unsafe { gpu.launch(&kernel, launch, argument, &[]) }
}
