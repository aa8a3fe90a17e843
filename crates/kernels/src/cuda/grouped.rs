//! Grouped products on the GPU: sorted rows times the matrix of their group, in one launch.

use super::Result;
use super::compile::{GROUPED, GROUPED_MMA, Source};
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::tensor_map::TensorMap;
use cudarc::driver::{CudaSlice, DevicePtr};
use std::ops::RangeInclusive;

/// Rows a group for which tall tiles are better: wide ones would read most weights twice from memory.
const TALL: RangeInclusive<usize> = 112..=192;
/// Shared memory of the kernels of grouped.cu.
const SHARED: usize = 216_064;
/// Shared memory of the kernels of grouped_mma.cu.
const MMA_SHARED: usize = 3 * (128 + 256) * 128;

/// Which kernels compute grouped products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Hopper's warpgroup products and copy engine (grouped.cu).
    Hopper,
    /// The products of the A100 and later (grouped_mma.cu).
    Mma,
}

impl Path {
    /// The faster one that this GPU has.
    pub fn best(gpu: &Gpu) -> Self {
        if gpu.is_hopper() {
            Self::Hopper
        } else {
            Self::Mma
        }
    }
}

/// Where sorted rows lie, known on the GPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segments {
    /// First row of each group, and the end.
    pub(super) starts: Address,
    /// Token of each row.
    pub(super) tokens: Address,
    /// Gate of each row.
    pub(super) gates: Address,
    /// The most rows that there can be.
    pub(super) rows: usize,
    /// Whether inputs are those of the rows' tokens, or lie in the order of rows.
    pub(super) gather: bool,
    /// Whether results are multiplied by the rows' gates.
    pub(super) scale: bool,
}

impl Segments {
    /// `rows` rows in the order of groups, which begin where `starts` says.
    pub(super) fn sorted(starts: Address, rows: usize) -> Self {
        Self {
            starts,
            tokens: Address::NULL,
            gates: Address::NULL,
            rows,
            gather: false,
            scale: false,
        }
    }

    pub(super) fn gathered(self) -> Self {
        Self {
            gather: true,
            ..self
        }
    }

    pub(super) fn scaled(self) -> Self {
        Self {
            scale: true,
            ..self
        }
    }
}

/// What is computed, with its matrices `[groups, n, k]` and results.
pub(super) enum Kind<'a, T, W = CudaSlice<T>> {
    /// `W·x`, `[rows, n]`
    Plain(&'a W, &'a mut CudaSlice<T>),
    /// `W·x` and `V·x`, `[rows, n]` each.
    Dual(&'a W, &'a W, &'a mut CudaSlice<T>, &'a mut CudaSlice<T>),
    /// The same in one result, `[rows, 2n]`.
    SideBySide(&'a W, &'a W, &'a mut CudaSlice<T>),
    /// `silu(W·x) · (V·x)`, `[rows, n]`
    Swiglu(&'a W, &'a W, &'a mut CudaSlice<T>),
}

/// `Grouped` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Argument {
    a: Address,
    rows: Address,
    b0: Address,
    b1: Address,
    y0: Address,
    y1: Address,
    scale: Address,
    starts: Address,
    ranks: Address,
    groups: u32,
    n: u32,
    k: u32,
    lda: u32,
    ldy: u32,
}

arguments!(Argument: 96);

/// The sizes of a grouped product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grouped {
    path: Path,
    groups: usize,
    /// Outputs of a matrix.
    n: usize,
    /// Inputs of a matrix.
    k: usize,
    /// Rows that a group has on average, as far as the host can know.
    depth: usize,
    /// Where the rows of each group's matrices begin, and the last end; null where all have `n`.
    ranks: Address,
}

impl Grouped {
    /// Matrices `[groups, n, k]`, and so many rows in all.
    pub(super) fn new(path: Path, groups: usize, [n, k]: [usize; 2], rows: usize) -> Self {
        Self {
            path,
            groups,
            n,
            k,
            depth: rows / groups,
            ranks: Address::NULL,
        }
    }

    /// With matrices of rows of their own number, one behind the other, of which `n` are the most. Only the kernels of
    /// [`Path::Mma`] know them.
    pub(super) fn ranked(self, ranks: Address) -> Self {
        Self {
            path: Path::Mma,
            ranks,
            ..self
        }
    }

    /// Queues the product of `a`, rows of `k`.
    pub(super) fn run<T: Element, W: DevicePtr<T>>(
        &self,
        gpu: &Gpu,
        kind: Kind<'_, T, W>,
        a: &impl DevicePtr<T>,
        segments: &Segments,
    ) -> Result<()> {
        let n = self.n;
        let mut argument = Argument {
            a: gpu.address(a),
            rows: if segments.gather {
                segments.tokens
            } else {
                Address::NULL
            },
            b0: Address::NULL,
            b1: Address::NULL,
            y0: Address::NULL,
            y1: Address::NULL,
            scale: if segments.scale {
                segments.gates
            } else {
                Address::NULL
            },
            starts: segments.starts,
            ranks: self.ranks,
            groups: self.groups as u32,
            n: n as u32,
            k: self.k as u32,
            lda: self.k as u32,
            ldy: n as u32,
        };
        let (form, two) = match kind {
            Kind::Plain(w, y) => {
                (argument.b0, argument.y0) = (gpu.address(w), gpu.address_mut(y));
                (&PLAIN, false)
            }
            Kind::Dual(w, v, y0, y1) => {
                (argument.b0, argument.b1) = (gpu.address(w), gpu.address(v));
                (argument.y0, argument.y1) = (gpu.address_mut(y0), gpu.address_mut(y1));
                (&DUAL, true)
            }
            Kind::SideBySide(w, v, y) => {
                (argument.b0, argument.b1) = (gpu.address(w), gpu.address(v));
                argument.y0 = gpu.address_mut(y);
                argument.y1 = argument.y0.skip::<T>(n);
                argument.ldy = 2 * n as u32;
                (&DUAL, true)
            }
            Kind::Swiglu(w, v, y) => {
                (argument.b0, argument.b1) = (gpu.address(w), gpu.address(v));
                argument.y0 = gpu.address_mut(y);
                (&SWIGLU, true)
            }
        };
        if self.path == Path::Mma {
            let size = (form.mma, 256, MMA_SHARED);
            return self.launch::<T>(gpu, &GROUPED_MMA, size, &argument, &[]);
        }
        let (name, rows) = self.tiles(form);
        let weights = |address| {
            let sizes = [self.k, self.groups * n];
            TensorMap::new(address, T::KIND, &sizes, &[64, rows])
        };
        let mut maps = vec![weights(argument.b0)?];
        if two {
            maps.push(weights(argument.b1)?);
        }
        let sizes = [self.k, a.len() / self.k];
        maps.push(TensorMap::new(argument.a, T::KIND, &sizes, &[64, 64])?);
        self.launch::<T>(gpu, &GROUPED, (name, 384, SHARED), &argument, &maps)
    }

    /// The narrowest tiles that hold all columns, else by the depth of groups.
    fn tiles(&self, form: &Form) -> Tiles {
        let holds = form
            .narrow
            .iter()
            .find(|(_, rows)| self.n <= *rows as usize);
        let deep = if TALL.contains(&self.depth) {
            form.tall
        } else {
            form.wide
        };
        holds.copied().unwrap_or(deep)
    }

    fn launch<T: Element>(
        &self,
        gpu: &Gpu,
        source: &Source,
        (name, block, shared): (&'static str, usize, usize),
        argument: &Argument,
        maps: &[TensorMap],
    ) -> Result<()> {
        let kernel = gpu.kernel(source, T::KIND, name, shared)?;
        let launch = Launch {
            grid: gpu.multiprocessors(),
            block,
            shared,
        };
        // SAFETY: the caller's matrices have these sizes, its rows and results those of the segments.
        unsafe { gpu.launch(&kernel, launch, argument, maps) }
    }
}

/// A kernel of grouped.cu, and the weight rows of one box.
type Tiles = (&'static str, u32);

/// The kernels of one kind of product.
struct Form {
    mma: &'static str,
    /// For few columns, the fewest first.
    narrow: &'static [Tiles],
    tall: Tiles,
    wide: Tiles,
}

const PLAIN: Form = Form {
    mma: "grouped_mma_plain",
    narrow: &[("grouped_plain_narrow", 64), ("grouped_plain_half", 128)],
    tall: ("grouped_plain_tall", 128),
    wide: ("grouped_plain", 256),
};
const DUAL: Form = Form {
    mma: "grouped_mma_dual",
    narrow: &[("grouped_dual_narrow", 32), ("grouped_dual_half", 64)],
    tall: ("grouped_dual_tall", 64),
    wide: ("grouped_dual", 128),
};
const SWIGLU: Form = Form {
    mma: "grouped_mma_swiglu",
    narrow: &[],
    tall: ("grouped_swiglu_tall", 64),
    wide: ("grouped_swiglu", 128),
};
