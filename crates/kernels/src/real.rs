//! The two floating-point types that the CPU operations accept, and zero-copy access to tensors.

use crate::few;
use crate::gemm::Output;
use crate::panels::{self, Stored};
use crate::runs::{Tile, Way};
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType};
use std::ops::Deref;

/// `f32` for work, `f64` for finite-difference tests.
pub(crate) trait Real:
    WithDType + Default + num_traits::Float + std::iter::Sum + 'static
{
    /// `exp`, for `f32` without the call into the maths library that keeps loops scalar.
    fn fast_exp(self) -> Self;

    /// As [`few::product`], which there is for `f32` alone.
    fn few_rows(shape: few::Shape, x: &[Self], w: &[Self], y: &mut [Self]) -> bool {
        let _ = (shape, x, w, y);
        false
    }

    /// As [`Tile::by_unit`], of rows, matrix, and numbers from a row of it to the next, if the processor has a unit
    /// for such numbers that is worth it; whether it has.
    ///
    /// # Safety
    /// As there.
    unsafe fn by_unit<'a>(
        tile: &Tile,
        way: Way,
        (rows, w, stride): (&'a [Self], &[Self], usize),
        out: Output<'_, Self>,
        scratch: &mut panels::Scratch<'a>,
    ) -> bool {
        let _ = (tile, way, rows, w, stride, out, scratch);
        false
    }
}

impl Real for f32 {
    #[inline(always)]
    fn fast_exp(self) -> Self {
        crate::lanes::exp(self)
    }

    fn few_rows(shape: few::Shape, x: &[Self], w: &[Self], y: &mut [Self]) -> bool {
        few::product(shape, x, w, y)
    }

    unsafe fn by_unit<'a>(
        tile: &Tile,
        way: Way,
        (rows, w, stride): (&'a [Self], &[Self], usize),
        out: Output<'_, Self>,
        scratch: &mut panels::Scratch<'a>,
    ) -> bool {
        let Some(unit) = Self::unit().filter(|_| tile.is_large()) else {
            return false;
        };
        // SAFETY: the caller's promise.
        unsafe { tile.by_unit(unit, way, rows, (w, stride), out, scratch) };
        true
    }
}

impl Real for f64 {
    #[inline(always)]
    fn fast_exp(self) -> Self {
        self.exp()
    }
}

/// Runs `$body` with `$T` bound to the tensor's element type.
macro_rules! dispatch {
    ($dtype:expr, $name:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => candle_core::bail!(
                "{}: element type {other:?} is not supported on the CPU; load the model as f32",
                $name
            ),
        }
    };
}
pub(crate) use dispatch;

/// The elements of a contiguous CPU storage, in the order of its layout.
pub(crate) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("a contiguous tensor was expected")
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// Read access to a contiguous CPU tensor without a copy.
pub(crate) struct View<'a, G> {
    guard: G,
    layout: &'a Layout,
}

/// Locks a tensor's storage for reading.
pub(crate) fn view(tensor: &Tensor) -> View<'_, impl Deref<Target = Storage> + '_> {
    let (guard, layout) = tensor.storage_and_layout();
    View { guard, layout }
}

impl<G: Deref<Target = Storage>> View<'_, G> {
    pub(crate) fn slice<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.guard {
            Storage::Cpu(storage) => slice(storage, self.layout),
            _ => candle_core::bail!("a tensor on the CPU was expected"),
        }
    }
}

/// A new contiguous CPU tensor.
pub(crate) fn tensor<T: Real>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

/// The gradient `data` of `input`, if anybody asked for it.
pub(crate) fn tracked<T: Real>(input: &Tensor, data: Vec<T>) -> Result<Option<Tensor>> {
    input
        .track_op()
        .then(|| tensor(data, input.shape()))
        .transpose()
}

/// The storage that a custom op returns.
pub(crate) fn storage<T: Real>(data: Vec<T>) -> CpuStorage {
    T::to_cpu_storage_owned(data)
}

/// Checks that two tensors have one element type.
pub(crate) fn same_dtype(name: &str, a: DType, b: DType) -> Result<()> {
    if a != b {
        candle_core::bail!("{name}: element types differ, {a:?} and {b:?}")
    }
    Ok(())
}
