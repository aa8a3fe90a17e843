//! Grouped products of candle's tensors, queued on candle's own stream.

use super::device::{Element, Gpu, lock};
use super::grouped::{Grouped, Kind, Path, Segments};
use super::products::{Out, Rows, Transposed, outer};
use super::{CudaError, Result};
use candle_core::cuda::{CudaDType, DeviceId};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp3, DType, Device, Error, Layout, Result as Candle,
    Shape,
};
use cudarc::driver::{CudaSlice, CudaView};
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

/// GPU number `ordinal` as candle knows it, the same each time, with one stream for all threads: the work of one is
/// there for the others, and kernels whose blocks wait for each other run one after the other.
///
/// # Errors
/// If there is no such GPU.
pub fn device(ordinal: usize) -> Candle<Device> {
    static OPENED: LazyLock<Mutex<HashMap<usize, Device>>> = LazyLock::new(Mutex::default);
    let mut opened = lock(&OPENED);
    if let Some(device) = opened.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = Device::new_cuda_with_stream(ordinal)?;
    if let Device::Cuda(device) = &device {
        // SAFETY: all that this device takes and queues is on its one stream, where nothing needs to wait.
        unsafe { device.disable_event_tracking() };
    }
    opened.insert(ordinal, device.clone());
    Ok(device)
}

type Known = Mutex<HashMap<DeviceId, Option<Arc<Gpu>>>>;

impl Gpu {
    /// The GPU and the stream that candle knows as `device`, opened once, so that kernels are loaded once;
    /// nothing if they do not run on it.
    pub(crate) fn of(device: &CudaDevice) -> Result<Option<Arc<Self>>> {
        static KNOWN: LazyLock<Known> = LazyLock::new(Mutex::default);
        let mut known = lock(&KNOWN);
        if let Some(gpu) = known.get(&device.id()) {
            return Ok(gpu.clone());
        }
        let gpu = match Self::on(device.cuda_stream()) {
            #[cfg(test)]
            Ok(gpu) => Some(Arc::new(gpu.poisoned())),
            #[cfg(not(test))]
            Ok(gpu) => Some(Arc::new(gpu)),
            Err(CudaError::TooOld { .. } | CudaError::TooSmall { .. }) => None,
            Err(error) => return Err(error),
        };
        known.insert(device.id(), gpu.clone());
        Ok(gpu)
    }
}

/// Which product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// `z = x·wᵀ` of rows `[rows, k]` and a stack `[groups · n, k]`: `[rows, n]`.
    There,
    /// `x = z·w` of rows `[rows, n]` and such a stack: `[rows, k]`.
    Back,
    /// `w = zᵀ·x` of rows `[rows, n]` and rows `[rows, k]`: such a stack, of f32.
    Outer,
}

/// A product of sorted rows as an operation of candle's. Its third operand has the first row of each group,
/// and the end, which is `rows`, as u32. All are contiguous and begin at multiples of 16 bytes; `n` and `k`
/// are multiples of 8.
pub(crate) struct Product {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) way: Way,
    pub(crate) rows: usize,
    /// At most 512.
    pub(crate) groups: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

/// One of the operands.
type Operand<'a> = (&'a CudaStorage, &'a Layout);

impl Product {
    fn queue<T: Element + CudaDType>(
        &self,
        [a, b, starts]: [Operand<'_>; 3],
    ) -> Candle<(CudaStorage, Shape)> {
        let (gpu, path, device) = (&*self.gpu, Path::best(&self.gpu), a.0.device.clone());
        let (rows, groups, n, k) = (self.rows, self.groups, self.n, self.k);
        let (of_a, of_b) = match self.way {
            Way::There => (rows * k, groups * n * k),
            Way::Back => (rows * n, groups * n * k),
            Way::Outer => (rows * n, rows * k),
        };
        let (a, b) = (numbers::<T>(a, of_a)?, numbers::<T>(b, of_b)?);
        let starts = numbers::<u32>(starts, groups + 1)?;
        let segments = &Segments::sorted(gpu.address(&starts), rows);
        match self.way {
            Way::There => {
                let product = Grouped::new(path, groups, [n, k], rows);
                let z = gpu.filled(rows * n, |z| {
                    product.run(gpu, Kind::Plain(&b, z), &a, segments)
                });
                stored(z, (rows, n), device)
            }
            Way::Back => {
                let product = Transposed::new(path, groups, [k, n]);
                let z = Rows::sorted(gpu, &a, n);
                let x = gpu.filled::<T>(rows * k, |x| {
                    product.one(gpu, (z, &b), Out::rows(gpu, x, k), segments)
                });
                stored(x, (rows, k), device)
            }
            Way::Outer => {
                let (z, x) = (Rows::sorted(gpu, &a, n), Rows::sorted(gpu, &b, k));
                let w = gpu.filled(groups * n * k, |w| {
                    outer::<T>(gpu, path, [groups, n, k], z, x, w, segments)
                });
                stored(w, (groups * n, k), device)
            }
        }
    }
}

/// A result as candle takes it.
pub(super) fn stored<T: CudaDType>(
    numbers: Result<CudaSlice<T>>,
    shape: (usize, usize),
    device: CudaDevice,
) -> Candle<(CudaStorage, Shape)> {
    let numbers = numbers.map_err(Error::wrap)?;
    Ok((CudaStorage::wrap_cuda_slice(numbers, device), shape.into()))
}

/// What the kernels read of a tensor.
pub(super) fn numbers<'a, T: CudaDType>(
    (storage, layout): Operand<'a>,
    count: usize,
) -> Candle<CudaView<'a, T>> {
    let all = storage.as_cuda_slice::<T>()?;
    let aligned = |start: usize| (start * size_of::<T>()).is_multiple_of(16);
    let part = layout.contiguous_offsets();
    let part = part.filter(|&(start, end)| end - start == count && aligned(start));
    let part = part.and_then(|(start, end)| all.try_slice(start..end));
    part.ok_or_else(|| {
        Error::msg(format!(
            "{count} numbers from a multiple of 16 bytes on were expected, not {layout:?}"
        ))
    })
}

const NAME: &str = "product by groups";

impl CustomOp3 for Product {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        candle_core::bail!("{NAME}: of tensors on a GPU alone")
    }

    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
        starts: &CudaStorage,
        ls: &Layout,
    ) -> Candle<(CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let operands = [(a, la), (b, lb), (starts, ls)];
        match a.dtype() {
            DType::BF16 => self.queue::<bf16>(operands),
            DType::F16 => self.queue::<f16>(operands),
            dtype => candle_core::bail!("{NAME}: of 16-bit floats, not of {dtype:?}"),
        }
    }
}
