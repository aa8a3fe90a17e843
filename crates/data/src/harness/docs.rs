//! The documents of a task: found in the data's folder, read, and put into their fields.

use super::config::TaskConfig;
use super::data_files::{DataFiles, DataFormat};
use super::rows::{add_labels, numbered_files, read_rows};
use super::template::{Engine, Fields};
use crate::{Error, MissingData, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A document and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Doc {
    /// Its fields.
    pub fields: Fields,
    /// The file.
    pub path: PathBuf,
    /// 1-based line of the file.
    pub line: usize,
}

impl Doc {
    /// An error about this document.
    pub(super) fn fails(&self, problem: String) -> Error {
        Error::Row {
            path: self.path.clone(),
            line: self.line,
            problem,
        }
    }
}

/// Reads the documents of a split from the first of `folders` that has them. One of them may be a
/// file, which is then the split's own.
///
/// # Errors
/// [`Error::NoData`] if no file is there, and what reading it brings.
pub fn read_docs(
    task: &TaskConfig,
    split: &str,
    folders: &[PathBuf],
    engine: &Engine,
) -> Result<Vec<Doc>> {
    let unusable = |problem: String| Error::Unusable {
        task: task.name().to_owned(),
        problem,
    };
    let files = task.data_files.as_ref().ok_or_else(|| {
        unusable("it has no `data_files`; say in which file each split lies".into())
    })?;
    let paths = files.splits.get(split).ok_or_else(|| {
        unusable(format!(
            "`data_files.splits` has no `{split}`, which the task reads; name its file"
        ))
    })?;
    let finder = Finder {
        task,
        split,
        files,
        folders,
        engine,
    };
    let found = finder.find(&paths.0)?;
    let found = match files.format {
        DataFormat::JsonFiles => numbered_files(&found)?,
        _ => vec![found],
    };
    let mut docs = Vec::new();
    for path in found {
        let mut rows = read_rows(&path, split, files)?;
        if let Some(labels) = files.labels.get(split) {
            add_labels(&finder.find(&labels.0)?, &mut rows)?;
        }
        docs.extend(rows.into_iter().map(|(line, fields)| Doc {
            fields,
            path: path.clone(),
            line,
        }));
    }
    let wanted = files.rows.get(split).map(String::as_str);
    let mut chosen = Vec::new();
    for (number, row) in docs.into_iter().enumerate() {
        chosen.extend(document(task, row, number, wanted, engine)?);
    }
    match chosen.is_empty() {
        true => Err(unusable(format!(
            "no row of its file is in the split `{split}`; check `data_files.rows` and the file"
        ))),
        false => Ok(chosen),
    }
}

/// Puts a row into the fields of a document, if it is `wanted`. Expressions see the row,
/// `dataset_name` and `row_number`.
fn document(
    task: &TaskConfig,
    mut doc: Doc,
    number: usize,
    wanted: Option<&str>,
    engine: &Engine,
) -> Result<Option<Doc>> {
    if task.process_docs.is_none() && wanted.is_none() {
        return Ok(Some(doc));
    }
    let mut row = doc.fields.clone();
    row.insert("row_number".into(), number.into());
    row.insert("dataset_name".into(), task.dataset_name.clone().into());
    if let Some(expression) = wanted {
        match engine.expression(expression, &row) {
            Ok(Value::Bool(true)) => {}
            Ok(Value::Bool(false)) => return Ok(None),
            Ok(other) => {
                let problem = format!("`data_files.rows` gives {other}, neither true nor false");
                return Err(doc.fails(problem));
            }
            Err(problem) => return Err(doc.fails(problem)),
        }
    }
    if let Some(fields) = &task.process_docs {
        doc.fields = Fields::new();
        for (name, expression) in fields {
            let value = evaluated(expression, &row, engine)
                .map_err(|problem| doc.fails(format!("field `{name}`: {problem}")))?;
            doc.fields.insert(name.clone(), value);
        }
    }
    Ok(Some(doc))
}

/// The expressions in `value`, computed.
fn evaluated(value: &Value, row: &Fields, engine: &Engine) -> Result<Value, String> {
    Ok(match value {
        Value::String(expression) => engine.expression(expression, row)?,
        Value::Array(list) => {
            let list = list.iter().map(|item| evaluated(item, row, engine));
            Value::Array(list.collect::<Result<_, _>>()?)
        }
        Value::Object(map) => {
            let pairs = map
                .iter()
                .map(|(key, item)| Ok((key.clone(), evaluated(item, row, engine)?)));
            Value::Object(pairs.collect::<Result<_, String>>()?)
        }
        other => other.clone(),
    })
}

/// Where the file of a split may lie.
struct Finder<'a> {
    task: &'a TaskConfig,
    split: &'a str,
    files: &'a DataFiles,
    folders: &'a [PathBuf],
    engine: &'a Engine,
}

impl Finder<'_> {
    fn find(&self, paths: &[String]) -> Result<PathBuf> {
        let mut tried = Vec::new();
        for folder in self.folders {
            if folder.is_file() {
                return Ok(folder.clone());
            }
            for place in self.places(folder)? {
                for path in paths {
                    let path = place.join(self.filled(path)?);
                    for candidate in self.candidates(path) {
                        let is_there = match self.files.format {
                            DataFormat::JsonFiles => candidate.is_dir(),
                            _ => candidate.is_file(),
                        };
                        if is_there {
                            return Ok(candidate);
                        }
                        tried.push(candidate);
                    }
                }
            }
        }
        let tried: Vec<String> = tried.iter().map(|p| format!("`{}`", p.display())).collect();
        Err(Error::NoData(Box::new(MissingData {
            task: self.task.name().to_owned(),
            split: self.split.to_owned(),
            tried: match tried.is_empty() {
                true => "no folder, for none was given".into(),
                false => tried.join(", "),
            },
            format: format_name(self.files),
            origin: self.files.source.clone(),
        })))
    }

    /// A file may be packed.
    fn candidates(&self, path: PathBuf) -> Vec<PathBuf> {
        let mut packed = path.clone().into_os_string();
        packed.push(".gz");
        match self.files.format {
            DataFormat::JsonFiles => vec![path],
            _ => vec![path, packed.into()],
        }
    }

    /// The folders that bear the names of the task and its data, and then the folder that they are in:
    /// files of many benchmarks have the same names.
    fn places(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let mut places = vec![folder.join(self.task.name())];
        for name in &self.files.folders {
            places.push(folder.join(self.filled(name)?));
        }
        places.push(folder.to_owned());
        places.dedup();
        Ok(places)
    }

    fn filled(&self, path: &str) -> Result<String> {
        let name = self.task.dataset_name.clone();
        let fields = Fields::from_iter([("dataset_name".to_owned(), Value::from(name))]);
        self.engine
            .text(path, &fields)
            .map_err(|problem| Error::Unusable {
                task: self.task.name().to_owned(),
                problem,
            })
    }
}

fn format_name(files: &DataFiles) -> String {
    let format = match files.format {
        DataFormat::Jsonl => "one JSON object a line",
        DataFormat::Json => "a JSON array of rows, or an object with one for each split",
        DataFormat::JsonFiles => "a folder with one JSON object a file",
        DataFormat::Csv => "comma-separated columns",
        DataFormat::Tsv => "tab-separated columns",
        DataFormat::Text => "plain text",
        DataFormat::Wikitext => "the text of WikiText, articles one after the other",
    };
    match files.columns.is_empty() {
        true => format.to_owned(),
        false => format!("{format} ({})", files.columns.join(", ")),
    }
}
