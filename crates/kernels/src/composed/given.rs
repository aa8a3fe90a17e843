//! Results that were computed without gradients, and are given one that is written out.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor};
use std::sync::Mutex;

/// From the gradient of a result to those of its inputs, where `track_op` says that they have one.
type Backward = Box<dyn Fn(&Tensor) -> Result<[Option<Tensor>; 3]> + Send + Sync>;

struct Given {
    name: &'static str,
    /// Taken when the result is made of it, so that nothing is held twice.
    value: Mutex<Option<Tensor>>,
    backward: Backward,
}

impl Given {
    fn take(&self) -> Result<Tensor> {
        let value = self.value.lock().ok().and_then(|mut value| value.take());
        value.ok_or_else(|| candle_core::Error::Msg(format!("{}: run twice", self.name)))
    }
}

impl CustomOp3 for Given {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("{}: inputs on the CPU, and a result elsewhere", self.name),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("{}: inputs on a GPU, and a result elsewhere", self.name),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = (self.backward)(&grad.contiguous()?)?;
        Ok((a, b, c))
    }
}

/// The contiguous `value`, computed from `inputs` without gradients, with the gradients that `backward` makes
/// of its own.
pub(super) fn given(
    name: &'static str,
    inputs: [&Tensor; 3],
    value: Tensor,
    backward: impl Fn(&Tensor) -> Result<[Option<Tensor>; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(value);
    }
    let backward = Box::new(backward);
    let [a, b, c] = inputs;
    a.apply_op3(
        b,
        c,
        Given {
            name,
            value: Mutex::new(Some(value)),
            backward,
        },
    )
}
