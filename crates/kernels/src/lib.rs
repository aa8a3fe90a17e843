//! The arithmetic of Mixture-of-Experts layers, forward and backward: on the CPU, and with the feature `cuda`
//! whole layers of experts on NVIDIA GPUs.
//!
//! Several of candle's own operations drop the gradient without a word, and none of them
//! works on many experts at once. The operations for the CPU enter candle as custom ops with a
//! backward, are multi-threaded, and give the same bits whatever the number of threads: every
//! output element is written by exactly one task whose order of summation is fixed.
//!
//! Symbols, used throughout: `T` tokens, `S` rows (token × chosen expert pairs), `E` experts,
//! `K` top-k, `H` hidden size, `F` expert intermediate size, `R` adapter rank, `D` head size.
//!
//! On the CPU all operations take `f32` or `f64` (the latter for finite-difference tests) and contiguous or
//! strided tensors; outputs are contiguous. The matrices of products may be `bf16` where rows are `f32`.

mod adamw;
mod attention;
mod choice;
mod composed;
#[cfg(feature = "cuda")]
pub mod cuda;
mod few;
mod gemm;
mod grouped;
mod lanes;
mod loss;
mod low_rank;
mod memory;
mod mixed;
mod norm;
#[cfg(any(test, feature = "linked"))]
mod padded;
mod panels;
mod real;
mod rope;
mod route;
mod runs;
mod scatter;
mod spread;
mod swiglu;
mod trained;
mod whole;

pub use adamw::{AdamW, Moments};
pub use attention::{Seen, attention, causal_attention};
pub use choice::{Choice, ExpertGroups};
pub use grouped::{Segment, grouped_linear, linear};
pub use loss::cross_entropy;
pub use low_rank::low_rank;
pub use memory::{keep_freed_memory, return_freed_memory, tune_process};
pub use mixed::as_rows;
pub use norm::rms_norm;
pub use rope::{Rope, RopePairs, apply_rope};
pub use route::{Dispatch, TokenGroups, top_k};
pub use scatter::{add_rows, select_rows, weighted_scatter};
pub use spread::spread_columns;
pub use swiglu::{silu_with_slope, swiglu};
pub use trained::TrainedLayer;
pub use whole::{AdapterParts, LayerParts, WholeLayer};
