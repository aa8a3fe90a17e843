//! The same arithmetic on NVIDIA GPUs: a whole layer of experts, original or compressed.
//!
//! Kernels are CUDA sources inside this crate. NVRTC compiles them at first use for the GPU at hand;
//! neither a toolkit nor a GPU is needed to build. Numbers are `bf16` or `f16` in memory and `f32` in
//! sums; no sum depends on the order in which blocks run, so the same inputs give the same bits.

mod adapters;
#[cfg(feature = "linked")]
mod attention;
mod backward;
mod block;
mod compile;
mod decode;
mod device;
mod forward;
mod gradients;
mod graph;
mod grouped;
mod held;
#[cfg(feature = "linked")]
mod made;
#[cfg(any(test, feature = "linked"))]
mod pack;
mod products;
mod route;
mod rows;
mod tensor_map;
#[cfg(feature = "linked")]
mod tensors;
#[cfg(test)]
mod tests;
#[cfg(feature = "linked")]
mod tokens;
#[cfg(feature = "linked")]
mod trained;
#[cfg(feature = "linked")]
mod whole;
mod workspace;

pub use crate::choice::{Choice, ExpertGroups};
pub use block::{Adapted, Block, Projections, Shape, Weights};
pub use compile::{Binary, ElementKind, SOURCES, Source, compile, compiler_present};
pub use device::{Element, Gpu, Number};
pub use forward::Stage;
pub use gradients::{Gradients, Trained};
pub use graph::Graph;
pub use grouped::Path as GroupedPath;
pub use held::Held;
pub use route::Scores;
#[cfg(feature = "linked")]
pub use tensors::device;
#[cfg(feature = "linked")]
pub(crate) use tensors::{Product, Way};
pub use workspace::Workspace;
#[cfg(feature = "linked")]
pub(crate) use {
    attention::Attention,
    made::{aligned, gpu_of, gpu_of_f32},
    tokens::{
        cross_entropy, cross_entropy_gradient, norm_gradient, spread_rows, sum_rows, swiglu,
        swiglu_gradients,
    },
    trained::TrainedOnGpu,
    whole::OnGpu,
};

/// What can go wrong on a GPU.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The driver's library cannot be loaded.
    #[error(
        "no NVIDIA driver: `libcuda.so` cannot be loaded; install the driver, or work on the CPU"
    )]
    NoDriver,
    /// The compiler's library cannot be loaded.
    #[error(
        "no NVRTC: `libnvrtc.so` cannot be loaded; it comes with the CUDA toolkit and with the Python \
         package `nvidia-cuda-nvrtc`; put its folder into LD_LIBRARY_PATH"
    )]
    NoCompiler,
    /// The card is older than Ampere.
    #[error("`{name}` has compute capability {major}.{minor}; 8.0 (A100) is the least")]
    TooOld {
        /// The name of the card.
        name: String,
        /// Its compute capability.
        major: i32,
        /// Its second digit.
        minor: i32,
    },
    /// The card has too little shared memory.
    #[error(
        "`{name}` gives a block {shared} bytes of shared memory; the kernels need what data-centre cards \
         from the A100 on have"
    )]
    TooSmall {
        /// The name of the card.
        name: String,
        /// Bytes of shared memory of a block.
        shared: i32,
    },
    /// A kernel does not compile.
    #[error("the kernel `{kernel}` does not compile for {architecture}:\n{log}")]
    Compile {
        /// Its file, without the ending.
        kernel: &'static str,
        /// What it was compiled for.
        architecture: String,
        /// What the compiler said.
        log: String,
    },
    /// The driver refused something.
    #[error("{what}: {source}")]
    Driver {
        /// What was tried.
        what: String,
        /// What the driver said.
        source: cudarc::driver::DriverError,
    },
    /// Arguments do not fit.
    #[error("{0}")]
    Shape(String),
}

/// The result of an operation on a GPU.
pub type Result<T> = std::result::Result<T, CudaError>;

/// Names what was tried when the driver refuses it.
trait Trying<T> {
    fn trying(self, what: impl Into<String>) -> Result<T>;
}

impl<T> Trying<T> for std::result::Result<T, cudarc::driver::DriverError> {
    fn trying(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|source| CudaError::Driver {
            what: what.into(),
            source,
        })
    }
}

/// Stops with a message unless a condition on the arguments holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::cuda::CudaError::Shape(format!($($message)+)));
        }
    };
}
use ensure;
