//! The rows of a data file in a benchmark's own form.

use super::data_files::{DataFiles, DataFormat};
use super::parquet::parquet_rows;
use super::template::Fields;
use crate::records::read;
use crate::{Error, Result};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// A row, and the 1-based line where it begins, or its number where there are no lines.
pub(super) type Row = (usize, Fields);

/// How a file is read.
pub(super) struct Form<'a> {
    /// What it holds; none where its name says so.
    format: Option<DataFormat>,
    /// Names of the columns of a file that does not name them itself.
    columns: &'a [String],
    /// The split that is wanted of a file that has several.
    split: &'a str,
}

impl<'a> Form<'a> {
    /// As a task says.
    pub(super) fn of(files: &'a DataFiles, split: &'a str) -> Self {
        Self {
            format: Some(files.format),
            columns: &files.columns,
            split,
        }
    }

    /// As the file's name says.
    pub(super) fn by_name(split: &'a str) -> Self {
        Self {
            format: None,
            columns: &[],
            split,
        }
    }
}

/// Reads the rows of a file; one that ends in `.gz` is unpacked.
///
/// # Errors
/// [`Error::Read`], [`Error::DataFile`], [`Error::Empty`] without rows, [`Error::Row`] for a row that
/// is none.
pub(super) fn read_rows(path: &Path, form: &Form<'_>) -> Result<Vec<Row>> {
    let (columns, split) = (form.columns, form.split);
    let format = form.format.or_else(|| DataFormat::of(path));
    let format = format.ok_or_else(|| Error::DataFile {
        path: path.into(),
        problem:
            "its name does not say what it holds; let it end in .parquet, .jsonl, .json, .csv or \
                  .tsv"
                .into(),
    })?;
    let text = || read(path);
    let rows = match format {
        DataFormat::Parquet => parquet_rows(path)?,
        DataFormat::Jsonl => json_lines(path, &text()?)?,
        // In repositories files of lines are often called so.
        DataFormat::Json if form.format.is_none() => match text()? {
            text if text.trim_start().starts_with('[') => json_array(path, &text, split, columns)?,
            text => json_lines(path, &text)?,
        },
        DataFormat::Json => json_array(path, &text()?, split, columns)?,
        DataFormat::JsonFiles => json_object(path, &text()?)?,
        DataFormat::Csv => table(path, &text()?, columns, b',', true)?,
        DataFormat::Tsv => table(path, &text()?, columns, b'\t', false)?,
        DataFormat::Text => vec![(1, field("text", text()?))],
        DataFormat::Wikitext => articles(&text()?),
    };
    match rows.is_empty() {
        true => Err(Error::Empty { path: path.into() }),
        false => Ok(rows),
    }
}

/// The JSON files of a folder, in the order of the numbers that they are named by; a file itself.
///
/// # Errors
/// [`Error::Read`], and [`Error::Empty`] if there is none.
pub(super) fn numbered_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.into()]);
    }
    let read = |source| Error::Read {
        path: path.into(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(read)? {
        let file = entry.map_err(read)?.path();
        if file.extension().is_some_and(|e| e == "json") {
            let number = file
                .file_stem()
                .and_then(|name| name.to_str()?.parse().ok());
            files.push((number.unwrap_or(u64::MAX), file));
        }
    }
    files.sort();
    match files.is_empty() {
        true => Err(Error::Empty { path: path.into() }),
        false => Ok(files.into_iter().map(|(_, file)| file).collect()),
    }
}

/// Puts the lines of a file of labels into the field `label` of the rows.
///
/// # Errors
/// [`Error::Row`] if there is not one label a row.
pub(super) fn add_labels<'a>(
    path: &Path,
    rows: impl ExactSizeIterator<Item = &'a mut Fields>,
) -> Result<()> {
    let text = read(path)?;
    let labels: Vec<&str> = text.lines().collect();
    if labels.len() != rows.len() {
        return Err(Error::Row {
            path: path.into(),
            line: labels.len().min(rows.len()) + 1,
            problem: format!("{} labels are there for {} rows", labels.len(), rows.len()),
        });
    }
    for (row, label) in rows.zip(labels) {
        row.insert("label".into(), label.trim().into());
    }
    Ok(())
}

fn field(name: &str, text: String) -> Fields {
    Fields::from_iter([(name.to_owned(), Value::String(text))])
}

fn json_lines(path: &Path, text: &str) -> Result<Vec<Row>> {
    // Not `lines`: a JSON text may hold U+2028 and the like, and only `\n` ends a line.
    let lines = (1..).zip(text.split('\n'));
    lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(line, text)| match serde_json::from_str(text) {
            Ok(row) => Ok((line, row)),
            Err(e) => Err(Error::Row {
                path: path.into(),
                line,
                problem: format!("no JSON object ({e})"),
            }),
        })
        .collect()
}

/// An array of rows, or an object that has one for each split. A row is an object, or a list of the
/// values of `columns`.
fn json_array(path: &Path, text: &str, split: &str, columns: &[String]) -> Result<Vec<Row>> {
    let fails = |line: usize, problem: String| Error::Row {
        path: path.into(),
        line,
        problem,
    };
    let mut all: Value =
        serde_json::from_str(text).map_err(|e| fails(e.line(), format!("no JSON ({e})")))?;
    if let Value::Object(splits) = &mut all {
        let names: Vec<String> = splits.keys().map(|name| format!("`{name}`")).collect();
        let missing = || format!("there is no split `{split}` among {}", names.join(", "));
        all = splits.remove(split).ok_or_else(|| fails(1, missing()))?;
    }
    let Value::Array(rows) = all else {
        return Err(fails(1, "the rows are no JSON array".into()));
    };
    // The parser tells no lines; the number of the row is the next best.
    let numbered = (1..).zip(rows);
    numbered
        .map(|(number, row)| match row {
            Value::Object(fields) => Ok((number, fields)),
            Value::Array(values) if values.len() == columns.len() => {
                Ok((number, columns.iter().cloned().zip(values).collect()))
            }
            _ => Err(fails(
                number,
                format!(
                    "row {number} is neither an object nor a list of {} values ({})",
                    columns.len(),
                    columns.join(", ")
                ),
            )),
        })
        .collect()
}

fn json_object(path: &Path, text: &str) -> Result<Vec<Row>> {
    let row = serde_json::from_str(text).map_err(|e| Error::Row {
        path: path.into(),
        line: e.line(),
        problem: format!("no JSON object ({e})"),
    })?;
    Ok(vec![(1, row)])
}

fn table(
    path: &Path,
    text: &str,
    columns: &[String],
    delimiter: u8,
    quoting: bool,
) -> Result<Vec<Row>> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(quoting)
        // Rows of another length are told of below.
        .flexible(true)
        .has_headers(columns.is_empty())
        .from_reader(text.as_bytes());
    let row_error = |e: csv::Error| Error::Row {
        path: path.into(),
        line: e.position().map_or(1, |p| p.line() as usize),
        problem: format!("no row of the table ({e})"),
    };
    let names: Vec<String> = match columns {
        [] => reader
            .headers()
            .map_err(row_error)?
            .iter()
            .map(str::to_owned)
            .collect(),
        given => given.to_vec(),
    };
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(row_error)?;
        let line = record.position().map_or(1, |p| p.line() as usize);
        if record.len() != names.len() {
            return Err(Error::Row {
                path: path.into(),
                line,
                problem: format!(
                    "{} columns, expected {}: {}",
                    record.len(),
                    names.len(),
                    names.join(", ")
                ),
            });
        }
        let fields = names.iter().cloned().zip(record.iter().map(Value::from));
        rows.push((line, fields.collect()));
    }
    Ok(rows)
}

/// Articles of WikiText: each begins with a line `= Title =` (not `= = Section = =`); what stands
/// before the first one is dropped if it is blank.
fn articles(text: &str) -> Vec<Row> {
    let (mut rows, mut page, mut begin) = (Vec::new(), Vec::new(), 1);
    for (number, line) in (1..).zip(text.split('\n')) {
        let marks = line.replace("= = =", "===").replace("= =", "==");
        let marks = marks.trim();
        if marks.starts_with("= ") && marks.ends_with(" =") {
            let article = page.join("\n");
            if !article.trim().is_empty() {
                rows.push((begin, field("page", article)));
            }
            page.clear();
            begin = number;
        }
        page.push(line);
    }
    rows.push((begin, field("page", page.join("\n"))));
    rows
}
