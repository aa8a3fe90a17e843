//! What can go wrong while training.

use std::path::{Path, PathBuf};

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot access `{}`; check that it exists and its permissions", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A training checkpoint does not belong to this run, or is damaged.
    #[error("training checkpoint `{}`: {message}; remove it to start again", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// Options that cannot work, or a run that went wrong.
    #[error("{0}")]
    Invalid(String),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] lightmoe_models::Error),
    /// The tensor library failed.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn state(path: &Path, message: impl Into<String>) -> Self {
        Self::State {
            path: path.to_owned(),
            message: message.into(),
        }
    }
}
