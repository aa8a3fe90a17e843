//! A model folder: `config.json`, safetensors in one file or in shards with an index, side files.
//!
//! Reading is lazy: opening reads the headers, [`Checkpoint::tensor`] reads one tensor's bytes.

use crate::config::ModelConfig;
use crate::layout::BankLayout;
use crate::{Error, Result, folder, names};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The weights, if they are one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Which shard has which tensor, if they are several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Elements that are read and converted at a time.
const READ_ELEMENTS: usize = 1 << 18;
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
        let data = size - 8 - header;
        if metadata.data_len() as u64 != data {
            return Err(fail(&format!(
                "{data} bytes of tensors, but its header describes {}",
                metadata.data_len()
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
    /// its shards agree. No weights are read. As in `transformers`, a single file comes before an
    /// index.
    pub fn open(dir: &Path) -> Result<Self> {
        if let Some(old) = folder::abandoned(dir) {
            return Err(Error::Invalid(format!(
                "`{}` is missing, but an interrupted write left its earlier version; \
                 rename `{}` back",
                dir.display(),
                old.display()
            )));
        }
        let config_path = dir.join("config.json");
        let config = ModelConfig::from_file(&config_path)?;
        let layout = BankLayout::of(&config, &config_path)?;
        let (single, index_path) = (dir.join(SINGLE), dir.join(INDEX));
        let index = match (single.exists(), index_path.exists()) {
            (false, false) => {
                return Err(Error::Invalid(format!(
                    "`{}` has no weights, neither `{SINGLE}` nor `{INDEX}`; download them, or \
                     convert other formats to safetensors",
                    dir.display()
                )));
            }
            (false, true) => read_index(&index_path)?,
            (true, _) => BTreeMap::new(),
        };
        let paths = match index.is_empty() {
            true => vec![single],
            false => shards(&index)
                .into_iter()
                .map(|name| dir.join(name))
                .collect(),
        };
        let mut files = Vec::new();
        for path in paths {
            files.push(TensorFile::open(path).map_err(|e| match e {
                Error::Io { path, source } if !index.is_empty() => Error::config(
                    &index_path,
                    format!(
                        "the shard `{}` cannot be read: {source}; download it again",
                        path.display()
                    ),
                ),
                other => other,
            })?);
        }
        let mut by_name: HashMap<String, usize> = HashMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.metadata.offset_keys() {
                if let Some(&other) = by_name.get(&name) {
                    let other = files[other].path.display();
                    let message = format!("also stands in `{other}`; download both again");
                    return Err(Error::tensor(&file.path, name, message));
                }
                by_name.insert(name, i);
            }
        }
        for (name, shard) in &index {
            let found = by_name.get(name).map(|&i| &files[i].path);
            if found != Some(&dir.join(shard)) {
                let message = format!("missing, though `{INDEX}` says it is here; download both");
                return Err(Error::tensor(&dir.join(shard), name, message));
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

    /// All tensor names as they stand in the files, sorted.
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

    /// Numbers in all tensors.
    pub fn parameters(&self) -> u64 {
        let infos = self
            .files
            .iter()
            .flat_map(|f| f.metadata.tensors().into_values());
        infos
            .map(|i| i.shape.iter().product::<usize>() as u64)
            .sum()
    }

    /// The element type most tensors have on disk.
    pub fn dtype(&self) -> DType {
        let mut counts = BTreeMap::new();
        for file in &self.files {
            for info in file.metadata.tensors().values() {
                *counts.entry(info.dtype).or_insert(0usize) += 1;
            }
        }
        match counts.into_iter().max_by_key(|(_, n)| *n) {
            Some((Dtype::BF16, _)) => DType::BF16,
            Some((Dtype::F16, _)) => DType::F16,
            _ => DType::F32,
        }
    }

    /// Reads the tensor `name` (our name, see [`names::stored`]) of the given shape as f32 on the CPU. A missing tensor, another
    /// shape, an element type that is no float, NaN and infinity are errors.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let stored = self.find(name, shape)?;
        let mut values = vec![0f32; shape.iter().product()];
        stored.read(&mut values)?;
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// Reads tensors of one shape, as [`Checkpoint::tensor`] does, into one: `[names, ..shape]`.
    pub fn stack(&self, names: &[String], shape: &[usize]) -> Result<Tensor> {
        let stored = names
            .iter()
            .map(|name| self.find(name, shape))
            .collect::<Result<Vec<_>>>()?;
        let each: usize = shape.iter().product();
        let mut values = vec![0f32; stored.len() * each];
        values
            .par_chunks_mut(each.max(1))
            .zip(&stored)
            .try_for_each(|(values, stored)| stored.read(values))?;
        let shape = [&[names.len()], shape].concat();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// Where a tensor of this shape lies: nothing is allocated before its size is known to be real.
    fn find(&self, name: &str, shape: &[usize]) -> Result<Stored<'_>> {
        let name = names::stored(self.config.family, name);
        let found = self.by_name.get(&name).map(|&i| &self.files[i]);
        let Some((file, info)) = found.and_then(|f| Some((f, f.metadata.info(&name)?))) else {
            let message = format!(
                "missing, expected {shape:?}; the checkpoint is incomplete or of another family, \
                 download it again"
            );
            return Err(Error::tensor(&self.dir, name, message));
        };
        let fail = |message: String| Error::tensor(&file.path, &name, message);
        if info.shape != shape {
            return Err(fail(format!(
                "shape {:?} contradicts config.json, which implies {shape:?}; use the config.json \
                 that belongs to the weights",
                info.shape
            )));
        }
        match info.dtype {
            Dtype::F32 | Dtype::BF16 | Dtype::F16 => Ok(Stored {
                file,
                dtype: info.dtype,
                start: file.data_start + info.data_offsets.0 as u64,
                name,
            }),
            other => Err(fail(format!(
                "element type {other:?} is not supported; convert it to bf16, f16 or f32"
            ))),
        }
    }
}

/// A tensor on disk.
struct Stored<'a> {
    file: &'a TensorFile,
    name: String,
    dtype: Dtype,
    start: u64,
}

impl Stored<'_> {
    /// Reads all elements, a piece at a time.
    fn read(&self, values: &mut [f32]) -> Result<()> {
        let width = self.dtype.bitsize() / 8;
        let mut buffer = vec![0u8; width * READ_ELEMENTS.min(values.len())];
        for (i, values) in values.chunks_mut(READ_ELEMENTS).enumerate() {
            let bytes = &mut buffer[..width * values.len()];
            let at = self.start + (i * READ_ELEMENTS * width) as u64;
            self.file
                .file
                .read_exact_at(bytes, at)
                .map_err(|e| Error::io(&self.file.path, e))?;
            match self.dtype {
                Dtype::BF16 => decode(bytes, values, |b| half::bf16::from_le_bytes(b).to_f32()),
                Dtype::F16 => decode(bytes, values, |b| half::f16::from_le_bytes(b).to_f32()),
                _ => decode(bytes, values, f32::from_le_bytes),
            }
            // Without an early end, so that the check is vectorised.
            if !values.iter().fold(true, |ok, v| ok & v.is_finite()) {
                let at = values.iter().position(|v| !v.is_finite()).unwrap_or(0);
                let message = format!(
                    "element {} is {}, not a finite number; the checkpoint is damaged, download \
                     or build it again",
                    i * READ_ELEMENTS + at,
                    values[at]
                );
                return Err(Error::tensor(&self.file.path, &self.name, message));
            }
        }
        Ok(())
    }
}

fn decode<const N: usize>(bytes: &[u8], values: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *value = decode(bytes);
    }
}

/// The names of the shards that an index names, sorted.
pub(crate) fn shards(index: &BTreeMap<String, String>) -> BTreeSet<&str> {
    index.values().map(String::as_str).collect()
}

/// The shard of each tensor. Shards are files beside the index and nothing else.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let fail = |message: String| Error::config(path, format!("{message}; download it again"));
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| fail(format!("not JSON: {e}")))?;
    let map = value
        .get("weight_map")
        .and_then(|m| m.as_object())
        .filter(|m| !m.is_empty())
        .ok_or_else(|| fail("`weight_map` is no object with entries".into()))?;
    map.iter()
        .map(|(tensor, shard)| match shard.as_str() {
            Some(shard) if Path::new(shard).file_name() == Some(shard.as_ref()) => {
                Ok((tensor.clone(), shard.to_owned()))
            }
            _ => Err(fail(format!(
                "`weight_map` gives `{tensor}` the shard {shard}, which is no file name"
            ))),
        })
        .collect()
}
