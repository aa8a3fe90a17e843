//! `lightmoe inspect`: what a model folder holds.

use anyhow::Result;
use lightmoe_models::{Checkpoint, SlotLayout};
use serde::Serialize;
use std::fmt;

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
    /// The MoE layers.
    pub layers: Vec<LayerSummary>,
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
    /// Rank of the adapters.
    pub rank: usize,
    /// One character a slot: `#` dense, `0`–`9` the base of an adapted slot, `+` ten or more,
    /// `.` an adapter alone.
    pub slots: String,
}

/// Reads a folder's headers; no weights.
///
/// # Errors
/// If a tensor's shape cannot be found.
pub fn summary(checkpoint: &Checkpoint) -> Result<Summary> {
    let config = checkpoint.config();
    let layers = checkpoint
        .layout()
        .layers
        .iter()
        .map(|(&layer, layout)| LayerSummary {
            layer,
            dense: layout
                .slots
                .iter()
                .filter(|s| **s == SlotLayout::Dense)
                .count(),
            adapted: layout.adapted().count(),
            bases: layout.bases(),
            rank: layout.rank(),
            slots: layout
                .slots
                .iter()
                .map(|s| match s {
                    SlotLayout::Dense => '#',
                    SlotLayout::Adapted { group: None, .. } => '.',
                    SlotLayout::Adapted { group: Some(g), .. } => {
                        char::from_digit(*g as u32, 10).unwrap_or('+')
                    }
                })
                .collect(),
        });
    let dtype = checkpoint.dtype();
    Ok(Summary {
        family: config.family.to_string(),
        parameters: checkpoint.parameters(),
        parameters_original: config.parameters().total(),
        parameters_original_active: config.active_parameters(),
        bytes: checkpoint.bytes(),
        dtype: dtype.as_str().to_owned(),
        shape: Shape {
            hidden_size: config.hidden_size,
            num_layers: config.num_layers,
            num_experts: config.moe.num_experts,
            top_k: config.moe.top_k,
            intermediate_size: config.moe.intermediate_size,
            vocab_size: config.vocab_size,
        },
        layers: layers.collect(),
    })
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
        let share = 100.0 * (1.0 - self.parameters as f64 / self.parameters_original as f64);
        writeln!(
            f,
            "{} parameters ({share:.1}% less than the original's {}, of which a token uses {}), {} \
             bytes, {}",
            self.parameters,
            self.parameters_original,
            self.parameters_original_active,
            self.bytes,
            self.dtype
        )?;
        for l in &self.layers {
            write!(f, "\nlayer {:>3}  {}  {} dense", l.layer, l.slots, l.dense)?;
            if l.adapted > 0 {
                write!(
                    f,
                    ", {} adapted (rank {}, {} bases)",
                    l.adapted, l.rank, l.bases
                )?;
            }
        }
        Ok(())
    }
}
