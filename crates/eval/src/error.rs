//! What can go wrong in an evaluation, in words that end with what to do.

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate. Examples are numbered from 0.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// There is nothing to evaluate.
    #[error("there are no examples to evaluate; check the data file or the number of items")]
    Empty,
    /// An option that cannot work.
    #[error("{0}")]
    Invalid(String),
    /// An example cannot be scored.
    #[error("example {index}: {message}")]
    Example {
        /// The example's number.
        index: usize,
        /// What was expected of it, and what to do.
        message: String,
    },
    /// An example cannot be made into tokens.
    #[error("example {index} cannot be made into tokens")]
    Encode {
        /// The example's number.
        index: usize,
        /// What the encoder said.
        source: lightmoe_data::Error,
    },
    /// The model gives no numbers.
    #[error(
        "example {index}: the model's output is not a number; the checkpoint is damaged or its \
         training went wrong: lower the learning rate and build it again"
    )]
    NotFinite {
        /// The example's number.
        index: usize,
    },
    /// The caller stopped the work; nothing was written.
    #[error("the evaluation was interrupted; run it again to score all examples")]
    Interrupted,
    /// A document of a benchmark cannot be scored.
    #[error("`{}` line {line}: {message}", path.display())]
    Document {
        /// The file.
        path: std::path::PathBuf,
        /// 1-based line.
        line: usize,
        /// What was expected of it, and what to do.
        message: String,
    },
    /// The model gives no numbers.
    #[error(
        "the model's output is not a number; the checkpoint is damaged or its training went wrong: \
         lower the learning rate and build it again"
    )]
    NoNumbers,
    /// A program that the model wrote could not be run.
    #[error("a program that the model wrote could not be run: {0}")]
    Program(String),
    /// The journal of an evaluation cannot be used.
    #[error("`{}` cannot be read or written; check the folder and its permissions", path.display())]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The samples cannot be written as JSON.
    #[error("the samples cannot be written as JSON: {0}; report it")]
    Json(#[from] serde_json::Error),
    /// The model or its tokenizer failed.
    #[error(transparent)]
    Model(#[from] lightmoe_models::Error),
    /// The tensor library failed.
    #[error("tensor operation failed: {0}; check the shapes, types and device it names")]
    Candle(#[from] candle_core::Error),
}
