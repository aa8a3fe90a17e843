//! Writing a model folder: tensors into safetensors shards, an index, side files, `config.json`.

use crate::checkpoint::{INDEX, SINGLE};
use crate::families::Family;
use crate::folder::PartialFolder;
use crate::{Error, Result, names};
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

/// The largest shard unless asked otherwise; also the most that waits in memory.
const SHARD_BYTES: usize = 4 << 30;

/// Endings of weights in any format, and of their indices: no side files.
const WEIGHTS: [&str; 11] = [
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".partial",
];

/// Writes a model folder, shard by shard, and puts it in its place at the end.
pub struct CheckpointWriter {
    folder: PartialFolder,
    dtype: Dtype,
    family: Family,
    shard_bytes: usize,
    names: HashSet<String>,
    pending: Vec<(String, Vec<usize>, Vec<u8>)>,
    pending_bytes: usize,
    shards: Vec<Vec<String>>,
    total: u64,
}

impl CheckpointWriter {
    /// Begins a folder that appears at `target` on [`CheckpointWriter::finish`]; tensors are stored
    /// as `dtype` (f32, bf16 or f16), under the names of `family`. A folder at `target` is replaced as
    /// a whole, if it is empty or has a `config.json`; any other is an error.
    pub fn new(target: &Path, dtype: DType, family: Family) -> Result<Self> {
        let dtype = match dtype {
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            other => {
                return Err(Error::Invalid(format!(
                    "weights are not stored as {other:?}; choose f32, bf16 or f16"
                )));
            }
        };
        Self::check_target(target)?;
        let folder = PartialFolder::new(target)?;
        Ok(Self {
            folder,
            dtype,
            family,
            shard_bytes: SHARD_BYTES,
            names: HashSet::new(),
            pending: Vec::new(),
            pending_bytes: 0,
            shards: Vec::new(),
            total: 0,
        })
    }

    /// Whether a model may be put at `target`: nothing, an empty folder, or a model stands there. To
    /// be asked before long work.
    pub fn check_target(target: &Path) -> Result<()> {
        let occupied = fs::read_dir(target).is_ok_and(|mut all| all.next().is_some());
        if occupied && !target.join("config.json").exists() {
            return Err(Error::Invalid(format!(
                "`{}` holds other files and no model; give a new or empty folder",
                target.display()
            )));
        }
        Ok(())
    }

    /// The largest shard, in bytes of tensors; only a larger single tensor exceeds it. Shards wait
    /// in memory until they are full.
    pub fn with_shard_bytes(mut self, bytes: usize) -> Self {
        self.shard_bytes = bytes;
        self
    }

    /// Adds one tensor by our name for it. A second one of a name, and a number that is not finite as
    /// stored, are errors.
    pub fn push(&mut self, name: impl AsRef<str>, tensor: &Tensor) -> Result<()> {
        let name = names::stored(self.family, name.as_ref());
        let fail = |message: String| Error::tensor(self.folder.target(), &name, message);
        if self.names.contains(&name) {
            return Err(fail(
                "written twice; this is a fault of the program, report it".into(),
            ));
        }
        let shape = tensor.dims().to_vec();
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?;
        let values = values.to_vec1::<f32>()?;
        let bytes = match self.dtype {
            Dtype::BF16 => encode(&values, half::bf16::from_f32, half::bf16::is_finite, |v| {
                v.to_le_bytes()
            }),
            Dtype::F16 => encode(&values, half::f16::from_f32, half::f16::is_finite, |v| {
                v.to_le_bytes()
            }),
            _ => encode(&values, |v| v, f32::is_finite, f32::to_le_bytes),
        };
        let bytes = bytes.map_err(|at| {
            fail(match values[at] {
                v if v.is_finite() => format!(
                    "element {at} is {v}, too large for {:?}; store the model as f32 or bf16",
                    self.dtype
                ),
                v => format!("element {at} is {v}; train with a smaller learning rate"),
            })
        })?;
        if !self.pending.is_empty() && self.pending_bytes + bytes.len() > self.shard_bytes {
            self.flush()?;
        }
        self.total += bytes.len() as u64;
        self.pending_bytes += bytes.len();
        self.names.insert(name.clone());
        self.pending.push((name, shape, bytes));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let path = self
            .folder
            .path()
            .join(format!("shard-{}", self.shards.len()));
        let views = self
            .pending
            .iter()
            .map(|(name, shape, bytes)| {
                let view = TensorView::new(self.dtype, shape.clone(), bytes).map_err(|e| {
                    Error::tensor(&path, name, format!("cannot be written: {e}; report it"))
                })?;
                Ok((name.clone(), view))
            })
            .collect::<Result<Vec<_>>>()?;
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(views, Some(format), &path)
            .map_err(|e| Error::io(&path, std::io::Error::other(e)))?;
        self.shards
            .push(self.pending.drain(..).map(|(name, ..)| name).collect());
        self.pending_bytes = 0;
        Ok(())
    }

    /// Adds a side file (tokenizer, generation config, …).
    pub fn side_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).map_err(|e| Error::io(path, e))
    }

    /// Copies every side file of `source`: all files at its top but weights in any format, their
    /// indices and `config.json`.
    pub fn copy_side_files(&mut self, source: &Path) -> Result<()> {
        for entry in fs::read_dir(source).map_err(|e| Error::io(source, e))? {
            let path = entry.map_err(|e| Error::io(source, e))?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            let Some(name) = name.filter(|_| path.is_file()) else {
                continue;
            };
            if name == "config.json" || WEIGHTS.iter().any(|w| name.ends_with(w)) {
                continue;
            }
            let bytes = fs::read(&path).map_err(|e| Error::io(&path, e))?;
            self.side_file(&name, &bytes)?;
        }
        Ok(())
    }

    /// Writes the last shard, the index if there are several, and `config.json`; then the folder
    /// appears.
    pub fn finish(mut self, config: &serde_json::Value) -> Result<()> {
        if !self.pending.is_empty() {
            self.flush()?;
        }
        self.json("config.json", config)?;
        // safetensors makes files that only their owner can read; the rest of the folder follows the
        // umask, and so shall they.
        let config_path = self.folder.path().join("config.json");
        let mode = fs::metadata(&config_path)
            .map_err(|e| Error::io(&config_path, e))?
            .permissions();
        let count = self.shards.len();
        let mut weight_map = serde_json::Map::new();
        for (i, names) in self.shards.iter().enumerate() {
            let name = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            let from = self.folder.path().join(format!("shard-{i}"));
            fs::set_permissions(&from, mode.clone())
                .and_then(|()| fs::rename(&from, self.folder.path().join(&name)))
                .map_err(|e| Error::io(from, e))?;
            weight_map.extend(names.iter().map(|n| (n.clone(), name.clone().into())));
        }
        if count > 1 {
            let index = serde_json::json!({
                "metadata": { "total_size": self.total },
                "weight_map": weight_map,
            });
            self.json(INDEX, &index)?;
        }
        self.folder.commit()
    }

    fn json(&mut self, name: &str, value: &serde_json::Value) -> Result<()> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|e| Error::Invalid(format!("{name} cannot be written: {e}; report it")))?;
        self.side_file(name, (text + "\n").as_bytes())
    }
}

/// Little-endian bytes of the rounded values, or the place of the first that is not finite.
fn encode<T: Copy, const N: usize>(
    values: &[f32],
    round: impl Fn(f32) -> T,
    is_finite: impl Fn(T) -> bool,
    to_bytes: impl Fn(T) -> [u8; N],
) -> std::result::Result<Vec<u8>, usize> {
    let mut bytes = vec![0; values.len() * N];
    let mut finite = true;
    for (to, &value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        let value = round(value);
        finite &= is_finite(value);
        *to = to_bytes(value);
    }
    match values.iter().position(|&v| !is_finite(round(v))) {
        Some(at) if !finite => Err(at),
        _ => Ok(bytes),
    }
}
