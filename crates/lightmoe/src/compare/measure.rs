//! What says how good a model is and how large, in tables and pictures.

use crate::recipe::Recipe;
use crate::report::svg::scatter::Better;
use anyhow::Result;
use lightmoe_data::text::is_text;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The places of columns with sizes.
pub(super) const PARAMETERS: usize = 4;
pub(super) const BYTES: usize = 7;

/// What says how good a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Measure {
    /// A score of which more is better.
    #[default]
    Score,
    /// Of text its perplexity.
    Perplexity,
}

impl Measure {
    /// What the data that test the models allow: the user's own may be text.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        let own = recipe.eval_text.as_ref().or(recipe.train.as_ref());
        Ok(match own.map(|path| is_text(path)).transpose()? {
            Some(true) => Self::Perplexity,
            Some(false) | None => Self::Score,
        })
    }

    /// The place of its column before recovery.
    pub fn before(self) -> usize {
        match self {
            Self::Score => 0,
            Self::Perplexity => 2,
        }
    }

    /// And after it.
    pub fn after(self) -> usize {
        self.before() + 1
    }

    /// Whether the column at `place` says something beside it; of text there is no other score.
    pub fn shows(self, place: usize) -> bool {
        self == Self::Score || place >= self.before()
    }

    /// The name of a column of it.
    pub fn head(self, task: &str) -> String {
        match self {
            Self::Score => task.to_owned(),
            Self::Perplexity => format!("{task}: perplexity, lower is better"),
        }
    }

    /// What pictures show, as a sentence begins with it.
    pub fn shown(self) -> &'static str {
        match self {
            Self::Score => "Score",
            Self::Perplexity => {
                "Logarithm of the perplexity, of which lower is better and stands higher,"
            }
        }
    }

    /// The axis of pictures, and which way is better.
    pub fn axis(self) -> (&'static str, Better) {
        match self {
            Self::Score => ("score", Better::More),
            Self::Perplexity => ("ln perplexity, lower is better", Better::Less),
        }
    }

    /// Where a number stands on it: perplexities lie too far apart to be drawn as such.
    pub fn height(self, number: f64) -> f64 {
        match self {
            Self::Score => number,
            Self::Perplexity => number.ln(),
        }
    }
}
