//! Attention of candle's tensors by kernels that hold no scores in memory.

use super::Result;
use super::compile::{ATTENTION, ATTENTION_BACKWARD, Source};
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::held::Held;
use super::made::{gpu_of, held, held_from, is_aligned, made};
use crate::attention::{Dims, Seen, has_whole_rows};
use candle_core::cuda::CudaDType;
use candle_core::{DType, Error, Result as Candle, Tensor};
use cudarc::driver::{CudaSlice, DeviceRepr, DeviceSlice};
use half::{bf16, f16};
use std::f64::consts::LOG2_E;
use std::sync::Arc;

/// Rows of a tile.
const TILE: usize = 64;
/// As far as the kernels count rows.
const MOST: usize = i32::MAX as usize;

/// `Seen` of attention.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SeenArgument {
    starts: Address,
    lengths: Address,
    batch: u32,
    queries: u32,
    keys: u32,
    heads: u32,
    kv_heads: u32,
    window: u32,
    scale: f32,
}

/// `Attend` of attention.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Attend {
    q: Address,
    k: Address,
    v: Address,
    out: Address,
    sums: Address,
    seen: SeenArgument,
    k_row: u64,
    v_row: u64,
}

/// `AttendBackward` of attention_backward.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct AttendBackward {
    q: Address,
    k: Address,
    v: Address,
    out: Address,
    dout: Address,
    sums: Address,
    delta: Address,
    dq: Address,
    dk: Address,
    dv: Address,
    seen: SeenArgument,
    scale: f32,
    width: u32,
}

arguments!(SeenArgument: 48, Attend: 104, AttendBackward: 136);

/// The sizes of an attention, and what its queries see.
pub(crate) struct Attention {
    gpu: Arc<Gpu>,
    dims: Dims,
    scale: f64,
    window: u32,
    /// As those of [`Seen`]; none: no row has padding.
    starts: Option<CudaSlice<u32>>,
    lengths: Option<CudaSlice<u32>>,
}

impl Attention {
    /// That of `q: [B, T, heads, D]` on `k` and `v: [B, S, kv_heads, D]`; nothing where the kernels cannot do
    /// it. `seen` is known to fit.
    pub(crate) fn new(
        q: &Tensor,
        [k, v]: [&Tensor; 2],
        scale: f64,
        seen: &Seen,
    ) -> Candle<Option<Self>> {
        let dims = Dims::new(q.shape(), k.shape(), v.shape())?;
        let alike = [k, v]
            .iter()
            .all(|t| t.dtype() == q.dtype() && t.device().same_device(q.device()));
        let rows = dims.batch * dims.heads;
        let fits = alike
            && matches!(dims.dim, 64 | 128 | 192)
            && rows * dims.queries > 0
            && rows * dims.keys <= MOST;
        let gpu = if fits { gpu_of(q)? } else { None };
        let Some(gpu) = gpu else { return Ok(None) };
        let numbers = |numbers: &[usize]| -> Candle<Option<CudaSlice<u32>>> {
            let numbers: Vec<u32> = numbers.iter().map(|&n| n as u32).collect();
            let some = (!numbers.is_empty()).then(|| gpu.upload(&numbers));
            some.transpose().map_err(Error::wrap)
        };
        let window = seen.window.and_then(|window| u32::try_from(window).ok());
        Ok(Some(Self {
            dims,
            scale,
            window: window.unwrap_or(u32::MAX),
            starts: numbers(&seen.starts)?,
            lengths: numbers(&seen.lengths)?,
            gpu,
        }))
    }

    /// The result `[B, T, heads, D]`, and what the way back needs of it if that is wanted: `[B, heads, T]`, f32.
    pub(crate) fn forward(
        &self,
        q: &Tensor,
        [k, v]: [&Tensor; 2],
        sums: bool,
    ) -> Candle<(Tensor, Option<Tensor>)> {
        match q.dtype() {
            DType::BF16 => self.forward_of::<bf16>(q, [k, v], sums),
            _ => self.forward_of::<f16>(q, [k, v], sums),
        }
    }

    /// The gradients of `q`, `k` and `v`, of the result's `dout`.
    pub(crate) fn backward(
        &self,
        inputs: [&Tensor; 3],
        out: &Tensor,
        sums: &Tensor,
        dout: &Tensor,
    ) -> Candle<[Tensor; 3]> {
        match dout.dtype() {
            DType::BF16 => self.backward_of::<bf16>(inputs, out, sums, dout),
            _ => self.backward_of::<f16>(inputs, out, sums, dout),
        }
    }

    fn seen(&self) -> SeenArgument {
        let address =
            |t: &Option<CudaSlice<u32>>| t.as_ref().map_or(Address::NULL, |t| self.gpu.address(t));
        SeenArgument {
            starts: address(&self.starts),
            lengths: address(&self.lengths),
            batch: self.dims.batch as u32,
            queries: self.dims.queries as u32,
            keys: self.dims.keys as u32,
            heads: self.dims.heads as u32,
            kv_heads: self.dims.kv_heads as u32,
            window: self.window,
            scale: (self.scale * LOG2_E) as f32,
        }
    }

    fn forward_of<T: Element + CudaDType>(
        &self,
        q: &Tensor,
        [k, v]: [&Tensor; 2],
        keeps: bool,
    ) -> Candle<(Tensor, Option<Tensor>)> {
        let gpu = &*self.gpu;
        let (of_q, (of_k, k_row), (of_v, v_row)) =
            (held::<T>(q)?, self.rows::<T>(k)?, self.rows::<T>(v)?);
        let pairs = self.dims.batch * self.dims.heads;
        let run = || -> Result<_> {
            let mut out = gpu.alloc::<T>(of_q.len())?;
            let mut sums = match keeps {
                true => Some(gpu.alloc::<f32>(pairs * self.dims.queries)?),
                false => None,
            };
            let argument = Attend {
                q: gpu.address(&of_q),
                k: gpu.address(&of_k),
                v: gpu.address(&of_v),
                out: gpu.address_mut(&mut out),
                sums: (sums.as_mut()).map_or(Address::NULL, |sums| gpu.address_mut(sums)),
                seen: self.seen(),
                k_row: k_row as u64,
                v_row: v_row as u64,
            };
            let (name, launch) = match (self.dims.queries, self.dims.dim) {
                (1, 64) => ("attend_one_64", one(pairs)),
                (1, 128) => ("attend_one_128", one(pairs)),
                (1, _) => ("attend_one_192", one(pairs)),
                (_, 64) => ("attend_64", self.tiles(self.dims.queries, pairs)),
                (_, 128) => ("attend_128", self.tiles(self.dims.queries, pairs)),
                // Half as many keys, and the queries beside them.
                _ => {
                    let launch = self.tiles(self.dims.queries, pairs);
                    let shared = 384 * self.dims.dim;
                    ("attend_192", Launch { shared, ..launch })
                }
            };
            queue::<T, _>(gpu, &ATTENTION, name, launch, &argument)?;
            Ok((out, sums))
        };
        let (out, sums) = run().map_err(Error::wrap)?;
        let sums = sums.map(|sums| {
            made(
                gpu,
                sums,
                (self.dims.batch, self.dims.heads, self.dims.queries),
                q,
            )
        });
        Ok((made(gpu, out, q.shape().clone(), q)?, sums.transpose()?))
    }

    fn backward_of<T: Element + CudaDType>(
        &self,
        [q, k, v]: [&Tensor; 3],
        out: &Tensor,
        sums: &Tensor,
        dout: &Tensor,
    ) -> Candle<[Tensor; 3]> {
        let gpu = &*self.gpu;
        let [of_q, of_k, of_v, of_out, of_dout] =
            [held::<T>(q)?, held(k)?, held(v)?, held(out)?, held(dout)?];
        let of_sums = held::<f32>(sums)?;
        let run = || -> Result<_> {
            let mut delta = gpu.alloc::<f32>(of_sums.len())?;
            let mut dq = gpu.alloc::<T>(of_q.len())?;
            let [mut dk, mut dv] = [gpu.alloc::<T>(of_k.len())?, gpu.alloc(of_v.len())?];
            let argument = AttendBackward {
                q: gpu.address(&of_q),
                k: gpu.address(&of_k),
                v: gpu.address(&of_v),
                out: gpu.address(&of_out),
                dout: gpu.address(&of_dout),
                sums: gpu.address(&of_sums),
                delta: gpu.address_mut(&mut delta),
                dq: gpu.address_mut(&mut dq),
                dk: gpu.address_mut(&mut dk),
                dv: gpu.address_mut(&mut dv),
                seen: self.seen(),
                scale: self.scale as f32,
                width: self.dims.dim as u32,
            };
            let queue =
                |name, launch| queue::<T, _>(gpu, &ATTENTION_BACKWARD, name, launch, &argument);
            let (pairs, kv_pairs) = (
                self.dims.batch * self.dims.heads,
                self.dims.batch * self.dims.kv_heads,
            );
            queue(
                "attend_delta",
                Launch {
                    grid: (pairs * self.dims.queries).div_ceil(4),
                    block: 128,
                    shared: 0,
                },
            )?;
            let keys = self.tiles(self.dims.keys, kv_pairs);
            // The sums and deltas of the queries of two stages.
            let keys = Launch {
                shared: keys.shared + 512,
                ..keys
            };
            let queries = self.tiles(self.dims.queries, pairs);
            match self.dims.dim {
                64 => {
                    queue("attend_keys_64", keys)?;
                    queue("attend_queries_64", queries)?;
                }
                128 => {
                    queue("attend_keys_128", keys)?;
                    queue("attend_queries_128", queries)?;
                }
                _ => {
                    // Keys and values have blocks of their own.
                    let grid = 2 * keys.grid;
                    queue("attend_keys_192", Launch { grid, ..keys })?;
                    queue("attend_queries_192", queries)?;
                }
            }
            Ok([dq, dk, dv])
        };
        let [dq, dk, dv] = run().map_err(Error::wrap)?;
        Ok([
            made(gpu, dq, q.shape().clone(), q)?,
            made(gpu, dk, k.shape().clone(), q)?,
            made(gpu, dv, v.shape().clone(), q)?,
        ])
    }

    /// A block for each tile of `rows` of each of `pairs`.
    fn tiles(&self, rows: usize, pairs: usize) -> Launch {
        Launch {
            grid: rows.div_ceil(TILE) * pairs,
            block: 128,
            shared: 512 * self.dims.dim,
        }
    }

    /// Keys or values, and how far apart rows of the batch are: where they lie if only these have gaps, as the
    /// first positions of a cache do.
    fn rows<T: Element + CudaDType>(&self, t: &Tensor) -> Candle<(Held<T>, usize)> {
        let row = self.dims.keys * self.dims.kv_heads * self.dims.dim;
        let apart = t.stride()[0];
        let in_place = has_whole_rows(t.layout()) && is_aligned(t) && apart.is_multiple_of(8);
        if !in_place || t.is_contiguous() {
            return Ok((held(t)?, row));
        }
        let len = (self.dims.batch - 1) * apart + row;
        Ok((held_from(t, len)?, apart))
    }
}

/// A block for each of `pairs`.
fn one(pairs: usize) -> Launch {
    Launch {
        grid: pairs,
        block: 256,
        shared: 0,
    }
}

fn queue<T: Element, A: DeviceRepr>(
    gpu: &Gpu,
    source: &Source,
    name: &'static str,
    launch: Launch,
    argument: &A,
) -> Result<()> {
    let kernel = gpu.kernel(source, T::KIND, name, launch.shared)?;
    // SAFETY: all operands have the sizes of the argument.
    unsafe { gpu.launch(&kernel, launch, argument, &[]) }
}
