//! Word problems of three or four steps. Every intermediate value and the answer
//! is an integer from 0 to 99; the answer is given without a trace.

use std::ops::RangeInclusive;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::Example;
use crate::rng::{pick, weighted};
use crate::task::Draft;
use crate::words::fill;

/// Names of people in stories.
pub(crate) const PEOPLE: [&str; 12] = [
    "Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Max", "Lily", "Jack", "Nora", "Paul", "Rosa",
];

/// Things that can be counted, in the plural.
pub(crate) const OBJECTS: [&str; 12] = [
    "apples", "coins", "cards", "books", "shells", "stones", "eggs", "cups", "balls", "pens",
    "hats", "keys",
];

const START: [&str; 4] = [
    "{a} has {k} {o}.",
    "{a} owns {k} {o}.",
    "At first {a} has {k} {o}.",
    "There are {k} {o} in the bag of {a}.",
];
const GAIN: [&str; 6] = [
    "{a} finds {k} more.",
    "{a} buys {k} more {o}.",
    "{b} gives {k} {o} to {a}.",
    "{a} gets {k} more from {b}.",
    "Then {a} wins {k} {o}.",
    "Then {b} brings {a} {k} more.",
];
const LOSE: [&str; 6] = [
    "{a} gives {k} to {b}.",
    "{a} loses {k} of them.",
    "Then {a} sells {k} {o}.",
    "{b} takes {k} of the {o}.",
    "{a} gives away {k} {o}.",
    "Then {a} sends {k} of them to {b}.",
];
const DOUBLE: [&str; 3] = [
    "{b} doubles what {a} has.",
    "Soon {a} has twice as many {o}.",
    "Then {a} gets as many again.",
];
const TRIPLE: [&str; 2] = [
    "Soon {a} has 3 times as many {o}.",
    "{b} makes it 3 times as many.",
];
const HALVE: [&str; 3] = [
    "{a} shares them equally with {b}.",
    "{a} gives half of the {o} to {b}.",
    "Then {a} loses half of them.",
];
const BAGS: [&str; 2] = [
    "{a} buys {m} bags of {k} {o} each.",
    "{b} brings {m} bags with {k} {o} each to {a}.",
];
const ASK: [&str; 3] = [
    "How many {o} does {a} have now?",
    "How many {o} does {a} have in the end?",
    "How many {o} are left for {a}?",
];

/// One step of a story, with its number where it has one.
#[derive(Clone, Copy)]
enum Step {
    Gain(u32),
    Lose(u32),
    Double,
    Triple,
    Halve,
    Bags(u32, u32),
    /// Someone else has this many more; asks for theirs. Last step only.
    OtherMore(u32),
    /// Someone else has this many fewer; asks for theirs. Last step only.
    OtherFewer(u32),
    /// Someone else has twice as many; asks for theirs. Last step only.
    OtherTwice,
    /// Someone else has this many; asks for the sum. Last step only.
    Together(u32),
}

impl Step {
    fn propose(rng: &mut ChaCha8Rng, last: bool) -> Self {
        let small = rng.random_range(1..=6);
        if last && rng.random_range(0..3) == 0 {
            return match rng.random_range(0..4) {
                0 => Self::OtherMore(small),
                1 => Self::OtherFewer(small),
                2 => Self::OtherTwice,
                _ => Self::Together(small),
            };
        }
        match weighted(rng, &[46, 46, 3, 1, 2, 2]) {
            0 => Self::Gain(small),
            1 => Self::Lose(small),
            2 => Self::Double,
            3 => Self::Triple,
            4 => Self::Halve,
            _ => Self::Bags(rng.random_range(2..=3), rng.random_range(2..=5)),
        }
    }

    /// The value after the step, if it is an integer from 0 to 99.
    fn apply(self, value: u32) -> Option<u32> {
        let result = match self {
            Self::Gain(k) | Self::OtherMore(k) | Self::Together(k) => value + k,
            Self::Lose(k) | Self::OtherFewer(k) => value.checked_sub(k)?,
            Self::Double | Self::OtherTwice => 2 * value,
            Self::Triple => 3 * value,
            Self::Halve if value.is_multiple_of(2) => value / 2,
            Self::Halve => return None,
            Self::Bags(m, k) => value + m * k,
        };
        (result <= 99).then_some(result)
    }

    /// Canonical content of the step.
    fn key(self) -> String {
        match self {
            Self::Gain(k) => format!(" +{k}"),
            Self::Lose(k) => format!(" -{k}"),
            Self::Double => " *2".into(),
            Self::Triple => " *3".into(),
            Self::Halve => " /2".into(),
            Self::Bags(m, k) => format!(" +{m}*{k}"),
            Self::OtherMore(k) => format!(" o+{k}"),
            Self::OtherFewer(k) => format!(" o-{k}"),
            Self::OtherTwice => " o*2".into(),
            Self::Together(k) => format!(" t+{k}"),
        }
    }

    /// Phrasings, and the numbers `k` and `m` they mention.
    fn phrases(self) -> (&'static [&'static str], u32, u32) {
        match self {
            Self::Gain(k) => (&GAIN, k, 0),
            Self::Lose(k) => (&LOSE, k, 0),
            Self::Double => (&DOUBLE, 0, 0),
            Self::Triple => (&TRIPLE, 0, 0),
            Self::Halve => (&HALVE, 0, 0),
            Self::Bags(m, k) => (&BAGS, k, m),
            Self::OtherMore(k) => (&["{c} has {k} more {o} than {a}."], k, 0),
            Self::OtherFewer(k) => (&["{c} has {k} fewer {o} than {a}."], k, 0),
            Self::OtherTwice => (&["{c} has twice as many {o} as {a}."], 0, 0),
            Self::Together(k) => (&["{c} has {k} {o}."], k, 0),
        }
    }

    /// The question's phrasings when this is the last step.
    fn question(self) -> &'static [&'static str] {
        match self {
            Self::OtherMore(_) | Self::OtherFewer(_) | Self::OtherTwice => {
                &["How many {o} does {c} have?"]
            }
            Self::Together(_) => &["How many {o} do {a} and {c} have together?"],
            _ => &ASK,
        }
    }
}

/// One word problem of three or four steps. Its key is the numbers and the kinds of step, whoever
/// acts and whatever is counted.
pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Draft {
    draw_steps(rng, 3..=4)
}

/// A problem of one or two steps, for pre-training alone: no item of the task is as short.
pub(crate) fn draw_short(rng: &mut ChaCha8Rng) -> Draft {
    draw_steps(rng, 1..=2)
}

fn draw_steps(rng: &mut ChaCha8Rng, count: RangeInclusive<usize>) -> Draft {
    let (start, steps, answer) = plan(rng, count);
    let people = rand::seq::index::sample(rng, PEOPLE.len(), 3);
    let object = *pick(rng, &OBJECTS);
    let mut key = start.to_string();
    let mut prompt = String::from("Question:");
    let mut worked = String::new();
    let mut say =
        |rng: &mut ChaCha8Rng, phrases: &[&str], (k, m): (u32, u32), value: Option<u32>| {
            let phrase = *pick(rng, phrases);
            let sentence = fill(
                phrase,
                &[
                    ("a", PEOPLE[people.index(0)]),
                    ("b", PEOPLE[people.index(1)]),
                    ("c", PEOPLE[people.index(2)]),
                    ("o", object),
                    ("k", &k.to_string()),
                    ("m", &m.to_string()),
                ],
            );
            for text in [&mut prompt, &mut worked] {
                let space = if text.is_empty() { "" } else { " " };
                text.push_str(space);
                text.push_str(&sentence);
            }
            if let Some(value) = value {
                worked.push_str(&format!(" Now {value}."));
            }
        };
    say(rng, &START, (start, 0), None);
    let mut value = start;
    for step in &steps {
        let (phrases, k, m) = step.phrases();
        value = step.apply(value).unwrap_or(value);
        say(rng, phrases, (k, m), Some(value));
        key.push_str(&step.key());
    }
    if let Some(last) = steps.last() {
        say(rng, last.question(), (0, 0), None);
    }
    prompt.push_str("\nAnswer:");
    Draft {
        key,
        example: Example::new(prompt, answer.to_string()),
        worked: Some(format!("{worked}\nAnswer: {answer}")),
    }
}

/// Start value, steps, and final value.
fn plan(rng: &mut ChaCha8Rng, count: RangeInclusive<usize>) -> (u32, Vec<Step>, u32) {
    let count = rng.random_range(count);
    let start = rng.random_range(2..=12);
    let mut value = start;
    let mut steps = Vec::with_capacity(count);
    while steps.len() < count {
        let step = Step::propose(rng, steps.len() + 1 == count);
        if let Some(next) = step.apply(value) {
            value = next;
            steps.push(step);
        }
    }
    (start, steps, value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::stream;

    #[test]
    fn steps_stay_within_0_and_99() {
        assert_eq!(Step::Lose(5).apply(4), None);
        assert_eq!(Step::Triple.apply(34), None);
        assert_eq!(Step::Halve.apply(7), None);
        assert_eq!(Step::Halve.apply(8), Some(4));
        assert_eq!(Step::Bags(3, 9).apply(10), Some(37));
        assert_eq!(Step::OtherFewer(3).apply(10), Some(7));
    }

    /// Items of one key differ in people, objects and phrasing only.
    #[test]
    fn the_key_holds_the_numbers() {
        let mut rng = stream(6, "math", 0, 0);
        let mut seen = std::collections::HashMap::new();
        let mut reworded = 0;
        for _ in 0..100_000 {
            let Draft { key, example, .. } = draw(&mut rng);
            let numbers: Vec<u32> = example
                .prompt
                .replace("3 times", "")
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|digits| digits.parse().ok())
                .collect();
            let content = (numbers, example.completion);
            if let Some(other) = seen.insert(key, content.clone()) {
                assert_eq!(other, content);
                reworded += 1;
            }
        }
        assert!(reworded > 10, "{reworded}");
    }

    /// The text alone determines the answer: read it back and recompute.
    #[test]
    fn the_text_gives_the_answer() {
        let mut rng = stream(5, "math", 0, 0);
        for _ in 0..2_000 {
            let Draft { example, .. } = draw(&mut rng);
            assert_eq!(
                read(&example.prompt),
                example.completion,
                "{}",
                example.prompt
            );
        }
    }

    fn read(prompt: &str) -> String {
        let text = prompt.strip_prefix("Question: ").unwrap();
        let mut value = 0_i64;
        for (at, sentence) in text.split(['.', '?']).enumerate() {
            let numbers: Vec<i64> = sentence
                .split(' ')
                .filter_map(|word| word.parse().ok())
                .collect();
            let has = |part: &str| sentence.contains(part);
            value = if at == 0 {
                numbers[0]
            } else if has("How many") || has("Answer") {
                value
            } else if has("bags") {
                value + numbers[0] * numbers[1]
            } else if has("twice") || has("doubles") || has("as many again") {
                2 * value
            } else if has("3 times") {
                3 * value
            } else if has("half") || has("equally") {
                value / 2
            } else if has("fewer") || has("loses") || has("sells") || has("takes") {
                value - numbers[0]
            } else if has("more") || has("wins") || !has(" gives ") && !has("sends") {
                value + numbers[0]
            } else {
                // "{b} gives {k} {o} to {a}" gains, "{a} gives {k} to {b}" loses.
                let opening = text.split('.').next().unwrap();
                let owner = PEOPLE.into_iter().find(|name| opening.contains(name));
                if sentence.ends_with(owner.unwrap()) {
                    value + numbers[0]
                } else {
                    value - numbers[0]
                }
            };
        }
        value.to_string()
    }
}
