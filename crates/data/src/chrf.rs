//! chrF2 as sacreBLEU computes it by default: character n-grams of order 1 to 6
//! with white space removed, F-score with beta 2, averaged over the effective
//! orders. Popović, "chrF: character n-gram F-score for automatic MT evaluation"
//! (WMT 2015).

use std::collections::HashMap;

const ORDER: usize = 6;
const BETA_SQUARED: f64 = 4.0;

/// Counts of one n-gram order, summed over a corpus.
#[derive(Clone, Copy, Default)]
struct Counts {
    hypothesis: usize,
    reference: usize,
    matched: usize,
}

/// chrF2 of one sentence, on the scale 0 to 100.
pub fn chrf(hypothesis: &str, reference: &str) -> f64 {
    corpus_chrf(&[(hypothesis, reference)])
}

/// chrF2 of a corpus of `(hypothesis, reference)` pairs, on the scale 0 to 100.
///
/// Counts are summed over the pairs before the score is taken, so this is not the
/// mean of [`chrf`]. An empty corpus scores 0.
pub fn corpus_chrf<S: AsRef<str>>(pairs: &[(S, S)]) -> f64 {
    let mut totals = [Counts::default(); ORDER];
    for (hypothesis, reference) in pairs {
        let hypothesis = visible(hypothesis.as_ref());
        let reference = visible(reference.as_ref());
        for (order, total) in (1..).zip(&mut totals) {
            count(&hypothesis, &reference, order, total);
        }
    }
    score(&totals)
}

fn visible(text: &str) -> Vec<char> {
    text.chars().filter(|c| !c.is_whitespace()).collect()
}

fn count(hypothesis: &[char], reference: &[char], order: usize, total: &mut Counts) {
    let mut grams: HashMap<&[char], usize> = HashMap::new();
    for gram in reference.windows(order) {
        *grams.entry(gram).or_default() += 1;
        total.reference += 1;
    }
    // sacreBLEU leaves the hypothesis out where the reference is too short.
    if grams.is_empty() {
        return;
    }
    for gram in hypothesis.windows(order) {
        total.hypothesis += 1;
        if let Some(left) = grams.get_mut(gram).filter(|left| **left > 0) {
            *left -= 1;
            total.matched += 1;
        }
    }
}

fn score(totals: &[Counts; ORDER]) -> f64 {
    let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
    for counts in totals {
        if counts.hypothesis > 0 && counts.reference > 0 {
            precision += counts.matched as f64 / counts.hypothesis as f64;
            recall += counts.matched as f64 / counts.reference as f64;
            orders += 1.0;
        }
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (precision / orders, recall / orders);
    100.0 * (1.0 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

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
