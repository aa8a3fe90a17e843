//! The file of observations.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use lightmoe_models::folder;
use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};
use serde::{Deserialize, Serialize};

use super::components::{BIASED, DAMAGES, DIFFERENCES, SPECTRA};
use super::{Biased, Components, Damage, LayerObservations, Observations, OutputObservations};
use crate::observe::Sensitivity;
use crate::{Error, Result, read};

/// Version of the file's layout.
pub const SCHEMA_VERSION: u32 = 3;

const METADATA_KEY: &str = "observations";

/// The folder of the moments and samples that belong to the observations `path`.
pub fn moments_folder(path: &Path) -> PathBuf {
    path.with_extension("moments")
}

#[derive(Serialize, Deserialize)]
struct Header {
    schema_version: u32,
    tokens: u64,
    samples: u64,
    fingerprint: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sensitivity: Option<Sensitivity>,
}

impl Observations {
    /// Writes the file, atomically: the same observations give the same bytes.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written; [`Error::Invalid`] if a layer holds
    /// impossible values.
    pub fn save(&self, path: &Path) -> Result<()> {
        for layer in &self.layers {
            layer.validate().map_err(Error::Invalid)?;
        }
        let bytes = self
            .encode()
            .map_err(|e| observations_error(path, format!("cannot be encoded ({e}); report it")))?;
        Ok(folder::write_file(path, &bytes)?)
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// If they cannot be encoded, in the words of the encoder.
    pub fn encode(&self) -> std::result::Result<Vec<u8>, String> {
        let mut tensors = Vec::new();
        for layer in &self.layers {
            let experts = layer.gate_mass.len();
            let mut push = |name: &str, shape: &[usize], block: Block| {
                tensors.push((tensor_name(layer.layer, name), block.shaped(shape)));
            };
            push("gate_mass", &[experts], Block::f64(&layer.gate_mass));
            push("selections", &[experts], Block::u64(&layer.selections));
            if let Some(norm) = layer.router_norm {
                push("router_norm", &[1], Block::f64(&[norm]));
            }
            for (name, values) in layer.tables() {
                let width = values.len() / experts.max(1);
                let shape: &[usize] = match flat(name) {
                    true => &[experts],
                    false => &[experts, width],
                };
                push(name, shape, Block::f64(values));
            }
        }
        let header = Header {
            schema_version: SCHEMA_VERSION,
            tokens: self.tokens,
            samples: self.samples,
            fingerprint: self.fingerprint.clone(),
            sensitivity: self.sensitivity,
        };
        let header = serde_json::to_string(&header).map_err(|e| e.to_string())?;
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), header)]);
        safetensors::serialize(tensors, Some(metadata)).map_err(|e| e.to_string())
    }

    /// Reads a file that [`Observations::save`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Observations`] naming the tensor if it is
    /// damaged, of another version, incomplete, or holds impossible values.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = read(path)?;
        let mut seen = Self::decode(&bytes).map_err(|message| observations_error(path, message))?;
        let folder = moments_folder(path);
        seen.moments = folder.is_dir().then_some(folder);
        Ok(seen)
    }

    /// Reads the bytes of a file that [`Observations::save`] wrote.
    ///
    /// # Errors
    /// What is wrong with them and what to do.
    pub fn decode(bytes: &[u8]) -> std::result::Result<Self, String> {
        decode(bytes)
    }
}

pub(crate) fn observations_error(path: &Path, message: String) -> Error {
    Error::Observations {
        path: path.to_owned(),
        message,
    }
}

fn tensor_name(layer: usize, name: &str) -> String {
    format!("layers.{layer}.{name}")
}

fn decode(bytes: &[u8]) -> std::result::Result<Observations, String> {
    let damaged = |e| format!("not a whole safetensors file ({e}); observe again");
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let header = metadata
        .metadata()
        .as_ref()
        .and_then(|entries| entries.get(METADATA_KEY))
        .ok_or("no metadata `observations`; give a file that `observe` wrote")?;
    let header: Header = serde_json::from_str(header)
        .map_err(|e| format!("the metadata `observations` is damaged ({e}); observe again"))?;
    if header.schema_version != SCHEMA_VERSION {
        return Err(format!(
            "schema version {}, expected {SCHEMA_VERSION}; observe again with this version",
            header.schema_version
        ));
    }
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let mut names: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for name in file.names() {
        let (layer, field) = split_name(name)
            .ok_or_else(|| format!("unknown tensor `{name}`; observe again with this version"))?;
        names.entry(layer).or_default().push(field);
    }
    let mut layers = Vec::with_capacity(names.len());
    for (layer, fields) in names {
        let observed = decode_layer(&file, layer, &fields)?;
        observed.validate()?;
        layers.push(observed);
    }
    Ok(Observations {
        layers,
        tokens: header.tokens,
        samples: header.samples,
        fingerprint: header.fingerprint,
        sensitivity: header.sensitivity,
        moments: None,
    })
}

/// Whether a table has one number an expert.
fn flat(name: &str) -> bool {
    matches!(
        name,
        "output_gated"
            | "output_norm"
            | "output_square"
            | "weight_flatness"
            | "damage_drop"
            | "damage_mass"
    )
}

fn split_name(name: &str) -> Option<(usize, &str)> {
    let (layer, field) = name.strip_prefix("layers.")?.split_once('.')?;
    let known = [
        "gate_mass",
        "selections",
        "router_norm",
        "similarity",
        "logit_gram",
        "output_gated",
        "output_norm",
        "output_square",
        "output_sum",
        "output_weighted",
        "weight_flatness",
        "all_outputs",
        "spectrum_gate",
        "spectrum_up",
        "spectrum_down",
        "damage_gate",
        "damage_up",
        "damage_down",
        "damage_drop",
        "damage_mass",
        "difference_gate",
        "difference_up",
        "difference_down",
        "damage_bias",
        "difference_bias",
    ];
    let known = known.contains(&field);
    known.then_some((layer.parse().ok()?, field))
}

fn decode_layer(
    file: &SafeTensors<'_>,
    layer: usize,
    fields: &[&str],
) -> std::result::Result<LayerObservations, String> {
    let read = |field: &str, dtype: Dtype, shape: Option<&[usize]>| {
        let name = tensor_name(layer, field);
        let view = file
            .tensor(&name)
            .map_err(|_| format!("tensor `{name}` is missing; observe again"))?;
        let expected = shape.map_or_else(|| "[E]".to_owned(), |shape| format!("{shape:?}"));
        let fits = shape.map_or(view.shape().len() == 1, |shape| view.shape() == shape);
        if !fits || view.dtype() != dtype {
            return Err(format!(
                "tensor `{name}` is {:?} {:?}, expected {dtype:?} {expected}; observe again",
                view.dtype(),
                view.shape()
            ));
        }
        Ok(view)
    };
    let gate_mass = floats(&read("gate_mass", Dtype::F64, None)?);
    let experts = gate_mass.len();
    let selections = read("selections", Dtype::U64, Some(&[experts]))?;
    // A row of numbers an expert, as many as the file has.
    let table = |field: &str, width: Option<usize>| -> std::result::Result<Vec<f64>, String> {
        let name = tensor_name(layer, field);
        let found = file.tensor(&name).ok();
        let found = found.and_then(|view| view.shape().get(1).copied());
        let width = width.or(found).unwrap_or(0);
        Ok(floats(&read(field, Dtype::F64, Some(&[experts, width]))?))
    };
    let row = |field: &str| Ok::<_, String>(floats(&read(field, Dtype::F64, Some(&[experts]))?));
    let has = |field: &str| fields.contains(&field);
    let components = |[gate, up, down]: [&str; 3]| -> std::result::Result<_, String> {
        let read = || {
            Ok(Components {
                gate: table(gate, None)?,
                up: table(up, None)?,
                down: table(down, None)?,
            })
        };
        has(gate).then(read).transpose()
    };
    Ok(LayerObservations {
        layer,
        gate_mass,
        selections: words(&selections).map(u64::from_le_bytes).collect(),
        router_norm: match has("router_norm") {
            true => floats(&read("router_norm", Dtype::F64, Some(&[1]))?)
                .first()
                .copied(),
            false => None,
        },
        similarity: has("similarity")
            .then(|| table("similarity", Some(experts)))
            .transpose()?,
        logit_gram: has("logit_gram")
            .then(|| table("logit_gram", Some(experts)))
            .transpose()?,
        outputs: match has("output_sum") {
            true => Some(OutputObservations {
                gated: row("output_gated")?,
                norm: row("output_norm")?,
                square: row("output_square")?,
                sum: table("output_sum", None)?,
                weighted: table("output_weighted", None)?,
                flatness: row("weight_flatness")?,
            }),
            false => None,
        },
        all_outputs: has("all_outputs")
            .then(|| table("all_outputs", None))
            .transpose()?,
        spectra: components(SPECTRA)?,
        damage: match components(DAMAGES)? {
            Some(own) => Some(Damage {
                own,
                difference: components(DIFFERENCES)?,
                biased: match BIASED.map(|field| has(field).then(|| table(field, None))) {
                    [Some(own), difference] => Some(Biased {
                        own: own?,
                        difference: difference.transpose()?,
                    }),
                    [None, _] => None,
                },
                drop: row("damage_drop")?,
                mass: row("damage_mass")?,
            }),
            None => None,
        },
    })
}

fn words<'a>(view: &TensorView<'a>) -> impl Iterator<Item = [u8; 8]> + use<'a> {
    let (whole, _) = view.data().as_chunks::<8>();
    whole.iter().copied()
}

fn floats(view: &TensorView<'_>) -> Vec<f64> {
    words(view).map(f64::from_le_bytes).collect()
}

/// A tensor on its way into the file, little-endian.
struct Block {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Block {
    fn f64(values: &[f64]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: Dtype::F64,
            shape: Vec::new(),
            data,
        }
    }

    fn u64(values: &[u64]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: Dtype::U64,
            shape: Vec::new(),
            data,
        }
    }

    fn shaped(mut self, shape: &[usize]) -> Self {
        self.shape = shape.to_vec();
        self
    }
}

impl View for Block {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}
