//! The promises the built-in tasks make to training and evaluation.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;

use lightmoe_data::pretrain::{Mix, Source};
use lightmoe_data::{Error, Example, Metric, Split, Task, encode, tokenizer};

const SPLITS: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

/// What two items must not share if they are of different splits.
fn content(task: Task, example: &Example) -> String {
    let prompt = &example.prompt;
    match task {
        // The numbers of the story, in order.
        Task::Math => format!(
            "{:?} {}",
            prompt
                .split(|c: char| !c.is_ascii_digit())
                .collect::<Vec<_>>()
                .join(" "),
            example.completion
        ),
        Task::Code => {
            let program = prompt.split("\nOutput:").next().unwrap();
            program.replace("___", &example.completion)
        }
        // The being, and what is asked about it.
        Task::Commonsense => {
            let question = prompt.split('\n').next().unwrap();
            let mut words = question.split([' ', '?', '.']);
            let being = words.find(|word| is_name(word)).unwrap();
            format!("{being} {}", attribute(question))
        }
        Task::Intent => example.completion.clone(),
        Task::Translation => prompt.clone(),
    }
}

fn is_name(word: &str) -> bool {
    const ENGLISH: [&str; 6] = ["home", "like", "live", "make", "size", "take"];
    word.len() >= 4
        && word.len().is_multiple_of(2)
        && (0..word.len()).all(|at| "aeiou".contains(&word[at..=at]) == (at % 2 == 1))
        && !ENGLISH.contains(&word)
}

fn attribute(prompt: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| prompt.contains(word));
    if has(&["colour"]) {
        "colour"
    } else if has(&["sound", "voice"]) {
        "sound"
    } else if has(&["size", "big", "large", "tall"]) {
        "size"
    } else if has(&["eat", "food", "feed"]) {
        "food"
    } else {
        "habitat"
    }
}

#[test]
fn every_task_has_enough_distinct_items() {
    for task in Task::ALL {
        for (split, least) in SPLITS.into_iter().zip([8_000, 1_000, 1_000]) {
            let least = if task == Task::Commonsense && split != Split::Train {
                900
            } else {
                least
            };
            let items = task.examples(split, least, 1);
            assert_eq!(items.len(), least, "{task} {split:?}");
            let distinct: HashSet<_> = items.iter().map(|item| &item.prompt).collect();
            assert_eq!(distinct.len(), least, "{task} {split:?}");
        }
    }
}

/// What an item of math is about cannot be read off its text so easily; that its key holds it is
/// tested beside the generator.
#[test]
fn splits_share_no_content() {
    for task in Task::ALL.into_iter().filter(|task| *task != Task::Math) {
        let contents = SPLITS.map(|split| -> HashSet<String> {
            let items = task.examples(split, 3_000, 2);
            items.iter().map(|item| content(task, item)).collect()
        });
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            let shared: Vec<_> = contents[a].intersection(&contents[b]).collect();
            assert!(shared.is_empty(), "{task}: {shared:?}");
        }
    }
}

#[test]
fn examples_are_a_function_of_their_arguments() {
    for task in Task::ALL {
        let items = task.examples(Split::Test, 50, 7);
        assert_eq!(items, task.examples(Split::Test, 80, 7)[..50], "{task}");
        assert_ne!(items, task.examples(Split::Test, 50, 8), "{task}");
    }
}

#[test]
fn references_are_accepted_and_others_are_not() {
    for task in Task::ALL {
        for item in task.examples(Split::Validation, 200, 3) {
            assert!(task.accepts(&item, &format!(" {}\n", item.completion)));
            assert!(!task.accepts(&item, "nothing"));
            assert!(item.choices.is_empty() == (task != Task::Commonsense));
        }
    }
}

#[test]
fn names_and_metrics() {
    for task in Task::ALL {
        assert_eq!(task.to_string().parse::<Task>().unwrap(), task);
        assert_eq!(task.metrics()[0], Metric::ExactMatch);
    }
    let error = "maths".parse::<Task>().unwrap_err();
    assert!(matches!(error, Error::UnknownTask { .. }));
    assert!(error.to_string().contains("`math`, `code`"), "{error}");
    assert_eq!(serde_json::to_string(&Task::Code).unwrap(), "\"code\"");
}

#[test]
fn items_fit_a_short_context() {
    let tokenizer = tokenizer::build().unwrap();
    for task in Task::ALL {
        let items = task.examples(Split::Train, 2_000, 4);
        for item in &items {
            let encoded = encode(&tokenizer, tokenizer::EOS_ID, item, None).unwrap();
            let length = encoded.tokens.len();
            assert!(
                (10..=96).contains(&length),
                "{task}, {length}: {}",
                item.text()
            );
        }
    }
}

#[test]
fn pretraining_holds_the_train_split_only() {
    let read: HashSet<String> = Mix::default()
        .documents(11)
        .take(60_000)
        .map(|(_, text)| text)
        .collect();
    for task in Task::ALL {
        let held_out: Vec<Example> = [Split::Validation, Split::Test]
            .into_iter()
            .flat_map(|split| task.examples(split, 2_000, 5))
            .collect();
        for item in &held_out {
            assert!(!read.contains(&item.text()), "{}", item.text());
        }
        if task == Task::Translation {
            let sentences: HashSet<&str> = read
                .iter()
                .filter_map(|text| text.strip_prefix("Story: "))
                .flat_map(|text| text.trim_end_matches('.').split(". "))
                .collect();
            assert!(sentences.len() > 500);
            for item in &held_out {
                let english = item.prompt.split(['.', ':']).nth(1).unwrap().trim();
                assert!(!sentences.contains(english), "{english}");
            }
        }
    }
    // Facts: no question on a held-out fact in any phrasing.
    let questions: Vec<String> = Mix::default()
        .documents(12)
        .take(60_000)
        .filter(|(source, _)| *source == Source::Questions)
        .map(|(_, text)| content(Task::Commonsense, &Example::new(text, "")))
        .collect();
    let asked: HashSet<String> = questions.into_iter().collect();
    assert!(asked.len() > 700, "{}", asked.len());
    for item in Task::Commonsense.examples(Split::Test, 900, 1) {
        assert!(
            !asked.contains(&content(Task::Commonsense, &item)),
            "{}",
            item.prompt
        );
    }
}

#[test]
fn pretraining_holds_no_item_of_a_new_skill() {
    for (_, text) in Mix::default().documents(13).take(40_000) {
        assert!(
            !text.contains("{\"intent\": \"") || !text.contains("\"slots\": {"),
            "{text}"
        );
        assert!(
            !text.contains(".\nVelic:") || !text.starts_with("English:"),
            "{text}"
        );
    }
}
