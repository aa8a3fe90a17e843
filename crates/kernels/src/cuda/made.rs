//! Candle's tensors as kernels read them, and what kernels made as candle's tensors.

use super::device::{Gpu, Number};
use super::held::Held;
use candle_core::cuda::CudaDType;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Error, Layout, Result as Candle, Shape,
    Storage, Tensor,
};
use cudarc::driver::{CudaSlice, DevicePtr};
use std::sync::{Arc, Mutex};

/// The GPU of tensors of 16-bit floats, if kernels run on it.
pub(crate) fn gpu_of(x: &Tensor) -> Candle<Option<Arc<Gpu>>> {
    match x.device() {
        Device::Cuda(device) if matches!(x.dtype(), DType::BF16 | DType::F16) => {
            Gpu::of(device).map_err(Error::wrap)
        }
        _ => Ok(None),
    }
}

/// The same of tensors of f32.
pub(crate) fn gpu_of_f32(x: &Tensor) -> Candle<Option<Arc<Gpu>>> {
    match x.device() {
        Device::Cuda(device) if x.dtype() == DType::F32 => Gpu::of(device).map_err(Error::wrap),
        _ => Ok(None),
    }
}

/// Whether copies of 16 bytes can begin where the tensor does.
pub(super) fn is_aligned(tensor: &Tensor) -> bool {
    (tensor.layout().start_offset() * tensor.dtype().size_in_bytes()).is_multiple_of(16)
}

/// The same numbers without gaps, the first of them at a multiple of 16 bytes: memory begins at one, but a
/// part of a tensor need not.
pub(crate) fn aligned(tensor: &Tensor) -> Candle<Tensor> {
    match tensor.is_contiguous() && is_aligned(tensor) {
        true => Ok(tensor.clone()),
        false => tensor.force_contiguous(),
    }
}

/// The numbers of a tensor, which lives on with them, one behind the other.
pub(super) fn held<T: Number + CudaDType>(tensor: &Tensor) -> Candle<Held<T>> {
    let tensor = aligned(tensor)?;
    held_from(&tensor, tensor.elem_count())
}

/// The `len` numbers from the first of a tensor on, whether all of them are the tensor's or not.
pub(super) fn held_from<T: Number + CudaDType>(tensor: &Tensor, len: usize) -> Candle<Held<T>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        candle_core::bail!("a tensor for kernels of a GPU is not on one")
    };
    let stream = storage.device.cuda_stream();
    let first = layout.start_offset();
    let part = storage.as_cuda_slice::<T>()?.try_slice(first..first + len);
    let Some(part) = part else {
        candle_core::bail!("{len} numbers from {first} on are more than {layout:?} has")
    };
    let address = part.device_ptr(&stream).0;
    // SAFETY: the memory is the tensor's, which is held on to.
    Ok(unsafe { Held::new(address, len, stream.clone(), Arc::new(tensor.clone())) })
}

/// A result on its way to candle.
struct Made(Mutex<Option<CudaStorage>>, Shape);

impl CustomOp1 for Made {
    fn name(&self) -> &'static str {
        "result of a kernel"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Candle<(CpuStorage, Shape)> {
        candle_core::bail!("{}: of a tensor on the CPU", self.name())
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Candle<(CudaStorage, Shape)> {
        let made = self.0.lock().ok().and_then(|mut made| made.take());
        let made = made.ok_or_else(|| Error::Msg(format!("{}: taken twice", self.name())))?;
        Ok((made, self.1.clone()))
    }
}

/// What a kernel made, as a tensor where `like` is.
pub(super) fn made<T: CudaDType>(
    gpu: &Gpu,
    mut numbers: CudaSlice<T>,
    shape: impl Into<Shape>,
    like: &Tensor,
) -> Candle<Tensor> {
    // Noted once more: a stream that reads it waits for what was queued until here.
    gpu.address_mut(&mut numbers);
    let Device::Cuda(device) = like.device() else {
        candle_core::bail!("a result of a kernel for a tensor that is not on a GPU")
    };
    let storage = CudaStorage::wrap_cuda_slice(numbers, device.clone());
    like.apply_op1_no_bwd(&Made(Mutex::new(Some(storage)), shape.into()))
}
