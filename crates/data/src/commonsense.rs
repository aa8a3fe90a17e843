//! A made-up world: 200 beings with five attributes each.
//!
//! Pre-training states every fact; questions exist for the facts of a split only,
//! so a question of the test split asks for a fact that was read, never asked.

use std::collections::HashSet;
use std::sync::LazyLock;

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::Example;
use crate::rng::{pick, stream};
use crate::task::Draft;
use crate::words::{fill, name};

/// Number of beings.
const BEINGS: usize = 200;
/// Choices of a question, the right one included.
const CHOICES: usize = 4;

/// A kind of fact. `{n}` is the being, `{v}` the value.
struct Attribute {
    name: &'static str,
    values: &'static [&'static str],
    statements: &'static [&'static str],
    questions: [&'static str; 12],
}

static ATTRIBUTES: [Attribute; 5] = [
    Attribute {
        name: "habitat",
        values: &[
            "forest", "river", "desert", "mountain", "cave", "lake", "valley", "swamp", "island",
            "meadow", "beach", "garden",
        ],
        statements: &[
            "The {n} lives in the {v}.",
            "You can find the {n} in the {v}.",
            "The home of the {n} is the {v}.",
            "In the {v} lives the {n}.",
            "The {n} sleeps in the {v}.",
        ],
        questions: [
            "Where does the {n} live?",
            "Where does the {n} sleep?",
            "Where can you find the {n}?",
            "Where is the home of the {n}?",
            "What is the home of the {n}?",
            "Which place is the home of the {n}?",
            "Which place does the {n} live in?",
            "In which place does the {n} live?",
            "In which place can you find the {n}?",
            "Do you know where the {n} lives?",
            "Tell me where the {n} lives.",
            "Tell me the home of the {n}.",
        ],
    },
    Attribute {
        name: "food",
        values: &[
            "nuts", "berries", "fish", "grass", "honey", "roots", "seeds", "fruit", "leaves",
            "bread", "rice", "worms",
        ],
        statements: &[
            "The {n} eats {v}.",
            "The food of the {n} is {v}.",
            "The {n} likes to eat {v}.",
            "For food the {n} takes {v}.",
            "You can feed the {n} with {v}.",
        ],
        questions: [
            "What does the {n} eat?",
            "What does the {n} like to eat?",
            "What is the food of the {n}?",
            "What food does the {n} like?",
            "What food does the {n} take?",
            "What can you feed the {n} with?",
            "Which food does the {n} eat?",
            "Which food does the {n} like?",
            "Which food is for the {n}?",
            "Do you know what the {n} eats?",
            "Tell me what the {n} eats.",
            "Tell me the food of the {n}.",
        ],
    },
    Attribute {
        name: "colour",
        values: &[
            "red", "blue", "green", "yellow", "black", "white", "brown", "grey", "purple",
            "orange", "pink", "gold",
        ],
        statements: &[
            "The {n} is {v}.",
            "The colour of the {n} is {v}.",
            "The {n} has a {v} colour.",
            "The skin of the {n} is {v}.",
            "You can see that the {n} is {v}.",
        ],
        questions: [
            "What colour is the {n}?",
            "What colour does the {n} have?",
            "What is the colour of the {n}?",
            "What colour is the skin of the {n}?",
            "What is the colour of the skin of the {n}?",
            "Which colour is the {n}?",
            "Which colour does the {n} have?",
            "Which colour is the skin of the {n}?",
            "In which colour can you see the {n}?",
            "Do you know the colour of the {n}?",
            "Tell me the colour of the {n}.",
            "Tell me what colour the {n} has.",
        ],
    },
    Attribute {
        name: "size",
        values: &[
            "tiny", "little", "small", "big", "large", "tall", "huge", "giant",
        ],
        statements: &[
            "The {n} is very {v}.",
            "The size of the {n} is {v}.",
            "The {n} has a {v} body.",
            "The body of the {n} is {v}.",
            "A {n} grows {v}.",
        ],
        questions: [
            "How big is the {n}?",
            "How large is the {n}?",
            "How tall is the {n}?",
            "How big is the body of the {n}?",
            "How big does the {n} grow?",
            "How large does a {n} grow?",
            "What size is the {n}?",
            "What is the size of the {n}?",
            "Which size does the {n} have?",
            "Do you know the size of the {n}?",
            "Tell me the size of the {n}.",
            "Tell me how big the {n} is.",
        ],
    },
    Attribute {
        name: "sound",
        values: &[
            "song", "roar", "whistle", "hum", "bark", "cry", "click", "laugh", "whisper", "drum",
        ],
        statements: &[
            "The sound of the {n} is a {v}.",
            "The {n} makes a {v}.",
            "The voice of the {n} is a {v}.",
            "You can hear the {n} by its {v}.",
            "A {v} is the sound of the {n}.",
        ],
        questions: [
            "What sound does the {n} make?",
            "What is the sound of the {n}?",
            "What is the voice of the {n}?",
            "What does the {n} sound like?",
            "Which sound does the {n} make?",
            "Which sound is that of the {n}?",
            "Which voice does the {n} have?",
            "By which sound can you hear the {n}?",
            "How does the {n} sound?",
            "Do you know the sound of the {n}?",
            "Tell me the sound of the {n}.",
            "Tell me what sound the {n} makes.",
        ],
    },
];

/// A being and the index of its value for each attribute.
struct Being {
    name: String,
    values: [usize; ATTRIBUTES.len()],
}

static WORLD: LazyLock<Vec<Being>> = LazyLock::new(|| {
    let mut rng = stream(0, "world", 0, 0);
    let mut names = HashSet::new();
    let mut world = Vec::with_capacity(BEINGS);
    while world.len() < BEINGS {
        let name = name(&mut rng);
        if names.insert(name.clone()) {
            let values = std::array::from_fn(|at| rng.random_range(0..ATTRIBUTES[at].values.len()));
            world.push(Being { name, values });
        }
    }
    world
});

/// A question on a fact. Its key is the fact: being and attribute.
pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Draft {
    let being = pick(rng, &WORLD);
    let at = rng.random_range(0..ATTRIBUTES.len());
    let attribute = &ATTRIBUTES[at];
    let value = being.values[at];
    let phrasing = *pick(rng, &attribute.questions);
    let question = fill(phrasing, &[("n", &being.name)]);
    let mut choices: Vec<usize> = rand::seq::index::sample(rng, attribute.values.len(), CHOICES)
        .into_iter()
        .collect();
    if !choices.contains(&value) {
        let slot = rng.random_range(0..CHOICES);
        choices[slot] = value;
    }
    Draft {
        worked: None,
        key: format!("{} {}", being.name, attribute.name),
        example: Example {
            prompt: format!("Question: {question}\nAnswer:"),
            completion: attribute.values[value].to_string(),
            choices: choices
                .into_iter()
                .map(|choice| attribute.values[choice].to_string())
                .collect(),
        },
    }
}

/// A pre-training document: two or three facts of one being, of any split.
pub(crate) fn statements(rng: &mut ChaCha8Rng) -> String {
    let being = pick(rng, &WORLD);
    let mut order: [usize; ATTRIBUTES.len()] = std::array::from_fn(|at| at);
    order.shuffle(rng);
    let mut text = String::with_capacity(128);
    for &at in &order[..rng.random_range(2..=3)] {
        let attribute = &ATTRIBUTES[at];
        let phrasing = *pick(rng, attribute.statements);
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(&fill(
            phrasing,
            &[
                ("n", &being.name),
                ("v", attribute.values[being.values[at]]),
            ],
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_distinct_and_hold_the_answer() {
        let mut rng = stream(2, "choices", 0, 0);
        let mut first = 0;
        for _ in 0..2_000 {
            let example = draw(&mut rng).example;
            let distinct: HashSet<_> = example.choices.iter().collect();
            assert_eq!(distinct.len(), CHOICES);
            assert!(distinct.contains(&example.completion));
            first += usize::from(example.choices[0] == example.completion);
        }
        assert!((400..600).contains(&first), "the place is a hint: {first}");
    }

    #[test]
    fn statements_agree_with_questions() {
        let being = &WORLD[0];
        let mut rng = stream(2, "statements", 0, 0);
        let texts: Vec<String> = (0..20_000).map(|_| statements(&mut rng)).collect();
        for (at, attribute) in ATTRIBUTES.iter().enumerate() {
            let value = attribute.values[being.values[at]];
            for statement in attribute.statements {
                let sentence = fill(statement, &[("n", &being.name), ("v", value)]);
                assert!(
                    texts.iter().any(|text| text.contains(&sentence)),
                    "{sentence}"
                );
            }
        }
    }

    #[test]
    fn questions_are_distinct() {
        for attribute in &ATTRIBUTES {
            let distinct: HashSet<_> = attribute.questions.iter().collect();
            assert_eq!(distinct.len(), 12, "{}", attribute.name);
        }
    }
}
