//! The names of the methods, and what can be said of each by its name.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::observe::{Sensitivity, Statistics};
use crate::{Error, Result};

/// A method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    /// LightMoE: replaced experts become a shared base of their group plus an adapter.
    Lightmoe,
    /// The paper's baseline "Replace": an adapter alone, or with one base for the whole layer.
    Replace,
    /// The uncompressed reference: every expert is kept and trains an adapter.
    Lora,
    /// Pruning by the mean of gate times output norm (REAP, arXiv 2510.13999).
    Reap,
    /// Pruning by how often an expert is chosen.
    Frequency,
    /// Pruning by the sum of output norms (expert activation norm).
    Ean,
    /// Pruning at random: what a score is worth.
    Random,
    /// Pruning by the weights alone (AIMER, arXiv 2603.18492).
    Aimer,
    /// Dropped experts become the mean of their outputs (MoNE, arXiv 2507.00390).
    Mone,
    /// Merging by router logits, neurons aligned (M-SMoE, arXiv 2310.01334).
    Msmoe,
    /// The same, then low rank plus a few rows of what is left (MC-SMoE, arXiv 2310.01334).
    Mcsmoe,
    /// Merging by clusters of mean outputs (HC-SMoE, arXiv 2410.08589).
    Hcsmoe,
    /// Merging by REAP scores and gated similarity (REAM, arXiv 2604.04356).
    Ream,
    /// Low-rank factors of every expert, whitened by what it is given.
    Svd,
    /// One base for all experts of a layer, and whitened factors of the differences (D²-MoE,
    /// arXiv 2502.17298).
    D2moe,
    /// Fewer experts run, the others scale their inputs (Compressed Experts, arXiv 2503.00634).
    Compressed,
    /// Gate and up mixed from the layer's bases (MoBE, arXiv 2508.05257).
    Mobe,
    /// Pruning by a search over sets, then low-rank factors of those that stay (MoE-I²,
    /// arXiv 2411.01016).
    Moei2,
    /// Every expert takes the form that costs the model least for its bytes (ours).
    Budget,
}

/// What a method does to experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Keeps all of them, whatever the ratio.
    Keep,
    /// Replaces some by a base and an adapter, and fades the originals out while it recovers.
    Replace,
    /// Drops some, by a ratio.
    Drop,
    /// Merges some into others, by a ratio.
    Merge,
    /// Factorises all of them, or all that it does not drop or merge, by a ratio.
    Factorise,
}

impl MethodName {
    /// Every method, in the order in which messages list them.
    pub const ALL: [Self; 19] = [
        Self::Lightmoe,
        Self::Replace,
        Self::Lora,
        Self::Reap,
        Self::Frequency,
        Self::Ean,
        Self::Random,
        Self::Aimer,
        Self::Mone,
        Self::Msmoe,
        Self::Mcsmoe,
        Self::Hcsmoe,
        Self::Ream,
        Self::Svd,
        Self::D2moe,
        Self::Compressed,
        Self::Mobe,
        Self::Moei2,
        Self::Budget,
    ];

    /// The name in recipes, plans and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lightmoe => "lightmoe",
            Self::Replace => "replace",
            Self::Lora => "lora",
            Self::Reap => "reap",
            Self::Frequency => "frequency",
            Self::Ean => "ean",
            Self::Random => "random",
            Self::Aimer => "aimer",
            Self::Mone => "mone",
            Self::Msmoe => "msmoe",
            Self::Mcsmoe => "mcsmoe",
            Self::Hcsmoe => "hcsmoe",
            Self::Ream => "ream",
            Self::Svd => "svd",
            Self::D2moe => "d2moe",
            Self::Compressed => "compressed",
            Self::Mobe => "mobe",
            Self::Moei2 => "moei2",
            Self::Budget => "budget",
        }
    }

    /// What it does to experts.
    pub fn kind(self) -> Kind {
        match self {
            Self::Lora | Self::Compressed => Kind::Keep,
            Self::Lightmoe | Self::Replace => Kind::Replace,
            Self::Msmoe | Self::Hcsmoe | Self::Ream => Kind::Merge,
            Self::Svd | Self::D2moe | Self::Mobe | Self::Moei2 | Self::Mcsmoe | Self::Budget => {
                Kind::Factorise
            }
            _ => Kind::Drop,
        }
    }

    /// Whether each layer is observed behind the compressed layers before it, so that observations serve
    /// one ratio alone; see [`successor`].
    pub fn is_sequential(self) -> bool {
        self == Self::Ream
    }

    /// What it needs to be observed beside routing and outputs.
    pub fn statistics(self) -> Statistics {
        Statistics {
            // MoBE asks the weights alone.
            moments: matches!(self, Self::Svd | Self::D2moe),
            all_outputs: self == Self::Hcsmoe,
            samples: self == Self::Moei2,
            bias: false,
            damage: (self == Self::Budget).then_some(Sensitivity::Fisher),
        }
    }
}

impl fmt::Display for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for MethodName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|method| method.name() == text)
            .ok_or_else(|| {
                let names = Self::ALL.map(|method| format!("`{method}`")).join(", ");
                Error::Invalid(format!("unknown method `{text}`; use one of {names}"))
            })
    }
}
