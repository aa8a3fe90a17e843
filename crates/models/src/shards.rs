//! Which tensor lies where in the files of a checkpoint, before any of it is written.

use crate::checkpoint::{Extra, SINGLE};
use crate::manifest::Manifest;
use crate::names::Scheme;
use crate::{Error, Result};
use candle_core::DType;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::path::Path;

/// The largest shard unless asked otherwise.
const SHARD_BYTES: u64 = 4 << 30;

/// How the files of a checkpoint are written.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// f32, bf16 or f16.
    pub dtype: DType,
    /// Names and packing.
    pub scheme: Scheme,
    /// The largest shard, in bytes of tensors; only a larger single tensor exceeds it.
    pub shard_bytes: u64,
}

impl Format {
    /// Shards of ordinary size.
    pub fn new(dtype: DType, scheme: Scheme) -> Self {
        Self {
            dtype,
            scheme,
            shard_bytes: SHARD_BYTES,
        }
    }

    /// The element type in the words of the file format.
    fn element(&self) -> Result<Dtype> {
        match self.dtype {
            DType::F32 => Ok(Dtype::F32),
            DType::BF16 => Ok(Dtype::BF16),
            DType::F16 => Ok(Dtype::F16),
            other => Err(Error::Invalid(format!(
                "weights are not stored as {other:?}; choose f32, bf16 or f16"
            ))),
        }
    }
}

/// Where a tensor of ours goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) shard: usize,
    /// Bytes before it in the file.
    pub(crate) start: u64,
    pub(crate) count: usize,
}

/// One file.
pub(crate) struct Shard {
    pub(crate) name: String,
    /// Length and header, what comes before the data.
    pub(crate) head: Vec<u8>,
    pub(crate) bytes: u64,
    /// The tensors in it, by the file's names.
    pub(crate) tensors: Vec<String>,
}

/// All files, and the place of every tensor in them.
pub(crate) struct Shards {
    pub(crate) shards: Vec<Shard>,
    /// In the order of the manifest, extras behind.
    pub(crate) slots: Vec<Slot>,
    /// The number of each by our name.
    pub(crate) index: HashMap<String, usize>,
    /// Bytes of all tensors.
    pub(crate) total: u64,
}

impl Shards {
    /// Fills shards in the order of the manifest; a fused tensor stands where its first part would.
    pub(crate) fn new(
        target: &Path,
        format: &Format,
        manifest: &Manifest,
        extras: &[Extra],
    ) -> Result<Self> {
        let element = format.element()?;
        let width = (element.bitsize() / 8) as u64;
        let own = manifest.tensors.iter().map(|(name, shape)| {
            let place = format.scheme.place(name, shape, &manifest.layout);
            (name, shape, place.name, place.shape, place.offset)
        });
        let extras = extras.iter();
        let extra = extras.map(|e| (&e.name, &e.shape, e.name.clone(), e.shape.clone(), 0));
        // Shard and first byte of each tensor of the files.
        let mut stored: HashMap<String, (usize, u64)> = HashMap::new();
        let mut infos: Vec<Vec<(String, TensorInfo)>> = Vec::new();
        let (mut filled, mut total) = (0, 0);
        let mut parts = Vec::new();
        let mut index = HashMap::new();
        for (ours, shape, name, whole, offset) in own.chain(extra) {
            let (shard, start) = *stored.entry(name.clone()).or_insert_with(|| {
                let bytes = whole.iter().product::<usize>() as u64 * width;
                if infos.is_empty() || (filled > 0 && filled + bytes > format.shard_bytes) {
                    infos.push(Vec::new());
                    filled = 0;
                }
                let start = filled;
                filled += bytes;
                total += bytes;
                let shard = infos.len() - 1;
                infos[shard].push((
                    name,
                    TensorInfo {
                        dtype: element,
                        shape: whole,
                        data_offsets: (start as usize, filled as usize),
                    },
                ));
                (shard, start)
            });
            if index.insert(ours.clone(), parts.len()).is_some() {
                let message = "is in the model twice; this is a fault of the program, report it";
                return Err(Error::tensor(target, ours, message));
            }
            let count: usize = shape.iter().product();
            parts.push((shard, start + offset as u64 * width, count));
        }
        let count = infos.len();
        let shards = infos.into_iter().enumerate().map(|(i, tensors)| {
            let name = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            shard(name, tensors).map_err(|e| Error::tensor(target, "(header)", e))
        });
        let shards: Vec<Shard> = shards.collect::<Result<_>>()?;
        let slots = parts.into_iter().map(|(shard, start, count)| Slot {
            shard,
            start: shards[shard].head.len() as u64 + start,
            count,
        });
        Ok(Self {
            slots: slots.collect(),
            shards,
            index,
            total,
        })
    }
}

fn shard(name: String, tensors: Vec<(String, TensorInfo)>) -> std::result::Result<Shard, String> {
    let names = tensors.iter().map(|(name, _)| name.clone()).collect();
    let bytes = tensors.last().map_or(0, |(_, info)| info.data_offsets.1);
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), tensors)
        .map_err(|e| format!("cannot be written: {e}; report it"))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| e.to_string())?;
    // The data begin at a multiple of eight.
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut head = (json.len() as u64).to_le_bytes().to_vec();
    head.extend(json);
    Ok(Shard {
        name,
        head,
        bytes: bytes as u64,
        tensors: names,
    })
}
