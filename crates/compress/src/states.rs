//! The hidden states of all samples between two layers, in files of a folder.
//!
//! `work.json` says which work the folder is of, and how large its batches are. `hidden-<l>` holds
//! what goes into layer `l`: the batches one behind the other, each `[B, T, H]` f32 little-endian.
//! `observations-<l>.safetensors` holds what the layers before it showed. A layer reads one pair and
//! writes the next, so a run killed at any moment finds the last whole pair. A folder without a pair
//! is worth nothing, and an error does not leave it behind.
//!
//! Where gradients are wanted, the hidden states of all layers stay until the end, and the way back has
//! pairs of its own: `gradient-<l>`, of what goes into layer `l`, and `returned-<l>.safetensors`, with what
//! layer `l` and those behind it showed.

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
const RETURNED: &str = "returned-";
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

/// What a file has of every token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Values {
    /// Its hidden state.
    Hidden,
    /// The gradient of the loss by that.
    Gradient,
}

/// Which files of states stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// The last.
    Last,
    /// All, for the way back.
    All,
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

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(path)(e)),
        _ => Ok(()),
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

    fn values(&self, what: Values, layer: usize) -> PathBuf {
        let name = match what {
            Values::Hidden => "hidden",
            Values::Gradient => "gradient",
        };
        self.folder.join(format!("{name}-{layer}"))
    }

    fn seen(&self, prefix: &str, layer: usize) -> PathBuf {
        self.folder.join(format!("{prefix}{layer}.safetensors"))
    }

    /// The layers that have a file of observations of this name.
    fn layers(&self, prefix: &str) -> Vec<usize> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let numbers = entries.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let number = name.strip_prefix(prefix)?.strip_suffix(".safetensors")?;
            number.parse().ok()
        });
        numbers.collect()
    }

    /// The last layer that has a pair.
    fn last(&self) -> Option<usize> {
        self.layers(OBSERVATIONS).into_iter().max()
    }

    /// Whether the file holds all batches.
    fn is_whole(&self, what: Values, layer: usize) -> bool {
        let size = fs::metadata(self.values(what, layer)).map_or(0, |found| found.len());
        Some(&size) == self.starts.last()
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
        // On the way back they are removed layer by layer.
        if !self.is_whole(Values::Hidden, layer) && self.returned()?.is_none() {
            return Ok(None);
        }
        let seen = Observations::load(&self.seen(OBSERVATIONS, layer))?;
        Ok(Some((layer, seen)))
    }

    /// How far an earlier run came on the way back: the last layer that was done, and what was seen.
    pub(crate) fn returned(&self) -> Result<Option<(usize, Observations)>> {
        let layer = self.layers(RETURNED).into_iter().min();
        let layer = layer.filter(|&layer| self.is_whole(Values::Gradient, layer));
        let seen = layer.map(|l| Ok((l, Observations::load(&self.seen(RETURNED, l))?)));
        seen.transpose()
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

    /// What goes into `layer` of batch `number`, or its gradient: `[B, T, H]`.
    pub(crate) fn read(
        &self,
        what: Values,
        layer: usize,
        number: usize,
        batch: &Batch<'_>,
    ) -> Result<Tensor> {
        let path = self.values(what, layer);
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

    /// Begins the file of what goes into `layer`, or of its gradient.
    pub(crate) fn writer(&self, what: Values, layer: usize) -> Result<StatesWriter<'_>> {
        let path = self.values(what, layer);
        let file = File::create(&path).map_err(io(&path))?;
        Ok(StatesWriter {
            states: self,
            what,
            layer,
            file: BufWriter::new(file),
            whole: false,
        })
    }

    /// Records what was seen so far beside the file of `layer`, which is whole, and removes the pair before,
    /// of its values unless they are wanted again: from here on, a run goes on with this layer.
    pub(crate) fn record(
        &self,
        seen: &Observations,
        what: Values,
        layer: usize,
        keep: Keep,
    ) -> Result<()> {
        let (prefix, before) = match what {
            Values::Hidden => (OBSERVATIONS, layer - 1),
            Values::Gradient => (RETURNED, layer + 1),
        };
        seen.save(&self.seen(prefix, layer))?;
        if keep == Keep::Last {
            self.forget(what, before)?;
        }
        remove(&self.seen(prefix, before))
    }

    /// Removes the file of `layer`.
    pub(crate) fn forget(&self, what: Values, layer: usize) -> Result<()> {
        remove(&self.values(what, layer))
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
    what: Values,
    layer: usize,
    file: BufWriter<File>,
    whole: bool,
}

impl Drop for StatesWriter<'_> {
    fn drop(&mut self) {
        if !self.whole {
            // Best effort: the next run writes over it.
            let _ = fs::remove_file(self.path());
        }
    }
}

impl StatesWriter<'_> {
    fn path(&self) -> PathBuf {
        self.states.values(self.what, self.layer)
    }

    /// Adds the next batch.
    pub(crate) fn push(&mut self, hidden: &Tensor) -> Result<()> {
        let path = self.path();
        for value in hidden.flatten_all()?.to_vec1::<f32>()? {
            self.file
                .write_all(&value.to_le_bytes())
                .map_err(io(&path))?;
        }
        Ok(())
    }

    /// Ends the file.
    pub(crate) fn close(mut self) -> Result<()> {
        let path = self.path();
        self.file
            .flush()
            .and_then(|()| self.file.get_ref().sync_data())
            .map_err(io(&path))?;
        self.whole = true;
        Ok(())
    }
}
