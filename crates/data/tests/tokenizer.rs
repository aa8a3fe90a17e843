//! The promises the tokenizer and the pre-training stream make to each other.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeSet, HashMap};

use lightmoe_data::pretrain::{Mix, Source};
use lightmoe_data::{PackedStream, Split, Task, encode, tokenizer};
use tokenizers::Tokenizer;

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn the_vocabulary_is_small_and_the_same_each_time() {
    let tokenizer = tokenizer::build().unwrap();
    let size = tokenizer.get_vocab_size(true);
    assert!((600..=1_024).contains(&size), "{size}");
    assert_eq!(
        tokenizer.token_to_id(tokenizer::EOS),
        Some(tokenizer::EOS_ID)
    );
    assert_eq!(
        tokenizer.token_to_id(tokenizer::PAD),
        Some(tokenizer::PAD_ID)
    );
    // Ids are dense: an embedding matrix has a row for each and no other.
    let ids: BTreeSet<u32> = tokenizer.get_vocab(true).into_values().collect();
    assert_eq!(ids, (0..size as u32).collect());
    let again = tokenizer::build().unwrap();
    assert_eq!(
        again.to_string(false).unwrap(),
        tokenizer.to_string(false).unwrap()
    );
}

#[test]
fn any_text_comes_back() {
    let tokenizer = tokenizer::build().unwrap();
    for text in [
        "",
        " ",
        "  two  spaces \n\n  and\tlines\r\n",
        "Größe naïve 東京 🦀 e\u{301} \u{a0}\u{2003}x",
        "1234567 0099 3.14 -5 a1b2c3",
        "{\"intent\": \"x_y\"}}}  ___)):",
        "katumi Katumi KATUMI zzz qxw",
        "\0\u{7f}\u{85}\u{feff}",
        "def f(x):\n    return x * 2\n\n\n",
    ] {
        let back = tokenizer.decode(&ids(&tokenizer, text), false).unwrap();
        assert_eq!(back, text);
    }
}

#[test]
fn words_are_whole_and_invented_words_are_syllables() {
    let tokenizer = tokenizer::build().unwrap();
    let tokens = |text| tokenizer.encode(text, false).unwrap().get_tokens().to_vec();
    assert_eq!(
        tokens("The katumi lives in the forest."),
        [
            "The", "Ġka", "tu", "mi", "Ġlives", "Ġin", "Ġthe", "Ġforest", "."
        ]
    );
    assert_eq!(tokens("x = 42"), ["x", "Ġ=", "Ġ42"]);
    assert_eq!(tokens("\n    y"), ["Ċ    ".replace(' ', "Ġ"), "y".into()]);
}

/// A byte token is fine only where the piece of text is that one character.
#[test]
fn no_task_and_no_document_falls_back_to_bytes() {
    let tokenizer = tokenizer::build().unwrap();
    let check = |text: &str| {
        let encoding = tokenizer.encode(text, false).unwrap();
        let letter =
            |token: &str| token.len() == 1 && token.starts_with(|c: char| c.is_ascii_alphabetic());
        let mut chars = encoding.get_tokens().iter().zip(encoding.get_offsets());
        let bytes = text.as_bytes();
        if let Some((token, offsets)) = chars.find(|(token, (start, end))| {
            let beside = |at: Option<&u8>| at.is_some_and(u8::is_ascii_alphabetic);
            letter(token) && (beside(bytes.get(*end)) || beside(bytes.get(start.wrapping_sub(1))))
        }) {
            panic!("{token} at {offsets:?} in {text}");
        }
    };
    for task in Task::ALL {
        for split in [Split::Train, Split::Validation, Split::Test] {
            for item in task.examples(split, 2_500, 21) {
                check(&item.text());
            }
        }
    }
    for (_, text) in Mix::default().documents(22).take(20_000) {
        check(&text);
    }
}

#[test]
fn prompt_and_completion_meet_at_a_token_boundary() {
    let tokenizer = tokenizer::build().unwrap();
    for task in Task::ALL {
        for item in task.examples(Split::Train, 300, 23) {
            let encoded = encode(&tokenizer, 0, &item, None).unwrap();
            let (last, text) = encoded.tokens.split_last().unwrap();
            assert_eq!(*last, 0);
            assert_eq!(text, ids(&tokenizer, &item.text()));
            let answer = tokenizer
                .decode(&text[encoded.answer_start..], false)
                .unwrap();
            assert_eq!(answer, format!(" {}", item.completion));
        }
    }
}

/// Embeddings are frozen in adaptation: what pre-training never read stays noise.
#[test]
fn pretraining_reads_every_token_of_the_new_skills_often() {
    let tokenizer = tokenizer::build().unwrap();
    let packed = PackedStream::new(500, 2_000, 31).unwrap();
    let mut counts: HashMap<u32, usize> = HashMap::new();
    for id in packed.batch(0).unwrap().tokens {
        *counts.entry(id).or_default() += 1;
    }
    let mut rare = BTreeSet::new();
    for task in [Task::Intent, Task::Translation] {
        for item in task.examples(Split::Train, 8_000, 32) {
            for id in encode(&tokenizer, 0, &item, None).unwrap().tokens {
                let count = counts.get(&id).copied().unwrap_or(0);
                if count < 50 {
                    rare.insert((count, tokenizer.id_to_token(id)));
                }
            }
        }
    }
    assert!(rare.is_empty(), "{rare:?}");
}

#[test]
fn sources_have_their_shares_of_tokens() {
    let tokenizer = tokenizer::build().unwrap();
    let mut tokens: HashMap<Source, usize> = HashMap::new();
    for (source, text) in Mix::default().documents(41).take(20_000) {
        *tokens.entry(source).or_default() += ids(&tokenizer, &text).len() + 1;
    }
    let total: usize = tokens.values().sum();
    for source in Source::ALL {
        let share = 100.0 * tokens[&source] as f64 / total as f64;
        let want = f64::from(source.share());
        assert!(
            (share - want).abs() < 1.5,
            "{source:?}: {share:.1}, want {want}"
        );
    }
}
