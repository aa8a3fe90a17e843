//! What a model is observed on: the first of its training sequences, or a mix of tasks, records and text.

use crate::items::Items;
use crate::preflight::Refused;
use crate::recipe::Recipe;
use crate::source::FEWEST_RECORDS;
use anyhow::{Context, Result, bail, ensure};
use lightmoe_data::{Encoded, Split, Task};
use lightmoe_models::{Checkpoint, ModelTokenizer};
use std::path::PathBuf;
use std::str::FromStr;

/// Fewer selections per expert than this say nothing about an expert.
const FEWEST_SELECTIONS: usize = 16;
/// Below this many, a warning.
const FEW_SELECTIONS: usize = 100;

/// What a model is observed on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Calibration {
    /// Token ids.
    pub samples: Vec<Vec<u32>>,
    /// Where the answer of each sample begins, in tokens.
    pub answers: Vec<usize>,
}

/// Where some of the samples come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The training split of a built-in task.
    Task(Task),
    /// Records or text.
    File(PathBuf),
}

/// Sources, each with its weight: `math,code=2,notes.jsonl=0.5`.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix(pub Vec<(Source, f64)>);

/// Whether a name is that of a file, packed or not.
fn is_file(name: &str) -> bool {
    let name = name.trim_end_matches(".gz");
    [".jsonl", ".txt"].iter().any(|end| name.ends_with(end))
}

impl FromStr for Mix {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let part = |part: &str| {
            let (name, weight) = match part.split_once('=') {
                Some((name, weight)) => (name, weight.trim().parse().unwrap_or(f64::NAN)),
                None => (part, 1.0),
            };
            let name = name.trim();
            if !(weight > 0.0 && weight.is_finite()) {
                bail!("`calibrate` has the weight of `{part}`; give a number above 0");
            }
            let source = match name.parse::<Task>() {
                Ok(task) => Source::Task(task),
                Err(_) if is_file(name) => Source::File(name.into()),
                Err(_) => bail!(
                    "`calibrate` has `{name}`; give built-in tasks or files of records or text that \
                     end in .jsonl or .txt, such as math,code=2,notes.jsonl=0.5"
                ),
            };
            Ok((source, weight))
        };
        text.split(',').map(part).collect::<Result<_>>().map(Self)
    }
}

impl Calibration {
    /// The first of `encoded`, up to `budget` tokens; the last one is cut to fit.
    pub fn first(encoded: &[Encoded], budget: usize) -> Self {
        let mut found = Self::default();
        let mut left = budget;
        for e in encoded {
            let take = e.tokens.len().min(left);
            if take == 0 {
                break;
            }
            found.samples.push(e.tokens[..take].to_vec());
            found.answers.push(e.answer_start);
            left -= take;
        }
        found
    }

    /// Tokens of all samples.
    pub fn tokens(&self) -> usize {
        self.samples.iter().map(Vec::len).sum()
    }

    /// Those that a recipe asks for: of its `calibrate`, each source its share of the tokens by its
    /// weight, or of `encoded`, its training sequences.
    ///
    /// # Errors
    /// If records cannot be read; [`Refused`] if there is too little to say anything about the experts.
    pub fn of(
        recipe: &Recipe,
        encoded: &[Encoded],
        tokenizer: &ModelTokenizer,
        checkpoint: &Checkpoint,
    ) -> Result<Self> {
        let budget = recipe.calibration_tokens;
        let Some(mix) = recipe.calibrate()? else {
            return Self::first(encoded, budget).checked(checkpoint);
        };
        let whole: f64 = mix.0.iter().map(|(_, weight)| weight).sum();
        let mut found = Self::default();
        for (source, weight) in &mix.0 {
            let items = source.items(recipe, tokenizer)?;
            let encoded = items.encoded(tokenizer, recipe.max_length)?;
            let share = (budget as f64 * weight / whole) as usize;
            let more = Self::first(&encoded, share);
            if more.tokens() < share {
                tracing::warn!(
                    ?source,
                    share,
                    found = more.tokens(),
                    "fewer tokens than its share"
                );
            }
            found.samples.extend(more.samples);
            found.answers.extend(more.answers);
        }
        found.checked(checkpoint)
    }

    /// Itself, if it says enough; little text is warned of.
    ///
    /// # Errors
    /// [`Refused`] if there is too little to say anything about the experts.
    pub fn checked(self, checkpoint: &Checkpoint) -> Result<Self> {
        let moe = &checkpoint.config().moe;
        let tokens = self.tokens();
        let selections = tokens * moe.top_k / moe.num_experts;
        if selections < FEWEST_SELECTIONS {
            let message = format!(
                "too little calibration text: {tokens} tokens choose each of {} experts {selections} \
                 times on average; give at least {} tokens of training data",
                moe.num_experts,
                FEWEST_SELECTIONS * moe.num_experts / moe.top_k
            );
            return Err(Refused(message).into());
        }
        if selections < FEW_SELECTIONS {
            tracing::warn!(
                tokens,
                "little calibration text: some experts will hardly be seen"
            );
        }
        Ok(self)
    }
}

impl Source {
    fn items(&self, recipe: &Recipe, tokenizer: &ModelTokenizer) -> Result<Items> {
        match self {
            Self::Task(task) => Ok(Items::Examples(task.examples(
                Split::Train,
                recipe.train_examples,
                recipe.seed,
            ))),
            Self::File(path) => {
                let items = Items::read(path, recipe, tokenizer)?;
                ensure!(
                    items.len() >= FEWEST_RECORDS,
                    Refused(format!(
                        "`{}` has {} records or windows, too few to calibrate on; give at least {FEWEST_RECORDS}",
                        path.display(),
                        items.len()
                    ))
                );
                Ok(items.to_train(recipe.seed))
            }
        }
    }

    /// The text of the file, on which a run depends; `None` for a built-in task.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn text(&self) -> Result<Option<String>> {
        match self {
            Self::Task(_) => Ok(None),
            Self::File(path) => {
                let text = lightmoe_data::read_text(path);
                Ok(Some(text.context("in `calibrate`")?))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_read_with_its_weights() {
        let mix: Mix = "math,code=2, notes.jsonl = 0.5".parse().unwrap();
        let expected = [
            (Source::Task(Task::Math), 1.0),
            (Source::Task(Task::Code), 2.0),
            (Source::File("notes.jsonl".into()), 0.5),
        ];
        assert_eq!(mix.0, expected);
        for (text, word) in [
            ("", "built-in tasks"),
            ("chess", "`chess`"),
            ("math=0", "`math=0`"),
            ("math=many", "weight"),
        ] {
            let message = text.parse::<Mix>().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn the_last_sample_is_cut_to_fit() {
        let encoded = |len: u32, answer_start| Encoded {
            tokens: (0..len).collect(),
            answer_start,
        };
        let all = [encoded(4, 2), encoded(5, 3), encoded(6, 1)];
        let found = Calibration::first(&all, 7);
        assert_eq!(found.samples, [vec![0, 1, 2, 3], vec![0, 1, 2]]);
        assert_eq!(found.answers, [2, 3]);
        assert_eq!(found.tokens(), 7);
    }
}
