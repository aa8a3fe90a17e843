//! What each slot of a compressed checkpoint is: the part of `config.json` under `"lightmoe"`.
//!
//! A bank has one slot per router output. A checkpoint without the key is an original one: every
//! slot of every MoE layer is dense.

use crate::config::{ModelConfig, MoeConfig};
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

/// How the shared bases of a layer are stored instead of as whole matrices: each of the three is a
/// product of rank `rank`, plus a few rows of a matrix that is zero elsewhere (MC-SMoE, arXiv 2310.01334,
/// section 3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerLayout {
    /// `[E]` forms.
    pub slots: Vec<SlotLayout>,
    /// How many of the chosen experts run, where the others only scale (Compressed Experts,
    /// arXiv 2503.00634); `None` where all run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main: Option<usize>,
    /// How its shared bases are stored, all alike; `None` where they are whole matrices.
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
                SlotLayout::Adapted { group, rank } => Some((expert, group, rank)),
                _ => None,
            })
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
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Two layers of four experts.
    fn config(lightmoe: Option<Value>) -> ModelConfig {
        let mut raw = json!({
            "model_type": "olmoe", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4,
            "num_experts_per_tok": 2, "hidden_act": "silu", "eos_token_id": 1,
        });
        if let Some(value) = lightmoe {
            raw["lightmoe"] = value;
        }
        ModelConfig::from_json(&raw, Path::new("here/config.json")).unwrap()
    }

    fn read(lightmoe: Value) -> Result<BankLayout> {
        BankLayout::of(&config(Some(lightmoe)), Path::new("here/config.json"))
    }

    fn adapted(group: Option<usize>, rank: usize) -> SlotLayout {
        SlotLayout::Adapted { group, rank }
    }

    fn mixed(bases: usize, rank: usize) -> SlotLayout {
        SlotLayout::Mixed { bases, rank }
    }

    /// A layout with this first layer; the second is dense.
    fn layout(slots: &[SlotLayout]) -> BankLayout {
        layout_of(LayerLayout::from(slots.to_vec()))
    }

    fn layout_of(layer: LayerLayout) -> BankLayout {
        let mut layout = BankLayout::dense(&config(None));
        layout.layers.insert(0, layer);
        layout
    }

    fn factored(slots: [SlotLayout; 4], [rank, gate_up_rows, down_rows]: [usize; 3]) -> BankLayout {
        layout_of(LayerLayout {
            factored: Some(FactoredBases {
                rank,
                gate_up_rows,
                down_rows,
            }),
            ..LayerLayout::from(slots.to_vec())
        })
    }

    const DENSE: SlotLayout = SlotLayout::Dense;

    #[test]
    fn a_written_layout_is_read_back() {
        let slots = [
            [DENSE, adapted(Some(1), 2), DENSE, adapted(Some(0), 2)],
            [adapted(Some(0), 0); 4],
            [adapted(None, 3); 4],
            [DENSE, DENSE, DENSE, adapted(Some(0), 1)],
            [
                adapted(Some(0), 2),
                adapted(None, 3),
                SlotLayout::Constant,
                SlotLayout::Removed,
            ],
            [mixed(2, 3), adapted(Some(0), 2), mixed(2, 3), DENSE],
        ];
        let whole = slots.iter().map(|slots| layout(slots));
        for layout in whole.chain([factored([adapted(Some(0), 0); 4], [8, 1, 3])]) {
            let original = config(None);
            let raw = layout.annotate(&original).unwrap();
            // Through text, as on disk: the layer numbers become strings.
            let raw: Value = serde_json::from_str(&raw.to_string()).unwrap();
            let config = ModelConfig::from_json(&raw, Path::new("c")).unwrap();
            assert_eq!(BankLayout::of(&config, Path::new("c")).unwrap(), layout);
            // Annotating a compressed config again replaces; a dense layout takes the key away.
            assert_eq!(layout.annotate(&config).unwrap(), raw);
            let dense = BankLayout::dense(&config).annotate(&config).unwrap();
            assert_eq!(dense, original.raw);
        }
    }

    #[test]
    fn without_the_key_every_slot_is_dense() {
        let layout = BankLayout::of(&config(None), Path::new("c")).unwrap();
        assert_eq!(layout.layers.keys().collect::<Vec<_>>(), [&0, &1]);
        assert!(
            layout
                .layers
                .values()
                .all(|l| l == &LayerLayout::dense(4) && l.bases() == 0 && l.rank() == 0)
        );
    }

    #[test]
    fn counts_bases_rank_and_adapted_slots() {
        let layer =
            layout(&[adapted(Some(1), 5), DENSE, adapted(Some(0), 5), DENSE]).layers[&0].clone();
        assert_eq!((layer.bases(), layer.rank()), (2, 5));
        let adapted: Vec<_> = layer.adapted().collect();
        assert_eq!(adapted, [(0, Some(1), 5), (2, Some(0), 5)]);
    }

    /// Refused when read, and when about to be written.
    #[track_caller]
    fn assert_refused(layout: &BankLayout, words: &[&str]) {
        let written = layout.annotate(&config(None)).unwrap_err().to_string();
        let message = read(serde_json::to_value(layout).unwrap())
            .unwrap_err()
            .to_string();
        for word in words {
            assert!(message.contains(word), "`{message}` lacks `{word}`");
            assert!(written.contains(word), "`{written}` lacks `{word}`");
        }
        assert!(message.contains("here/config.json") && message.contains("build"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let one = |slot| layout(&[DENSE, slot, DENSE, DENSE]);
        assert_refused(&layout(&[DENSE; 3]), &["layer 0", "3 slots", "4 experts"]);
        let removed = [
            SlotLayout::Removed,
            SlotLayout::Removed,
            SlotLayout::Removed,
            DENSE,
        ];
        assert_refused(&layout(&removed), &["1 experts", "top-k of 2"]);
        assert_refused(&one(adapted(Some(1), 2)), &["no slot uses base 0"]);
        assert_refused(&one(adapted(Some(4), 2)), &["base 4"]);
        let wide = layout(&[adapted(None, 9), DENSE, DENSE, DENSE]);
        assert_refused(&wide, &["layer 0", "rank 9", "8"]);
        // Neither an overflow nor an allocation of that size.
        assert_refused(&one(adapted(None, usize::MAX)), &["rank"]);
        assert_refused(&one(adapted(Some(usize::MAX - 1), 2)), &["base"]);
        assert_refused(&one(adapted(Some(usize::MAX), 2)), &["base"]);
        assert_refused(&one(adapted(None, 0)), &["slot 1", "neither"]);
        for (bases, rank) in [
            (0, 2),
            (5, 2),
            (usize::MAX, 2),
            (2, 0),
            (2, 9),
            (2, usize::MAX),
        ] {
            assert_refused(&one(mixed(bases, rank)), &["layer 0", "bases of rank"]);
        }
        let alone = [adapted(Some(0), 0); 4];
        for shape in [
            [0, 1, 1],
            [9, 1, 1],
            [2, 0, 1],
            [2, 9, 1],
            [2, 1, 0],
            [2, 1, 9],
            [usize::MAX; 3],
        ] {
            assert_refused(
                &factored(alone, shape),
                &["layer 0", "factored bases of rank"],
            );
        }
        assert_refused(
            &factored([adapted(None, 2); 4], [2, 1, 1]),
            &["layer 0", "without a slot"],
        );
        let unlike = layout(&[mixed(2, 3), DENSE, mixed(2, 4), DENSE]);
        assert_refused(&unlike, &["slot 2", "other bases"]);
        let mut missing = layout(&[DENSE, DENSE, DENSE, adapted(Some(0), 1)]);
        let second = missing.layers.remove(&1).unwrap();
        assert_refused(&missing, &["no layer 1"]);
        missing.layers.extend([(1, second.clone()), (2, second)]);
        assert_refused(&missing, &["layer 2"]);
    }

    #[test]
    fn damaged_entries_are_refused() {
        for (value, word) in [
            (json!(null), "lightmoe"),
            (json!([]), "lightmoe"),
            (json!({"layers": {}}), "schema_version"),
            (
                json!({"schema_version": 2, "banks": []}),
                "schema_version 2",
            ),
            (json!({"schema_version": 1}), "layers"),
            (
                json!({"schema_version": 1, "layers": {"zero": {"slots": []}}}),
                "number",
            ),
            (
                json!({"schema_version": 1, "layers": {"0": {"slots": [{"form": "sparse"}]}}}),
                "sparse",
            ),
        ] {
            let message = read(value).unwrap_err().to_string();
            assert!(message.contains(word), "`{message}` lacks `{word}`");
            assert!(message.contains("here/config.json"));
        }
    }
}
