//! Parameters as they train, as kernels take them: 16 bits, all slots of one rank.

use super::compile::PACK;
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::{Result, ensure};

/// The most stacks of a launch.
const MOST: usize = 18;

/// `PackJob` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    wide: Address,
    narrow: Address,
    starts: Address,
    to: Address,
    slots: u32,
    outer: u32,
    inner: u32,
    rank: u32,
    width: u32,
    outer_step: u32,
    inner_step: u32,
    inner_is_rank: u32,
}

/// Arguments of `pack_stacks`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Pack {
    jobs: [Job; MOST],
    count: u32,
}

arguments!(Job: 64, Pack: 1160);

/// Where the numbers of a stack are.
#[derive(Debug, Clone, Copy)]
pub(super) enum From {
    /// In f32.
    Wide(Address),
    /// In the kernels' own type.
    Narrow(Address),
    /// Nowhere: zeros.
    Zeros,
}

/// How the components of a source lie.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// `[slots, rank, width]`
    Rows(usize),
    /// `[slots, width, rank]`
    Columns(usize),
    /// `[ΣR, width]`, with where those of each slot begin, and the last end: `[slots + 1]`.
    Ranked(Address),
}

impl Job {
    const NONE: Self = Self {
        wide: Address::NULL,
        narrow: Address::NULL,
        starts: Address::NULL,
        to: Address::NULL,
        slots: 0,
        outer: 0,
        inner: 0,
        rank: 0,
        width: 0,
        outer_step: 0,
        inner_step: 0,
        inner_is_rank: 0,
    };

    fn of(from: From, source: Source, to: Address, [slots, rank, width]: [usize; 3]) -> Self {
        let (wide, narrow) = match from {
            From::Wide(at) => (at, Address::NULL),
            From::Narrow(at) => (Address::NULL, at),
            From::Zeros => (Address::NULL, Address::NULL),
        };
        let (starts, own) = match source {
            Source::Ranked(starts) => (starts, rank),
            Source::Rows(rank) | Source::Columns(rank) => (Address::NULL, rank),
        };
        Self {
            wide,
            narrow,
            starts,
            to,
            slots: slots as u32,
            rank: own as u32,
            width: width as u32,
            ..Self::NONE
        }
    }

    /// `[slots, rank, width]` of a source; `width` is a multiple of 8.
    pub(super) fn rows(from: From, source: Source, to: Address, sizes: [usize; 3]) -> Self {
        let [_, rank, width] = sizes;
        let job = Self::of(from, source, to, sizes);
        let (outer_step, inner_step) = match source {
            Source::Columns(own) => (1, own as u32),
            Source::Rows(_) | Source::Ranked(_) => (width as u32, 1),
        };
        Self {
            outer: rank as u32,
            inner: width as u32,
            outer_step,
            inner_step,
            ..job
        }
    }

    /// `[slots, width, rank]` of a source; `rank` is a multiple of 8.
    pub(super) fn columns(from: From, source: Source, to: Address, sizes: [usize; 3]) -> Self {
        let [_, rank, width] = sizes;
        let job = Self::of(from, source, to, sizes);
        let (outer_step, inner_step) = match source {
            Source::Columns(own) => (own as u32, 1),
            Source::Rows(_) | Source::Ranked(_) => (1, width as u32),
        };
        Self {
            outer: width as u32,
            inner: rank as u32,
            outer_step,
            inner_step,
            inner_is_rank: 1,
            ..job
        }
    }
}

/// Queues the making of all stacks.
///
/// # Safety
/// Sources and stacks must have the sizes that the jobs say.
pub(super) unsafe fn pack<T: Element>(gpu: &Gpu, jobs: &[Job]) -> Result<()> {
    ensure!(jobs.len() <= MOST, "{} stacks at once", jobs.len());
    let mut all = [Job::NONE; MOST];
    all[..jobs.len()].copy_from_slice(jobs);
    let arguments = Pack {
        jobs: all,
        count: jobs.len() as u32,
    };
    let kernel = gpu.kernel(&PACK, T::KIND, "pack_stacks", 0)?;
    let launch = Launch {
        grid: 8 * gpu.multiprocessors(),
        block: 256,
        shared: 0,
    };
    // SAFETY: the caller's promise.
    unsafe { gpu.launch(&kernel, launch, &arguments, &[]) }
}
