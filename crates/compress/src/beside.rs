//! The files beside the observations: what is too much to hold for a whole model, one file a layer, in
//! safetensors, all f32. The metadata `fingerprint` is that of the observations.

use crate::{Error, Result};
use candle_core::{Device, Tensor};
use lightmoe_models::TensorFile;
use safetensors::{Dtype, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

const FINGERPRINT: &str = "fingerprint";

/// Opens the file of a layer.
///
/// # Errors
/// If it is missing or damaged, or belongs to other observations.
pub(crate) fn open(path: PathBuf, fingerprint: &str) -> Result<TensorFile> {
    let file = TensorFile::open(path.clone())?;
    match file.entry(FINGERPRINT) == Some(fingerprint) {
        true => Ok(file),
        false => Err(Error::Observations {
            path,
            message: "belongs to other observations; observe again".to_owned(),
        }),
    }
}

/// Writes the file of a layer, and its folder if need be, whole or not at all.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn save(
    path: PathBuf,
    mut tensors: Vec<(String, Block)>,
    fingerprint: &str,
) -> Result<()> {
    // What fails elsewhere, fails here.
    for (_, block) in &mut tensors {
        if let Some(values) = &mut block.values {
            *values = values.to_device(&Device::Cpu)?;
        }
    }
    let metadata = HashMap::from([(FINGERPRINT.to_owned(), fingerprint.to_owned())]);
    let io = |source| Error::Io {
        path: path.clone(),
        source,
    };
    let partial = path.with_extension("partial");
    path.parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .map_err(io)?;
    safetensors::serialize_to_file(tensors, Some(metadata), &partial)
        .map_err(|e| io(std::io::Error::other(e)))?;
    std::fs::rename(&partial, &path).map_err(io)
}

/// Numbers on their way into a file; they become bytes when they are written. `None` is all zeros.
pub(crate) struct Block {
    pub(crate) values: Option<Tensor>,
    pub(crate) shape: Vec<usize>,
}

impl View for Block {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.values.as_ref().and_then(|v| v.flatten_all().ok());
        let values = values.and_then(|v| v.to_vec1::<f32>().ok());
        Cow::Owned(match values {
            Some(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            None => vec![0; self.data_len()],
        })
    }

    fn data_len(&self) -> usize {
        4 * self.shape.iter().product::<usize>()
    }
}
