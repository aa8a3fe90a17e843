//! The pre-training stream: documents of five sources in fixed shares by token.
//!
//! Tasks contribute items of their train split only; facts are stated for the whole
//! world, since a question of any split asks for a stated fact.

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::rng::{stream, weighted};
use crate::{Task, commonsense, filler, math};

/// Where a pre-training document comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Word problems with their answers, some with every step worked out, some shorter.
    Math,
    /// Programs with their outputs or missing parts, some with the values of their variables.
    Code,
    /// Statements of facts of the invented world.
    Facts,
    /// Questions on facts of the train split, with answers.
    Questions,
    /// Copying, objects, lists, numbers, plain sentences.
    Filler,
}

impl Source {
    /// Every source.
    pub const ALL: [Self; 5] = [
        Self::Math,
        Self::Code,
        Self::Facts,
        Self::Questions,
        Self::Filler,
    ];

    /// The source's part of the stream, in percent of tokens.
    pub fn share(self) -> u32 {
        match self {
            Self::Math => 33,
            Self::Code => 33,
            Self::Facts => 12,
            Self::Questions => 4,
            Self::Filler => 18,
        }
    }

    /// Mean length of a document, the end token included, in tenths of a token. A
    /// test measures it.
    fn mean_length(self) -> u32 {
        match self {
            Self::Math => 469,
            Self::Code => 385,
            Self::Facts => 235,
            Self::Questions => 161,
            Self::Filler => 274,
        }
    }

    pub(crate) fn document(self, rng: &mut ChaCha8Rng) -> String {
        let item = |task: Task, rng| task.draw_train(rng).example.text();
        let worked = |task: Task, rng| {
            let draft = task.draw_train(rng);
            draft.worked.unwrap_or_else(|| draft.example.text())
        };
        match self {
            Self::Math => match weighted(rng, &[45, 25, 30]) {
                0 => item(Task::Math, rng),
                1 => math::draw_short(rng).example.text(),
                _ => worked(Task::Math, rng),
            },
            Self::Code => match weighted(rng, &[65, 35]) {
                0 => item(Task::Code, rng),
                _ => worked(Task::Code, rng),
            },
            Self::Facts => commonsense::statements(rng),
            Self::Questions => item(Task::Commonsense, rng),
            Self::Filler => filler::document(rng),
        }
    }
}

/// The mix of sources.
#[derive(Debug, Clone, Copy)]
pub struct Mix {
    /// Weights by document, in the order of [`Source::ALL`].
    weights: [u32; Source::ALL.len()],
}

impl Default for Mix {
    /// The shares of [`Source::share`].
    fn default() -> Self {
        Self {
            weights: Source::ALL.map(|source| source.share() * 100_000 / source.mean_length()),
        }
    }
}

impl Mix {
    /// An endless stream of documents, without end tokens; a function of `seed`.
    pub fn documents(self, seed: u64) -> impl Iterator<Item = (Source, String)> {
        let mut rng = stream(seed, "documents", 0, 0);
        std::iter::repeat_with(move || self.document(&mut rng))
    }

    /// The next document of `rng`.
    pub(crate) fn document(self, rng: &mut ChaCha8Rng) -> (Source, String) {
        let source = Source::ALL[weighted(rng, &self.weights)];
        (source, source.document(rng))
    }
}
