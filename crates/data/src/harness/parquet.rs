//! The rows of Parquet files.

use super::rows::Row;
use crate::{Error, Result};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::{Type, TypePtr};
use serde_json::Value;
use std::fs::File;
use std::path::Path;

/// Reads the rows, numbered from 1: structs are objects, lists are arrays, times and decimals are
/// texts, bytes are base64.
///
/// # Errors
/// [`Error::Read`]; [`Error::DataFile`], naming the column that cannot be read where it is one.
pub(super) fn parquet_rows(path: &Path) -> Result<Vec<Row>> {
    let file = File::open(path).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    let fails = |problem: String| Error::DataFile {
        path: path.into(),
        problem,
    };
    let reader = SerializedFileReader::new(file)
        .map_err(|e| fails(format!("no Parquet file ({e}); get it again")))?;
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
    let rows = (1..).zip(reader.get_row_iter(columns)?);
    rows.map(|(number, row)| match row?.to_json_value() {
        Value::Object(fields) => Ok((number, fields)),
        other => Err(ParquetError::General(format!("row {number} is {other}"))),
    })
    .collect()
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
