//! ROUGE as the package `rouge_score` computes it. Lin, "ROUGE: a package for automatic evaluation of
//! summaries" (WAS 2004).

use super::porter::stem;
use super::{matches, ngrams, number};
use std::collections::HashMap;

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
    /// Of each line of the reference the words that are in its longest common subsequence with a line of
    /// the answer, each word as often as both texts have it at most: ROUGE-Lsum.
    Lines,
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
        let answer = self.lines(answer);
        let scores = references
            .iter()
            .map(|reference| self.of(&answer, &self.lines(reference)));
        scores.fold(0.0, f64::max)
    }

    /// The words of a text by line, where lines count, else all in one.
    fn lines(&self, text: &str) -> Vec<Vec<String>> {
        match self.unit {
            Unit::Lines => text.split('\n').map(|line| self.words(line)).collect(),
            _ => vec![self.words(text)],
        }
    }

    fn of(&self, answer: &[Vec<String>], reference: &[Vec<String>]) -> f64 {
        let order = match self.unit {
            Unit::Ngrams(order) => order,
            Unit::Subsequence | Unit::Lines => 1,
        };
        let common = match self.unit {
            Unit::Ngrams(_) => matches(&ngrams(&answer[0], order), &ngrams(&reference[0], order)),
            Unit::Subsequence => longest_common(&answer[0], &reference[0]),
            Unit::Lines => common_in_lines(answer, reference),
        };
        let all = |lines: &[Vec<String>]| number(lines.iter().map(Vec::len).sum(), order);
        let (of_answer, of_reference) = (all(answer), all(reference));
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

/// Words of the reference that its lines have in common with lines of the answer.
fn common_in_lines(answer: &[Vec<String>], reference: &[Vec<String>]) -> usize {
    let count = |lines: &[Vec<String>]| {
        let mut counts: HashMap<String, usize> = HashMap::new();
        for word in lines.iter().flatten() {
            *counts.entry(word.clone()).or_default() += 1;
        }
        counts
    };
    let (mut left, of_answer) = (count(reference), count(answer));
    for (word, count) in &mut left {
        *count = of_answer.get(word).map_or(0, |other| *other.min(count));
    }
    let mut common = 0;
    for line in reference {
        let mut is_common = vec![false; line.len()];
        for other in answer {
            mark_common(line, other, &mut is_common);
        }
        let marked = line.iter().zip(is_common).filter(|(_, marked)| *marked);
        for (word, _) in marked {
            if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
                *count -= 1;
                common += 1;
            }
        }
    }
    common
}

/// Marks the words of `a` in the longest subsequence that it has in common with `b`: of several, in the
/// one that `rouge_score` takes, which leaves out a word of `a` rather than one of `b`.
fn mark_common(a: &[String], b: &[String], is_common: &mut [bool]) {
    let mut rows = vec![vec![0; b.len() + 1]];
    for word in a {
        let mut row = rows[rows.len() - 1].clone();
        add_word(&mut row, word, b);
        rows.push(row);
    }
    let (mut i, mut j) = (a.len(), b.len());
    while i > 0 && j > 0 {
        if a[i - 1] == b[j - 1] {
            is_common[i - 1] = true;
            (i, j) = (i - 1, j - 1);
        } else if rows[i][j - 1] > rows[i - 1][j] {
            j -= 1;
        } else {
            i -= 1;
        }
    }
}

/// The length of the longest common subsequence.
fn longest_common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        add_word(&mut row, word, b);
    }
    row[b.len()] as usize
}

/// `row` has the lengths of the longest subsequences that a text has in common with the beginnings of `b`,
/// the empty one first; makes them those of the text with one `word` more.
fn add_word(row: &mut [u32], word: &str, b: &[String]) {
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
        // Of the reference's line "a b c" the words a and c, by "a x c"; of "c d" the c, by either line.
        // Its d would do with "d c" as well, and is left out.
        let summary = rouge(Unit::Lines, Stemming::None);
        near(
            summary.score("a x c\nd c", &["a b c\nc d"]),
            2.0 * 3.0 / 10.0,
        );
        near(summary.score("\n", &["one"]), 0.0);
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
