//! The choice of few-shot examples.

use super::config::{Sampler, TaskConfig};
use super::docs::Doc;
use super::python::Random;
use crate::{Error, Result};

/// Where few-shot examples come from.
pub(super) struct Examples {
    docs: Vec<Doc>,
    random: Random,
    count: usize,
    sampler: Sampler,
    drawn: usize,
}

impl Examples {
    /// Chooses `count` of `docs` each time.
    pub(super) fn new(task: &TaskConfig, docs: Vec<Doc>, count: usize, seed: u32) -> Self {
        Self {
            docs,
            random: Random::new(seed),
            count,
            sampler: task
                .fewshot_config
                .as_ref()
                .map_or_else(Sampler::default, |c| c.sampler),
            // As the harness decides it: also where neither split is named.
            drawn: count + usize::from(task.fewshot_split == task.test_split),
        }
    }

    /// The examples for a document, which is not among them.
    pub(super) fn choose(&mut self, task: &TaskConfig, doc: &Doc) -> Result<Vec<Doc>> {
        if self.drawn > self.docs.len() {
            return Err(Error::Unusable {
                task: task.name().to_owned(),
                problem: format!(
                    "{} few-shot examples are to be drawn from {}; ask for fewer",
                    self.drawn,
                    self.docs.len()
                ),
            });
        }
        let drawn: Vec<usize> = match self.sampler {
            Sampler::FirstN => (0..self.drawn).collect(),
            Sampler::Default => self.random.sample(self.docs.len(), self.drawn),
        };
        let others = drawn.into_iter().map(|i| &self.docs[i]);
        let others = others.filter(|example| example.fields != doc.fields);
        Ok(others.take(self.count).cloned().collect())
    }
}
