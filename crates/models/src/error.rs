//! What can go wrong with a model folder, in words that end with what to do.

use std::path::{Path, PathBuf};

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate: each names the file, key or tensor it is about.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot access `{}`; check that it exists and its permissions", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration file does not describe a model that we know.
    #[error("in `{}`: {message}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The key, what was expected of it, and what to do.
        message: String,
    },
    /// A tensor is missing or has another shape or type than the configuration says.
    #[error("tensor `{tensor}` in `{}`: {message}", path.display())]
    Tensor {
        /// The checkpoint file or folder.
        path: PathBuf,
        /// The tensor's full name.
        tensor: String,
        /// What was expected, what was found, and what to do.
        message: String,
    },
    /// A tokenizer or chat template cannot be used.
    #[error("tokenizer `{}`: {message}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What was expected, and what to do.
        message: String,
    },
    /// A request that cannot be met.
    #[error("{0}")]
    Invalid(String),
    /// The Hub could not be reached or did not keep to its word; the same request may succeed later.
    #[error("{0}")]
    Hub(String),
    /// The caller stopped a download; what had come is kept.
    #[error("the download was interrupted; start it again, it goes on where it stopped")]
    Interrupted,
    /// The tensor library failed.
    #[error("tensor operation failed: {0}; check the shapes, types and device it names")]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    /// An [`Error::Config`] about `path`.
    pub fn config(path: &Path, message: impl Into<String>) -> Self {
        Self::Config {
            path: path.to_owned(),
            message: message.into(),
        }
    }

    /// An [`Error::Tensor`] about the tensor `tensor` of `path`.
    pub fn tensor(path: &Path, tensor: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Tensor {
            path: path.to_owned(),
            tensor: tensor.into(),
            message: message.into(),
        }
    }

    /// An [`Error::Tokenizer`] about `path`.
    pub fn tokenizer(path: &Path, message: impl Into<String>) -> Self {
        Self::Tokenizer {
            path: path.to_owned(),
            message: message.into(),
        }
    }
}
