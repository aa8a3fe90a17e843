//! English to Velic, an invented language.
//!
//! A Velic clause is `subject object place adverb verb`. An adjective follows its
//! noun, a preposition follows its noun phrase, `a` is not said. Plural nouns end in
//! `-ri`, past verbs in `-ko`, future verbs in `-ne`. Words are spelled by syllables
//! that pre-training knows, but pre-training holds no pair of words.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::Example;
use crate::rng::{pick, stream};
use crate::task::Draft;
use crate::words::invent;

const PLURAL: &str = "ri";
const PAST: &str = "ko";
const FUTURE: &str = "ne";

/// Singular and plural of who acts.
const ACTORS: [(&str, &str); 16] = [
    ("farmer", "farmers"),
    ("king", "kings"),
    ("child", "children"),
    ("friend", "friends"),
    ("sister", "sisters"),
    ("teacher", "teachers"),
    ("doctor", "doctors"),
    ("girl", "girls"),
    ("boy", "boys"),
    ("soldier", "soldiers"),
    ("bird", "birds"),
    ("dog", "dogs"),
    ("cat", "cats"),
    ("horse", "horses"),
    ("wolf", "wolves"),
    ("bear", "bears"),
];

/// Singular and plural of things; the same twice for what is not counted.
const THINGS: [(&str, &str); 20] = [
    ("honey", "honey"),
    ("bread", "bread"),
    ("rice", "rice"),
    ("fruit", "fruit"),
    ("apple", "apples"),
    ("coin", "coins"),
    ("card", "cards"),
    ("book", "books"),
    ("shell", "shells"),
    ("stone", "stones"),
    ("egg", "eggs"),
    ("cup", "cups"),
    ("ball", "balls"),
    ("pen", "pens"),
    ("hat", "hats"),
    ("key", "keys"),
    ("map", "maps"),
    ("letter", "letters"),
    ("boat", "boats"),
    ("coat", "coats"),
];

const PLACES: [&str; 18] = [
    "table", "train", "bus", "car", "forest", "river", "desert", "mountain", "cave", "lake",
    "valley", "swamp", "island", "meadow", "beach", "garden", "kitchen", "hall",
];

const ADJECTIVES: [&str; 26] = [
    "large", "little", "tall", "purple", "orange", "pink", "old", "young", "red", "blue", "green",
    "yellow", "black", "white", "brown", "grey", "tiny", "small", "big", "huge", "happy", "sad",
    "good", "new", "clean", "strong",
];

/// Base and past form.
const VERBS: [(&str, &str); 20] = [
    ("see", "saw"),
    ("find", "found"),
    ("take", "took"),
    ("carry", "carried"),
    ("like", "liked"),
    ("want", "wanted"),
    ("lose", "lost"),
    ("buy", "bought"),
    ("sell", "sold"),
    ("bring", "brought"),
    ("hide", "hid"),
    ("hold", "held"),
    ("break", "broke"),
    ("wash", "washed"),
    ("paint", "painted"),
    ("follow", "followed"),
    ("know", "knew"),
    ("leave", "left"),
    ("draw", "drew"),
    ("keep", "kept"),
];

const PREPOSITIONS: [&str; 4] = ["in", "near", "behind", "by"];
const ADVERBS: [&str; 4] = ["never", "often", "soon", "again"];
const DETERMINERS: [&str; 3] = ["the", "some", "many"];

/// English base form to Velic stem.
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
        .chain(ADVERBS)
        .chain(DETERMINERS);
    words
        .chain(others)
        .map(|english| {
            let stem = loop {
                let stem = invent(&mut rng, 2);
                if taken.insert(stem.clone()) {
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
    let is_mass = singular == plural;
    let is_plural = !is_mass && rng.random_range(0..2) == 0;
    let adjective = (rng.random_range(0..2) == 0).then(|| *pick(rng, &ADJECTIVES));
    let determiner = match rng.random_range(0..4) {
        0 | 1 => "the",
        2 if is_plural => "many",
        _ if is_plural || is_mass => "some",
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

/// One sentence. Its key is the English sentence.
pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Draft {
    let subject = noun_phrase(rng, &ACTORS);
    let object = match rng.random_range(0..4) {
        0 => noun_phrase(rng, &ACTORS),
        _ => noun_phrase(rng, &THINGS),
    };
    let adverb = (rng.random_range(0..4) == 0).then(|| *pick(rng, &ADVERBS));
    let (base, past) = *pick(rng, &VERBS);
    let is_past = rng.random_range(0..3) > 0;

    let mut english = vec![subject.english.as_str()];
    let mut words = vec![subject.velic.as_str(), object.velic.as_str()];
    if !is_past {
        english.push("will");
    }
    english.extend(adverb);
    english.push(if is_past { past } else { base });
    english.push(&object.english);
    if rng.random_range(0..3) == 0 {
        let (preposition, place) = (*pick(rng, &PREPOSITIONS), *pick(rng, &PLACES));
        english.extend([preposition, "the", place]);
        words.extend([velic("the"), velic(place), velic(preposition)]);
    }
    words.extend(adverb.map(velic));
    let verb = format!("{}{}", velic(base), if is_past { PAST } else { FUTURE });
    words.push(&verb);

    let english = english.join(" ");
    Draft {
        worked: None,
        example: Example::new(
            format!("English: {english}.\nVelic:"),
            format!("{}.", words.join(" ")),
        ),
        key: english,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lexicon_is_a_bijection() {
        let stems: HashSet<_> = LEXICON.values().collect();
        assert_eq!(stems.len(), LEXICON.len());
        assert!((95..=130).contains(&LEXICON.len()), "{}", LEXICON.len());
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
            place = format!("{} ", parts.join(" "));
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
        let adverb = words.iter().find(|word| ADVERBS.contains(word));
        let adverb = adverb.map_or(String::new(), |word| format!("{} ", velic(word)));
        words.retain(|word| *word != "will" && !ADVERBS.contains(word));
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
            let suffix = if noun == *plural && plural != singular {
                PLURAL
            } else {
                ""
            };
            out.push(format!("{}{suffix}", velic(singular)));
            if words.len() == 3 {
                out.push(velic(words[1]).to_string());
            }
            out.join(" ")
        };
        format!(
            "{} {} {place}{adverb}{}{suffix}.",
            phrase(&words),
            phrase(&object[1..]),
            velic(base)
        )
    }
}
