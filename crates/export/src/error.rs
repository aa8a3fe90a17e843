//! What can go wrong in an export, in words that end with what to do.

use crate::ExportKind;
use std::path::PathBuf;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// A kind of export that does not exist.
    #[error("unknown kind of export `{name}`; use one of {}", ExportKind::names())]
    UnknownKind {
        /// The name as given.
        name: String,
    },
    /// The target cannot be written without losing something.
    #[error("`{}` {message}", path.display())]
    Target {
        /// The target folder.
        path: PathBuf,
        /// What is there, and what to do.
        message: String,
    },
    /// A file of an update is damaged.
    #[error("update `{}`: {message}", path.display())]
    Update {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found, and what to do.
        message: String,
    },
    /// A request that cannot be met.
    #[error("{0}")]
    Invalid(String),
    /// The caller stopped the work; nothing was written.
    #[error("the export was interrupted and nothing was written; run it again")]
    Interrupted,
    /// The checkpoint could not be read, or the folder not be written.
    #[error(transparent)]
    Model(#[from] lightmoe_models::Error),
    /// The tensor library failed.
    #[error("tensor operation failed: {0}; check the shapes, types and device it names")]
    Candle(#[from] candle_core::Error),
}
