//! What can go wrong between a checkpoint and a plan, in words that end with what to do.

use std::path::PathBuf;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate: each names the file, layer or setting it is about.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot access `{}`; check that it exists, its permissions and the free space", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of observations or scores cannot be used.
    #[error("in `{}`: {message}", path.display())]
    Observations {
        /// The file.
        path: PathBuf,
        /// The layer or tensor, what was expected of it, and what to do.
        message: String,
    },
    /// A plan file cannot be used.
    #[error("in `{}`: {message}", path.display())]
    Plan {
        /// The file.
        path: PathBuf,
        /// The layer and slot, what was expected of them, and what to do.
        message: String,
    },
    /// The caller stopped the work; nothing half-written remains.
    #[error("interrupted; nothing half-written remains, start the stage again or resume the run")]
    Interrupted,
    /// A request that cannot be met, or values that contradict each other.
    #[error("{0}")]
    Invalid(String),
    /// The model's configuration or checkpoint cannot be used.
    #[error(transparent)]
    Model(#[from] lightmoe_models::Error),
    /// The tensor library failed.
    #[error("tensor operation failed: {0}; check the shapes, types and device it names")]
    Candle(#[from] candle_core::Error),
}
