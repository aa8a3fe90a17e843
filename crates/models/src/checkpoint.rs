//! A model folder: `config.json`, safetensors in one file or in shards with an index, side files.
//!
//! Reading is lazy: opening reads the headers, [`Checkpoint::tensor`] reads one tensor's bytes.
//! What the files call a tensor, and whether experts are stacked in them, is seen here alone.

use crate::config::ModelConfig;
use crate::index::{INDEX, read_index, shards};
use crate::layout::BankLayout;
use crate::manifest::Manifest;
use crate::names::Scheme;
use crate::placement::Placement;
use crate::tensor_file::{BlockScales, Change, Stored, TensorFile, count_numbers};
use crate::{Error, Result, folder, names};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The weights, if they are one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// What the scales of an FP8 matrix add to its name.
const SCALE: &str = "_scale_inv";

/// An open model folder.
#[derive(Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    layout: BankLayout,
    scheme: Scheme,
    files: Arc<[TensorFile]>,
    by_name: Arc<HashMap<String, usize>>,
    change: Option<Arc<Change>>,
    placement: Placement,
}

/// A tensor of the files that is no part of the model as we run it.
#[derive(Debug, Clone, PartialEq)]
pub struct Extra {
    /// Its name in the files.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its element type; bf16 where that is FP8.
    pub dtype: DType,
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
        let scheme = Scheme::detect(config.family, by_name.keys().map(String::as_str));
        Ok(Self {
            dir: dir.to_owned(),
            config,
            layout,
            scheme,
            files: files.into(),
            by_name: by_name.into(),
            change: None,
            placement: Placement::default(),
        })
    }

    /// The same model with `change` done to every number of its own tensors as it is read, by whoever
    /// runs or copies it. A changed number is rounded to the element type of the file, so a copy of
    /// that type computes the same. Extra tensors stay as they are.
    pub fn changed(self, change: impl Fn(&str, usize, &mut [f32]) + Send + Sync + 'static) -> Self {
        Self {
            change: Some(Arc::new(change)),
            ..self
        }
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

    /// Names and packing of the files.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// All tensor names as they stand in the files, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Bytes of the files of weights, headers included.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Tells this checkpoint from another, or from an earlier state of the same: `config.json`, and
    /// the place, size and time of change of each file.
    ///
    /// # Errors
    /// If a file is gone.
    pub fn stamp(&self) -> Result<String> {
        let mut stamp = self.config.raw.to_string();
        for file in self.files.iter() {
            let found = fs::metadata(&file.path).map_err(|e| Error::io(&file.path, e))?;
            let path = fs::canonicalize(&file.path).map_err(|e| Error::io(&file.path, e))?;
            stamp += &format!(
                "\n{}: {} {:?}",
                path.display(),
                found.len(),
                found.modified()
            );
        }
        Ok(stamp)
    }

    /// Parameters of the model as it runs: without scales of FP8 blocks and extra tensors.
    pub fn parameters(&self) -> u64 {
        // The layout fits the model, or the checkpoint would not be open.
        Manifest::of(&self.config, &self.layout).map_or(0, |manifest| manifest.parameters())
    }

    /// The element type most numbers have on disk; bf16 where that is FP8.
    pub fn dtype(&self) -> DType {
        let mut counts = BTreeMap::new();
        for file in self.files.iter() {
            for (dtype, numbers) in count_numbers(&file.metadata) {
                *counts.entry(dtype).or_insert(0u64) += numbers;
            }
        }
        match counts.into_iter().max_by_key(|(_, n)| *n) {
            Some((Dtype::BF16 | Dtype::F8_E4M3, _)) => DType::BF16,
            Some((Dtype::F16, _)) => DType::F16,
            _ => DType::F32,
        }
    }

    /// Whether every tensor that the configuration implies is there, in its shape, and none that a
    /// layer would ignore. To be asked before the model is run; no weights are read.
    ///
    /// # Errors
    /// [`Error::Tensor`] naming the first that is missing, or that does not belong.
    pub fn check(&self) -> Result<()> {
        let manifest = Manifest::of(&self.config, &self.layout)?;
        let mut tensors = manifest.tensors.iter();
        tensors.try_for_each(|(name, shape)| self.find(name, shape).map(|_| ()))?;
        self.extras().map(|_| ())
    }

    /// Gives the tensors of a manifest that are in this checkpoint the element type they have here,
    /// where it is not that of most: routers and their corrections are often kept in f32.
    ///
    /// # Errors
    /// If one of them has an element type that we cannot read.
    pub fn keep_types(&self, manifest: &mut Manifest) -> Result<()> {
        let most = self.dtype();
        for (name, shape) in &manifest.tensors {
            let place = self.scheme.place(name, shape, &self.layout);
            if !self.by_name.contains_key(&place.name) {
                continue;
            }
            let dtype = self.find(name, shape)?.plain_dtype();
            if let Some(dtype) = dtype.filter(|&dtype| dtype != most) {
                manifest.types.insert(name.clone(), dtype);
            }
        }
        Ok(())
    }

    /// Tensors that are no part of the model, sorted: they are copied and not run, like the layers of
    /// DeepSeek-V3 that guess further tokens. Scales of FP8 blocks are not among them.
    ///
    /// # Errors
    /// If the layout does not fit the model, an extra one has an element type that we cannot copy, or
    /// it stands in a layer that runs: then the configuration leaves out a part of the model.
    pub fn extras(&self) -> Result<Vec<Extra>> {
        let manifest = Manifest::of(&self.config, &self.layout)?;
        let places = manifest.tensors.iter();
        let known: HashSet<String> = places
            .map(|(name, shape)| self.scheme.place(name, shape, &self.layout).name)
            .collect();
        let mut extras = Vec::new();
        for name in self.names() {
            let scale = name.strip_suffix(SCALE);
            let tied = self.config.tie_word_embeddings && name == "lm_head.weight";
            if known.contains(name) || tied || scale.is_some_and(|w| self.by_name.contains_key(w)) {
                continue;
            }
            let runs = names::layer_of(name).is_some_and(|l| l < self.config.num_layers);
            if runs && !name.ends_with(".rotary_emb.inv_freq") {
                let message = "is no part of the layer that config.json describes; use the \
                               config.json that belongs to the weights";
                return Err(Error::tensor(&self.dir, name, message));
            }
            let info = self.files[self.by_name[name]].metadata.info(name);
            let shape = info.map(|info| info.shape.clone()).unwrap_or_default();
            let stored = self.locate(name, &shape, name, 0, shape.iter().product())?;
            extras.push(Extra {
                name: name.to_owned(),
                dtype: stored.plain_dtype().unwrap_or(DType::BF16),
                shape,
            });
        }
        Ok(extras)
    }

    /// The same model, whose tensors go to another place as they are read.
    #[must_use]
    pub fn on(&self, placement: &Placement) -> Self {
        Self {
            placement: placement.clone(),
            ..self.clone()
        }
    }

    /// Where tensors go as they are read.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Reads the tensor `name` (our name, see [`crate::names`]) of the given shape; see
    /// [`Checkpoint::on`]. A missing tensor, another shape, an element type that is no float, NaN and
    /// infinity are errors.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let values = self.values(name, shape)?;
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        // Choices are decided by differences that 16 bits do not hold.
        match names::is_router(name) {
            true => self.placement.exact().put(&tensor),
            false => self.placement.put(&tensor),
        }
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let stored = self.find(name, shape)?;
        let mut values = vec![0f32; shape.iter().product()];
        stored.read(&mut values)?;
        Ok(values)
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
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        self.placement.put(&tensor)
    }

    /// Reads the places of rows `name`, each below `rows` and ascending: `[count]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing or damaged, or a place is none.
    pub fn index(&self, name: &str, count: usize, rows: usize) -> Result<Vec<u32>> {
        let places = self.values(name, &[count])?;
        let places: Vec<u32> = places.into_iter().map(|place| place as u32).collect();
        let mut next = 0;
        for (i, &place) in places.iter().enumerate() {
            if place < next || place as usize >= rows {
                let message = format!(
                    "element {i} is {place}, expected ascending places of {rows} rows; the checkpoint \
                     is damaged, download or build it again"
                );
                return Err(Error::tensor(&self.dir, name, message));
            }
            next = place.saturating_add(1);
        }
        Ok(places)
    }

    /// Shows `f` the numbers of a tensor, as [`Checkpoint::tensor`] reads them, a piece at a time.
    pub fn pieces(
        &self,
        name: &str,
        shape: &[usize],
        f: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        self.find(name, shape)?.pieces(f)
    }

    /// Where a tensor of this shape lies.
    pub(crate) fn find(&self, name: &str, shape: &[usize]) -> Result<Stored<'_>> {
        let place = self.scheme.place(name, shape, &self.layout);
        let count = shape.iter().product();
        let stored = self.locate(&place.name, &place.shape, name, place.offset, count)?;
        let change = self.change.as_deref();
        Ok(Stored {
            change: change.map(|change| (name.to_owned(), change)),
            ..stored
        })
    }

    /// Where an extra tensor lies.
    pub(crate) fn find_extra(&self, extra: &Extra) -> Result<Stored<'_>> {
        let count = extra.shape.iter().product();
        self.locate(&extra.name, &extra.shape, &extra.name, 0, count)
    }

    /// `count` numbers from `offset` of the file's tensor `name`; `ours` is what errors call it if it
    /// is a part. Nothing is allocated before its size is known to be real.
    fn locate(
        &self,
        name: &str,
        shape: &[usize],
        ours: &str,
        offset: usize,
        count: usize,
    ) -> Result<Stored<'_>> {
        let found = self.by_name.get(name).map(|&i| &self.files[i]);
        let Some((file, info)) = found.and_then(|f| Some((f, f.metadata.info(name)?))) else {
            let message = format!(
                "missing, expected {shape:?}; the checkpoint is incomplete or of another family, \
                 download it again"
            );
            return Err(Error::tensor(&self.dir, name, message));
        };
        let fail = |message: String| Error::tensor(&file.path, name, message);
        if info.shape != shape {
            return Err(fail(format!(
                "shape {:?} contradicts config.json, which implies {shape:?}; use the config.json \
                 that belongs to the weights",
                info.shape
            )));
        }
        let scales = match info.dtype {
            Dtype::U32 if names::is_index(ours) => None,
            other if names::is_index(ours) => {
                return Err(fail(format!(
                    "element type {other:?}, expected U32; build the checkpoint again"
                )));
            }
            Dtype::F32 | Dtype::BF16 | Dtype::F16 => None,
            Dtype::F8_E4M3 => Some(self.scales(name, shape).map_err(fail)?),
            other => {
                return Err(fail(format!(
                    "element type {other:?} is not supported; convert it to bf16, f16 or f32"
                )));
            }
        };
        Ok(Stored {
            file,
            dtype: info.dtype,
            start: (info.data_offsets.0 + offset * info.dtype.bitsize() / 8) as u64,
            name: if offset == 0 { name } else { ours }.to_owned(),
            count,
            scales,
            change: None,
        })
    }

    /// The scales of the FP8 matrix `name`.
    fn scales(&self, name: &str, shape: &[usize]) -> std::result::Result<BlockScales, String> {
        let (Some(block), &[rows, columns]) = (self.config.fp8_block, shape) else {
            return Err(
                "FP8 numbers need a `quantization_config` with a `weight_block_size` and a matrix \
                 of their own; convert the checkpoint to bf16"
                    .into(),
            );
        };
        let scale = format!("{name}{SCALE}");
        let blocks = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
        let stored = self
            .locate(&scale, &blocks, &scale, 0, blocks[0] * blocks[1])
            .map_err(|e| format!("its scales cannot be read: {e}"))?;
        let mut values = vec![0f32; stored.count];
        stored
            .read(&mut values)
            .map_err(|e| format!("its scales cannot be read: {e}"))?;
        Ok(BlockScales {
            columns,
            block,
            values,
        })
    }
}
