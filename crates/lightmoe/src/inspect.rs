//! `lightmoe inspect`: what a model folder holds, or what a configuration describes.

use crate::recipe::Recipe;
use crate::settings::Settings;
use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use lightmoe_compress::methods::MethodName;
use lightmoe_compress::{Estimate, estimate};
use lightmoe_models::{BankLayout, Checkpoint, FactoredBases, Manifest, ModelConfig, SlotLayout};
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// The shares of all parameters whose cost is forecast.
const RATIOS: [f64; 4] = [0.25, 0.5, 0.6, 0.75];

/// What `inspect` tells.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Model family.
    pub family: String,
    /// Parameters on disk.
    pub parameters: u64,
    /// Parameters of the architecture uncompressed.
    pub parameters_original: u64,
    /// Of these, the parameters that one token uses.
    pub parameters_original_active: u64,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Most common element type.
    pub dtype: String,
    /// `H`, layers, `E`, `K`, `F`, vocabulary.
    pub shape: Shape,
    /// The tensors, those that differ only in their numbers together.
    pub tensors: Vec<TensorSummary>,
    /// The MoE layers.
    pub layers: Vec<LayerSummary>,
    /// What some ratios would leave with the default settings; none for a compressed model.
    pub ratios: Vec<RatioSummary>,
}

/// Tensors of one kind and shape.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct TensorSummary {
    /// Their name, with `*` for the numbers.
    pub name: String,
    /// How many there are.
    pub count: u64,
    /// The shape of each.
    pub shape: Vec<usize>,
    /// Numbers in all of them.
    pub parameters: u64,
    /// Bytes of all of them, in the most common element type.
    pub bytes: u64,
}

/// What a ratio would leave.
#[derive(Debug, Serialize)]
pub struct RatioSummary {
    /// Share of all parameters to save.
    pub ratio: f64,
    /// The forecast; `None` where the ratio is out of reach.
    pub forecast: Option<Estimate>,
}

/// The sizes of a model.
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // the names of config.json
pub struct Shape {
    pub hidden_size: usize,
    pub num_layers: usize,
    pub num_experts: usize,
    pub top_k: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
}

/// The slots of a layer.
#[derive(Debug, Serialize)]
pub struct LayerSummary {
    /// Number of the layer.
    pub layer: usize,
    /// Slots with matrices of their own.
    pub dense: usize,
    /// Slots with an adapter, on a base or alone.
    pub adapted: usize,
    /// Shared bases.
    pub bases: usize,
    /// How the bases are stored, if as factors and rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factored: Option<FactoredBases>,
    /// Rank of the adapters.
    pub rank: usize,
    /// One character a slot: `#` dense, `0`–`9` the base of an adapted slot, `+` ten or more,
    /// `.` an adapter alone, `m` mixed from bases, `c` a constant, a space a removed one.
    pub slots: String,
}

impl Summary {
    /// Of a folder: reads its headers and no weights.
    ///
    /// # Errors
    /// If the layout does not fit the model.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let size = checkpoint.dtype().size_in_bytes() as u64;
        let config = checkpoint.config();
        Ok(Self {
            parameters: checkpoint.parameters(),
            bytes: checkpoint.bytes(),
            dtype: checkpoint.dtype().as_str().to_owned(),
            ..Self::of(config, checkpoint.layout(), size)?
        })
    }

    /// Of a configuration alone; `origin` is the file that errors name.
    ///
    /// # Errors
    /// If its layout does not fit the model.
    pub fn of_config(config: &ModelConfig, origin: &Path) -> Result<Self> {
        let dtype = config.file_dtype();
        let size = dtype.size_in_bytes() as u64;
        Ok(Self {
            dtype: dtype.as_str().to_owned(),
            ..Self::of(config, &BankLayout::of(config, origin)?, size)?
        })
    }

    fn of(config: &ModelConfig, layout: &BankLayout, size: u64) -> Result<Self> {
        let tensors = tensors(&Manifest::of(config, layout)?, size);
        let parameters = tensors.iter().map(|t| t.parameters).sum();
        let options = Recipe::resolve(Settings::default(), config)?.plan_options();
        let ratios = RATIOS.map(|ratio| RatioSummary {
            ratio,
            forecast: estimate(config, ratio, MethodName::Lightmoe, &options).ok(),
        });
        let original = *layout == BankLayout::dense(config);
        Ok(Self {
            family: config.family.to_string(),
            parameters,
            parameters_original: config.parameters().total(),
            parameters_original_active: config.active_parameters(),
            bytes: tensors.iter().map(|t| t.bytes).sum(),
            dtype: String::new(),
            shape: Shape {
                hidden_size: config.hidden_size,
                num_layers: config.num_layers,
                num_experts: config.moe.num_experts,
                top_k: config.moe.top_k,
                intermediate_size: config.moe.intermediate_size,
                vocab_size: config.vocab_size,
            },
            tensors,
            layers: layers(layout),
            ratios: ratios.into_iter().filter(|_| original).collect(),
        })
    }
}

/// The tensors of a model in order of their first appearance.
fn tensors(manifest: &Manifest, size: u64) -> Vec<TensorSummary> {
    let mut all: Vec<TensorSummary> = Vec::new();
    for (full, shape) in &manifest.tensors {
        let parts = full.split('.').map(|part| match part.parse::<usize>() {
            Ok(_) => "*",
            Err(_) => part,
        });
        let name = parts.collect::<Vec<_>>().join(".");
        let parameters = shape.iter().product::<usize>() as u64;
        let own = manifest
            .types
            .get(full)
            .map(|dtype| dtype.size_in_bytes() as u64);
        let size = own.unwrap_or(size);
        let same = |t: &&mut TensorSummary| t.name == name && t.shape == *shape;
        match all.iter_mut().find(same) {
            Some(found) => {
                found.count += 1;
                found.parameters += parameters;
                found.bytes += parameters * size;
            }
            None => all.push(TensorSummary {
                name,
                count: 1,
                shape: shape.clone(),
                parameters,
                bytes: parameters * size,
            }),
        }
    }
    all
}

fn layers(layout: &BankLayout) -> Vec<LayerSummary> {
    let layers = layout.layers.iter().map(|(&layer, layout)| LayerSummary {
        layer,
        dense: layout
            .slots
            .iter()
            .filter(|s| **s == SlotLayout::Dense)
            .count(),
        adapted: layout.adapted().count(),
        bases: layout.bases(),
        factored: layout.factored,
        rank: layout.rank(),
        slots: layout
            .slots
            .iter()
            .map(|s| match s {
                SlotLayout::Dense => '#',
                SlotLayout::Mixed { .. } => 'm',
                SlotLayout::Constant => 'c',
                SlotLayout::Removed => ' ',
                SlotLayout::Adapted { group: None, .. } => '.',
                SlotLayout::Adapted { group: Some(g), .. } => {
                    char::from_digit(*g as u32, 10).unwrap_or('+')
                }
            })
            .collect(),
    });
    layers.collect()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.shape;
        writeln!(
            f,
            "{}: {} layers, hidden size {}, {} experts of {} (top {}), vocabulary {}",
            self.family,
            s.num_layers,
            s.hidden_size,
            s.num_experts,
            s.intermediate_size,
            s.top_k,
            s.vocab_size
        )?;
        let original = self.parameters_original;
        let saved = match self.parameters == original {
            true => String::new(),
            false => {
                let share = 100.0 * (1.0 - self.parameters as f64 / original as f64);
                format!(" ({share:.1}% less than the original's {original})")
            }
        };
        writeln!(
            f,
            "{} parameters{saved}, {} bytes, {}; a token of the original uses {} parameters",
            self.parameters, self.bytes, self.dtype, self.parameters_original_active
        )?;
        write!(f, "\n{}\n", self.tensor_table())?;
        if !self.ratios.is_empty() {
            write!(f, "\n{}\n", self.ratio_table())?;
        }
        for l in &self.layers {
            write!(f, "\nlayer {:>3}  {}  {} dense", l.layer, l.slots, l.dense)?;
            if l.adapted > 0 {
                write!(
                    f,
                    ", {} adapted (rank {}, {} bases)",
                    l.adapted, l.rank, l.bases
                )?;
            }
            if let Some(shape) = &l.factored {
                let (rank, gate_up, down) = (shape.rank, shape.gate_up_rows, shape.down_rows);
                write!(f, ", of rank {rank} with {gate_up} and {down} rows")?;
            }
        }
        Ok(())
    }
}

/// A table whose columns from `first` on are numbers.
fn table(header: &[&str], first: usize, rows: impl Iterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(first) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

impl Summary {
    fn tensor_table(&self) -> Table {
        let header = ["tensor", "count", "shape", "parameters", "bytes", "share"];
        let rows = self.tensors.iter().map(|t| {
            let share = 100.0 * t.parameters as f64 / self.parameters.max(1) as f64;
            vec![
                t.name.clone(),
                t.count.to_string(),
                format!("{:?}", t.shape),
                t.parameters.to_string(),
                t.bytes.to_string(),
                format!("{share:.1}%"),
            ]
        });
        table(&header, 1, rows)
    }

    fn ratio_table(&self) -> Table {
        let header = [
            "ratio",
            "experts replaced a layer",
            "parameters left",
            "bytes left",
        ];
        let rows = self.ratios.iter().map(|r| {
            let unreachable = || "out of reach".to_owned();
            let of =
                |f: &dyn Fn(&Estimate) -> String| r.forecast.map_or_else(unreachable, |e| f(&e));
            vec![
                format!("{}", r.ratio),
                of(&|e| {
                    let (replaced, all) = (e.experts_replaced_per_layer, e.experts_per_layer);
                    format!("{replaced:.1} of {all}")
                }),
                of(&|e| e.parameters_after.to_string()),
                of(&|e| e.bytes_after.to_string()),
            ]
        });
        table(&header, 1, rows)
    }
}
