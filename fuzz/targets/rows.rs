//! The rows of a benchmark's data file, in every form.

#![no_main]

#[path = "../forms.rs"]
mod forms;

use forms::FORMS;
use libfuzzer_sys::fuzz_target;
use lightmoe_data::harness::{PromptOptions, TaskConfig, build_prompts, catches_panics};
use std::fs;
use std::panic;
use std::sync::LazyLock;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// A task for each form, whose documents are the rows.
static TASKS: LazyLock<Vec<TaskConfig>> = LazyLock::new(|| {
    let tasks = FORMS.iter().map(|form| form.task(FOLDER.path()));
    tasks.collect()
});

/// The fuzzer ends at every panic, also at one that is caught.
fn let_caught_panics_be() {
    let ends = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !catches_panics() {
            ends(info);
        }
    }));
}

fuzz_target!(
    init: let_caught_panics_be(),
    |input: &[u8]| {
        let Some((&form, bytes)) = input.split_first() else {
            return;
        };
        let form = usize::from(form) % FORMS.len();
        let path = FORMS[form].path(FOLDER.path());
        fs::write(&path, bytes).expect("a file");
        match build_prompts(&TASKS[form], &[path], &PromptOptions::default()) {
            Ok(prompts) => {
                assert!(!prompts.items.is_empty());
                assert!(prompts.items.iter().all(|item| item.doc.line > 0));
            }
            Err(error) => assert!(error.to_string().contains("rows.")),
        }
    }
);
