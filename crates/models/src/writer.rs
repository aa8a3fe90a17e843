//! Writing a model folder: tensors into safetensors shards, an index, side files, `config.json`.
//!
//! What will be written is known before it begins, so each tensor goes to its place at once and in
//! any order, nothing waits in memory, and a run that was stopped can go on.

use crate::checkpoint::{Checkpoint, Extra};
use crate::config::ModelConfig;
use crate::encode::{encode, first_not_finite};
use crate::folder::{PartialFolder, check_room, write_file};
use crate::index::INDEX;
use crate::layout::BankLayout;
use crate::manifest::Manifest;
use crate::placement::to_be_read;
pub use crate::shards::Format;
use crate::shards::{Shards, Slot};
use crate::tensor_file::Stored;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// What is done of a folder under construction.
const JOURNAL: &str = "journal.json";
/// Room that a file system wants beside the tensors, for side files and its own tables.
const ROOM: u64 = 1 << 20;

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

/// Writes a model folder and puts it in its place at the end.
pub struct CheckpointWriter {
    folder: PartialFolder,
    shards: Shards,
    files: Vec<File>,
    done: Vec<AtomicBool>,
    /// What a run that goes on must agree with.
    key: String,
    /// Whether there is something to go on with.
    journaled: bool,
    /// Whether the disk refused a write.
    failed: AtomicBool,
}

#[derive(Serialize, Deserialize)]
struct Journal {
    key: String,
    done: Vec<bool>,
}

impl CheckpointWriter {
    /// Begins a folder that appears at `target` on [`CheckpointWriter::finish`] and holds the tensors
    /// of `manifest`, and `extras` as they are called. A folder at `target` is replaced as a whole, if
    /// it is empty or has a `config.json`; any other is an error, and so is too little room on the
    /// disk.
    pub fn new(
        target: &Path,
        format: &Format,
        manifest: &Manifest,
        extras: &[Extra],
    ) -> Result<Self> {
        Self::check_target(target)?;
        Self::begin(PartialFolder::new(target)?, format, manifest, extras, "")
    }

    /// Begins a folder for the whole model `config` with the expert banks `layout`.
    pub fn for_model(
        target: &Path,
        format: &Format,
        config: &ModelConfig,
        layout: &BankLayout,
    ) -> Result<Self> {
        Self::new(target, format, &Manifest::of(config, layout)?, &[])
    }

    /// The same as [`CheckpointWriter::new`], going on with what an earlier run with the same `key` left; the
    /// key names all that decides the content.
    pub fn resume(
        target: &Path,
        format: &Format,
        manifest: &Manifest,
        extras: &[Extra],
        key: &str,
    ) -> Result<Self> {
        Self::check_target(target)?;
        let folder = PartialFolder::resume(target)?;
        let journal = fs::read(folder.path().join(JOURNAL)).unwrap_or_default();
        let journal = serde_json::from_slice::<Journal>(&journal).ok();
        let Some(journal) = journal.filter(|journal| journal.key == key) else {
            drop(folder);
            return Self::begin(PartialFolder::new(target)?, format, manifest, extras, key);
        };
        let shards = Shards::new(target, format, manifest, extras)?;
        let files = shards
            .shards
            .iter()
            .map(|shard| shard.reopen(folder.path()));
        let (files, whole) = (
            files.collect::<std::io::Result<Vec<_>>>(),
            journal.done.len() == shards.slots.len(),
        );
        match files {
            Ok(files) if whole => Ok(Self {
                journaled: true,
                failed: AtomicBool::new(false),
                done: journal.done.into_iter().map(AtomicBool::new).collect(),
                key: key.to_owned(),
                folder,
                shards,
                files,
            }),
            _ => {
                drop(folder);
                Self::begin(PartialFolder::new(target)?, format, manifest, extras, key)
            }
        }
    }

    fn begin(
        folder: PartialFolder,
        format: &Format,
        manifest: &Manifest,
        extras: &[Extra],
        key: &str,
    ) -> Result<Self> {
        let shards = Shards::new(folder.target(), format, manifest, extras)?;
        check_room(folder.target(), shards.total + ROOM)?;
        let create = |shard: &crate::shards::Shard| {
            let path = folder.path().join(&shard.name);
            shard.create(&path).map_err(|e| Error::io(&path, e))
        };
        Ok(Self {
            journaled: false,
            failed: AtomicBool::new(false),
            files: shards.shards.iter().map(create).collect::<Result<_>>()?,
            done: shards
                .slots
                .iter()
                .map(|_| AtomicBool::new(false))
                .collect(),
            key: key.to_owned(),
            folder,
            shards,
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

    /// Bytes of the files of weights, headers included.
    pub fn bytes(&self) -> u64 {
        self.shards.file_bytes()
    }

    /// Whether the tensor is written already, by this run or the one that it goes on with.
    pub fn is_done(&self, name: &str) -> bool {
        self.number(name).is_ok_and(|number| self.has(number))
    }

    fn has(&self, number: usize) -> bool {
        self.done[number].load(Ordering::Relaxed)
    }

    fn mark(&self, number: usize) {
        self.done[number].store(true, Ordering::Relaxed);
    }

    fn number(&self, name: &str) -> Result<usize> {
        self.shards.index.get(name).copied().ok_or_else(|| {
            let message = "is no part of the model; this is a fault of the program, report it";
            Error::tensor(self.folder.target(), name, message)
        })
    }

    /// Writes one tensor by our name for it, also from several threads. One of another size or without a
    /// place, a second one of a name, and a number that is not finite as stored, are errors.
    pub fn push(&self, name: impl AsRef<str>, tensor: &Tensor) -> Result<()> {
        let name = name.as_ref();
        let number = self.number(name)?;
        let fail = |message: String| Error::tensor(self.folder.target(), name, message);
        let expected = self.shards.slots[number].count;
        if self.has(number) || tensor.elem_count() != expected {
            return Err(fail(format!(
                "{} numbers for a place of {expected}, or written twice; this is a fault of the \
                 program, report it",
                tensor.elem_count()
            )));
        }
        let values = to_be_read(&tensor.to_dtype(DType::F32)?)?.flatten_all()?;
        let values = values.to_vec1::<f32>()?;
        let bytes = self.encoded(name, self.shards.slots[number].dtype, 0, &values)?;
        self.write(number, 0, &bytes)?;
        self.mark(number);
        Ok(())
    }

    fn encoded(&self, name: &str, dtype: DType, first: usize, values: &[f32]) -> Result<Vec<u8>> {
        encode(dtype, values).map_err(|at| {
            let (value, at) = (values[at], first + at);
            let message = match value.is_finite() {
                true => format!(
                    "element {at} is {value}, too large for {dtype:?}; store the model as f32 or bf16"
                ),
                false => format!("element {at} is {value}; train with a smaller learning rate"),
            };
            Error::tensor(self.folder.target(), name, message)
        })
    }

    /// Writes bytes from element `first` of a tensor on.
    fn write(&self, number: usize, first: usize, bytes: &[u8]) -> Result<()> {
        let slot = self.shards.slots[number];
        let start = slot.start + (first * slot.dtype.size_in_bytes()) as u64;
        self.files[slot.shard]
            .write_all_at(bytes, start)
            .map_err(|e| {
                self.failed.store(true, Ordering::Relaxed);
                let name = &self.shards.shards[slot.shard].name;
                Error::io(self.folder.path().join(name), e)
            })
    }

    /// Copies tensors of `checkpoint` that keep their name and shape; those done are skipped. Bytes of
    /// the same element type are copied as they are.
    pub fn copy(&self, checkpoint: &Checkpoint, tensors: &[(String, Vec<usize>)]) -> Result<()> {
        let stored = |(name, shape): &(String, Vec<usize>)| {
            Ok((name.clone(), checkpoint.find(name, shape)?))
        };
        self.copy_stored(tensors.iter().map(stored).collect::<Result<Vec<_>>>()?)
    }

    /// Copies extra tensors of `checkpoint`; those done are skipped.
    pub fn copy_extras(&self, checkpoint: &Checkpoint, extras: &[Extra]) -> Result<()> {
        let stored = |extra: &Extra| Ok((extra.name.clone(), checkpoint.find_extra(extra)?));
        self.copy_stored(extras.iter().map(stored).collect::<Result<Vec<_>>>()?)
    }

    fn copy_stored(&self, tensors: Vec<(String, Stored<'_>)>) -> Result<()> {
        let numbers = tensors.iter().map(|(name, _)| self.number(name));
        let numbers = numbers.collect::<Result<Vec<_>>>()?;
        let todo = tensors.par_iter().zip(&numbers);
        todo.filter(|(_, number)| !self.has(**number))
            .try_for_each(|((name, stored), &number)| {
                self.copy_one(name, stored, number)?;
                self.mark(number);
                Ok(())
            })
    }

    fn copy_one(&self, name: &str, stored: &Stored<'_>, number: usize) -> Result<()> {
        let dtype = self.shards.slots[number].dtype;
        if stored.plain_dtype() != Some(dtype) || stored.change.is_some() {
            let mut first = 0;
            return stored.pieces(&mut |values| {
                self.write(number, first, &self.encoded(name, dtype, first, values)?)?;
                first += values.len();
                Ok(())
            });
        }
        stored.bytes(&mut |first, bytes| match first_not_finite(dtype, bytes) {
            Some((at, value)) => Err(stored.not_finite(first + at, value)),
            None => self.write(number, first, bytes),
        })
    }

    /// Writes one tensor whose numbers are made piece by piece, from `first` on, in any order and on
    /// any thread; the caller makes all of them.
    pub(crate) fn fill(
        &self,
        name: &str,
        piece: usize,
        make: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<()> {
        let number = self.number(name)?;
        let Slot { count, dtype, .. } = self.shards.slots[number];
        (0..count.div_ceil(piece))
            .into_par_iter()
            .try_for_each(|i| {
                let first = i * piece;
                let mut values = vec![0f32; piece.min(count - first)];
                make(i, &mut values);
                self.write(number, first, &self.encoded(name, dtype, first, &values)?)
            })?;
        self.mark(number);
        Ok(())
    }

    /// Makes what is done durable: a writer that is dropped, or killed, from here on leaves it for a
    /// later run with the same key, unless the disk fails: a full one gets its room back.
    pub fn checkpoint(&mut self) -> Result<()> {
        for (file, shard) in self.files.iter().zip(&self.shards.shards) {
            file.sync_data()
                .map_err(|e| Error::io(self.folder.path().join(&shard.name), e))?;
        }
        let journal = Journal {
            key: self.key.clone(),
            done: (0..self.done.len())
                .map(|number| self.has(number))
                .collect(),
        };
        write_file(&self.folder.path().join(JOURNAL), &json(JOURNAL, &journal)?)?;
        self.journaled = true;
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
            let ours = ["config.json", JOURNAL].contains(&name.as_str());
            if ours || WEIGHTS.iter().any(|w| name.ends_with(w)) {
                continue;
            }
            fs::copy(&path, self.folder.path().join(name)).map_err(|e| Error::io(&path, e))?;
        }
        Ok(())
    }

    /// Writes the index if there are several shards, and `config.json`; then the folder appears. A
    /// tensor that was never written is an error.
    pub fn finish(mut self, config: &serde_json::Value) -> Result<()> {
        let missing = (0..self.done.len()).find(|&number| !self.has(number));
        if let Some(missing) = missing {
            let found = self.shards.index.iter().find(|(_, i)| **i == missing);
            let name = found.map_or("", |(name, _)| name.as_str());
            let message = "was not written; this is a fault of the program, report it";
            return Err(Error::tensor(self.folder.target(), name, message));
        }
        self.side_file("config.json", &json("config.json", config)?)?;
        let shards = &self.shards.shards;
        if shards.len() > 1 {
            let mut weight_map = serde_json::Map::new();
            for shard in shards {
                let names = shard.tensors.iter();
                weight_map.extend(names.map(|n| (n.clone(), shard.name.clone().into())));
            }
            let index = serde_json::json!({
                "metadata": { "total_size": self.shards.total },
                "weight_map": weight_map,
            });
            self.side_file(INDEX, &json(INDEX, &index)?)?;
        }
        let journal = self.folder.path().join(JOURNAL);
        if journal.exists() {
            fs::remove_file(&journal).map_err(|e| Error::io(journal, e))?;
        }
        self.folder.commit()
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if self.journaled && !self.failed.load(Ordering::Relaxed) {
            self.folder.keep();
        }
    }
}

fn json(name: &str, value: &impl Serialize) -> Result<Vec<u8>> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::Invalid(format!("{name} cannot be written: {e}; report it")))?;
    Ok((text + "\n").into_bytes())
}
