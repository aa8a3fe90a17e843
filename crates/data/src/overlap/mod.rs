//! How much an answer has in common with reference texts: BLEU, chrF and chrF++ over a corpus, as
//! sacreBLEU computes them, and ROUGE of single texts, as the package `rouge_score` does.
//!
//! `fixtures/overlap` holds what both say.

mod bleu;
mod chrf;
mod porter;
mod rouge;
mod tokenize;

pub use bleu::Bleu;
pub use chrf::{Chrf, corpus_chrf};
pub use rouge::{Rouge, Stemming, Unit};
pub use tokenize::Tokenizer;

use std::collections::HashMap;
use std::hash::Hash;

/// The version of sacreBLEU whose numbers these are.
const SACREBLEU: &str = "2.6.0";

/// Whether capital letters differ from small ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Case {
    /// They do.
    #[default]
    Mixed,
    /// Texts are put into small letters first.
    Lower,
}

impl Case {
    fn applied(self, text: &str) -> String {
        match self {
            Self::Mixed => text.to_owned(),
            Self::Lower => text.to_lowercase(),
        }
    }

    /// As it stands in signatures.
    fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Lower => "lc",
        }
    }
}

/// A metric of a whole corpus: counts of each answer are added up, and the score is taken of the sums.
pub trait CorpusMetric: Send + Sync {
    /// Counts of one answer against its references, always as many.
    fn counts(&self, answer: &str, references: &[&str]) -> Vec<usize>;
    /// The score of counts that were added up, 0 to 100.
    fn score(&self, counts: &[usize]) -> f64;
    /// What decides the score besides the texts, in sacreBLEU's form. `references` is their number
    /// for each answer, if it is the same for all.
    fn signature(&self, references: Option<usize>) -> String;
}

/// How a signature begins.
fn references_part(references: Option<usize>) -> String {
    match references {
        Some(number) => format!("nrefs:{number}"),
        None => "nrefs:var".into(),
    }
}

/// Counts `counts` to `sums`, number by number.
pub fn add_counts(sums: &mut Vec<usize>, counts: &[usize]) {
    sums.resize(counts.len(), 0);
    for (sum, count) in sums.iter_mut().zip(counts) {
        *sum += count;
    }
}

/// How often each n-gram of an order is there.
fn ngrams<T: Eq + Hash>(items: &[T], order: usize) -> HashMap<&[T], usize> {
    let mut counts = HashMap::new();
    for gram in items.windows(order) {
        *counts.entry(gram).or_default() += 1;
    }
    counts
}

/// N-grams of `answer` that `reference` has too, each as often as both have it.
fn matches<T: Eq + Hash>(answer: &HashMap<&[T], usize>, reference: &HashMap<&[T], usize>) -> usize {
    let common = answer
        .iter()
        .map(|(gram, count)| reference.get(gram).map_or(0, |other| *count.min(other)));
    common.sum()
}

/// N-grams of an order in a text of so many items.
fn number(items: usize, order: usize) -> usize {
    (items + 1).saturating_sub(order)
}

/// White space as Python's texts have it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
