//! Token ids in a file, for those who have no task: `input_ids` `[batch, length]`.

use crate::preflight::Refused;
use anyhow::{Context, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use std::path::Path;

/// Name of the tensor.
pub const INPUT_IDS: &str = "input_ids";

/// A batch of sequences of one length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TokenBatch {
    /// `[rows, len]`, row-major.
    pub ids: Vec<u32>,
    /// Number of sequences.
    pub rows: usize,
}

impl TokenBatch {
    /// `rows` × `len` ids spread over the vocabulary.
    pub fn spread(rows: usize, len: usize, vocabulary: usize) -> Self {
        let id = |i: usize| (i * 7919 % vocabulary.max(1)) as u32;
        Self {
            ids: (0..rows * len).map(id).collect(),
            rows,
        }
    }

    /// Reads a safetensors file with `input_ids`, as i64, i32 or u32.
    ///
    /// # Errors
    /// [`Refused`], naming the file: no such tensor, another type or shape, an id outside the
    /// vocabulary.
    pub fn load(path: &Path, vocabulary: usize) -> Result<Self> {
        let bytes =
            std::fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let refused = |message: String| Refused(format!("`{}`: {message}", path.display()));
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| refused(format!("not a safetensors file ({e}); make it again")))?;
        let view = file
            .tensor(INPUT_IDS)
            .map_err(|_| refused(format!("no tensor `{INPUT_IDS}`; give token ids under it")))?;
        let ids = integers(&view).ok_or_else(|| {
            refused(format!(
                "`{INPUT_IDS}` is {:?}, expected i64, i32 or u32; convert it",
                view.dtype()
            ))
        })?;
        let &[rows, len] = view.shape() else {
            let message = format!(
                "`{INPUT_IDS}` is {:?}, expected [batch, length]",
                view.shape()
            );
            return Err(refused(message).into());
        };
        if rows * len == 0 {
            return Err(refused(format!("`{INPUT_IDS}` is empty; give token ids")).into());
        }
        let ids = ids.into_iter().map(|id| {
            let known = u32::try_from(id)
                .ok()
                .filter(|&id| (id as usize) < vocabulary);
            known.ok_or_else(|| {
                refused(format!(
                    "token id {id} is outside the vocabulary of {vocabulary}; use the model's own \
                     tokenizer"
                ))
            })
        });
        Ok(Self {
            ids: ids.collect::<Result<_, _>>()?,
            rows,
        })
    }

    /// `[rows, len]`
    pub fn shape(&self) -> Vec<usize> {
        vec![self.rows, self.ids.len() / self.rows.max(1)]
    }

    /// The ids as i64, little-endian.
    pub fn bytes(&self) -> Vec<u8> {
        let each = self.ids.iter();
        each.flat_map(|&id| i64::from(id).to_le_bytes()).collect()
    }

    /// Each sequence by itself.
    pub fn samples(&self) -> Vec<Vec<u32>> {
        let len = self.ids.len() / self.rows.max(1);
        self.ids.chunks(len.max(1)).map(<[u32]>::to_vec).collect()
    }
}

fn integers(view: &TensorView<'_>) -> Option<Vec<i64>> {
    let data = view.data();
    let four = || data.as_chunks::<4>().0.iter();
    Some(match view.dtype() {
        Dtype::I64 => {
            let numbers = data.as_chunks::<8>().0.iter();
            numbers.map(|&b| i64::from_le_bytes(b)).collect()
        }
        Dtype::I32 => four().map(|&b| i32::from_le_bytes(b).into()).collect(),
        Dtype::U32 => four().map(|&b| u32::from_le_bytes(b).into()).collect(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_back_and_what_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ids.safetensors");
        let batch = TokenBatch::spread(3, 5, 50);
        let bytes = batch.bytes();
        let view = TensorView::new(Dtype::I64, batch.shape(), &bytes).unwrap();
        let file = safetensors::serialize([(INPUT_IDS, view)], None).unwrap();
        std::fs::write(&path, file).unwrap();
        assert_eq!(TokenBatch::load(&path, 50).unwrap(), batch);
        assert_eq!(batch.samples().len(), 3);
        let refused = |words: &[&str]| {
            let message = format!("{:#}", TokenBatch::load(&path, 10).unwrap_err());
            for word in words.iter().chain(&["ids.safetensors"]) {
                assert!(message.contains(word), "`{message}` lacks `{word}`");
            }
        };
        refused(&["vocabulary of 10"]);
        let write = |name: &str, dtype, shape: Vec<usize>, bytes: &[u8]| {
            let view = TensorView::new(dtype, shape, bytes).unwrap();
            std::fs::write(&path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
        };
        write(INPUT_IDS, Dtype::I32, vec![1, 2], &[1, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(TokenBatch::load(&path, 10).unwrap().ids, [1, 9]);
        write(INPUT_IDS, Dtype::F32, vec![1, 1], &[0; 4]);
        refused(&["F32", "i64"]);
        write(INPUT_IDS, Dtype::U32, vec![1], &[0; 4]);
        refused(&["[batch, length]"]);
        write(INPUT_IDS, Dtype::U32, vec![1, 0], &[]);
        refused(&["empty"]);
        write("ids", Dtype::U32, vec![1, 1], &[0; 4]);
        refused(&[INPUT_IDS]);
        std::fs::write(&path, "no tensors").unwrap();
        refused(&["not a safetensors file"]);
    }
}
