//! BLEU as sacreBLEU computes it by default. Papineni et al., "BLEU: a method for automatic evaluation of
//! machine translation" (ACL 2002); the smoothing is method 3 of Chen and Cherry (WMT 2014).

use super::{Case, CorpusMetric, SACREBLEU, Tokenizer, matches, ngrams, number, references_part};
use std::collections::HashMap;

const ORDER: usize = 4;

/// BLEU: up to 4-grams, the nearest reference's length, precisions without a match halved in turn.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bleu {
    /// How texts become words.
    pub tokenizer: Tokenizer,
    /// Whether capital letters count.
    pub case: Case,
}

impl CorpusMetric for Bleu {
    /// Words of the answer and of the reference, then by order the n-grams that match, and all.
    fn counts(&self, answer: &str, references: &[&str]) -> Vec<usize> {
        let words = |text: &str| self.tokenizer.words(&self.case.applied(text));
        let answer = words(answer);
        let references: Vec<Vec<String>> = references.iter().map(|text| words(text)).collect();
        let lengths = references.iter().map(Vec::len);
        let nearest = lengths.min_by_key(|length| (length.abs_diff(answer.len()), *length));
        let mut counts = vec![answer.len(), nearest.unwrap_or(0)];
        for order in 1..=ORDER {
            let mut most: HashMap<&[String], usize> = HashMap::new();
            for reference in &references {
                for (gram, count) in ngrams(reference, order) {
                    let known = most.entry(gram).or_default();
                    *known = count.max(*known);
                }
            }
            counts.push(matches(&ngrams(&answer, order), &most));
        }
        counts.extend((1..=ORDER).map(|order| number(answer.len(), order)));
        counts
    }

    fn score(&self, counts: &[usize]) -> f64 {
        let (lengths, grams) = counts.split_at(2);
        let (matched, all) = grams.split_at(ORDER);
        if matched.iter().all(|count| *count == 0) {
            return 0.0;
        }
        let [answer, reference] = [lengths[0] as f64, lengths[1] as f64];
        let brevity = match answer < reference {
            true => (1.0 - reference / answer).exp(),
            false => 1.0,
        };
        let (mut logarithms, mut smooth) = (0.0, 1.0);
        for (&matched, &all) in matched.iter().zip(all) {
            let precision = match (matched, all) {
                // Answers that are all shorter than the order score nothing.
                (_, 0) => return 0.0,
                (0, all) => {
                    smooth *= 2.0;
                    100.0 / (smooth * all as f64)
                }
                (matched, all) => 100.0 * matched as f64 / all as f64,
            };
            logarithms += precision.ln();
        }
        brevity * (logarithms / ORDER as f64).exp()
    }

    fn signature(&self, references: Option<usize>) -> String {
        format!(
            "{}|case:{}|eff:no|tok:{}|smooth:exp|version:{SACREBLEU}",
            references_part(references),
            self.case.name(),
            self.tokenizer.name()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_by_hand() {
        let bleu = Bleu::default();
        let counts = bleu.counts("the cat sat on the mat", &["the cat sat on a mat"]);
        assert_eq!(counts, [6, 6, 5, 3, 2, 1, 6, 5, 4, 3]);
        let want = 100.0 * (5.0 / 6.0 * 3.0 / 5.0 * 2.0 / 4.0 / 3.0_f64).powf(0.25);
        assert!((bleu.score(&counts) - want).abs() < 1e-9);
        // The nearest length, the shorter of two; counts are the most of any reference.
        let counts = bleu.counts("a a", &["a", "a b c", "a a a a"]);
        assert_eq!(counts[..4], [2, 1, 2, 1]);
        assert_eq!(bleu.score(&counts), 0.0);
        assert_eq!(bleu.score(&bleu.counts("", &["a"])), 0.0);
    }
}
