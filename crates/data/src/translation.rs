//! English to Velic, an invented language.
//!
//! A Velic clause is `subject verb object place`. An adjective follows its noun, a
//! preposition follows its noun phrase, `a` is not said. Plural nouns end in `-ri`,
//! past verbs in `-ko`, future verbs in `-ne`. Words are spelled by syllables that
//! pre-training knows, but pre-training holds no pair of words: it only asks for the
//! parts of English sentences.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::Example;
use crate::rng::{pick, stream};
use crate::task::Draft;
use crate::words::invent;

const PLURAL: &str = "ri";
const PAST: &str = "ko";
const FUTURE: &str = "ne";

/// Singular and plural of who acts.
const ACTORS: [(&str, &str); 10] = [
    ("farmer", "farmers"),
    ("king", "kings"),
    ("child", "children"),
    ("friend", "friends"),
    ("teacher", "teachers"),
    ("girl", "girls"),
    ("soldier", "soldiers"),
    ("dog", "dogs"),
    ("horse", "horses"),
    ("wolf", "wolves"),
];

/// Singular and plural of things.
const THINGS: [(&str, &str); 10] = [
    ("apple", "apples"),
    ("coin", "coins"),
    ("card", "cards"),
    ("book", "books"),
    ("shell", "shells"),
    ("stone", "stones"),
    ("egg", "eggs"),
    ("cup", "cups"),
    ("key", "keys"),
    ("boat", "boats"),
];

const PLACES: [&str; 8] = [
    "forest", "river", "cave", "lake", "island", "garden", "kitchen", "hall",
];

const ADJECTIVES: [&str; 10] = [
    "large", "little", "old", "young", "red", "blue", "green", "white", "happy", "clean",
];

/// Base and past form.
const VERBS: [(&str, &str); 10] = [
    ("see", "saw"),
    ("find", "found"),
    ("take", "took"),
    ("carry", "carried"),
    ("want", "wanted"),
    ("lose", "lost"),
    ("bring", "brought"),
    ("hide", "hid"),
    ("wash", "washed"),
    ("follow", "followed"),
];

const PREPOSITIONS: [&str; 2] = ["in", "near"];
const DETERMINERS: [&str; 3] = ["the", "some", "many"];

/// English base form to Velic stem: two syllables, the first one in no other stem.
static LEXICON: LazyLock<HashMap<&'static str, String>> = LazyLock::new(|| {
    let mut rng = stream(0, "velic", 0, 0);
    let mut taken = HashSet::new();
    let words = ACTORS
        .iter()
        .chain(&THINGS)
        .chain(&VERBS)
        .map(|pair| pair.0);
    let others = PLACES
        .into_iter()
        .chain(ADJECTIVES)
        .chain(PREPOSITIONS)
        .chain(DETERMINERS);
    words
        .chain(others)
        .map(|english| {
            let stem = loop {
                let stem = invent(&mut rng, 2);
                if taken.insert(stem[..2].to_string()) {
                    break stem;
                }
            };
            (english, stem)
        })
        .collect()
});

/// A phrase in both languages.
struct Phrase {
    english: String,
    velic: String,
}

fn velic(english: &str) -> &'static str {
    &LEXICON[english]
}

/// Determiner, adjective or none, and a noun.
fn noun_phrase(rng: &mut ChaCha8Rng, nouns: &[(&'static str, &'static str)]) -> Phrase {
    let (singular, plural) = *pick(rng, nouns);
    let is_plural = rng.random_range(0..2) == 0;
    let adjective = (rng.random_range(0..2) == 0).then(|| *pick(rng, &ADJECTIVES));
    let determiner = match rng.random_range(0..4) {
        0 | 1 => "the",
        2 if is_plural => "many",
        _ if is_plural => "some",
        _ if adjective.unwrap_or(singular).starts_with(['a', 'e', 'o']) => "an",
        _ => "a",
    };
    let mut english = vec![determiner];
    english.extend(adjective);
    english.push(if is_plural { plural } else { singular });
    let mut velic_words = Vec::new();
    if !determiner.starts_with('a') {
        velic_words.push(velic(determiner).to_string());
    }
    velic_words.push(format!(
        "{}{}",
        velic(singular),
        if is_plural { PLURAL } else { "" }
    ));
    velic_words.extend(adjective.map(|word| velic(word).to_string()));
    Phrase {
        english: english.join(" "),
        velic: velic_words.join(" "),
    }
}

/// One sentence. Its key is the English sentence; worked, it is followed by questions for its
/// parts, in English and in any order.
pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Draft {
    let subject = noun_phrase(rng, &ACTORS);
    let object = match rng.random_range(0..4) {
        0 => noun_phrase(rng, &ACTORS),
        _ => noun_phrase(rng, &THINGS),
    };
    let (base, past) = *pick(rng, &VERBS);
    let is_past = rng.random_range(0..3) > 0;
    let action = match is_past {
        true => past.to_string(),
        false => format!("will {base}"),
    };

    let mut english = format!("{} {action} {}", subject.english, object.english);
    let suffix = if is_past { PAST } else { FUTURE };
    let mut velic_words = format!("{} {}{suffix} {}", subject.velic, velic(base), object.velic);
    let mut parts = vec![
        ("Who", subject.english),
        ("Action", action),
        ("What", object.english),
    ];
    if rng.random_range(0..3) == 0 {
        let (preposition, place) = (*pick(rng, &PREPOSITIONS), *pick(rng, &PLACES));
        let phrase = format!("{preposition} the {place}");
        english.push_str(&format!(" {phrase}"));
        let there = [velic("the"), velic(place), velic(preposition)];
        velic_words.push_str(&format!(" {}", there.join(" ")));
        parts.push(("Where", phrase));
    }
    parts.shuffle(rng);
    let asked: String = parts
        .iter()
        .map(|(question, part)| format!("\n{question}: {part}"))
        .collect();
    Draft {
        worked: Some(format!("Text: {english}.{asked}")),
        example: Example::new(
            format!("English: {english}.\nVelic:"),
            format!("{velic_words}."),
        ),
        key: english,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lexicon_is_a_bijection() {
        let stems: HashSet<_> = LEXICON.values().map(|stem| &stem[..2]).collect();
        assert_eq!(stems.len(), LEXICON.len());
        assert!((50..=60).contains(&LEXICON.len()), "{}", LEXICON.len());
    }

    #[test]
    fn the_english_gives_the_velic() {
        let mut rng = stream(8, "translation", 0, 0);
        for _ in 0..1_000 {
            let example = draw(&mut rng).example;
            assert_eq!(translate(&example.prompt), example.completion);
        }
    }

    /// A second, parsing implementation of the grammar.
    fn translate(prompt: &str) -> String {
        let text = prompt
            .strip_prefix("English: ")
            .and_then(|rest| rest.strip_suffix(".\nVelic:"))
            .unwrap();
        let mut words = text.split(' ').collect::<Vec<_>>();
        let mut place = String::new();
        if words.len() > 3 && PREPOSITIONS.contains(&words[words.len() - 3]) {
            let tail = words.split_off(words.len() - 3);
            let parts = [velic("the"), velic(tail[2]), velic(tail[0])];
            place = format!(" {}", parts.join(" "));
        }
        let verb_at = words
            .iter()
            .position(|word| {
                VERBS
                    .iter()
                    .any(|(base, past)| word == base || word == past)
            })
            .unwrap();
        let object = words.split_off(verb_at);
        let (base, past) = VERBS
            .into_iter()
            .find(|(base, past)| object[0] == *base || object[0] == *past)
            .unwrap();
        let suffix = if object[0] == past { PAST } else { FUTURE };
        words.retain(|word| *word != "will");
        let phrase = |words: &[&str]| {
            let mut out = Vec::new();
            if DETERMINERS.contains(&words[0]) {
                out.push(velic(words[0]).to_string());
            }
            let noun = *words.last().unwrap();
            let pair = ACTORS
                .iter()
                .chain(&THINGS)
                .find(|p| p.0 == noun || p.1 == noun);
            let (singular, plural) = pair.unwrap();
            let suffix = if noun == *plural { PLURAL } else { "" };
            out.push(format!("{}{suffix}", velic(singular)));
            if words.len() == 3 {
                out.push(velic(words[1]).to_string());
            }
            out.join(" ")
        };
        format!(
            "{} {}{suffix} {}{place}.",
            phrase(&words),
            velic(base),
            phrase(&object[1..]),
        )
    }
}
