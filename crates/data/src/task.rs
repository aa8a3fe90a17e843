//! The five built-in tasks: names, splits, metrics, and how items are drawn.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::rng::{split_of, stream};
use crate::{Error, Example, code, commonsense, intent, math, translation};

/// Draws in a row that may fail before a split counts as exhausted.
const PATIENCE: usize = 40_000;

/// Which disjoint part of a task an item belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// 80% of the content: pre-training and adaptation.
    Train,
    /// 10%: choices of method and learning rate.
    Validation,
    /// 10%: reported scores only.
    Test,
}

/// A built-in task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Word problems of three or four steps, answered without a trace.
    Math,
    /// Small programs: predict the output, or complete the program.
    Code,
    /// Questions on facts of an invented world.
    Commonsense,
    /// An utterance to JSON with intent and slots.
    Intent,
    /// English to an invented language.
    Translation,
}

/// How a task is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Share of completions that [`Task::accepts`].
    ExactMatch,
    /// Share of items whose right choice is the likeliest of `choices`.
    Accuracy,
    /// Corpus chrF2, 0 to 100: [`crate::overlap::corpus_chrf`].
    Chrf,
}

/// An item before it is assigned: its canonical content and its text.
pub(crate) struct Draft {
    /// What decides the split: equal keys never straddle splits.
    pub(crate) key: String,
    /// The text.
    pub(crate) example: Example,
    /// The text with every intermediate value spelled out, where the task has any: for pre-training
    /// alone, where it teaches the single steps that an item asks for all at once.
    pub(crate) worked: Option<String>,
}

impl Task {
    /// Every task, the preserved ones first.
    pub const ALL: [Self; 5] = [
        Self::Math,
        Self::Code,
        Self::Commonsense,
        Self::Intent,
        Self::Translation,
    ];

    /// The task's lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Math => "math",
            Self::Code => "code",
            Self::Commonsense => "commonsense",
            Self::Intent => "intent",
            Self::Translation => "translation",
        }
    }

    /// All names as a list for messages: `math`, `code`, ...
    pub(crate) fn names() -> String {
        Self::ALL.map(|task| format!("`{task}`")).join(", ")
    }

    /// Whether pre-training teaches the task, so that compression must preserve it;
    /// the others are new skills.
    pub fn is_preserved(self) -> bool {
        matches!(self, Self::Math | Self::Code | Self::Commonsense)
    }

    /// The task's metrics, the main one first.
    pub fn metrics(self) -> &'static [Metric] {
        match self {
            Self::Commonsense => &[Metric::ExactMatch, Metric::Accuracy],
            Self::Translation => &[Metric::ExactMatch, Metric::Chrf],
            _ => &[Metric::ExactMatch],
        }
    }

    /// `n` items of `split` without repeated prompts, a function of the arguments
    /// alone; the first items do not depend on `n`.
    ///
    /// The splits are disjoint in content, not only in text. Fewer than `n` items
    /// come back only when the split has no more (commonsense: about 9,600, 1,200
    /// and 1,200; the others have far more than 10,000).
    pub fn examples(self, split: Split, n: usize, seed: u64) -> Vec<Example> {
        let mut rng = stream(seed, self.name(), split as u64, 0);
        let mut seen = HashSet::new();
        let mut out = Vec::with_capacity(n.min(1 << 20));
        let mut misses = 0;
        while out.len() < n && misses < PATIENCE {
            let draft = self.draw(&mut rng);
            if split_of(&draft.key) == split && seen.insert(draft.example.prompt.clone()) {
                out.push(draft.example);
                misses = 0;
            } else {
                misses += 1;
            }
        }
        out
    }

    /// Whether `completion` is a right answer to `example`, white space around it
    /// ignored: equal to the reference, or for code anything that makes the program
    /// print the required output.
    pub fn accepts(self, example: &Example, completion: &str) -> bool {
        match self {
            Self::Code => code::check(&example.prompt, completion),
            _ => completion.trim() == example.completion.trim(),
        }
    }

    /// One item of any split.
    pub(crate) fn draw(self, rng: &mut ChaCha8Rng) -> Draft {
        match self {
            Self::Math => math::draw(rng),
            Self::Code => code::draw(rng),
            Self::Commonsense => commonsense::draw(rng),
            Self::Intent => intent::draw(rng),
            Self::Translation => translation::draw(rng),
        }
    }

    /// One item of the train split.
    pub(crate) fn draw_train(self, rng: &mut ChaCha8Rng) -> Draft {
        loop {
            let draft = self.draw(rng);
            if split_of(&draft.key) == Split::Train {
                return draft;
            }
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Task {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|task| task.name() == name)
            .ok_or_else(|| Error::UnknownTask { name: name.into() })
    }
}
