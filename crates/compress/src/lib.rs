//! From a checkpoint's routing to a plan of what each expert becomes: the compression side of
//! LightMoE (arXiv 2603.12645), and of the methods that share its stages.
//!
//! [`observations`] hold what the router did on sample data; [`methods::plan`] turns them into a
//! [`plan::Plan`] by way of [`mod@select`] (which experts), [`mod@group`] (which of them share a base)
//! and [`search`] (how many, for a wanted size); [`size`] counts what a plan leaves.
//!
//! Symbols: `E` experts per layer, `H` hidden size, `F` intermediate size, `R` adapter rank,
//! `M` shared bases per layer, `N'` experts replaced in a layer, `Gbar` an expert's share of its
//! layer's gate mass.

mod beside;
mod build;
mod error;
mod estimate;
mod inputs;
mod memory;
mod observe;
mod scores;
mod states;

pub mod align;
pub mod damage;
pub mod evolve;
pub mod factor;
pub mod group;
pub mod merge;
pub mod methods;
pub mod mixture;
pub mod moments;
pub mod observations;
pub mod plan;
pub mod ranks;
pub mod reception;
pub mod samples;
pub mod search;
pub mod select;
pub mod size;

pub use build::{BuildInputs, build, whole_bases};
pub use error::{Error, Result};
pub use estimate::{Estimate, estimate};
pub use memory::{batch_tokens, layer_bytes};
pub use observe::{ObserveOptions, Observed, Sensitivity, Statistics, Successor, observe};

/// Reads a whole file.
fn read(path: &std::path::Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        source,
    })
}
