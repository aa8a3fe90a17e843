//! ROUGE as the package `rouge_score` computes it. Lin, "ROUGE: a package for automatic evaluation of
//! summaries" (WAS 2004).

use super::porter::stem;
use super::{matches, ngrams, number};

/// ROUGE of one text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rouge {
    /// What is counted.
    pub unit: Unit,
    /// Whether words are reduced first.
    pub stemming: Stemming,
}

/// What an answer and a reference have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// N-grams of so many words: ROUGE-1, ROUGE-2.
    Ngrams(usize),
    /// Their longest common subsequence: ROUGE-L.
    Subsequence,
}

/// Whether words are reduced to stems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stemming {
    /// Words count as they are.
    #[default]
    None,
    /// Words of more than three letters by Porter's algorithm.
    Porter,
}

impl Rouge {
    /// The F-measure of an answer, 0 to 1, against the reference that gives the highest.
    pub fn score(&self, answer: &str, references: &[&str]) -> f64 {
        let answer = self.words(answer);
        let scores = references
            .iter()
            .map(|reference| self.of(&answer, &self.words(reference)));
        scores.fold(0.0, f64::max)
    }

    fn of(&self, answer: &[String], reference: &[String]) -> f64 {
        let (common, of_answer, of_reference) = match self.unit {
            Unit::Ngrams(order) => (
                matches(&ngrams(answer, order), &ngrams(reference, order)),
                number(answer.len(), order),
                number(reference.len(), order),
            ),
            Unit::Subsequence => (
                longest_common(answer, reference),
                answer.len(),
                reference.len(),
            ),
        };
        if common == 0 {
            return 0.0;
        }
        let precision = common as f64 / of_answer as f64;
        let recall = common as f64 / of_reference as f64;
        2.0 * precision * recall / (precision + recall)
    }

    /// The words that are compared: runs of ASCII letters and digits, in small letters, or their stems.
    pub fn words(&self, text: &str) -> Vec<String> {
        let text = text.to_lowercase();
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let words = text.split(|c| !is_word(c)).filter(|word| !word.is_empty());
        words
            .map(|word| match self.stemming {
                Stemming::Porter if word.len() > 3 => stem(word),
                _ => word.to_owned(),
            })
            .collect()
    }
}

/// The length of the longest common subsequence, row by row.
fn longest_common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (place, other) in b.iter().enumerate() {
            let above = row[place + 1];
            row[place + 1] = match word == other {
                true => diagonal + 1,
                false => above.max(row[place]),
            };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_by_hand() {
        let rouge = |unit, stemming| Rouge { unit, stemming };
        let score = |rouge: Rouge| {
            rouge.score(
                "The cats sat, on-the mat!",
                &["a dog", "On the mat sat the cat"],
            )
        };
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got} {want}");
        near(score(rouge(Unit::Ngrams(1), Stemming::None)), 5.0 / 6.0);
        near(score(rouge(Unit::Ngrams(1), Stemming::Porter)), 1.0);
        near(score(rouge(Unit::Ngrams(2), Stemming::None)), 2.0 / 5.0);
        near(score(rouge(Unit::Subsequence, Stemming::None)), 3.0 / 6.0);
        near(
            rouge(Unit::Ngrams(2), Stemming::None).score("one", &["one"]),
            0.0,
        );
        near(
            rouge(Unit::Subsequence, Stemming::None).score("", &["one"]),
            0.0,
        );
    }
}
