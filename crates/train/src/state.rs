//! A training checkpoint: parameters, moments, the importance of rows that may go, and the step, in one
//! safetensors file.

use crate::trainer::Parameter;
use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_kernels::Moments;
use lightmoe_models::TensorFile;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::Path;

/// Name of the file in the recovery folder.
pub(crate) const FILE: &str = "state.safetensors";
/// What is wrong with the state of another run.
const OTHER: &str = "it was written by a run with other settings";

/// Writes the state after `step` finished steps.
pub(crate) fn save(
    path: &Path,
    step: usize,
    fingerprint: &str,
    parameters: &[Parameter],
) -> Result<()> {
    let bytes = |values: &[f32]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let mut data = Vec::new();
    for p in parameters {
        let values = p.var.as_tensor().flatten_all()?.to_vec1::<f32>()?;
        let count = values.len();
        data.push((p.name.clone(), count, bytes(&values)));
        let [first, second] = p.moments.values(count)?;
        for (suffix, moment) in [("first", first), ("second", second)] {
            data.push((format!("{}.{suffix}", p.name), count, bytes(&moment)));
        }
        if let Some(rows) = &p.rows {
            let importance = &rows.importance;
            let name = format!("{}.importance", p.name);
            data.push((name, importance.len(), bytes(importance)));
        }
    }
    let fail = |e: safetensors::SafeTensorError| Error::state(path, e.to_string());
    let views = data
        .iter()
        .map(|(name, count, bytes)| {
            Ok((
                name.clone(),
                TensorView::new(Dtype::F32, vec![*count], bytes).map_err(fail)?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([
        ("step".to_owned(), step.to_string()),
        ("fingerprint".to_owned(), fingerprint.to_owned()),
    ]);
    let file = safetensors::serialize(views, Some(metadata)).map_err(fail)?;
    Ok(lightmoe_models::folder::write_file(path, &file)?)
}

/// Whether the state at `path` is of the run `fingerprint`, or there is none.
///
/// # Errors
/// If it is of another run, or damaged.
pub(crate) fn check(path: &Path, fingerprint: &str) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let file = TensorFile::open(path.to_owned())?;
    match file.entry("fingerprint") == Some(fingerprint) {
        true => Ok(()),
        false => Err(Error::state(path, OTHER)),
    }
}

/// Reads the state into `parameters` and returns the number of finished steps; `None` if there is
/// no checkpoint.
pub(crate) fn load(
    path: &Path,
    fingerprint: &str,
    parameters: &mut [Parameter],
) -> Result<Option<usize>> {
    let file = match std::fs::read(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    let fail = |message: String| Error::state(path, message);
    let (_, header) = SafeTensors::read_metadata(&file).map_err(|e| fail(e.to_string()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    if metadata.get("fingerprint").map(String::as_str) != Some(fingerprint) {
        return Err(fail(OTHER.into()));
    }
    let step = metadata.get("step").and_then(|s| s.parse().ok());
    let step = step.ok_or_else(|| fail("it names no step".into()))?;
    let tensors = SafeTensors::deserialize(&file).map_err(|e| fail(e.to_string()))?;
    for p in parameters {
        let shape = p.var.as_tensor().shape().clone();
        let read = |name: &str, count: usize| -> Result<Vec<f32>> {
            let view = tensors
                .tensor(name)
                .map_err(|e| fail(format!("`{name}`: {e}")))?;
            let values: Vec<f32> = view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            if values.len() != count {
                return Err(fail(format!(
                    "`{name}` has {} values, expected {count}",
                    values.len()
                )));
            }
            Ok(values)
        };
        let count = shape.elem_count();
        p.moments = Moments::new(
            read(&format!("{}.first", p.name), count)?,
            read(&format!("{}.second", p.name), count)?,
        );
        if let Some(rows) = &mut p.rows {
            let count = rows.importance.len();
            rows.importance = read(&format!("{}.importance", p.name), count)?;
        }
        p.var.set(&Tensor::from_vec(
            read(&p.name, count)?,
            shape.clone(),
            p.var.device(),
        )?)?;
    }
    Ok(Some(step))
}
