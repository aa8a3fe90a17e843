//! Numbers that kernels read, whoever took their memory.

use super::device::Number;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceSlice, SyncOnDrop, sys};
use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

/// Numbers on a GPU that nothing changes while they are held: memory of one's own, or that of another
/// library's tensor.
#[derive(Clone)]
pub struct Held<T> {
    address: sys::CUdeviceptr,
    len: usize,
    stream: Arc<CudaStream>,
    /// Keeps the memory.
    _owner: Arc<dyn Any + Send + Sync>,
    numbers: PhantomData<T>,
}

impl<T> std::fmt::Debug for Held<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl<T: Number + Send + Sync + 'static> From<CudaSlice<T>> for Held<T> {
    fn from(memory: CudaSlice<T>) -> Self {
        let stream = memory.stream().clone();
        let (address, len) = (memory.device_ptr(&stream).0, memory.len());
        // SAFETY: the memory is the owner's, which is held on to.
        unsafe { Self::new(address, len, stream, Arc::new(memory)) }
    }
}

impl<T> Held<T> {
    /// `len` numbers from `address` on.
    ///
    /// # Safety
    /// They must be there, taken and written on `stream`, and stay what they are, as long as `owner` lives.
    pub(super) unsafe fn new(
        address: sys::CUdeviceptr,
        len: usize,
        stream: Arc<CudaStream>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            address,
            len,
            stream,
            _owner: owner,
            numbers: PhantomData,
        }
    }
}

impl<T> DeviceSlice<T> for Held<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl<T> DevicePtr<T> for Held<T> {
    /// Whoever reads it does so on the stream that it was written on, so nothing waits.
    fn device_ptr<'a>(&'a self, _: &'a CudaStream) -> (sys::CUdeviceptr, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}
