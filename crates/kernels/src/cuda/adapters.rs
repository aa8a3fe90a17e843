//! What lies between the grouped products of adapted slots, and the sum that ends a layer.

use super::Result;
use super::block::Block;
use super::compile::ADAPTERS;
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::workspace::{Own, Workspace};
use cudarc::driver::{CudaSlice, DevicePtrMut, DeviceRepr};

/// Arguments of `adapters_expand`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Expand {
    low: Address,
    gate: Address,
    up: Address,
    base_gate: Address,
    base_up: Address,
    h: Address,
    pair_of_row: Address,
    starts: Address,
    own_gate: Address,
    own_up: Address,
    slots: u32,
    inner: u32,
    rank: u32,
    kept: u32,
    base_share: f32,
    own_share: f32,
}

/// Arguments of `adapters_expand_pre`: the `h` of `expand` takes the pre-activations of the gate.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ExpandPre {
    expand: Expand,
    pre_up: Address,
}

/// Arguments of `adapters_join`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Join {
    gate: Address,
    up: Address,
    base_gate: Address,
    base_up: Address,
    h: Address,
    pair_of_row: Address,
    starts: Address,
    slots: u32,
    inner: u32,
    base_share: f32,
}

/// Arguments of `adapters_sum_pairs`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SumPairs {
    h: Address,
    sum: Address,
    row_of: Address,
    pair_of: Address,
    pair_of_row: Address,
    gates: Address,
    tokens: u32,
    top_k: u32,
    inner: u32,
    share: f32,
}

/// Arguments of `combine`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Combine {
    y: Address,
    pair_y: Address,
    out: Address,
    row_of: Address,
    pair_of: Address,
    own_y: Address,
    own_from: Address,
    replaced_from: Address,
    tokens: u32,
    top_k: u32,
    hidden: u32,
    own_share: f32,
}

/// Arguments of `add_vectors`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct AddVectors {
    vectors: Address,
    vector_of: Address,
    chosen: Address,
    gates: Address,
    out: Address,
    tokens: u32,
    top_k: u32,
    hidden: u32,
}

arguments!(Expand: 104, ExpandPre: 112, Join: 72, SumPairs: 64, Combine: 80, AddVectors: 56);

/// `h` of adapted rows, from `low` and what the bases made of their pairs.
pub(super) fn expand<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    work: &mut Workspace<T>,
) -> Result<()> {
    let h = gpu.address_mut(&mut work.h);
    let arguments = expand_arguments(gpu, block, work, h);
    // SAFETY: the block and the workspace have these sizes; rows stay below the workspace's.
    unsafe { queue::<T, _>(gpu, "adapters_expand", expand_size(block), &arguments) }
}

/// The same from what wider adapters made of their rows, in the workspace's own memory for them.
pub(super) fn join<T: Element>(gpu: &Gpu, block: &Block<T>, work: &mut Workspace<T>) -> Result<()> {
    let shape = &block.frame.shape;
    let [gate, up] = of_own(gpu, work.own.as_ref());
    let [base_gate, base_up] = of_bases(gpu, block, work);
    let arguments = Join {
        gate,
        up,
        base_gate,
        base_up,
        h: gpu.address_mut(&mut work.h),
        pair_of_row: gpu.address(&work.tables.pair_of_row),
        starts: gpu.address(&work.tables.starts).skip::<u32>(shape.dense),
        slots: shape.adapted as u32,
        inner: shape.inner as u32,
        base_share: 1.0 - block.beta,
    };
    // SAFETY: as in `expand`.
    unsafe { queue::<T, _>(gpu, "adapters_join", [8, 256, 0], &arguments) }
}

/// The pre-activations of adapted rows instead, `[S, F]` each.
pub(super) fn expand_pre<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    work: &Workspace<T>,
    gate: &mut CudaSlice<T>,
    up: &mut CudaSlice<T>,
) -> Result<()> {
    let arguments = ExpandPre {
        expand: expand_arguments(gpu, block, work, gpu.address_mut(gate)),
        pre_up: gpu.address_mut(up),
    };
    // SAFETY: as in `expand`; the gradients have the size of `h`.
    unsafe { queue::<T, _>(gpu, "adapters_expand_pre", expand_size(block), &arguments) }
}

/// Blocks for each multiprocessor, threads, and shared memory.
fn expand_size<T>(block: &Block<T>) -> [usize; 3] {
    // Two stages, each with U of a tile in parts of 32 ranks, and the rows of every warp.
    let parts = block.frame.shape.rank.div_ceil(32);
    let warps = if parts == 1 { 8 } else { 4 };
    let shared = 32 * (512 * parts + warps * (256 + 128 * parts));
    [if parts <= 2 { 2 } else { 1 }, 32 * warps, shared]
}

/// Pre-activations of rows; nothing without.
fn of_own<T: Element>(gpu: &Gpu, own: Option<&Own<T>>) -> [Address; 2] {
    own.map_or([Address::NULL; 2], |own| {
        [gpu.address(&own.gate), gpu.address(&own.up)]
    })
}

/// What bases made of pairs; nothing without bases.
fn of_bases<T: Element>(gpu: &Gpu, block: &Block<T>, work: &Workspace<T>) -> [Address; 2] {
    match block.frame.shape.groups {
        0 => [Address::NULL; 2],
        _ => [gpu.address(&work.pre_gate), gpu.address(&work.pre_up)],
    }
}

fn expand_arguments<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    work: &Workspace<T>,
    h: Address,
) -> Expand {
    let shape = &block.frame.shape;
    let weights = &block.weights.adapters.b;
    let own = work.own.as_ref().filter(|_| block.has_own());
    let [own_gate, own_up] = of_own(gpu, own);
    let [base_gate, base_up] = of_bases(gpu, block, work);
    Expand {
        low: gpu.address(&work.low),
        gate: gpu.address(&weights.gate),
        up: gpu.address(&weights.up),
        base_gate,
        base_up,
        h,
        pair_of_row: gpu.address(&work.tables.pair_of_row),
        starts: gpu.address(&work.tables.starts).skip::<u32>(shape.dense),
        own_gate,
        own_up,
        slots: shape.adapted as u32,
        kept: shape.kept as u32,
        inner: shape.inner as u32,
        rank: shape.rank as u32,
        base_share: 1.0 - block.beta,
        own_share: block.beta,
    }
}

/// `Σ g·h` of every pair, times the base's share.
pub(super) fn sum_pairs<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    tokens: usize,
    work: &mut Workspace<T>,
) -> Result<()> {
    let arguments = SumPairs {
        h: gpu.address(&work.h),
        sum: gpu.address_mut(&mut work.pair_h),
        row_of: gpu.address(&work.tables.row_of),
        pair_of: gpu.address(&work.tables.pair_of),
        pair_of_row: gpu.address(&work.tables.pair_of_row),
        gates: gpu.address(&work.tables.gates),
        tokens: tokens as u32,
        top_k: block.frame.shape.top_k as u32,
        inner: block.frame.shape.inner as u32,
        share: 1.0 - block.beta,
    };
    // SAFETY: as in `expand`.
    unsafe { queue::<T, _>(gpu, "adapters_sum_pairs", [8, 256, 0], &arguments) }
}

/// `out[t]`, the sum of its rows and pairs.
pub(super) fn combine<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    tokens: usize,
    work: &Workspace<T>,
    out: &mut impl DevicePtrMut<T>,
) -> Result<()> {
    let based = block.frame.shape.groups > 0;
    let own = work.own.as_ref().filter(|_| block.has_own());
    let starts = gpu.address(&work.tables.starts);
    let arguments = Combine {
        y: gpu.address(&work.y),
        pair_y: if based {
            gpu.address(&work.pair_y)
        } else {
            Address::NULL
        },
        out: gpu.address_mut(out),
        row_of: gpu.address(&work.tables.row_of),
        pair_of: gpu.address(&work.tables.pair_of),
        own_y: own.map_or(Address::NULL, |own| gpu.address(&own.y)),
        own_from: starts.skip::<u32>(block.frame.shape.dense),
        replaced_from: starts.skip::<u32>(block.frame.shape.dense + block.frame.shape.kept),
        tokens: tokens as u32,
        top_k: block.frame.shape.top_k as u32,
        hidden: block.frame.shape.hidden as u32,
        own_share: block.beta,
    };
    // SAFETY: as in `expand`; the block checked the size of `out`.
    unsafe { queue::<T, _>(gpu, "combine", [4, 256, 0], &arguments) }
}

/// Adds to `out[t]` the vectors of its positions, where the layer has any.
pub(super) fn add_vectors<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    tokens: usize,
    work: &Workspace<T>,
    out: &mut impl DevicePtrMut<T>,
) -> Result<()> {
    let Some(vectors) = &block.vectors else {
        return Ok(());
    };
    let arguments = AddVectors {
        vectors: gpu.address(&vectors.numbers),
        vector_of: gpu.address(&vectors.of_position),
        chosen: gpu.address(&work.tables.chosen),
        gates: gpu.address(&work.tables.gates),
        out: gpu.address_mut(out),
        tokens: tokens as u32,
        top_k: block.frame.shape.top_k as u32,
        hidden: block.frame.shape.hidden as u32,
    };
    // SAFETY: as in `combine`; every position has a vector that is there, or none.
    unsafe { queue::<T, _>(gpu, "add_vectors", [4, 256, 0], &arguments) }
}

/// `blocks` for each multiprocessor.
///
/// # Safety
/// As [`Gpu::launch`].
unsafe fn queue<T: Element, A: DeviceRepr>(
    gpu: &Gpu,
    name: &'static str,
    [blocks, block, shared]: [usize; 3],
    arguments: &A,
) -> Result<()> {
    let kernel = gpu.kernel(&ADAPTERS, T::KIND, name, shared)?;
    let grid = blocks * gpu.multiprocessors();
    let launch = Launch {
        grid,
        block,
        shared,
    };
    // SAFETY: the caller's promise.
    unsafe { gpu.launch(&kernel, launch, arguments, &[]) }
}
