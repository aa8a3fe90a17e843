//! chrF and chrF++ as sacreBLEU computes them by default: n-grams of characters of order 1 to 6 with
//! white space removed, and for chrF++ those of words of order 1 and 2; F-score with beta 2, averaged
//! over the effective orders. Popović, "chrF: character n-gram F-score for automatic MT evaluation"
//! (WMT 2015) and "chrF++: words helping character n-grams" (WMT 2017).

use super::{
    Case, CorpusMetric, SACREBLEU, add_counts, is_space, matches, ngrams, number, references_part,
};
use std::hash::Hash;

const CHARACTERS: usize = 6;
const BETA_SQUARED: f64 = 4.0;

/// chrF, or chrF++ with words.
#[derive(Debug, Clone, Copy, Default)]
pub struct Chrf {
    /// The longest n-grams of words: 0, or 2 for chrF++.
    pub words: usize,
    /// Whether capital letters count.
    pub case: Case,
}

impl CorpusMetric for Chrf {
    /// By order, n-grams of the answer, of the reference, and of both: of the reference that scores
    /// best.
    fn counts(&self, answer: &str, references: &[&str]) -> Vec<usize> {
        let answer = Text::new(&self.case.applied(answer));
        let mut best = (-1.0, Vec::new());
        for reference in references {
            let reference = Text::new(&self.case.applied(reference));
            let mut counts = Vec::new();
            for order in 1..=CHARACTERS {
                count(
                    &answer.characters,
                    &reference.characters,
                    order,
                    &mut counts,
                );
            }
            for order in 1..=self.words {
                count(&answer.words, &reference.words, order, &mut counts);
            }
            let score = self.score(&counts);
            if score > best.0 {
                best = (score, counts);
            }
        }
        best.1
    }

    fn score(&self, counts: &[usize]) -> f64 {
        let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
        for counts in counts.chunks_exact(3) {
            let [answer, reference, matched] = [counts[0], counts[1], counts[2]];
            if answer > 0 && reference > 0 {
                precision += matched as f64 / answer as f64;
                recall += matched as f64 / reference as f64;
                orders += 1.0;
            }
        }
        if precision + recall == 0.0 {
            return 0.0;
        }
        let (precision, recall) = (precision / orders, recall / orders);
        100.0 * (1.0 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
    }

    fn signature(&self, references: Option<usize>) -> String {
        format!(
            "{}|case:{}|eff:yes|nc:{CHARACTERS}|nw:{}|space:no|version:{SACREBLEU}",
            references_part(references),
            self.case.name(),
            self.words
        )
    }
}

/// chrF2 of a corpus of `(hypothesis, reference)` pairs, on the scale 0 to 100.
///
/// Counts are summed over the pairs before the score is taken, so this is not the mean over them. An
/// empty corpus scores 0.
pub fn corpus_chrf<S: AsRef<str>>(pairs: &[(S, S)]) -> f64 {
    let (chrf, mut sums) = (Chrf::default(), Vec::new());
    for (hypothesis, reference) in pairs {
        add_counts(
            &mut sums,
            &chrf.counts(hypothesis.as_ref(), &[reference.as_ref()]),
        );
    }
    chrf.score(&sums)
}

/// A text in pieces.
struct Text {
    /// Without white space.
    characters: Vec<char>,
    /// With one punctuation mark at the end of a word, or else at its beginning, a word of its own.
    words: Vec<String>,
}

impl Text {
    fn new(text: &str) -> Self {
        let words = text.split(is_space).filter(|word| !word.is_empty());
        let apart = |word: &str| -> Vec<String> {
            let (Some(first), Some(last)) = (word.chars().next(), word.chars().next_back()) else {
                return Vec::new();
            };
            let (first_length, before_last) = (first.len_utf8(), word.len() - last.len_utf8());
            let cut = match (last.is_ascii_punctuation(), first.is_ascii_punctuation()) {
                _ if before_last == 0 => word.len(),
                (true, _) => before_last,
                (false, true) => first_length,
                (false, false) => word.len(),
            };
            let parts = [&word[..cut], &word[cut..]].into_iter();
            parts
                .filter(|part| !part.is_empty())
                .map(str::to_owned)
                .collect()
        };
        Self {
            characters: text.chars().filter(|c| !is_space(*c)).collect(),
            words: words.flat_map(apart).collect(),
        }
    }
}

fn count<T: Eq + Hash>(answer: &[T], reference: &[T], order: usize, counts: &mut Vec<usize>) {
    let of_reference = number(reference.len(), order);
    // sacreBLEU leaves the answer out where the reference is too short.
    let of_answer = match of_reference {
        0 => 0,
        _ => number(answer.len(), order),
    };
    let common = matches(&ngrams(answer, order), &ngrams(reference, order));
    counts.extend([of_answer, of_reference, common]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chrf(hypothesis: &str, reference: &str) -> f64 {
        corpus_chrf(&[(hypothesis, reference)])
    }

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-9, "got {got}, want {want}");
    }

    #[test]
    fn equal_texts_score_100_and_foreign_ones_0() {
        close(chrf("le katu moriko.", "le katu moriko."), 100.0);
        close(chrf("abc", "xyz"), 0.0);
        close(chrf("", "xyz"), 0.0);
        close(chrf("abc", ""), 0.0);
    }

    #[test]
    fn white_space_does_not_count() {
        close(chrf("a b\tc", "abc"), 100.0);
    }

    #[test]
    fn worked_by_hand() {
        // "ab" against "abc": order 1: p 2/2, r 2/3; order 2: p 1/1, r 1/2; the
        // hypothesis has no trigram. p = 1, r = 7/12, F2 = 5pr/(4p + r).
        let (p, r) = (1.0, (2.0 / 3.0 + 0.5) / 2.0);
        close(chrf("ab", "abc"), 100.0 * 5.0 * p * r / (4.0 * p + r));
        // A repeated n-gram is matched only as often as the reference has it:
        // "aa" against "ab": p = r = (1/2 + 0/1)/2 = 1/4.
        close(chrf("aa", "ab"), 25.0);
    }

    /// Values of sacreBLEU 2 (`CHRF()`).
    #[test]
    fn equal_to_sacrebleu() {
        close(
            chrf("le katu moriko tana.", "le kato moriko sana."),
            49.583_782_230_841_05,
        );
        let pairs = [
            ("ab", "abc"),
            ("the quick brown fox", "a quick brown dog"),
            ("xyz", "xy zz"),
        ];
        close(corpus_chrf(&pairs), 61.926_248_549_824_46);
    }

    #[test]
    fn a_corpus_sums_counts() {
        // Order 1: p 3/4, r 3/4; order 2: p 1/2, r 1/2: 62.5.
        close(corpus_chrf(&[("ab", "ab"), ("cd", "ce")]), 62.5);
    }
}
