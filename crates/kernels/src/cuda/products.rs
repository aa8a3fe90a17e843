//! The grouped products of the backward pass.

use super::Result;
use super::compile::{BACKWARD, BACKWARD_MMA, Source};
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::grouped::{Path, Segments};
use super::held::Held;
use super::tensor_map::TensorMap;
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};

/// Columns up to which the narrow tiles of backward_mma.cu are better.
const NARROW: usize = 128;

/// Rows that a product takes: a matrix, and where in it they begin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    address: Address,
    /// Numbers between rows.
    stride: usize,
    /// Row of each sorted row; nothing for the sorted row itself.
    gather: Address,
}

impl Rows {
    /// The rows of `x`, each of `width` numbers, in the order of sorted rows.
    pub(super) fn sorted<T>(gpu: &Gpu, x: &impl DevicePtr<T>, width: usize) -> Self {
        Self {
            address: gpu.address(x),
            stride: width,
            gather: Address::NULL,
        }
    }

    /// The rows of the sorted rows' tokens.
    pub(super) fn of_tokens<T>(
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        width: usize,
        rows: &Segments,
    ) -> Self {
        Self {
            gather: rows.tokens,
            ..Self::sorted(gpu, x, width)
        }
    }

    /// The right half of each row.
    pub(super) fn right<T>(self) -> Self {
        Self {
            address: self.address.skip::<T>(self.stride / 2),
            ..self
        }
    }
}

/// `y[s] = g·(a[s]·W)`, with the matrices `[groups, k, n]` of the forward.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transposed {
    path: Path,
    groups: usize,
    n: usize,
    k: usize,
    /// Where the rows of each group's matrix begin, and the last end; null where all have `k`.
    ranks: Address,
}

/// `Transposed` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct TransposedArgument {
    a0: Address,
    a1: Address,
    rows: Address,
    b0: Address,
    b1: Address,
    y: Address,
    scale: Address,
    starts: Address,
    ranks: Address,
    groups: u32,
    n: u32,
    k: u32,
    lda: u32,
    ldy: u32,
}

/// `Outer` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct OuterArgument {
    a: Address,
    rows_a: Address,
    b: Address,
    rows_b: Address,
    dw: Address,
    scale: Address,
    starts: Address,
    groups: u32,
    n: u32,
    k: u32,
    lda: u32,
    ldb: u32,
}

arguments!(TransposedArgument: 96, OuterArgument: 80);

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Out {
    address: Address,
    stride: usize,
}

impl Out {
    /// Rows of `width` numbers.
    pub(super) fn rows<T>(gpu: &Gpu, y: &mut CudaSlice<T>, width: usize) -> Self {
        Self {
            address: gpu.address_mut(y),
            stride: width,
        }
    }

    /// The right half of each row.
    pub(super) fn right<T>(self) -> Self {
        Self {
            address: self.address.skip::<T>(self.stride / 2),
            ..self
        }
    }
}

impl Transposed {
    /// Matrices `[groups, k, n]`.
    pub(super) fn new(path: Path, groups: usize, [n, k]: [usize; 2]) -> Self {
        Self {
            path,
            groups,
            n,
            k,
            ranks: Address::NULL,
        }
    }

    /// With matrices of rows of their own number, one behind the other, of which `k` are the most. Only the kernels of
    /// [`Path::Mma`] know them.
    pub(super) fn ranked(self, ranks: Address) -> Self {
        Self {
            path: Path::Mma,
            ranks,
            ..self
        }
    }

    /// Queues the product of one operand pair.
    pub(super) fn one<T: Element>(
        &self,
        gpu: &Gpu,
        (a, w): (Rows, &impl DevicePtr<T>),
        y: Out,
        rows: &Segments,
    ) -> Result<()> {
        let kernel = match self.path {
            Path::Hopper => match self.n {
                ..=64 => Kernel::hopper("backward_transposed_narrow", 216_064),
                65..=128 => Kernel::hopper("backward_transposed_half", 216_064),
                _ => Kernel::hopper("backward_transposed", 216_064),
            },
            Path::Mma => match self.n {
                ..=NARROW => Kernel::mma("backward_mma_transposed_narrow", 2, 73_728),
                _ => Kernel::mma("backward_mma_transposed", 1, 147_456),
            },
        };
        self.queue::<T>(gpu, kernel, &[(a, gpu.address(w))], y, rows)
    }

    /// Queues the sum of two products, whose rows are gathered alike and have the same stride.
    pub(super) fn two<T: Element>(
        &self,
        gpu: &Gpu,
        first: (Rows, &Held<T>),
        second: (Rows, &Held<T>),
        y: Out,
        rows: &Segments,
    ) -> Result<()> {
        let kernel = match self.path {
            Path::Hopper => Kernel::hopper("backward_transposed_two", 216_064),
            Path::Mma => Kernel::mma("backward_mma_transposed_two", 1, 147_456),
        };
        let pairs = [first, second].map(|(a, w)| (a, gpu.address(w)));
        self.queue::<T>(gpu, kernel, &pairs, y, rows)
    }

    fn queue<T: Element>(
        &self,
        gpu: &Gpu,
        kernel: Kernel,
        pairs: &[(Rows, Address)],
        y: Out,
        rows: &Segments,
    ) -> Result<()> {
        let (a, b) = pairs[0];
        let (a1, b1) = pairs
            .get(1)
            .map_or((Address::NULL, Address::NULL), |(a, b)| (a.address, *b));
        let argument = TransposedArgument {
            a0: a.address,
            a1,
            rows: a.gather,
            b0: b,
            b1,
            y: y.address,
            scale: if rows.scale {
                rows.gates
            } else {
                Address::NULL
            },
            starts: rows.starts,
            ranks: self.ranks,
            groups: self.groups as u32,
            n: self.n as u32,
            k: self.k as u32,
            lda: a.stride as u32,
            ldy: y.stride as u32,
        };
        let mut maps = Vec::new();
        if self.path == Path::Hopper {
            // In three dimensions, so that nothing of the next group is read.
            let sizes = [self.n, self.k, self.groups];
            for (_, b) in pairs {
                maps.push(TensorMap::new(*b, T::KIND, &sizes, &[64, 64, 1])?);
            }
        }
        // SAFETY: the caller's matrices have these sizes, its rows and results those of the segments.
        unsafe { kernel.queue::<T, _>(gpu, &argument, &maps) }
    }
}

/// Queues `dw[g] = Σ a[s] ⊗ b[s]` over the rows of each of `groups`, times their gates where they scale:
/// `dw` is `[groups, n, k]`.
pub(super) fn outer<T: Element>(
    gpu: &Gpu,
    path: Path,
    [groups, n, k]: [usize; 3],
    a: Rows,
    b: Rows,
    dw: &mut CudaSlice<f32>,
    rows: &Segments,
) -> Result<()> {
    let argument = OuterArgument {
        a: a.address,
        rows_a: a.gather,
        b: b.address,
        rows_b: b.gather,
        dw: gpu.address_mut(dw),
        scale: if rows.scale {
            rows.gates
        } else {
            Address::NULL
        },
        starts: rows.starts,
        groups: groups as u32,
        n: n as u32,
        k: k as u32,
        lda: a.stride as u32,
        ldb: b.stride as u32,
    };
    let kernel = match path {
        Path::Hopper => match (n, k) {
            (..=64, _) => Kernel::hopper("backward_outer_flat", 205_824),
            (_, ..=64) => Kernel::hopper("backward_outer_narrow", 197_632),
            (_, ..=128) => Kernel::hopper("backward_outer_half", 197_632),
            _ => Kernel::hopper("backward_outer", 197_632),
        },
        Path::Mma => match n.min(k) {
            ..=NARROW => Kernel::mma("backward_mma_outer_narrow", 2, 74_496),
            _ => Kernel::mma("backward_mma_outer", 1, 148_224),
        },
    };
    // SAFETY: as in `Transposed`.
    unsafe { kernel.queue::<T, _>(gpu, &argument, &[]) }
}

/// A kernel and the size of its launch.
#[derive(Debug, Clone, Copy)]
struct Kernel {
    source: &'static Source,
    name: &'static str,
    /// Blocks for each multiprocessor.
    blocks: usize,
    block: usize,
    shared: usize,
}

impl Kernel {
    fn hopper(name: &'static str, shared: usize) -> Self {
        Self {
            source: &BACKWARD,
            name,
            blocks: 1,
            block: 384,
            shared,
        }
    }

    fn mma(name: &'static str, blocks: usize, shared: usize) -> Self {
        Self {
            source: &BACKWARD_MMA,
            name,
            blocks,
            block: 256,
            shared,
        }
    }

    /// # Safety
    /// As [`Gpu::launch`].
    unsafe fn queue<T: Element, A: DeviceRepr>(
        self,
        gpu: &Gpu,
        argument: &A,
        maps: &[TensorMap],
    ) -> Result<()> {
        let kernel = gpu.kernel(self.source, T::KIND, self.name, self.shared)?;
        let launch = Launch {
            grid: self.blocks * gpu.multiprocessors(),
            block: self.block,
            shared: self.shared,
        };
        // SAFETY: the caller's promise.
        unsafe { gpu.launch(&kernel, launch, argument, maps) }
    }
}
