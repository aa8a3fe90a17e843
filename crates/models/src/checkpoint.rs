//! A model folder: `config.json`, safetensors in one file or in shards with an index, side files.
//!
//! Reading is lazy: opening reads the headers, [`Checkpoint::tensor`] reads one tensor's bytes.

use crate::config::ModelConfig;
use crate::folder::PartialFolder;
use crate::layout::BankLayout;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The largest shard that [`CheckpointWriter`] writes.
const SHARD_BYTES: usize = 4 << 30;
/// A header larger than this is damage, not data.
const MAX_HEADER: u64 = 100 << 20;

struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

impl TensorFile {
    fn open(path: PathBuf) -> Result<Self> {
        let fail = |message: &str| {
            Error::tensor(
                &path,
                "(header)",
                format!("{message}; the file is damaged or incomplete, copy or download it again"),
            )
        };
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let size = file.metadata().map_err(|e| Error::io(&path, e))?.len();
        let mut prefix = [0u8; 8];
        file.read_exact_at(&mut prefix, 0)
            .map_err(|_| fail("shorter than 8 bytes"))?;
        let header = u64::from_le_bytes(prefix);
        if header > MAX_HEADER || header + 8 > size {
            return Err(fail(&format!(
                "a header of {header} bytes in a file of {size}"
            )));
        }
        // `SafeTensors::read_metadata` wants the whole file in memory; the header is plain JSON.
        let mut bytes = vec![0u8; header as usize];
        file.read_exact_at(&mut bytes, 8)
            .map_err(|e| Error::io(&path, e))?;
        let metadata: Metadata =
            serde_json::from_slice(&bytes).map_err(|e| fail(&format!("not safetensors: {e}")))?;
        let expected = header + 8 + metadata.data_len() as u64;
        if expected != size {
            return Err(fail(&format!(
                "{size} bytes, but its header describes {expected}: truncated"
            )));
        }
        Ok(Self {
            path,
            file,
            metadata,
            data_start: header + 8,
        })
    }
}

/// An open model folder.
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    layout: BankLayout,
    files: Vec<TensorFile>,
    by_name: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens a folder: reads the config, the layout and the headers, and checks that an index and
    /// its shards agree. No weights are read.
    pub fn open(dir: &Path) -> Result<Self> {
        let config_path = dir.join("config.json");
        let config = ModelConfig::from_file(&config_path)?;
        let layout = BankLayout::of(&config, &config_path)?;
        let index = dir.join(INDEX);
        let paths = if index.exists() {
            shards(dir, &index)?
        } else {
            vec![dir.join(SINGLE)]
        };
        let files = paths
            .into_iter()
            .map(TensorFile::open)
            .collect::<Result<Vec<_>>>()?;
        let mut by_name = HashMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.metadata.offset_keys() {
                by_name.insert(name, i);
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            config,
            layout,
            files,
            by_name,
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The form of every slot.
    pub fn layout(&self) -> &BankLayout {
        &self.layout
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Bytes of all tensors on disk.
    pub fn bytes(&self) -> u64 {
        self.files
            .iter()
            .map(|f| f.metadata.data_len() as u64)
            .sum()
    }

    /// The element type most tensors have on disk.
    pub fn dtype(&self) -> DType {
        let mut counts = BTreeMap::new();
        for file in &self.files {
            for info in file.metadata.tensors().values() {
                *counts.entry(format!("{:?}", info.dtype)).or_insert(0usize) += 1;
            }
        }
        match counts
            .into_iter()
            .max_by_key(|(_, n)| *n)
            .as_ref()
            .map(|(d, _)| d.as_str())
        {
            Some("BF16") => DType::BF16,
            Some("F16") => DType::F16,
            _ => DType::F32,
        }
    }

    /// Reads the tensor `name` of the given shape as f32 on the CPU. A missing tensor, another
    /// shape, an element type that is no float, NaN and infinity are errors.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let fail = |message: String| Error::tensor(&self.dir, name, message);
        let Some(&file) = self.by_name.get(name) else {
            return Err(fail(format!(
                "missing, expected {shape:?}; the checkpoint is incomplete or of another family"
            )));
        };
        let file = &self.files[file];
        let fail = |message: String| Error::tensor(&file.path, name, message);
        let info = file
            .metadata
            .info(name)
            .ok_or_else(|| fail("missing".into()))?;
        if info.shape != shape {
            return Err(fail(format!(
                "shape {:?} contradicts config.json, which implies {shape:?}",
                info.shape
            )));
        }
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            other => {
                return Err(fail(format!(
                    "element type {other:?} is not supported; convert it to bf16, f16 or f32"
                )));
            }
        };
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end - start];
        file.file
            .read_exact_at(&mut bytes, file.data_start + start as u64)
            .map_err(|e| Error::io(&file.path, e))?;
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)?;
        let tensor = tensor.to_dtype(DType::F32)?;
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(fail(format!(
                "element {at} is {}, not a finite number; the checkpoint is damaged",
                values[at]
            )));
        }
        Ok(tensor)
    }
}

fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string(index).map_err(|e| Error::io(index, e))?;
    let value: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Error::config(index, format!("not JSON: {e}; download it again")))?;
    let map = value
        .get("weight_map")
        .and_then(|m| m.as_object())
        .ok_or_else(|| {
            Error::config(
                index,
                "no object `weight_map`; the index is damaged, download it again",
            )
        })?;
    let mut names: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}

/// Writes a model folder, shard by shard, and puts it in its place at the end.
pub struct CheckpointWriter {
    folder: PartialFolder,
    dtype: DType,
    pending: Vec<(String, Vec<usize>, Vec<u8>)>,
    pending_bytes: usize,
    shards: Vec<Vec<String>>,
    total: u64,
}

impl CheckpointWriter {
    /// Begins a folder that appears at `target` on [`CheckpointWriter::finish`]; tensors are stored
    /// as `dtype` (f32, bf16 or f16).
    pub fn new(target: &Path, dtype: DType) -> Result<Self> {
        Ok(Self {
            folder: PartialFolder::new(target)?,
            dtype,
            pending: Vec::new(),
            pending_bytes: 0,
            shards: Vec::new(),
            total: 0,
        })
    }

    /// Adds one tensor.
    pub fn push(&mut self, name: impl Into<String>, tensor: &Tensor) -> Result<()> {
        let shape = tensor.dims().to_vec();
        let tensor = tensor.to_dtype(self.dtype)?.flatten_all()?;
        let bytes = match self.dtype {
            DType::BF16 => le_bytes(tensor.to_vec1::<half::bf16>()?, |v| v.to_le_bytes()),
            DType::F16 => le_bytes(tensor.to_vec1::<half::f16>()?, |v| v.to_le_bytes()),
            _ => le_bytes(tensor.to_vec1::<f32>()?, |v| v.to_le_bytes()),
        };
        self.total += bytes.len() as u64;
        self.pending_bytes += bytes.len();
        self.pending.push((name.into(), shape, bytes));
        if self.pending_bytes > SHARD_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let path = self
            .folder
            .path()
            .join(format!("shard-{}", self.shards.len()));
        let dtype = match self.dtype {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        };
        let views = self
            .pending
            .iter()
            .map(|(name, shape, bytes)| {
                let view = TensorView::new(dtype, shape.clone(), bytes)
                    .map_err(|e| Error::tensor(&path, name, format!("cannot be written: {e}")))?;
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

    /// Copies every side file of `source`: all but the weights, their index and `config.json`.
    pub fn copy_side_files(&mut self, source: &Path) -> Result<()> {
        for entry in fs::read_dir(source).map_err(|e| Error::io(source, e))? {
            let path = entry.map_err(|e| Error::io(source, e))?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            let Some(name) = name.filter(|_| path.is_file()) else {
                continue;
            };
            let weights = [".safetensors", ".safetensors.index.json", ".bin", ".pth"];
            if name == "config.json" || weights.iter().any(|w| name.ends_with(w)) {
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
        let count = self.shards.len();
        let mut weight_map = serde_json::Map::new();
        for (i, names) in self.shards.iter().enumerate() {
            let name = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            let from = self.folder.path().join(format!("shard-{i}"));
            fs::rename(&from, self.folder.path().join(&name)).map_err(|e| Error::io(from, e))?;
            weight_map.extend(names.iter().map(|n| (n.clone(), name.clone().into())));
        }
        if count > 1 {
            let index = serde_json::json!({
                "metadata": { "total_size": self.total },
                "weight_map": weight_map,
            });
            self.json(INDEX, &index)?;
        }
        self.json("config.json", config)?;
        self.folder.commit()
    }

    fn json(&mut self, name: &str, value: &serde_json::Value) -> Result<()> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|e| Error::Invalid(format!("{name} cannot be written: {e}")))?;
        self.side_file(name, (text + "\n").as_bytes())
    }
}

fn le_bytes<T, const N: usize>(values: Vec<T>, bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.into_iter().flat_map(bytes).collect()
}
