//! Which tensor lies where in the files of a checkpoint, before any of it is written.

use crate::checkpoint::{Extra, SINGLE};
use crate::manifest::Manifest;
use crate::names::{Place, Scheme};
use crate::{Error, Result};
use candle_core::DType;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The largest shard unless asked otherwise.
const SHARD_BYTES: u64 = 4 << 30;

/// How the files of a checkpoint are written.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// f32, bf16 or f16, for tensors without a type of their own in the manifest.
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
}

impl Format {
    /// What the files of such a checkpoint take, headers included, to the byte.
    ///
    /// # Errors
    /// If the format does not hold the element type, or a tensor is in the model twice.
    pub fn file_bytes(&self, manifest: &Manifest, extras: &[Extra]) -> Result<u64> {
        Ok(Shards::new(Path::new(SINGLE), self, manifest, extras)?.file_bytes())
    }
}

/// The element type in the words of the file format.
fn element(dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::BF16 => Ok(Dtype::BF16),
        DType::F16 => Ok(Dtype::F16),
        // Places of rows.
        DType::U32 => Ok(Dtype::U32),
        other => Err(Error::Invalid(format!(
            "weights are not stored as {other:?}; choose f32, bf16 or f16"
        ))),
    }
}

/// Where a tensor of ours goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) shard: usize,
    /// Bytes before it in the file.
    pub(crate) start: u64,
    pub(crate) count: usize,
    pub(crate) dtype: DType,
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

impl Shard {
    fn file_bytes(&self) -> u64 {
        self.head.len() as u64 + self.bytes
    }

    /// Makes the file with its head and the room for its data.
    pub(crate) fn create(&self, path: &Path) -> std::io::Result<File> {
        let file = File::create(path)?;
        let size = self.file_bytes();
        match fallocate(&file, FallocateFlags::empty(), 0, size.max(1)) {
            // Not every file system can promise room.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            other => other?,
        }
        file.set_len(size)?;
        file.write_all_at(&self.head, 0)?;
        Ok(file)
    }

    /// Opens the file that an earlier run made in `folder`, if it is the same one.
    pub(crate) fn reopen(&self, folder: &Path) -> std::io::Result<File> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(folder.join(&self.name))?;
        let mut head = vec![0; self.head.len()];
        file.read_exact_at(&mut head, 0)?;
        let same = head == self.head && file.metadata()?.len() == self.file_bytes();
        match same {
            true => Ok(file),
            false => Err(std::io::ErrorKind::InvalidData.into()),
        }
    }
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
    /// Bytes of all files, headers included.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.shards.iter().map(Shard::file_bytes).sum()
    }

    /// Fills shards in the order of the manifest; a fused tensor stands where its first part would.
    pub(crate) fn new(
        target: &Path,
        format: &Format,
        manifest: &Manifest,
        extras: &[Extra],
    ) -> Result<Self> {
        if format.dtype == DType::U32 {
            return Err(Error::Invalid(
                "weights are not stored as U32; choose f32, bf16 or f16".to_owned(),
            ));
        }
        element(format.dtype)?;
        let own = manifest.tensors.iter().map(|(name, shape)| {
            let place = format.scheme.place(name, shape, &manifest.layout);
            let dtype = manifest.types.get(name).copied().unwrap_or(format.dtype);
            (name, shape, place, dtype)
        });
        let extra = extras.iter().map(|extra| {
            let place = Place::whole(&extra.name, &extra.shape);
            (&extra.name, &extra.shape, place, extra.dtype)
        });
        let mut stored = Vec::new();
        let mut number: HashMap<String, usize> = HashMap::new();
        let mut parts = Vec::new();
        let mut index = HashMap::new();
        for (ours, shape, place, dtype) in own.chain(extra) {
            let at = *number.entry(place.name.clone()).or_insert_with(|| {
                stored.push((place.name, place.shape, dtype));
                stored.len() - 1
            });
            if index.insert(ours.clone(), parts.len()).is_some() {
                let message = "is in the model twice; this is a fault of the program, report it";
                return Err(Error::tensor(target, ours, message));
            }
            let count: usize = shape.iter().product();
            parts.push((at, place.offset, count));
        }
        let (files, total) = fill(&stored, format.shard_bytes);
        // Shard and first byte of each tensor of the files.
        let mut starts = vec![(0, 0); stored.len()];
        let mut shards = Vec::new();
        for (i, tensors) in files.iter().enumerate() {
            let name = match files.len() {
                1 => SINGLE.to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            let mut infos = Vec::new();
            let mut end = 0;
            for &at in tensors {
                let (name, shape, dtype) = &stored[at];
                starts[at] = (i, end);
                let start = end;
                end += shape.iter().product::<usize>() * dtype.size_in_bytes();
                let info = TensorInfo {
                    dtype: element(*dtype)?,
                    shape: shape.clone(),
                    data_offsets: (start, end),
                };
                infos.push((name.clone(), info));
            }
            let shard = shard(name, infos).map_err(|e| Error::tensor(target, "(header)", e))?;
            shards.push(shard);
        }
        let slots = parts.into_iter().map(|(at, offset, count)| {
            let ((shard, start), dtype) = (starts[at], stored[at].2);
            let start = shards[shard].head.len() + start + offset * dtype.size_in_bytes();
            Slot {
                shard,
                start: start as u64,
                count,
                dtype,
            }
        });
        Ok(Self {
            slots: slots.collect(),
            shards,
            index,
            total,
        })
    }
}

/// Shares tensors (name, shape, type) out to files, and counts their bytes. In each file wide types
/// come first, so that every tensor begins at a multiple of its own width: readers rely on it.
fn fill(stored: &[(String, Vec<usize>, DType)], shard_bytes: u64) -> (Vec<Vec<usize>>, u64) {
    let mut files: Vec<Vec<usize>> = Vec::new();
    let (mut filled, mut total) = (0, 0);
    for (at, (_, shape, dtype)) in stored.iter().enumerate() {
        let bytes = (shape.iter().product::<usize>() * dtype.size_in_bytes()) as u64;
        if filled > 0 && filled + bytes > shard_bytes {
            filled = 0;
        }
        if filled == 0 {
            files.push(Vec::new());
        }
        files.last_mut().into_iter().for_each(|file| file.push(at));
        filled += bytes;
        total += bytes;
    }
    for file in &mut files {
        file.sort_by_key(|&at| std::cmp::Reverse(stored[at].2.size_in_bytes()));
    }
    (files, total)
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
