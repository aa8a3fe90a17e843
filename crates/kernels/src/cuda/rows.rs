//! What the backward pass does by rows, between its grouped products.

use super::Result;
use super::block::Block;
use super::compile::ROWS;
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::workspace::Workspace;
use cudarc::driver::{CudaSlice, DeviceRepr};

/// Arguments of `swiglu_backward`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SwigluBackward {
    gate: Address,
    up: Address,
    dh: Address,
    pair_dh: Address,
    own_dh: Address,
    pair_of_row: Address,
    row_of: Address,
    gates: Address,
    h: Address,
    d_gate: Address,
    d_up: Address,
    d_gates: Address,
    own_from: Address,
    replaced_from: Address,
    choices: u32,
    inner: u32,
    base_share: f32,
    own_share: f32,
}

/// Arguments of `sum_pairs_two`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SumPairsTwo {
    x0: Address,
    x1: Address,
    sum0: Address,
    sum1: Address,
    row_of: Address,
    pair_of: Address,
    pair_of_row: Address,
    tokens: u32,
    top_k: u32,
    inner: u32,
    share: f32,
}

arguments!(SwigluBackward: 128, SumPairsTwo: 72);

/// What swiglu_backward takes beside the workspace: pre-activations, which become their gradients, the
/// gradients of gates, and what bases and whole experts gave back.
pub(super) struct Activations<'a, T> {
    pub(super) gate: &'a mut CudaSlice<T>,
    pub(super) up: &'a mut CudaSlice<T>,
    pub(super) gates: &'a mut CudaSlice<f32>,
    pub(super) pair_dh: Option<&'a CudaSlice<T>>,
    pub(super) own_dh: Option<&'a CudaSlice<T>>,
}

/// In place: the gradient of `h` in `work.h` becomes `h` again.
pub(super) fn swiglu_backward<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    tokens: usize,
    work: &mut Workspace<T>,
    of: Activations<'_, T>,
) -> Result<()> {
    let (gate, up, h) = (
        gpu.address_mut(of.gate),
        gpu.address_mut(of.up),
        gpu.address_mut(&mut work.h),
    );
    let or_null = |t: Option<&CudaSlice<T>>| t.map_or(Address::NULL, |t| gpu.address(t));
    let starts = gpu.address(&work.tables.starts);
    let arguments = SwigluBackward {
        gate,
        up,
        dh: h,
        pair_dh: or_null(of.pair_dh),
        own_dh: or_null(of.own_dh),
        pair_of_row: gpu.address(&work.tables.pair_of_row),
        row_of: gpu.address(&work.tables.row_of),
        gates: gpu.address(&work.tables.gates),
        h,
        d_gate: gate,
        d_up: up,
        d_gates: gpu.address_mut(of.gates),
        own_from: starts.skip::<u32>(block.frame.shape.dense),
        replaced_from: starts.skip::<u32>(block.frame.shape.dense + block.frame.shape.kept),
        choices: block.frame.shape.rows(tokens) as u32,
        inner: block.frame.shape.inner as u32,
        base_share: 1.0 - block.beta,
        own_share: block.beta,
    };
    // SAFETY: all have the sizes of the block and the workspace.
    unsafe { queue::<T, _>(gpu, "swiglu_backward", 5, &arguments) }
}

/// The sums of two matrices of rows over the rows of each pair, times the base's share.
pub(super) fn sum_pairs_two<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    tokens: usize,
    work: &Workspace<T>,
    (x0, x1): (&CudaSlice<T>, &CudaSlice<T>),
    (sum0, sum1): (&mut CudaSlice<T>, &mut CudaSlice<T>),
) -> Result<()> {
    let arguments = SumPairsTwo {
        x0: gpu.address(x0),
        x1: gpu.address(x1),
        sum0: gpu.address_mut(sum0),
        sum1: gpu.address_mut(sum1),
        row_of: gpu.address(&work.tables.row_of),
        pair_of: gpu.address(&work.tables.pair_of),
        pair_of_row: gpu.address(&work.tables.pair_of_row),
        tokens: tokens as u32,
        top_k: block.frame.shape.top_k as u32,
        inner: block.frame.shape.inner as u32,
        share: 1.0 - block.beta,
    };
    // SAFETY: as in `swiglu_backward`.
    unsafe { queue::<T, _>(gpu, "sum_pairs_two", 6, &arguments) }
}

/// `blocks` for each multiprocessor.
///
/// # Safety
/// As [`Gpu::launch`].
unsafe fn queue<T: Element, A: DeviceRepr>(
    gpu: &Gpu,
    name: &'static str,
    blocks: usize,
    arguments: &A,
) -> Result<()> {
    let kernel = gpu.kernel(&ROWS, T::KIND, name, 0)?;
    let launch = Launch {
        grid: blocks * gpu.multiprocessors(),
        block: 256,
        shared: 0,
    };
    // SAFETY: the caller's promise.
    unsafe { gpu.launch(&kernel, launch, arguments, &[]) }
}
