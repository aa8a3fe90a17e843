//! What each slot of a compressed checkpoint is: the part of `config.json` under `"lightmoe"`.
//!
//! A bank has one slot per router output. A checkpoint without the key is an original one: every
//! slot of every MoE layer is dense.

use crate::config::ModelConfig;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Version of the `"lightmoe"` entry of `config.json`.
pub const LAYOUT_VERSION: u32 = 1;

/// The form of one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "lowercase")]
pub enum SlotLayout {
    /// The expert's own three matrices.
    Dense,
    /// A base shared by the slots of a group (none: nothing but the adapter) and a low-rank adapter.
    Adapted {
        /// Number of the shared base in this layer.
        group: Option<usize>,
        /// Rank of the adapter of each of the three matrices.
        rank: usize,
    },
}

/// The slots of one MoE layer, in the order of the router's outputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerLayout {
    /// `[E]` forms.
    pub slots: Vec<SlotLayout>,
}

impl LayerLayout {
    /// The layout of an original layer.
    pub fn dense(experts: usize) -> Self {
        Self {
            slots: vec![SlotLayout::Dense; experts],
        }
    }

    /// Number of shared bases.
    pub fn bases(&self) -> usize {
        self.adapted()
            .filter_map(|(_, group, _)| group.map(|g| g + 1))
            .max()
            .unwrap_or(0)
    }

    /// The adapted slots: (expert, group, rank).
    pub fn adapted(&self) -> impl Iterator<Item = (usize, Option<usize>, usize)> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(expert, slot)| match *slot {
                SlotLayout::Adapted { group, rank } => Some((expert, group, rank)),
                SlotLayout::Dense => None,
            })
    }

    /// The common rank of the adapted slots, zero if there are none.
    pub fn rank(&self) -> usize {
        self.adapted().map(|(_, _, rank)| rank).next().unwrap_or(0)
    }

    fn check(&self, experts: usize) -> std::result::Result<(), String> {
        if self.slots.len() != experts {
            return Err(format!("{} slots for {experts} experts", self.slots.len()));
        }
        let (bases, rank) = (self.bases(), self.rank());
        let mut used = vec![false; bases];
        for (expert, group, r) in self.adapted() {
            if r != rank {
                return Err(format!("slot {expert} has rank {r}, another has {rank}"));
            }
            match group {
                Some(g) => used[g] = true,
                None if bases > 0 => {
                    return Err(format!("slot {expert} has no base, another has one"));
                }
                None => {}
            }
        }
        match used.iter().position(|u| !u) {
            Some(g) => Err(format!("no slot uses base {g}")),
            None => Ok(()),
        }
    }
}

/// The layouts of all MoE layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BankLayout {
    /// [`LAYOUT_VERSION`].
    pub schema_version: u32,
    /// By layer number.
    pub layers: BTreeMap<usize, LayerLayout>,
}

impl BankLayout {
    /// The layout of an original model.
    pub fn dense(config: &ModelConfig) -> Self {
        let layers = config
            .moe_layers()
            .map(|l| (l, LayerLayout::dense(config.moe.num_experts)))
            .collect();
        Self {
            schema_version: LAYOUT_VERSION,
            layers,
        }
    }

    /// Reads the layout of the model that `config` describes; `origin` is named in errors.
    pub fn of(config: &ModelConfig, origin: &Path) -> Result<Self> {
        let Some(value) = config.raw.get("lightmoe") else {
            return Ok(Self::dense(config));
        };
        let fail = |message: String| {
            Error::config(
                origin,
                format!("`lightmoe`: {message}; build the checkpoint again"),
            )
        };
        let layout: Self =
            serde_json::from_value(value.clone()).map_err(|e| fail(e.to_string()))?;
        if layout.schema_version != LAYOUT_VERSION {
            return Err(fail(format!(
                "schema_version {} is not {LAYOUT_VERSION}",
                layout.schema_version
            )));
        }
        for layer in config.moe_layers() {
            let found = layout
                .layers
                .get(&layer)
                .ok_or_else(|| fail(format!("no layer {layer}")))?;
            found
                .check(config.moe.num_experts)
                .map_err(|message| fail(format!("layer {layer}: {message}")))?;
        }
        Ok(layout)
    }

    /// `config.json` of a model with this layout: the original's, with or without `"lightmoe"`.
    pub fn annotate(&self, config: &ModelConfig) -> Result<serde_json::Value> {
        let mut raw = config.raw.clone();
        let dense = *self == Self::dense(config);
        if let Some(map) = raw.as_object_mut() {
            map.shift_remove("lightmoe");
            if !dense {
                let value = serde_json::to_value(self)
                    .map_err(|e| Error::Invalid(format!("layout cannot be written: {e}")))?;
                map.insert("lightmoe".into(), value);
            }
        }
        Ok(raw)
    }
}
