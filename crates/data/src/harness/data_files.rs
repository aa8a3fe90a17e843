//! Where the data of a task lie, and in which form.

use super::config::one_or_many;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Where the rows of each split lie.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataFiles {
    /// Form of the files.
    pub format: DataFormat,
    /// Names of the columns of a file that does not name them itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// Folders below that of the data to look in besides it.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "one_or_many"
    )]
    pub folders: Vec<String>,
    /// By split, a file's path, a template over `dataset_name`; the first of several that exists,
    /// with or without `.gz`.
    pub splits: BTreeMap<String, Paths>,
    /// By split, a file with one label a line, which become the field `label`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Paths>,
    /// By split, an expression that says which rows of its file are in it, where not all are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rows: BTreeMap<String, String>,
    /// The data set's name on the Hub, where it has moved from `dataset_path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    /// Where people get the files.
    pub source: String,
}

/// One path or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Paths(#[serde(deserialize_with = "one_or_many")] pub Vec<String>);

/// Form of a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DataFormat {
    /// One JSON object a line.
    Jsonl,
    /// A JSON array of rows, or an object with one for each split; a row is an object, or a list of the
    /// values of `columns`.
    Json,
    /// A folder with one JSON object a file, in the order of the numbers that they are named by.
    JsonFiles,
    /// Comma-separated, quoted where needed; the first line names the columns unless `columns` does.
    Csv,
    /// Tab-separated, without quoting; the same.
    Tsv,
    /// Parquet, which is read as well where a task names another form.
    Parquet,
    /// The whole file is the field `text` of one row.
    Text,
    /// WikiText: a row's field `page` is an article, which begins with a line `= Title =`.
    Wikitext,
}

impl DataFormat {
    /// What the name of a file says, packed or not.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let name = name.strip_suffix(".gz").unwrap_or(name);
        Some(match name.rsplit_once('.')?.1 {
            "parquet" => Self::Parquet,
            "jsonl" => Self::Jsonl,
            "json" => Self::Json,
            "csv" => Self::Csv,
            "tsv" => Self::Tsv,
            _ => return None,
        })
    }
}
