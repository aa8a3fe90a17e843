//! The documents of a task: read, and put into their fields.

use super::config::TaskConfig;
use super::find::Finder;
use super::rows::{add_labels, read_rows};
use super::template::{Engine, Fields};
use crate::{Error, Result};
use serde_json::Value;
use std::path::PathBuf;

/// A document and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Doc {
    /// Its fields.
    pub fields: Fields,
    /// The file.
    pub path: PathBuf,
    /// 1-based line of the file, or the number of the row where it has no lines.
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

/// Reads the documents of a split from where they are found.
///
/// # Errors
/// What finding and reading the files brings.
pub(super) fn read_docs(finder: &Finder<'_>) -> Result<Vec<Doc>> {
    let found = finder.find()?;
    let mut rows = Vec::new();
    for path in &found.paths {
        let of_file = read_rows(path, &found.form)?.into_iter();
        rows.extend(of_file.map(|(line, fields)| (path, line, fields)));
    }
    if let Some(labels) = &found.labels {
        add_labels(labels, rows.iter_mut().map(|(_, _, fields)| fields))?;
    }
    let files = finder.task.data_files.as_ref();
    let wanted = files.and_then(|files| files.rows.get(finder.split));
    let mut docs = Vec::new();
    for (number, (path, line, fields)) in rows.into_iter().enumerate() {
        let doc = Doc {
            fields,
            path: path.clone(),
            line,
        };
        let wanted = wanted.map(String::as_str);
        docs.extend(document(finder.task, doc, number, wanted, finder.engine)?);
    }
    match docs.is_empty() {
        true => Err(Error::Unusable {
            task: finder.task.name().to_owned(),
            problem: format!(
                "no row of its file is in the split `{}`; check `data_files.rows` and the file",
                finder.split
            ),
        }),
        false => Ok(docs),
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
