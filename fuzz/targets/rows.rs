//! The rows of a benchmark's data file, in every form.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe_data::harness::{Catalogue, PromptOptions, TaskConfig, build_prompts};
use std::fs;
use std::sync::LazyLock;
use tempfile::TempDir;

/// Forms of files, and the endings of their names.
const FORMS: [(&str, &str); 8] = [
    ("jsonl", "jsonl"),
    ("json", "json"),
    ("csv", "csv"),
    ("tsv", "tsv"),
    ("parquet", "parquet"),
    ("wikitext", "raw"),
    ("jsonl", "jsonl.gz"),
    ("text", "txt"),
];

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// A task for each form, whose documents are the rows.
static TASKS: LazyLock<Vec<TaskConfig>> = LazyLock::new(|| {
    let task = |(format, ending): &(&str, &str)| {
        let text = format!(
            "task: rows\noutput_type: generate_until\ntest_split: test\ndoc_to_text: a\n\
             doc_to_target: b\ndata_files:\n  format: {format}\n  splits: {{test: rows.{ending}}}\n  \
             source: Made.\n"
        );
        let path = FOLDER.path().join("task.yaml");
        fs::write(&path, text).expect("a file");
        let name = path.to_string_lossy().into_owned();
        let selected = Catalogue::default().select(&[name]).expect("a task");
        selected[0].tasks()[0].clone()
    };
    FORMS.iter().map(task).collect()
});

fuzz_target!(|input: &[u8]| {
    let Some((&form, bytes)) = input.split_first() else {
        return;
    };
    let form = usize::from(form) % FORMS.len();
    let task = &TASKS[form];
    let path = FOLDER.path().join(format!("rows.{}", FORMS[form].1));
    fs::write(&path, bytes).expect("a file");
    let prompts = build_prompts(task, &[path], &PromptOptions::default());
    match prompts {
        Ok(prompts) => {
            assert!(!prompts.items.is_empty());
            assert!(prompts.items.iter().all(|item| item.doc.line > 0));
        }
        Err(error) => assert!(error.to_string().contains("rows.")),
    }
});
