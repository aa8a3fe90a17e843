//! Pre-training text that teaches no task but the habits tasks rest on: copying,
//! quoting, key-value objects, lists, order of numbers, spelling, plain sentences.
//!
//! Adaptation freezes the embeddings, so every word of the two new skills must be
//! read here first: copying draws on the words of their train splits. It pairs no
//! utterance with an intent and no English word with a Velic one.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::rng::{pick, stream, weighted};
use crate::tokenizer::pieces;
use crate::words::{CONSONANTS, VOWELS, is_invented, name};
use crate::{Example, Task};

/// Days of the week in order.
pub(crate) const DAYS: [&str; 7] = [
    "monday",
    "tuesday",
    "wednesday",
    "thursday",
    "friday",
    "saturday",
    "sunday",
];

/// Items of each new skill that are read for their words.
const SAMPLE: usize = 3_000;

/// Words of the new skills, by the two forms in which they are tokens.
struct Pools {
    /// At the start of a line or after a sign.
    bare: Vec<String>,
    /// After a space.
    spaced: Vec<String>,
    /// Those of them that occur in utterances.
    spoken: Vec<String>,
}

static POOLS: LazyLock<Pools> = LazyLock::new(|| {
    let (mut bare, mut spaced, mut spoken) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for task in [Task::Intent, Task::Translation] {
        let mut rng = stream(0, "pools", task as u64, 0);
        for _ in 0..SAMPLE {
            let Example {
                prompt, completion, ..
            } = task.draw_train(&mut rng).example;
            for piece in pieces(&format!("{prompt} {completion}")) {
                let word = piece.trim_start_matches(' ');
                let is_word = word.starts_with(|c: char| c.is_ascii_alphabetic());
                if is_word && !is_invented(word) {
                    let pool = if word == piece {
                        &mut bare
                    } else {
                        &mut spaced
                    };
                    pool.insert(word.to_string());
                    if task == Task::Intent && word != piece {
                        spoken.insert(word.to_string());
                    }
                }
            }
        }
    }
    Pools {
        bare: bare.into_iter().collect(),
        spaced: spaced.into_iter().collect(),
        spoken: spoken.into_iter().collect(),
    }
});

type Kind = fn(&mut ChaCha8Rng) -> String;

/// Kinds of filler with their weights by document.
const KINDS: [(u32, Kind); 14] = [
    (20, echo),
    (12, quote),
    (16, object_echo),
    (6, object_lookup),
    (6, object_from_words),
    (8, reverse),
    (4, count),
    (5, sort),
    (6, compare),
    (3, days),
    (6, spell),
    (4, pairs),
    (8, story),
    (16, parts),
];

/// One document of filler.
pub(crate) fn document(rng: &mut ChaCha8Rng) -> String {
    let (_, kind) = KINDS[weighted(rng, &KINDS.map(|(weight, _)| weight))];
    kind(rng)
}

/// A number up to `largest`, small ones more often.
fn number(rng: &mut ChaCha8Rng, largest: u32) -> String {
    let largest = *pick(rng, &[9, 20, largest]);
    rng.random_range(0..=largest).to_string()
}

/// A word as it stands after a space: mostly English.
fn spaced(rng: &mut ChaCha8Rng) -> String {
    match weighted(rng, &[5, 4, 2, 1]) {
        0 => pick(rng, &POOLS.spaced).clone(),
        1 => pick(rng, &POOLS.spoken).clone(),
        2 => name(rng),
        _ => number(rng, 99),
    }
}

/// A word as it stands in quotes. Numbers end at 20 there, which saves tokens.
fn bare(rng: &mut ChaCha8Rng) -> String {
    match weighted(rng, &[6, 3, 3]) {
        0 => pick(rng, &POOLS.bare).clone(),
        1 => name(rng),
        _ => number(rng, 20),
    }
}

/// A word as it stands both after a space and in quotes.
fn both(rng: &mut ChaCha8Rng) -> String {
    loop {
        let word = bare(rng);
        let is_english = POOLS.bare.binary_search(&word).is_ok();
        if !is_english || POOLS.spaced.binary_search(&word).is_ok() {
            return word;
        }
    }
}

fn several(
    rng: &mut ChaCha8Rng,
    count: std::ops::RangeInclusive<usize>,
    word: fn(&mut ChaCha8Rng) -> String,
) -> Vec<String> {
    (0..rng.random_range(count)).map(|_| word(rng)).collect()
}

fn echo(rng: &mut ChaCha8Rng) -> String {
    let words = several(rng, 4..=12, spaced).join(" ");
    match rng.random_range(0..3) {
        0 => format!("Say: {words}.\nEcho: {words}."),
        1 => format!("Text: {words}\nCopy: {words}"),
        _ => {
            let line = pick(rng, &POOLS.bare).clone();
            format!("{line}: {words}.\n{line}: {words}.")
        }
    }
}

fn quote(rng: &mut ChaCha8Rng) -> String {
    let words = several(rng, 2..=5, both);
    let quoted: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    format!("Text: {}\nQuote: {}", words.join(" "), quoted.join(", "))
}

/// A key of an object: one word or two.
fn key(rng: &mut ChaCha8Rng) -> String {
    let first = pick(rng, &POOLS.bare).clone();
    match rng.random_range(0..3) {
        0 => format!("{first}_{}", pick(rng, &POOLS.bare)),
        _ => first,
    }
}

/// Distinct keys with values.
fn entries(rng: &mut ChaCha8Rng) -> Vec<(String, String)> {
    let mut entries: Vec<(String, String)> = Vec::new();
    for _ in 0..rng.random_range(2..=4) {
        let key = key(rng);
        if entries.iter().all(|(other, _)| *other != key) {
            entries.push((key, bare(rng)));
        }
    }
    entries
}

fn object(entries: &[(String, String)]) -> String {
    let entries: Vec<String> = entries
        .iter()
        .map(|(key, value)| format!("\"{key}\": \"{value}\""))
        .collect();
    format!("{{{}}}", entries.join(", "))
}

fn object_echo(rng: &mut ChaCha8Rng) -> String {
    let mut text = object(&entries(rng));
    if rng.random_range(0..2) == 0 {
        text = format!("{{\"{}\": {text}}}", key(rng));
    }
    format!("Object: {text}\nCopy: {text}")
}

/// An object and one of its values by key.
fn object_lookup(rng: &mut ChaCha8Rng) -> String {
    let entries = entries(rng);
    let (key, value) = pick(rng, &entries);
    format!(
        "Object: {}\nFind: \"{key}\"\nAnswer: \"{value}\"",
        object(&entries)
    )
}

/// Keys and values in words, and the object they make.
fn object_from_words(rng: &mut ChaCha8Rng) -> String {
    let mut entries: Vec<(String, String)> = Vec::new();
    for _ in 0..rng.random_range(2..=4) {
        let key = both(rng);
        if entries.iter().all(|(other, _)| *other != key) {
            entries.push((key, both(rng)));
        }
    }
    let words: Vec<String> = entries
        .iter()
        .map(|(key, value)| format!("{key} is {value}"))
        .collect();
    format!("Text: {}.\nObject: {}", words.join(", "), object(&entries))
}

fn reverse(rng: &mut ChaCha8Rng) -> String {
    let mut words = several(rng, 2..=6, spaced);
    let forward = words.join(" ");
    words.reverse();
    format!("List: {forward}\nReverse: {}", words.join(" "))
}

fn count(rng: &mut ChaCha8Rng) -> String {
    let (from, length) = (rng.random_range(0..=88_u32), rng.random_range(3..=10));
    let mut numbers: Vec<String> = (from..=from + length).map(|n| n.to_string()).collect();
    if rng.random_range(0..3) == 0 {
        numbers.reverse();
    }
    format!("Count: {}", numbers.join(" "))
}

fn sort(rng: &mut ChaCha8Rng) -> String {
    let mut numbers: Vec<u32> = (0..rng.random_range(3..=6))
        .map(|_| rng.random_range(0..=99))
        .collect();
    let join = |numbers: &[u32]| numbers.iter().map(|n| format!(" {n}")).collect::<String>();
    let list = join(&numbers);
    numbers.sort_unstable();
    format!("List:{list}\nSort:{}", join(&numbers))
}

fn compare(rng: &mut ChaCha8Rng) -> String {
    let mut text = String::from("Text:");
    for _ in 0..rng.random_range(1..=3) {
        let (a, b) = (rng.random_range(0..=99_u32), rng.random_range(0..=99));
        let relation = match a.cmp(&b) {
            std::cmp::Ordering::Less => "less than",
            std::cmp::Ordering::Equal => "the same as",
            std::cmp::Ordering::Greater => "more than",
        };
        text.push_str(&format!(" {a} is {relation} {b}."));
    }
    text
}

fn days(rng: &mut ChaCha8Rng) -> String {
    let today = rng.random_range(0..7);
    let ahead = rng.random_range(1..=6);
    let list: Vec<&str> = (0..=ahead).map(|at| DAYS[(today + at) % 7]).collect();
    format!("Count: {}", list.join(" "))
}

fn spell(rng: &mut ChaCha8Rng) -> String {
    let word = name(rng);
    let mut spelled = String::new();
    for syllable in word.as_bytes().chunks(2) {
        spelled.push(' ');
        spelled.extend(syllable.iter().copied().map(char::from));
    }
    match rng.random_range(0..2) {
        0 => format!("Spell: {word}\nAnswer:{spelled}"),
        _ => format!("Say:{spelled}\nAnswer: {word}"),
    }
}

/// Single syllables in turn, so that each is read at the start of a word.
fn pairs(rng: &mut ChaCha8Rng) -> String {
    let mut syllables = || format!("{}{}", pick(rng, &CONSONANTS), pick(rng, &VOWELS));
    let (a, b) = (syllables(), syllables());
    format!("Say: {a} {b} {a} {b}\nEcho: {a} {b} {a} {b}")
}

/// A sentence and its parts, asked for one by one: finding what stands elsewhere in a sentence is
/// what translation by another word order rests on.
fn parts(rng: &mut ChaCha8Rng) -> String {
    let draft = Task::Translation.draw_train(rng);
    draft.worked.unwrap_or(draft.key)
}

/// Plain sentences: the English side of translation's train split.
fn story(rng: &mut ChaCha8Rng) -> String {
    let sentences: Vec<String> = (0..rng.random_range(1..=4))
        .map(|_| format!(" {}.", Task::Translation.draw_train(rng).key))
        .collect();
    format!("Story:{}", sentences.concat())
}
