//! The kinds of export, and what can be said of each.

use crate::Error;
use lightmoe_models::{BankLayout, Checkpoint};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportKind {
    /// Bases and adapters multiplied out into one set of matrices per expert: the original
    /// architecture, as large as the original.
    Dense,
    /// The compressed checkpoint itself: bases once, adapters apart.
    Compact,
}

impl ExportKind {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::Dense, Self::Compact];

    /// The kind's lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Compact => "compact",
        }
    }

    /// All names as a list for messages.
    pub(crate) fn names() -> String {
        Self::ALL.map(|kind| format!("`{kind}`")).join(", ")
    }

    /// What the card says of it.
    pub(crate) fn description(self, source: &Checkpoint) -> &'static str {
        if is_original(source) {
            return "No expert of this model is compressed: it is the original architecture in its \
                    original size.";
        }
        match self {
            Self::Dense => {
                "A mixture-of-experts model whose experts were compressed and are here multiplied \
                 out again: every replaced expert is written as its shared base plus its own \
                 low-rank adapter, in the tensors of the original architecture. The folder loads \
                 wherever the original does. It saves no memory: it has as many parameters as the \
                 original. Use the compact export for the smaller model."
            }
            Self::Compact => {
                "A mixture-of-experts model with compressed experts: an expert that was kept has \
                 its own matrices, a replaced one a low-rank adapter on a base that its group \
                 shares. The entry `lightmoe` of `config.json` says which is which."
            }
        }
    }

    /// Engine by engine, whether this export of `source` loads. Honest rather than hopeful: only
    /// lightmoe is exercised by the tests of this project.
    pub(crate) fn loads_in(self, source: &Checkpoint) -> Vec<(String, String)> {
        let config = source.config();
        let statements = if self == Self::Dense || is_original(source) {
            let class = config.raw.get("architectures");
            let class = class
                .and_then(|all| all.get(0)?.as_str())
                .unwrap_or("the original class");
            let same = "same architecture, tensor names and shapes as the original";
            [
                ("lightmoe", "yes".to_owned()),
                (
                    "transformers",
                    match config.raw.get("auto_map") {
                        None => format!("yes, as `{class}`: {same}"),
                        Some(_) => format!(
                            "yes, as `{class}`: {same}; if it does not know the class itself, with \
                             the original's program and `trust_remote_code`"
                        ),
                    },
                ),
                (
                    "vLLM, SGLang",
                    format!("wherever they support `{}`: {same}", config.family),
                ),
                (
                    "llama.cpp",
                    "after its own conversion to GGUF, as the original".into(),
                ),
            ]
        } else {
            let no = || "no: it does not know shared bases; use the dense export".to_owned();
            [
                ("lightmoe", "yes, in its compressed size".to_owned()),
                ("transformers", no()),
                ("vLLM, SGLang", no()),
                ("llama.cpp", no()),
            ]
        };
        statements
            .into_iter()
            .map(|(engine, statement)| (engine.to_owned(), statement))
            .collect()
    }
}

/// Whether nothing is compressed.
fn is_original(source: &Checkpoint) -> bool {
    *source.layout() == BankLayout::dense(source.config())
}

impl fmt::Display for ExportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ExportKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| Error::UnknownKind { name: name.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused() {
        for kind in ExportKind::ALL {
            assert_eq!(kind.to_string().parse::<ExportKind>().unwrap(), kind);
        }
        let message = "gguf".parse::<ExportKind>().unwrap_err().to_string();
        assert!(message.contains("`dense`, `compact`"), "{message}");
    }
}
