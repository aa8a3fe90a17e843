//! Damaged Parquet, for which the reader of the format panics.

use crate::support::{Outcome, command, repository};
use std::fs;

#[test]
fn a_caught_panic_has_no_message_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (task, rows) = (
        folder.path().join("mine.yaml"),
        folder.path().join("rows.parquet"),
    );
    fs::write(
        &task,
        "task: mine\noutput_type: generate_until\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n\
         data_files:\n  format: parquet\n  splits: {test: rows.parquet}\n  source: Made.\n",
    )
    .unwrap();
    let mut bytes = fs::read(repository("fixtures/parquet/packed.parquet")).unwrap();
    bytes[345] ^= 0x80;
    fs::write(&rows, bytes).unwrap();
    let mut call = command("evaluate");
    call.arg("--tasks")
        .arg(&task)
        .arg("--data")
        .arg(folder.path());
    let message = call.fails(2);
    // That it was a panic is said in no other case.
    assert!(message.contains("contradicts itself"), "{message}");
    assert!(message.contains("rows.parquet"), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
}
