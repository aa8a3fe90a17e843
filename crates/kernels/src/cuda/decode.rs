//! Few tokens through a whole layer in three launches: the weights' bytes are the bound, and what little
//! else there is must not wait for the host.

use super::block::Block;
use super::compile::DECODE;
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::held::Held;
use super::route::{ScoresArgument, TablesArgument};
use super::workspace::Workspace;
use super::{Result, ensure};
use cudarc::driver::{DevicePtr, DevicePtrMut};

/// The most tokens that [`forward`] takes.
pub(super) const DECODE_TOKENS: usize = 32;
/// Parts into which the router's sums can be divided.
pub(super) const SPLITS: usize = 4;
/// Bytes of one matrix's weights that a block has under way: three pieces for each of 16 warps.
const RING: usize = 3 * 16 * 2048;
/// Bytes of a column of sums of 16 warps, and of one row of them.
const COLUMN: usize = 16 * 80;
const ROW: usize = 80;

/// Arguments of the kernels of decode_route.cu and decode_experts.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Decode {
    x: Address,
    router: Address,
    gate: Address,
    up: Address,
    down: Address,
    base_gate: Address,
    base_up: Address,
    base_down: Address,
    a_gate: Address,
    a_up: Address,
    a_down: Address,
    b_gate: Address,
    b_up: Address,
    b_down: Address,
    group_of: Address,
    logits: Address,
    low: Address,
    h: Address,
    pair_h: Address,
    low_down: Address,
    out: Address,
    barrier: Address,
    tables: TablesArgument,
    scores: ScoresArgument,
    tokens: u32,
    hidden: u32,
    inner: u32,
    rank: u32,
    positions: u32,
    dense: u32,
    groups: u32,
}

arguments!(Decode: 336);

/// A layer's output for up to [`DECODE_TOKENS`] tokens.
pub(super) fn forward<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    x: &impl DevicePtr<T>,
    tokens: usize,
    work: &mut Workspace<T>,
    out: &mut impl DevicePtrMut<T>,
) -> Result<()> {
    let (shape, w) = (&block.frame.shape, &block.weights);
    let at = |t: &Held<T>| gpu.address(t);
    let arguments = Decode {
        x: gpu.address(x),
        router: at(&w.router),
        gate: at(&w.dense.gate),
        up: at(&w.dense.up),
        down: at(&w.dense.down),
        base_gate: at(&w.bases.gate),
        base_up: at(&w.bases.up),
        base_down: at(&w.bases.down),
        a_gate: at(&w.adapters.a.gate),
        a_up: at(&w.adapters.a.up),
        a_down: at(&w.adapters.a.down),
        b_gate: at(&w.adapters.b.gate),
        b_up: at(&w.adapters.b.up),
        b_down: at(&w.adapters.b.down),
        group_of: gpu.address(&*block.frame.group_of),
        logits: gpu.address_mut(&mut work.logits),
        low: gpu.address_mut(&mut work.low),
        h: gpu.address_mut(&mut work.h),
        pair_h: gpu.address_mut(&mut work.pair_h),
        low_down: gpu.address_mut(&mut work.low_down),
        out: gpu.address_mut(out),
        barrier: gpu.address_mut(&mut work.barrier),
        tables: work.tables.arguments(gpu),
        scores: block.frame.scores.arguments(gpu, shape.top_k),
        tokens: tokens as u32,
        hidden: shape.hidden as u32,
        inner: shape.inner as u32,
        rank: shape.rank as u32,
        positions: shape.positions() as u32,
        dense: shape.dense as u32,
        groups: shape.groups as u32,
    };
    let columns = tokens.next_multiple_of(8);
    let rows = if shape.adapted > 0 {
        shape.rows(tokens)
    } else {
        0
    };
    let whole = RING + COLUMN * columns;
    let half = RING / 2 + 64 * ROW + ROW * rows.max(8 * columns);
    queue::<T>(gpu, "decode_route", &arguments, 512, 1, whole, true)?;
    queue::<T>(gpu, "decode_gate_up", &arguments, 256, 2, half, false)?;
    queue::<T>(
        gpu,
        "decode_down",
        &arguments,
        512,
        1,
        whole,
        shape.adapted > 0,
    )
}

/// `blocks` for each multiprocessor; where they `wait` for each other they must all fit at once.
fn queue<T: Element>(
    gpu: &Gpu,
    name: &'static str,
    arguments: &Decode,
    block: usize,
    blocks: usize,
    shared: usize,
    wait: bool,
) -> Result<()> {
    let kernel = gpu.kernel(&DECODE, T::KIND, name, shared)?;
    let grid = blocks * gpu.multiprocessors();
    if wait {
        let resident = gpu.resident(&kernel, block, shared)?;
        ensure!(
            grid <= resident,
            "`{name}` needs {grid} blocks on the GPU at once, which holds {resident}"
        );
    }
    let launch = Launch {
        grid,
        block,
        shared,
    };
    // SAFETY: the block has these sizes, the workspace room for the tokens.
    unsafe { gpu.launch(&kernel, launch, arguments, &[]) }
}
