//! The rows of Parquet files.

use super::rows::Row;
use crate::{Error, Result};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::{Type, TypePtr};
use serde_json::Value;
use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Reads the rows, numbered from 1: structs are objects, lists are arrays, times and decimals are
/// texts, bytes are base64.
///
/// # Errors
/// [`Error::Read`]; [`Error::DataFile`], naming the column that cannot be read where it is one.
pub(super) fn parquet_rows(path: &Path) -> Result<Vec<Row>> {
    let read = |source| Error::Read {
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(read)?;
    let bytes = file.metadata().map_err(read)?.len();
    let fails = |problem: String| Error::DataFile {
        path: path.into(),
        problem,
    };
    let reader = unless_it_panics(|| SerializedFileReader::new(file))
        .map_err(|e| fails(format!("no Parquet file ({e}); get it again")))?;
    check_columns(&reader, bytes).map_err(|e| fails(format!("{e}; get the file again")))?;
    rows(&reader, None).map_err(|e| match broken_column(&reader) {
        Some((column, e)) => fails(format!(
            "column `{column}` cannot be read ({e}); get the file again, or write it anew with plain or \
             dictionary pages, uncompressed or packed by snappy or zstd"
        )),
        None => fails(format!("its rows cannot be read ({e}); get it again")),
    })
}

type Reader = SerializedFileReader<File>;

fn rows(reader: &Reader, columns: Option<Type>) -> Result<Vec<Row>, ParquetError> {
    unless_it_panics(|| {
        let rows = (1..).zip(reader.get_row_iter(columns)?);
        rows.map(|(number, row)| match row?.to_json_value() {
            Value::Object(fields) => Ok((number, fields)),
            other => Err(ParquetError::General(format!("row {number} is {other}"))),
        })
        .collect()
    })
}

thread_local! {
    static CATCHES: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread would be caught and become an error of a file, so that a panic hook need
/// not tell of it.
pub fn catches_panics() -> bool {
    CATCHES.get()
}

/// What `read` gives; the reader takes some damage for a mistake of its caller and panics.
fn unless_it_panics<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    CATCHES.set(true);
    // Nothing that a panic may have left half done is used afterwards but to read anew.
    let outcome = catch_unwind(AssertUnwindSafe(read));
    CATCHES.set(false);
    outcome.unwrap_or_else(|_| {
        let message = "what it says of itself contradicts itself";
        Err(ParquetError::General(message.into()))
    })
}

/// Whether each column lies within the file of `bytes` bytes and has a value for each row: the reader
/// relies on both.
fn check_columns(reader: &Reader, bytes: u64) -> Result<(), String> {
    for group in reader.metadata().row_groups() {
        for column in group.columns() {
            let begin = column.dictionary_page_offset();
            let begin = u64::try_from(begin.unwrap_or(column.data_page_offset())).ok();
            let size = u64::try_from(column.compressed_size()).ok();
            let end = begin
                .zip(size)
                .and_then(|(begin, size)| begin.checked_add(size));
            let name = column.column_path();
            if end.is_none_or(|end| end > bytes) {
                return Err(format!("column `{name}` lies outside the file"));
            }
            if !(0..=column.num_values()).contains(&group.num_rows()) {
                let (rows, values) = (group.num_rows(), column.num_values());
                return Err(format!(
                    "column `{name}` has {values} values for {rows} rows"
                ));
            }
        }
    }
    Ok(())
}

/// The first column that cannot be read by itself, and why: errors of the reader do not tell.
fn broken_column(reader: &Reader) -> Option<(String, ParquetError)> {
    let schema = reader.metadata().file_metadata().schema();
    let alone = |column: &TypePtr| {
        let schema = Type::group_type_builder(schema.name()).with_fields(vec![column.clone()]);
        rows(reader, Some(schema.build()?))
    };
    let mut columns = schema.get_fields().iter();
    columns.find_map(|column| Some((column.name().to_owned(), alone(column).err()?)))
}
