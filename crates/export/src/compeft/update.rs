//! `update.compeft`: what recovery changed, in one safetensors file.
//!
//! The tensor `stream` `[bytes]` u8 holds the signs of the kept entries, coded as
//! [`super::golomb`] says; the metadata has one key, `compeft`, a JSON object with the fields of
//! [`Header`].

use super::delta::fingerprint;
use super::golomb::Signs;
use crate::{Error, Result};
use lightmoe_models::{Checkpoint, Manifest, NamedShape, folder};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Version of the file's layout.
pub const SCHEMA_VERSION: u32 = 1;

const METADATA_KEY: &str = "compeft";
const STREAM: &str = "stream";

/// What an update says beside its signs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// SHA-256 of the content of the checkpoint that the update belongs to.
    pub fingerprint: String,
    /// The share of the entries that was to be kept.
    pub density: f64,
    /// The kept entries in standard deviations.
    pub alpha: f64,
    /// Population standard deviation of all entries.
    pub sigma: f64,
    /// Entries in all tensors.
    pub n: u64,
    /// Entries that are kept.
    pub kept: u64,
    /// Low bits of each gap in the stream.
    pub rice_parameter: u32,
    /// Name and shape of the changed tensors, by name; the entries follow each other in this order.
    pub tensors: Vec<NamedShape>,
}

impl Header {
    /// What a kept entry adds or takes away.
    pub fn value(&self) -> f32 {
        (self.alpha * self.sigma) as f32
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.schema_version != SCHEMA_VERSION {
            return Err(format!(
                "schema version {}, expected {SCHEMA_VERSION}; pack again with this version",
                self.schema_version
            ));
        }
        if !(self.density > 0.0 && self.density <= 1.0) {
            return Err(format!(
                "a density of {}; expected a share above 0, at most 1",
                self.density
            ));
        }
        let value = self.value();
        if !(self.alpha > 0.0 && self.sigma > 0.0 && value > 0.0 && value.is_finite()) {
            return Err(format!(
                "alpha {} times a standard deviation of {} is no size for a change; expected a \
                 number above 0",
                self.alpha, self.sigma
            ));
        }
        if !self.tensors.is_sorted_by(|a, b| a.0 < b.0) {
            return Err("tensors that do not stand by name, once each; pack again".into());
        }
        let mut shapes = self.tensors.iter().map(|(_, shape)| shape);
        let n = shapes.try_fold(0u64, |all, shape| {
            let mut sizes = shape.iter();
            let count = sizes.try_fold(1u64, |all, &size| all.checked_mul(size as u64));
            all.checked_add(count?)
        });
        match n == Some(self.n) && (1..=self.n).contains(&self.kept) {
            true => Ok(()),
            false => Err(format!(
                "{} entries of {}, which its tensors do not have; pack again",
                self.kept, self.n
            )),
        }
    }
}

/// What recovery changed, sparse and ternary. Cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub struct Update {
    header: Header,
    signs: Arc<Signs>,
}

impl Update {
    pub(crate) fn new(header: Header, signs: Signs) -> std::result::Result<Self, String> {
        header.check()?;
        let signs = Arc::new(signs);
        Ok(Self { header, signs })
    }

    /// What it says beside its signs.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The same signs with another size.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `alpha` is no number above 0.
    pub fn with_alpha(&self, alpha: f64) -> Result<Self> {
        let mut update = self.clone();
        update.header.alpha = alpha;
        update.header.check().map_err(Error::Invalid)?;
        Ok(update)
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// If they cannot be written as safetensors: report it.
    pub fn encode(&self) -> std::result::Result<Vec<u8>, String> {
        let stream = self.signs.stream();
        let view = TensorView::new(Dtype::U8, vec![stream.len()], stream);
        let view = view.map_err(|e| e.to_string())?;
        let header = serde_json::to_string(&self.header).map_err(|e| e.to_string())?;
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), header)]);
        safetensors::serialize([(STREAM, view)], Some(metadata)).map_err(|e| e.to_string())
    }

    /// Reads the bytes of a file; every entry is checked.
    ///
    /// # Errors
    /// What is wrong with them and what to do.
    pub fn decode(bytes: &[u8]) -> std::result::Result<Self, String> {
        let damaged = |e| format!("not a whole safetensors file ({e}); copy it again");
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let header = metadata.metadata().as_ref();
        let header = header
            .and_then(|entries| entries.get(METADATA_KEY))
            .ok_or("no metadata `compeft`; give a file that `export --pack compeft` wrote")?;
        let header: Header = serde_json::from_str(header)
            .map_err(|e| format!("the metadata `compeft` is damaged ({e}); copy it again"))?;
        header.check()?;
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        let stream = match (file.tensor(STREAM), file.len()) {
            (Ok(view), 1) if view.dtype() == Dtype::U8 && view.shape().len() == 1 => view.data(),
            _ => {
                return Err(format!(
                    "expected the tensor `{STREAM}` [bytes] u8 alone; copy it again"
                ));
            }
        };
        let (n, kept, rice) = (header.n, header.kept, header.rice_parameter);
        let signs = Signs::decode(n, kept, rice, stream.to_vec())
            .map_err(|message| format!("{message}; the file is damaged, copy it again"))?;
        Self::new(header, signs)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`Error::Model`] if it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = self
            .encode()
            .map_err(|message| update_error(path, message))?;
        Ok(folder::write_file(path, &bytes)?)
    }

    /// Reads a file that [`Update::save`] wrote.
    ///
    /// # Errors
    /// [`Error::Model`] if it cannot be read, [`Error::Update`] if it is damaged.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| lightmoe_models::Error::io(path, e))?;
        Self::decode(&bytes).map_err(|message| update_error(path, message))
    }

    /// The changed model: `base` with the entries added as its numbers are read, by whoever runs or
    /// copies it, and rounded to the element type of `base`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `base` is not the checkpoint that the update was made from;
    /// [`Error::Model`] if it cannot be read.
    pub fn apply(&self, base: Checkpoint) -> Result<Checkpoint> {
        let manifest = Manifest::of(base.config(), base.layout())?;
        let shapes: HashMap<_, _> = manifest.tensors.into_iter().collect();
        let fits = |(name, shape): &NamedShape| shapes.get(name) == Some(shape);
        let fits = self.header.tensors.iter().all(fits);
        if !fits || fingerprint(&base)? != self.header.fingerprint {
            return Err(Error::Invalid(format!(
                "`{}` is not the checkpoint that the update was made from; give that one, unchanged",
                base.dir().display()
            )));
        }
        Ok(self.add_to(base))
    }

    /// As [`Update::apply`], for a base that is known to be the right one.
    pub(crate) fn add_to(&self, base: Checkpoint) -> Checkpoint {
        let (mut offsets, mut end) = (HashMap::new(), 0);
        for (name, shape) in &self.header.tensors {
            offsets.insert(name.clone(), end);
            end += shape.iter().product::<usize>() as u64;
        }
        let (signs, value) = (self.signs.clone(), self.header.value());
        base.changed(move |name, first, values| {
            let Some(offset) = offsets.get(name) else {
                return;
            };
            let start = offset + first as u64;
            for (index, negative) in signs.range(start, start + values.len() as u64) {
                values[(index - start) as usize] += if negative { -value } else { value };
            }
        })
    }
}

fn update_error(path: &Path, message: String) -> Error {
    Error::Update {
        path: path.to_owned(),
        message,
    }
}
