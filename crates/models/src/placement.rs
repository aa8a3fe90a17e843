//! Where the weights of a model are, and as what numbers.

use crate::Result;
use candle_core::{DType, Device, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

/// Where the weights that are read of a checkpoint go, and as what: f32 in the memory of the host, where
/// nothing else is said. Parameters of routers are f32 everywhere.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The processor that computes with them.
    pub device: Device,
    /// Their element type: on the CPU f32 or bf16, and rows are f32 whichever it is; on a GPU rows have the
    /// same type.
    pub dtype: DType,
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
        }
    }
}

impl Placement {
    /// The same place, as f32: where sums are taken that rounding would spoil.
    #[must_use]
    pub fn exact(&self) -> Self {
        Self {
            device: self.device.clone(),
            dtype: DType::F32,
        }
    }

    /// A tensor there.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn put(&self, tensor: &Tensor) -> Result<Tensor> {
        let tensor = match (self.dtype, tensor.dtype()) {
            (DType::BF16, DType::F32) if tensor.device().is_cpu() => rounded(tensor)?,
            _ => tensor.to_dtype(self.dtype)?,
        };
        Ok(tensor.to_device(&self.device)?)
    }
}

/// As bf16, by all threads; candle takes one.
fn rounded(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
    else {
        return Ok(tensor.to_dtype(DType::BF16)?);
    };
    let values = storage.as_slice::<f32>()?[start..end].par_iter();
    let values: Vec<bf16> = values.map(|&value| bf16::from_f32(value)).collect();
    Ok(Tensor::from_vec(values, layout.shape(), tensor.device())?)
}

/// A part of a tensor, or all of it, ready to be read by the host: of one that is elsewhere candle would bring
/// all that the part belongs to.
///
/// # Errors
/// If there is no room for it.
pub fn to_be_read(part: &Tensor) -> candle_core::Result<Tensor> {
    match part.device().is_cpu() {
        true => Ok(part.clone()),
        false => part.force_contiguous(),
    }
}
