//! What the routers did on sample data: the artefact of the observe stage (LightMoE eq. 1-3).
//!
//! One safetensors file. For each layer `l`, by the model's own numbers:
//!
//! | tensor | shape, type | meaning |
//! |---|---|---|
//! | `layers.{l}.gate_mass` | `[E]` f64 | sum of the gate values of an expert where it was chosen |
//! | `layers.{l}.selections` | `[E]` u64 | how often it was chosen |
//! | `layers.{l}.router_norm` | `[1]` f64, optional | mean L2 norm of a token's router logits |
//! | `layers.{l}.similarity` | `[E, E]` f64, optional | cosine of two experts' logit columns within a sample, averaged over samples |
//! | `layers.{l}.output_gated` | `[E]` f64, optional | sum of gate times norm of an expert's output where it was chosen, the gates of a token scaled to sum to one |
//! | `layers.{l}.output_norm` | `[E]` f64, optional | sum of the norms of its outputs |
//! | `layers.{l}.output_square` | `[E]` f64, optional | sum of their squares |
//! | `layers.{l}.output_sum` | `[E, H]` f64, optional | sum of its outputs |
//! | `layers.{l}.weight_flatness` | `[E]` f64, optional | `‖w‖₁ / (√n · ‖w‖₂)` of all its weights |
//!
//! The last five come together.
//!
//! The metadata has one key, `observations`: a JSON object of `schema_version`, `tokens`,
//! `samples` and `fingerprint`. One key, because several would be written in a random order, and
//! the same observations must give the same bytes.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use lightmoe_models::config::ModelConfig;
use lightmoe_models::folder;
use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, read};

/// Version of the file's layout.
pub const SCHEMA_VERSION: u32 = 1;

const METADATA_KEY: &str = "observations";

/// The observations of one layer of `E` experts.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerObservations {
    /// The layer's number in the model.
    pub layer: usize,
    /// `[E]` sums of the gate values of each expert over the tokens that chose it.
    pub gate_mass: Vec<f64>,
    /// `[E]` how many tokens chose each expert; zeros where only scores were given.
    pub selections: Vec<u64>,
    /// Mean over tokens of the L2 norm of the router's logits (`R_j` of eq. 3).
    pub router_norm: Option<f64>,
    /// `[E * E]` row-major: mean over samples of the cosine of two experts' logit columns
    /// (section 3.2).
    pub similarity: Option<Vec<f64>>,
    /// What the experts gave; `None` where only scores were given.
    pub outputs: Option<OutputObservations>,
}

/// What the experts of a layer gave on the tokens that chose them.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputObservations {
    /// `[E]` sums of gate times L2 norm of the output, the gates of a token scaled to sum to one
    /// (REAP, arXiv 2510.13999, as its code has it since March 2026).
    pub gated: Vec<f64>,
    /// `[E]` sums of the L2 norms of the outputs.
    pub norm: Vec<f64>,
    /// `[E]` sums of their squares.
    pub square: Vec<f64>,
    /// `[E * H]` row-major: sums of the outputs.
    pub sum: Vec<f64>,
    /// `[E]` `‖w‖₁ / (√n · ‖w‖₂)` over the `n` weights of an expert (AIMER, arXiv 2603.18492): what an
    /// expert is, whatever the tokens.
    pub flatness: Vec<f64>,
}

impl OutputObservations {
    /// Nothing seen yet of `experts` experts.
    pub(crate) fn none(experts: usize, hidden_size: usize) -> Self {
        Self {
            gated: vec![0.0; experts],
            norm: vec![0.0; experts],
            square: vec![0.0; experts],
            sum: vec![0.0; experts * hidden_size],
            flatness: vec![0.0; experts],
        }
    }

    /// By name in the file.
    fn named(&self) -> [(&'static str, &Vec<f64>); 5] {
        [
            ("output_gated", &self.gated),
            ("output_norm", &self.norm),
            ("output_square", &self.square),
            ("output_sum", &self.sum),
            ("weight_flatness", &self.flatness),
        ]
    }

    fn validate(&self, layer: usize, experts: usize) -> std::result::Result<(), String> {
        for (name, values) in self.named() {
            let rows = if name == "output_sum" {
                values.len() / experts.max(1)
            } else {
                1
            };
            let negative = name != "output_sum" && values.iter().any(|v| *v < 0.0);
            if values.len() != experts * rows || negative || values.iter().any(|v| !v.is_finite()) {
                return Err(format!(
                    "layer {layer}: `{name}` must hold finite numbers for {experts} experts; \
                     observe again"
                ));
            }
        }
        Ok(())
    }
}

impl LayerObservations {
    /// `Gbar` (eq. 1-2): each expert's share of the layer's gate mass; sums to one.
    pub fn importance(&self) -> Vec<f64> {
        let total: f64 = self.gate_mass.iter().sum();
        self.gate_mass.iter().map(|mass| mass / total).collect()
    }

    pub(crate) fn validate(&self) -> std::result::Result<(), String> {
        let layer = self.layer;
        let experts = self.gate_mass.len();
        let impossible = |mass: &f64| mass.is_nan() || *mass < 0.0;
        if let Some(expert) = self.gate_mass.iter().position(impossible) {
            return Err(format!(
                "layer {layer}: the gate mass of expert {expert} is {}, expected a number from \
                 0; observe again",
                self.gate_mass[expert]
            ));
        }
        let total: f64 = self.gate_mass.iter().sum();
        if !(total > 0.0 && total.is_finite()) {
            return Err(format!(
                "layer {layer}: the gate mass of its {experts} experts sums to {total}, expected \
                 a positive number; observe more tokens"
            ));
        }
        if self.selections.len() != experts {
            return Err(format!(
                "layer {layer}: {} selection counts for {experts} experts; observe again",
                self.selections.len()
            ));
        }
        if let Some(norm) = self.router_norm.filter(|n| !(n.is_finite() && *n >= 0.0)) {
            return Err(format!(
                "layer {layer}: the router norm is {norm}, expected a number from 0; observe again"
            ));
        }
        if let Some(outputs) = &self.outputs {
            outputs.validate(layer, experts)?;
        }
        let Some(similarity) = &self.similarity else {
            return Ok(());
        };
        if similarity.len() != experts * experts || similarity.iter().any(|s| !s.is_finite()) {
            return Err(format!(
                "layer {layer}: `similarity` must hold {experts} x {experts} finite numbers; \
                 observe again"
            ));
        }
        Ok(())
    }
}

/// The observations of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Observations {
    /// The layers that have experts, ascending.
    pub layers: Vec<LayerObservations>,
    /// Tokens seen, padding excluded; 0 where only scores were given.
    pub tokens: u64,
    /// Samples (sequences) seen.
    pub samples: u64,
    /// Names the model and the data that were observed.
    pub fingerprint: String,
}

#[derive(Serialize, Deserialize)]
struct Header {
    schema_version: u32,
    tokens: u64,
    samples: u64,
    fingerprint: String,
}

impl Observations {
    /// The router norms of all layers, or `None` if one of them has none.
    pub fn router_norms(&self) -> Option<Vec<f64>> {
        self.layers.iter().map(|layer| layer.router_norm).collect()
    }

    /// Checks that these are observations of a model like `config`.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the layer that is missing, has another number of experts, or
    /// holds impossible values.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let found: Vec<usize> = self.layers.iter().map(|layer| layer.layer).collect();
        let expected: Vec<usize> = config.moe_layers().collect();
        if found != expected {
            return Err(Error::Invalid(format!(
                "the observations are of layers {found:?}, the model has experts in layers \
                 {expected:?}; observe this model"
            )));
        }
        let experts = config.moe.num_experts;
        for layer in &self.layers {
            if layer.gate_mass.len() != experts {
                return Err(Error::Invalid(format!(
                    "layer {} of the observations has {} experts, the model {experts}; observe \
                     this model",
                    layer.layer,
                    layer.gate_mass.len()
                )));
            }
            layer.validate().map_err(Error::Invalid)?;
        }
        Ok(())
    }

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
            if let Some(similarity) = &layer.similarity {
                push("similarity", &[experts, experts], Block::f64(similarity));
            }
            for (name, values) in layer.outputs.iter().flat_map(OutputObservations::named) {
                let width = values.len() / experts.max(1);
                let shape: &[usize] = match name {
                    "output_sum" => &[experts, width],
                    _ => &[experts],
                };
                push(name, shape, Block::f64(values));
            }
        }
        let header = Header {
            schema_version: SCHEMA_VERSION,
            tokens: self.tokens,
            samples: self.samples,
            fingerprint: self.fingerprint.clone(),
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
        Self::decode(&bytes).map_err(|message| observations_error(path, message))
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
    })
}

fn split_name(name: &str) -> Option<(usize, &str)> {
    let (layer, field) = name.strip_prefix("layers.")?.split_once('.')?;
    let known = [
        "gate_mass",
        "selections",
        "router_norm",
        "similarity",
        "output_gated",
        "output_norm",
        "output_square",
        "output_sum",
        "weight_flatness",
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
    let mut observed = LayerObservations {
        layer,
        gate_mass,
        selections: words(&selections).map(u64::from_le_bytes).collect(),
        router_norm: None,
        similarity: None,
        outputs: None,
    };
    if fields.contains(&"output_sum") {
        let name = tensor_name(layer, "output_sum");
        let view = file
            .tensor(&name)
            .map_err(|e| format!("tensor `{name}`: {e}"))?;
        let width = view.shape().get(1).copied().unwrap_or(0);
        let of = |field: &str| Ok::<_, String>(floats(&read(field, Dtype::F64, Some(&[experts]))?));
        observed.outputs = Some(OutputObservations {
            gated: of("output_gated")?,
            norm: of("output_norm")?,
            square: of("output_square")?,
            sum: floats(&read("output_sum", Dtype::F64, Some(&[experts, width]))?),
            flatness: of("weight_flatness")?,
        });
    }
    if fields.contains(&"router_norm") {
        let view = read("router_norm", Dtype::F64, Some(&[1]))?;
        observed.router_norm = floats(&view).first().copied();
    }
    if fields.contains(&"similarity") {
        let view = read("similarity", Dtype::F64, Some(&[experts, experts]))?;
        observed.similarity = Some(floats(&view));
    }
    Ok(observed)
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
