//! The hidden states of all samples between two layers, in files of a folder.
//!
//! `work.json` says which work the folder is of, and how large its batches are. `hidden-<l>` holds
//! what goes into layer `l`: the batches one behind the other, each `[B, T, H]` f32 little-endian.
//! `observations-<l>.safetensors` holds what the layers before it showed. A layer reads one pair and
//! writes the next, so a run killed at any moment finds the last whole pair. A folder without a pair
//! is worth nothing, and an error does not leave it behind.

use crate::observations::Observations;
use crate::observe::Batch;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use lightmoe_models::folder::write_file;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const OBSERVATIONS: &str = "observations-";
const WORK: &str = "work.json";

/// Names all that decides the numbers: a digest of the samples and of the caller's fingerprint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Work(String);

impl Work {
    pub(crate) fn new(samples: &[Vec<u32>], fingerprint: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(fingerprint);
        for sample in samples {
            hash.update((sample.len() as u64).to_le_bytes());
            sample.iter().for_each(|id| hash.update(id.to_le_bytes()));
        }
        Self(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }
}

/// What a folder is of.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Found {
    work: String,
    /// The largest batch, in tokens.
    pub(crate) batch_tokens: usize,
}

/// The folder, and where the batches lie in its files.
#[derive(Debug)]
pub(crate) struct States {
    folder: PathBuf,
    hidden_size: usize,
    /// First byte of each batch, and the end.
    starts: Vec<u64>,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Io {
        path: path.to_owned(),
        source,
    }
}

impl States {
    pub(crate) fn new(folder: &Path, hidden_size: usize, batches: &[Batch<'_>]) -> Self {
        let mut starts = vec![0];
        for batch in batches {
            let numbers = batch.samples.len() * batch.width * hidden_size;
            starts.push(starts[starts.len() - 1] + 4 * numbers as u64);
        }
        Self {
            folder: folder.to_owned(),
            hidden_size,
            starts,
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn hidden(&self, layer: usize) -> PathBuf {
        self.folder.join(format!("hidden-{layer}"))
    }

    fn observations(&self, layer: usize) -> PathBuf {
        self.folder
            .join(format!("{OBSERVATIONS}{layer}.safetensors"))
    }

    /// The last layer that has a pair.
    fn last(&self) -> Option<usize> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let numbers = entries.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let number = name
                .strip_prefix(OBSERVATIONS)?
                .strip_suffix(".safetensors")?;
            number.parse().ok()
        });
        numbers.max()
    }

    /// The batches of an earlier run of the same work.
    pub(crate) fn find(folder: &Path, work: &Work) -> Option<Found> {
        let text = fs::read(folder.join(WORK)).ok()?;
        let found: Found = serde_json::from_slice(&text).ok()?;
        (found.work == work.0).then_some(found)
    }

    /// The layer to go on with and what was seen before it, if an earlier run of the `same` work left
    /// them.
    pub(crate) fn resume(&self, same: bool) -> Result<Option<(usize, Observations)>> {
        let Some(layer) = self.last().filter(|_| same) else {
            return Ok(None);
        };
        let size = fs::metadata(self.hidden(layer)).map_or(0, |found| found.len());
        if Some(&size) != self.starts.last() {
            return Ok(None);
        }
        Ok(Some((
            layer,
            Observations::load(&self.observations(layer))?,
        )))
    }

    /// Begins the folder anew.
    pub(crate) fn begin(&self, work: &Work, batch_tokens: usize) -> Result<()> {
        if self.folder.exists() {
            self.remove()?;
        }
        let found = Found {
            work: work.0.clone(),
            batch_tokens,
        };
        let text = serde_json::to_vec(&found)
            .map_err(|e| Error::Invalid(format!("{WORK} cannot be written: {e}; report it")))?;
        Ok(write_file(&self.folder.join(WORK), &text)?)
    }

    /// What goes into `layer` of batch `number`: `[B, T, H]`.
    pub(crate) fn read(&self, layer: usize, number: usize, batch: &Batch<'_>) -> Result<Tensor> {
        let path = self.hidden(layer);
        let (start, end) = (self.starts[number], self.starts[number + 1]);
        let mut bytes = vec![0u8; (end - start) as usize];
        File::open(&path)
            .and_then(|file| file.read_exact_at(&mut bytes, start))
            .map_err(io(&path))?;
        let numbers = bytes.as_chunks::<4>().0.iter();
        let values: Vec<f32> = numbers.map(|&b| f32::from_le_bytes(b)).collect();
        let shape = (batch.samples.len(), batch.width, self.hidden_size);
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// Begins the file of what goes into `layer`.
    pub(crate) fn writer(&self, layer: usize) -> Result<StatesWriter<'_>> {
        let path = self.hidden(layer);
        let file = File::create(&path).map_err(io(&path))?;
        Ok(StatesWriter {
            states: self,
            layer,
            file: BufWriter::new(file),
            whole: false,
        })
    }

    /// Removes the folder.
    pub(crate) fn remove(&self) -> Result<()> {
        fs::remove_dir_all(&self.folder).map_err(io(&self.folder))
    }
}

impl Drop for States {
    fn drop(&mut self) {
        if self.last().is_none() {
            // Best effort: the next run writes over what is left.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// A file of states under work. Dropped before its end, it is removed.
pub(crate) struct StatesWriter<'a> {
    states: &'a States,
    layer: usize,
    file: BufWriter<File>,
    whole: bool,
}

impl Drop for StatesWriter<'_> {
    fn drop(&mut self) {
        if !self.whole {
            // Best effort: the next run writes over it.
            let _ = fs::remove_file(self.states.hidden(self.layer));
        }
    }
}

impl StatesWriter<'_> {
    /// Adds the next batch.
    pub(crate) fn push(&mut self, hidden: &Tensor) -> Result<()> {
        let path = self.states.hidden(self.layer);
        for value in hidden.flatten_all()?.to_vec1::<f32>()? {
            self.file
                .write_all(&value.to_le_bytes())
                .map_err(io(&path))?;
        }
        Ok(())
    }

    /// Ends the file.
    pub(crate) fn close(mut self) -> Result<()> {
        let path = self.states.hidden(self.layer);
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_data())
            .map_err(io(&path))?;
        self.whole = true;
        Ok(())
    }

    /// Ends the file, records what was seen so far, and removes the pair before: from here on, a run
    /// goes on with this layer.
    pub(crate) fn finish(self, seen: &Observations) -> Result<()> {
        let (states, layer) = (self.states, self.layer);
        self.close()?;
        seen.save(&states.observations(layer))?;
        for old in [states.hidden(layer - 1), states.observations(layer - 1)] {
            match fs::remove_file(&old) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(&old)(e)),
                _ => {}
            }
        }
        Ok(())
    }
}
