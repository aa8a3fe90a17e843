//! A file of tasks or groups for `evaluate --tasks`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lightmoe_data::harness::{Catalogue, TaskConfig};

fuzz_target!(|text: &str| {
    let mut catalogue = Catalogue::default();
    if catalogue.add_text("task.yaml", text).is_err() {
        return;
    }
    for task in catalogue.tasks() {
        let keys = task.to_map().expect("a task is JSON");
        let again = serde_json::from_value(keys.clone().into());
        let again: TaskConfig = again.expect("written by us");
        assert_eq!(again.to_map().expect("a task is JSON"), keys);
        assert!(task.repeats() == 1 || task.generation().sampling().is_some());
    }
});
