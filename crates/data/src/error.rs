//! The crate's one error type.

use std::path::{Path, PathBuf};

use crate::Task;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between text and token batches.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("Could not read `{}`. Check the path and its permissions.", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A line of a JSONL file is not a record.
    #[error(
        "`{}` line {line}: {problem}. Expected {{\"prompt\": \"...\", \"completion\": \"...\"}} or \
         {{\"messages\": [{{\"role\": \"...\", \"content\": \"...\"}}, ...]}} whose last message is \
         the assistant's; correct or remove the line.",
        path.display()
    )]
    Record {
        /// The file.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// What is wrong with the line.
        problem: String,
    },
    /// A line of a file of documents is none.
    #[error(
        "`{}` line {line}: {problem}. Expected {{\"text\": \"...\"}}; correct or remove the line.",
        path.display()
    )]
    Document {
        /// The file.
        path: PathBuf,
        /// 1-based line number.
        line: usize,
        /// What is wrong with the line.
        problem: String,
    },
    /// A file holds nothing to train on.
    #[error("`{}` is empty. Expected at least one record or some text; check the path.", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A task name that does not exist.
    #[error("Unknown task `{name}`. Use one of {}.", Task::names())]
    UnknownTask {
        /// The name as given.
        name: String,
    },
    /// The tokenizer refused a text or a definition.
    #[error("The tokenizer failed: {0}. Check that tokenizer.json belongs to this model.")]
    Tokenizer(String),
    /// An answer alone exceeds the length limit.
    #[error(
        "The completion needs {needed} tokens with the end-of-text token, more than the limit of \
         {limit}. Raise the maximum length or leave this example out."
    )]
    TooLong {
        /// Tokens of the completion, the end token included.
        needed: usize,
        /// The limit in tokens.
        limit: usize,
    },
    /// A file of tasks cannot be understood.
    #[error("Task file `{file}`: {problem}.")]
    TaskFile {
        /// The file.
        file: String,
        /// What is wrong, with the line where it is known, and what to do.
        problem: String,
    },
    /// A task, group or tag that does not exist.
    #[error(
        "There is no task, group or tag `{name}`. `lightmoe tasks` lists those that come with the \
         program; give the path of a YAML file, or of a folder of such files, for one of your own."
    )]
    UnknownBenchmark {
        /// The name as given.
        name: String,
    },
    /// The data of a task are not there.
    #[error("{0}")]
    NoData(Box<MissingData>),
    /// A row of a data file cannot be used.
    #[error("`{}` {} {line}: {problem}. Correct or remove the row.", path.display(), unit(path))]
    Row {
        /// The file.
        path: PathBuf,
        /// 1-based number of the line, or of the row where there are no lines.
        line: usize,
        /// Which field is wrong, and how.
        problem: String,
    },
    /// A data file cannot be used as a whole.
    #[error("`{}`: {problem}.", path.display())]
    DataFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A task asks for what its data cannot give.
    #[error("Task `{task}`: {problem}.")]
    Unusable {
        /// The task.
        task: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Batches were asked of nothing, or of no size.
    #[error("Cannot make batches: {0}.")]
    Batch(&'static str),
}

/// Which data are not there, and how to come by them.
#[derive(Debug, thiserror::Error)]
#[error(
    "Task `{task}`: no file with the split `{split}` was found. It was looked for in {tried}{cache}. Expected \
     {format}. {origin}Give the folder with `--data`{remedy}."
)]
pub struct MissingData {
    /// The task.
    pub task: String,
    /// The split.
    pub split: String,
    /// Every path that was tried.
    pub tried: String,
    /// The cache that was tried.
    pub cache: String,
    /// The form of the file.
    pub format: String,
    /// Where people get it.
    pub origin: String,
    /// What else can be done.
    pub remedy: &'static str,
}

/// What the places in a data file are counted in.
fn unit(path: &Path) -> &'static str {
    match path.extension().is_some_and(|ending| ending == "parquet") {
        true => "row",
        false => "line",
    }
}
