//! What each slot of a compressed checkpoint is: the part of `config.json` under `"lightmoe"`.
//!
//! A bank has one slot per router output. A checkpoint without the key is an original one: every
//! slot of every MoE layer is dense.

use crate::config::{ModelConfig, MoeConfig};
use crate::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Version of the `"lightmoe"` entry of `config.json`.
pub const LAYOUT_VERSION: u32 = 1;

/// The form of one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
        /// Whether a vector of its own is added to what it gives, before the gate multiplies it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        bias: bool,
    },
    /// Gate and up mixed from bases that all such slots of the layer share, and the expert's own down
    /// (MoBE, arXiv 2508.05257).
    Mixed {
        /// Number of the bases in this layer.
        bases: usize,
        /// Rows of each basis, and columns of the slot's transforms.
        rank: usize,
    },
    /// A vector in place of the expert's output (MoNE, arXiv 2507.00390); the gate multiplies it.
    Constant,
    /// Nothing: the router may not choose it.
    Removed,
}

impl SlotLayout {
    /// An adapted slot without a bias.
    pub fn adapted(group: Option<usize>, rank: usize) -> Self {
        Self::Adapted {
            group,
            rank,
            bias: false,
        }
    }
}

/// How the shared bases of a layer are stored instead of as whole matrices: each of the three is a
/// product of rank `rank`, plus a few rows of a matrix that is zero elsewhere (MC-SMoE, arXiv 2310.01334,
/// section 3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FactoredBases {
    /// Rank of the product.
    pub rank: usize,
    /// Rows kept of gate and of up, each of `F`.
    pub gate_up_rows: usize,
    /// Rows kept of down, of `H`.
    pub down_rows: usize,
}

impl FactoredBases {
    /// Rows kept of a projection.
    pub fn rows(&self, projection: &str) -> usize {
        match projection {
            "down_proj" => self.down_rows,
            _ => self.gate_up_rows,
        }
    }

    /// Whether it fits matrices of hidden size `h` and intermediate size `f`.
    ///
    /// # Errors
    /// What does not, as part of a sentence.
    pub fn check(&self, h: usize, f: usize) -> std::result::Result<(), String> {
        let widest = h.min(f);
        let fits = (1..=widest).contains(&self.rank)
            && (1..=f).contains(&self.gate_up_rows)
            && (1..=h).contains(&self.down_rows);
        match fits {
            true => Ok(()),
            false => Err(format!(
                "factored bases of rank {} with {} and {} rows, expected a rank from 1 to {widest}, 1 to \
                 {f} rows of gate and up, and 1 to {h} of down",
                self.rank, self.gate_up_rows, self.down_rows
            )),
        }
    }
}

/// The slots of one MoE layer, in the order of the router's outputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LayerLayout {
    /// The form of each slot, `[E]`.
    pub slots: Vec<SlotLayout>,
    /// How many of the chosen experts run, where the others only scale (Compressed Experts,
    /// arXiv 2503.00634); absent where all run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main: Option<usize>,
    /// How its shared bases are stored, all alike; absent where they are whole matrices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factored: Option<FactoredBases>,
}

impl From<Vec<SlotLayout>> for LayerLayout {
    /// Slots of which every chosen one runs, and whose bases are whole.
    fn from(slots: Vec<SlotLayout>) -> Self {
        Self {
            slots,
            main: None,
            factored: None,
        }
    }
}

impl LayerLayout {
    /// The layout of an original layer.
    pub fn dense(experts: usize) -> Self {
        Self::from(vec![SlotLayout::Dense; experts])
    }

    /// Number of shared bases.
    pub fn bases(&self) -> usize {
        self.adapted()
            .filter_map(|(_, group, _)| group.map(|g| g.saturating_add(1)))
            .max()
            .unwrap_or(0)
    }

    /// The adapted slots: (expert, group, rank).
    pub fn adapted(&self) -> impl Iterator<Item = (usize, Option<usize>, usize)> + '_ {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(expert, slot)| match *slot {
                SlotLayout::Adapted { group, rank, .. } => Some((expert, group, rank)),
                _ => None,
            })
    }

    /// The experts of adapted slots with a bias, ascending.
    pub fn biased(&self) -> impl Iterator<Item = usize> + '_ {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| matches!(slot, SlotLayout::Adapted { bias: true, .. }))
            .map(|(expert, _)| expert)
    }

    /// Bases and rank of the mixed slots, which have them in common; `None` without such slots.
    pub fn mixture(&self) -> Option<(usize, usize)> {
        self.slots.iter().find_map(|slot| match *slot {
            SlotLayout::Mixed { bases, rank } => Some((bases, rank)),
            _ => None,
        })
    }

    /// The mixed slots' experts, ascending.
    pub fn mixed(&self) -> impl Iterator<Item = usize> + '_ {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| matches!(slot, SlotLayout::Mixed { .. }))
            .map(|(expert, _)| expert)
    }

    /// The experts of slots of this form, ascending.
    pub fn of_form(&self, form: SlotLayout) -> impl Iterator<Item = usize> + '_ {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(move |(_, slot)| **slot == form)
            .map(|(expert, _)| expert)
    }

    /// The largest rank of the adapted slots, zero if there are none.
    pub fn rank(&self) -> usize {
        self.adapted().map(|(_, _, rank)| rank).max().unwrap_or(0)
    }

    fn check_mixture(&self, experts: usize, widest: usize) -> std::result::Result<(), String> {
        let Some((bases, rank)) = self.mixture() else {
            return Ok(());
        };
        if !(1..=experts).contains(&bases) || !(1..=widest).contains(&rank) {
            return Err(format!(
                "{bases} bases of rank {rank}, expected 1 to {experts} of rank 1 to {widest}"
            ));
        }
        let alike = SlotLayout::Mixed { bases, rank };
        match self.mixed().find(|&expert| self.slots[expert] != alike) {
            Some(expert) => Err(format!(
                "slot {expert} is mixed from other bases than the slots before it"
            )),
            None => Ok(()),
        }
    }

    /// Whether it fits experts of hidden size `h`.
    fn check(&self, moe: &MoeConfig, h: usize) -> std::result::Result<(), String> {
        let experts = moe.num_experts;
        // The smaller side of an expert's matrices, which no rank exceeds.
        let widest = h.min(moe.intermediate_size);
        if self.slots.len() != experts {
            return Err(format!("{} slots for {experts} experts", self.slots.len()));
        }
        let bases = self.bases();
        // Every base is used, so there are no more than slots; the numbers may be of any size.
        if bases > experts {
            return Err(format!("base {} for {experts} experts", bases - 1));
        }
        if self.rank() > widest {
            return Err(format!(
                "rank {} for matrices of smaller side {widest}",
                self.rank()
            ));
        }
        self.check_mixture(experts, widest)?;
        if let Some(factored) = &self.factored {
            factored.check(h, moe.intermediate_size)?;
            if bases == 0 {
                return Err("factored bases without a slot that uses one".to_owned());
            }
        }
        let mut used = vec![false; bases];
        for (expert, group, r) in self.adapted() {
            match group {
                Some(g) => used[g] = true,
                None if r == 0 => {
                    return Err(format!("slot {expert} has neither base nor adapter"));
                }
                None => {}
            }
        }
        if let Some(g) = used.iter().position(|u| !u) {
            return Err(format!("no slot uses base {g}"));
        }
        if let Some(main) = self.main {
            if main == 0 || main >= moe.top_k {
                return Err(format!("{main} main experts of {} chosen", moe.top_k));
            }
            if self.slots.iter().any(|slot| *slot != SlotLayout::Dense) {
                return Err("main experts among slots that are not dense".to_owned());
            }
        }
        let left = experts - self.of_form(SlotLayout::Removed).count();
        match left < moe.top_k {
            true => Err(format!(
                "{left} experts are left for a top-k of {}",
                moe.top_k
            )),
            false => Ok(()),
        }
    }
}

/// The layouts of all MoE layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BankLayout {
    /// Version of this layout.
    #[schemars(extend("const" = LAYOUT_VERSION))]
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
        // First of all: a later version need not have this shape.
        let version = value.get("schema_version").and_then(|v| v.as_u64());
        if let Some(version) = version.filter(|&v| v != u64::from(LAYOUT_VERSION)) {
            return Err(fail(format!(
                "schema_version {version} is not {LAYOUT_VERSION}"
            )));
        }
        let layout: Self =
            serde_json::from_value(value.clone()).map_err(|e| fail(e.to_string()))?;
        layout.check(config).map_err(fail)?;
        Ok(layout)
    }

    /// Whether the layout fits the model.
    ///
    /// # Errors
    /// What does not, as part of a sentence.
    pub fn check(&self, config: &ModelConfig) -> std::result::Result<(), String> {
        for layer in config.moe_layers() {
            let found = self
                .layers
                .get(&layer)
                .ok_or_else(|| format!("no layer {layer}"))?;
            found
                .check(&config.moe, config.hidden_size)
                .map_err(|message| format!("layer {layer}: {message}"))?;
        }
        match self.layers.keys().find(|&&l| !config.is_moe_layer(l)) {
            Some(layer) => Err(format!("layer {layer} of the model has no experts")),
            None => Ok(()),
        }
    }

    /// `config.json` of a model with this layout: the original's, with or without `"lightmoe"`. A
    /// layout that does not fit the model is an error.
    pub fn annotate(&self, config: &ModelConfig) -> Result<serde_json::Value> {
        self.check(config).map_err(|message| {
            Error::Invalid(format!(
                "the layout does not fit the model: {message}; plan it again"
            ))
        })?;
        let mut raw = config.raw.clone();
        let dense = *self == Self::dense(config);
        if let Some(map) = raw.as_object_mut() {
            map.shift_remove("lightmoe");
            // What we write is not quantised.
            map.shift_remove("quantization_config");
            if !dense {
                let value = serde_json::to_value(self)
                    .map_err(|e| Error::Invalid(format!("layout cannot be written: {e}")))?;
                map.insert("lightmoe".into(), value);
            }
        }
        Ok(raw)
    }
}

#[cfg(test)]
mod tests;
