//! Invented words: 60 consonant-vowel syllables, and the rule that tells an
//! invented word from an English one.
//!
//! The tokenizer spells invented words by syllable and knows English words as a
//! whole. Both sides use [`is_invented`], so they cannot disagree.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::rng::pick;

/// Consonants that begin a syllable.
pub(crate) const CONSONANTS: [char; 12] =
    ['b', 'd', 'g', 'k', 'l', 'm', 'n', 'p', 'r', 's', 't', 'v'];
/// Vowels that end a syllable.
pub(crate) const VOWELS: [char; 5] = ['a', 'e', 'i', 'o', 'u'];

/// English words that could be spelled by syllables but are not invented.
const ENGLISH: [&str; 119] = [
    "bade", "bale", "bali", "bare", "base", "bide", "bike", "bite", "bone", "bore", "dare", "data",
    "date", "demo", "diva", "dome", "done", "dope", "dose", "dude", "gala", "game", "gate", "gave",
    "gene", "give", "gone", "kite", "lake", "lame", "lane", "late", "lava", "like", "line", "lite",
    "live", "logo", "lone", "lore", "lose", "love", "lute", "made", "make", "male", "mali", "mane",
    "mate", "memo", "menu", "mere", "mile", "mine", "mode", "mole", "more", "move", "mule", "mute",
    "name", "nine", "none", "nose", "note", "nude", "pile", "pine", "pipe", "pole", "polo", "pope",
    "pose", "potato", "puke", "pure", "rape", "rare", "rate", "ride", "ripe", "rise", "robe",
    "rode", "role", "rope", "rose", "rude", "rule", "ruse", "sake", "sale", "same", "sane", "sari",
    "side", "site", "soda", "sole", "solo", "some", "sore", "sure", "take", "tale", "tame", "tape",
    "tide", "tile", "time", "tire", "tomato", "tone", "tuba", "tube", "tuna", "tune", "vase",
    "vote",
];

/// Whether `word` is two or more syllables of ours and not an English word.
pub(crate) fn is_invented(word: &str) -> bool {
    let bytes = word.as_bytes();
    let is_syllable = |pair: &[u8]| {
        CONSONANTS.contains(&char::from(pair[0])) && VOWELS.contains(&char::from(pair[1]))
    };
    bytes.len() >= 4
        && bytes.len().is_multiple_of(2)
        && bytes.chunks_exact(2).all(is_syllable)
        && !ENGLISH.contains(&word)
}

/// A new word of `syllables` (two or more) syllables.
pub(crate) fn invent(rng: &mut ChaCha8Rng, syllables: usize) -> String {
    loop {
        let mut word = String::with_capacity(2 * syllables);
        for _ in 0..syllables {
            word.push(*pick(rng, &CONSONANTS));
            word.push(*pick(rng, &VOWELS));
        }
        if is_invented(&word) {
            return word;
        }
    }
}

/// A new word of two or three syllables.
pub(crate) fn name(rng: &mut ChaCha8Rng) -> String {
    let syllables = rng.random_range(2..=3);
    invent(rng, syllables)
}

/// Replaces each `{slot}` of `template` by its value; a slot without a value is
/// left out.
pub(crate) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(template.len() + 32);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        out.push_str(before);
        let (slot, tail) = after.split_once('}').unwrap_or((after, ""));
        if let Some((_, value)) = values.iter().find(|(name, _)| *name == slot) {
            out.push_str(value);
        }
        rest = tail;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::stream;

    #[test]
    fn invented_words_are_recognised() {
        assert!(is_invented("katumi"));
        for word in ["take", "ka", "forest", "kat", "katumis", "Katu", ""] {
            assert!(!is_invented(word), "{word}");
        }
        let mut rng = stream(3, "words", 0, 0);
        assert!((0..500).all(|_| is_invented(&name(&mut rng))));
    }

    #[test]
    fn templates_are_filled_in_one_pass() {
        assert_eq!(
            fill("{a} and {b}.", &[("a", "{b}"), ("b", "x")]),
            "{b} and x."
        );
    }
}
