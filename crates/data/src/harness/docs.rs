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
    let docs = rows.into_iter().enumerate();
    docs.map(|(number, (path, line, fields))| {
        let doc = Doc {
            fields,
            path: path.clone(),
            line,
        };
        document(finder.task, doc, number, finder.engine)
    })
    .collect()
}

/// Puts a row into the fields of a document. Expressions see the row, `dataset_name` and `row_number`.
fn document(task: &TaskConfig, mut doc: Doc, number: usize, engine: &Engine) -> Result<Doc> {
    let Some(wanted) = &task.process_docs else {
        return Ok(doc);
    };
    let mut row = std::mem::take(&mut doc.fields);
    row.insert("row_number".into(), number.into());
    row.insert("dataset_name".into(), task.dataset_name.clone().into());
    for (name, expression) in wanted {
        let value = evaluated(expression, &row, engine)
            .map_err(|problem| doc.fails(format!("field `{name}`: {problem}")))?;
        doc.fields.insert(name.clone(), value);
    }
    Ok(doc)
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
