//! Utterances to JSON: `{"intent": ..., "slots": {...}}`, for twelve intents with
//! one to three slots. Slots appear in the order in which the intent declares them.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::Example;
use crate::math::OBJECTS;
use crate::rng::pick;
use crate::task::Draft;
use crate::words::{fill, name};

const GENRES: &[&str] = &["jazz", "rock", "folk", "opera", "piano", "dance"];
const ROOMS: &[&str] = &["kitchen", "garden", "office", "hall", "cellar", "bedroom"];
const DAYS: &[&str] = &crate::filler::DAYS;
const TOPICS: &[&str] = &["news", "plan", "photo", "list", "letter", "map"];
const VEHICLES: &[&str] = &["car", "bus", "train", "boat", "bicycle"];
const COLOURS: &[&str] = &["red", "blue", "green", "yellow", "white", "orange"];

/// Where a slot's values come from.
#[derive(Clone, Copy)]
enum Values {
    /// Words invented anew.
    Name,
    /// Integers from 1 to this.
    UpTo(u32),
    /// One of these.
    Words(&'static [&'static str]),
}
use Values::{Name, UpTo, Words};

/// An intent; a phrasing uses the slots whose names it has in braces.
struct Intent {
    name: &'static str,
    slots: &'static [(&'static str, Values)],
    phrasings: &'static [&'static str],
}

static INTENTS: [Intent; 12] = [
    Intent {
        name: "play_music",
        slots: &[
            ("genre", Words(GENRES)),
            ("artist", Name),
            ("room", Words(ROOMS)),
        ],
        phrasings: &[
            "play some {genre} by {artist}",
            "play {artist}",
            "i want to hear {genre}",
            "put on {genre} music from {artist}",
            "i would like to hear {artist} in the {room}",
            "please play {genre} in the {room}",
            "play {genre} by {artist} in the {room}",
        ],
    },
    Intent {
        name: "set_alarm",
        slots: &[("time", UpTo(12)), ("day", Words(DAYS))],
        phrasings: &[
            "wake me at {time} on {day}",
            "set an alarm for {time}",
            "please set the alarm for {time} on {day}",
            "i have to get up at {time} on {day}",
            "on {day} i must get up at {time}",
        ],
    },
    Intent {
        name: "get_weather",
        slots: &[("place", Name), ("day", Words(DAYS))],
        phrasings: &[
            "what is the weather in {place}",
            "will it rain in {place} on {day}",
            "how is the weather on {day} in {place}",
            "tell me the weather for {place}",
            "do i need a coat in {place} on {day}",
        ],
    },
    Intent {
        name: "book_table",
        slots: &[("place", Name), ("people", UpTo(9)), ("day", Words(DAYS))],
        phrasings: &[
            "book a table for {people} at {place}",
            "i need a table at {place} on {day}",
            "find a table for {people} people at {place} on {day}",
            "we want to eat at {place} on {day}",
            "can we have a table for {people} at {place} on {day}",
        ],
    },
    Intent {
        name: "send_message",
        slots: &[("person", Name), ("topic", Words(TOPICS))],
        phrasings: &[
            "send the {topic} to {person}",
            "tell {person} about the {topic}",
            "write to {person} about the {topic}",
            "let {person} see the {topic}",
            "please send {person} a message about the {topic}",
        ],
    },
    Intent {
        name: "call_person",
        slots: &[("person", Name), ("time", UpTo(12)), ("day", Words(DAYS))],
        phrasings: &[
            "call {person}",
            "call {person} at {time}",
            "please call {person} on {day}",
            "i want to talk to {person}",
            "i have to talk to {person} at {time} on {day}",
        ],
    },
    Intent {
        name: "add_item",
        slots: &[("item", Words(&OBJECTS)), ("number", UpTo(20))],
        phrasings: &[
            "add {number} {item} to the list",
            "put {item} on my list",
            "put {number} {item} on the list",
            "do not let me forget the {item}",
            "the list needs {number} more {item}",
        ],
    },
    Intent {
        name: "order_item",
        slots: &[
            ("item", Words(&OBJECTS)),
            ("number", UpTo(20)),
            ("shop", Name),
        ],
        phrasings: &[
            "order {number} {item}",
            "buy {item} from {shop}",
            "order {number} {item} from {shop}",
            "get me {number} {item} at {shop}",
            "i want {item} from {shop}",
        ],
    },
    Intent {
        name: "set_light",
        slots: &[("room", Words(ROOMS)), ("colour", Words(COLOURS))],
        phrasings: &[
            "make the light in the {room} {colour}",
            "make the {room} {colour}",
            "set the light to {colour} in the {room}",
            "turn on the light in the {room}",
            "i want {colour} light in the {room}",
        ],
    },
    Intent {
        name: "find_route",
        slots: &[
            ("start", Name),
            ("place", Name),
            ("vehicle", Words(VEHICLES)),
        ],
        phrasings: &[
            "how do i get to {place} by {vehicle}",
            "show me the way to {place}",
            "find a way from {start} to {place}",
            "find the way from {start} to {place} by {vehicle}",
            "how long is the way to {place} by {vehicle}",
        ],
    },
    Intent {
        name: "book_trip",
        slots: &[
            ("place", Name),
            ("day", Words(DAYS)),
            ("vehicle", Words(VEHICLES)),
        ],
        phrasings: &[
            "book a {vehicle} to {place}",
            "i want to go to {place} by {vehicle} on {day}",
            "get me a {vehicle} to {place} on {day}",
            "on {day} i have to be in {place}",
            "book the {vehicle} to {place} on {day}",
        ],
    },
    Intent {
        name: "start_game",
        slots: &[("game", Name), ("people", UpTo(9))],
        phrasings: &[
            "start {game}",
            "start {game} for {people} people",
            "we are {people} and want to play the game {game}",
            "let us play the game {game}",
            "i would like a game of {game} for {people}",
        ],
    },
];

/// One utterance. Its key is intent and slots, however they are phrased.
pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Draft {
    let intent = pick(rng, &INTENTS);
    let phrasing = *pick(rng, intent.phrasings);
    let slots: Vec<(&str, String)> = intent
        .slots
        .iter()
        .filter(|(slot, _)| mentions(phrasing, slot))
        .map(|&(slot, values)| (slot, value(rng, values)))
        .collect();
    let borrowed: Vec<(&str, &str)> = slots.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let json = json(intent.name, &borrowed);
    Draft {
        worked: None,
        example: Example::new(
            format!("Utterance: {}\nJSON:", fill(phrasing, &borrowed)),
            json.clone(),
        ),
        key: json,
    }
}

fn mentions(phrasing: &str, slot: &str) -> bool {
    phrasing.split('{').any(|part| {
        part.strip_prefix(slot)
            .is_some_and(|rest| rest.starts_with('}'))
    })
}

fn value(rng: &mut ChaCha8Rng, values: Values) -> String {
    match values {
        Name => name(rng),
        UpTo(largest) => rng.random_range(1..=largest).to_string(),
        Words(words) => pick(rng, words).to_string(),
    }
}

/// The JSON of an answer; names and values hold nothing that needs escaping.
fn json(intent: &str, slots: &[(&str, &str)]) -> String {
    let slots: Vec<String> = slots
        .iter()
        .map(|(slot, value)| format!("\"{slot}\": \"{value}\""))
        .collect();
    format!(
        "{{\"intent\": \"{intent}\", \"slots\": {{{}}}}}",
        slots.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::rng::stream;

    #[test]
    fn answers_are_json_and_quote_the_utterance() {
        let mut rng = stream(4, "intent", 0, 0);
        let mut intents = HashSet::new();
        for _ in 0..2_000 {
            let example = draw(&mut rng).example;
            let json: serde_json::Value = serde_json::from_str(&example.completion).unwrap();
            intents.insert(json["intent"].as_str().unwrap().to_string());
            let slots = json["slots"].as_object().unwrap();
            assert!((1..=3).contains(&slots.len()), "{}", example.completion);
            for value in slots.values().map(|value| value.as_str().unwrap()) {
                let words: Vec<&str> = example.prompt.split_whitespace().collect();
                assert!(words.contains(&value), "{value}: {}", example.prompt);
            }
        }
        assert_eq!(intents.len(), INTENTS.len());
    }

    /// Two intents must not share an utterance, or the answer is not determined.
    #[test]
    fn phrasings_are_distinct() {
        let mut seen = HashSet::new();
        for phrasing in INTENTS.iter().flat_map(|intent| intent.phrasings) {
            let shape: String = phrasing
                .split('{')
                .map(|part| part.split_once('}').map_or(part, |(_, rest)| rest))
                .collect::<Vec<_>>()
                .join("_");
            assert!(seen.insert(shape), "{phrasing}");
        }
    }
}
