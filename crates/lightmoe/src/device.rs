//! Which processor the models of this process run on, and as what numbers.

use crate::machine;
use crate::preflight::Refused;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use lightmoe_models::{Checkpoint, Placement};
use std::str::FromStr;
use std::sync::OnceLock;

/// A processor, as a user names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// `auto`: the first GPU, where this program has CUDA and there is one; else the CPU.
    Auto,
    /// `cpu`
    Cpu,
    /// `cuda` or `cuda:N`: the NVIDIA GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let number = match name {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => name.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
        };
        let number = number.with_context(|| {
            format!(
                "`device` is `{name}`; use auto, cpu, cuda, or cuda:N for another than the first GPU"
            )
        })?;
        Ok(Self::Cuda(number))
    }
}

/// The element type that a user names: `None` for `auto`.
///
/// # Errors
/// If it is none that models compute with on this processor.
pub fn dtype(name: &str, device: DeviceName) -> Result<Option<DType>> {
    let dtype = match name {
        "auto" => None,
        "f32" => Some(DType::F32),
        "bf16" => Some(DType::BF16),
        "f16" => Some(DType::F16),
        _ => bail!("`dtype` is `{name}`; use auto, f32, bf16 or f16"),
    };
    ensure!(
        device != DeviceName::Cpu || dtype != Some(DType::F16),
        "`dtype` is `f16`, which the CPU does not compute with; use auto, f32 or bf16 (files keep the \
         model's own element type)"
    );
    Ok(dtype)
}

/// What this process was told.
struct Chosen {
    device: Device,
    dtype: Option<DType>,
}

static CHOSEN: OnceLock<Chosen> = OnceLock::new();

/// Opens the processor that all models of this process run on, and sets the numbers that they compute
/// with: of `auto` f32 on the CPU, and on a GPU what the weights are. The first call counts.
///
/// # Errors
/// If there is no such processor, or it cannot compute with these numbers.
pub fn choose(device: &str, dtype: &str) -> Result<()> {
    let name: DeviceName = device.parse().map_err(Refused::of)?;
    let number = self::dtype(dtype, name).map_err(Refused::of)?;
    let device = match name {
        DeviceName::Cpu => Device::Cpu,
        DeviceName::Cuda(number) => gpu(number)?,
        DeviceName::Auto => first_gpu(),
    };
    if device.is_cpu() {
        // Of `auto` it is known only now.
        self::dtype(dtype, DeviceName::Cpu).map_err(Refused::of)?;
    }
    let _ = CHOSEN.set(Chosen {
        device,
        dtype: number,
    });
    Ok(())
}

#[cfg(feature = "cuda")]
fn gpu(number: usize) -> Result<Device> {
    // Says what is missing: a driver, a card, or a newer one.
    lightmoe_kernels::cuda::Gpu::new(number).map_err(Refused::of)?;
    Ok(lightmoe_kernels::cuda::device(number)?)
}

/// The first GPU, or the CPU where there is none.
fn first_gpu() -> Device {
    gpu(0).unwrap_or_else(|error| {
        if cfg!(feature = "cuda") {
            tracing::warn!("models run on the CPU: {error:#}");
        }
        Device::Cpu
    })
}

#[cfg(not(feature = "cuda"))]
fn gpu(number: usize) -> Result<Device> {
    let message = format!(
        "`device` is `cuda:{number}`, and this program was built without CUDA; build it with \
         `cargo xtask cuda`, or use auto or cpu"
    );
    Err(Refused(message).into())
}

/// Where the weights of a model go.
pub fn placement(checkpoint: &Checkpoint) -> Placement {
    let Some(Chosen { device, dtype }) = CHOSEN.get() else {
        return Placement::default();
    };
    let own = match checkpoint.dtype() {
        own @ (DType::BF16 | DType::F16) if !device.is_cpu() => own,
        _ => DType::F32,
    };
    Placement {
        device: device.clone(),
        dtype: dtype.unwrap_or(own),
    }
}

/// Where a model goes that is trained from nothing: f32.
pub fn fresh() -> Placement {
    let device = CHOSEN.get().map(|chosen| chosen.device.clone());
    Placement {
        device: device.unwrap_or(Device::Cpu),
        ..Placement::default()
    }
}

/// The most memory that models may take where they run, in bytes.
pub fn max_memory() -> u64 {
    let away = CHOSEN.get().and_then(|chosen| free(&chosen.device));
    away.unwrap_or_else(machine::max_memory)
}

/// Three quarters of what a GPU has free.
#[cfg(feature = "cuda")]
fn free(device: &Device) -> Option<u64> {
    let Device::Cuda(device) = device else {
        return None;
    };
    let (free, _) = device.cuda_stream().context().mem_get_info().ok()?;
    Some(free as u64 / 4 * 3)
}

#[cfg(not(feature = "cuda"))]
fn free(_: &Device) -> Option<u64> {
    None
}

/// The fingerprint of work that goes on where it was stopped, if `fingerprint` is that on the CPU: numbers
/// that another processor made, or of another kind, do not go together with it.
///
/// # Errors
/// None but those of [`crate::fingerprint`].
pub fn fingerprint(fingerprint: &str, placement: &Placement) -> Result<String> {
    match placement.device.is_cpu() {
        true if placement.dtype == DType::F32 => Ok(fingerprint.to_owned()),
        true => crate::fingerprint(&(fingerprint, "cpu", placement.dtype.as_str())),
        false => crate::fingerprint(&(fingerprint, "cuda", placement.dtype.as_str())),
    }
}
