//! A file of benchmark tasks, and the requests that it makes of a row.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe_data::harness::{Benchmark, Catalogue, PromptOptions, TaskConfig, build_prompts};
use std::fs;
use std::sync::LazyLock;
use tempfile::TempDir;

/// A row with fields of every kind.
const ROW: &str = r#"{"q": "Who? ", "right": 1, "options": ["I", "you"], "choices": {"text": ["a"], "label": ["A"]}, "flag": true, "none": null}"#;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let row = format!("{ROW}\n{ROW}\n");
    fs::write(folder.path().join("rows.jsonl"), row).expect("a file");
    folder
});

fuzz_target!(|text: &[u8]| {
    let path = FOLDER.path().join("task.yaml");
    fs::write(&path, text).expect("a file");
    let name = path.to_string_lossy().into_owned();
    let Ok(selected) = Catalogue::default().select(&[name]) else {
        return;
    };
    let folders = [FOLDER.path().to_owned()];
    let options = PromptOptions {
        num_fewshot: Some(1),
        ..PromptOptions::default()
    };
    for task in selected.iter().flat_map(Benchmark::tasks) {
        let keys = task.to_map().expect("a task is JSON");
        let again: TaskConfig =
            serde_json::from_value(keys.into()).expect("the keys of a task make one");
        assert_eq!(again, *task);
        if let Ok(prompts) = build_prompts(task, &folders, &options) {
            for item in &prompts.items {
                assert!(item.right.iter().all(|&right| right < item.choices.len()));
            }
        }
    }
});
