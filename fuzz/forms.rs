//! The forms of the data files of benchmarks: for the fuzz target `rows`, and for the test that changes every
//! byte of its seeds (`crates/data/tests/damage.rs`).

use lightmoe_data::harness::{Catalogue, TaskConfig};
use std::fs;
use std::path::{Path, PathBuf};

/// A form of files and the ending of their names.
pub struct Form {
    format: &'static str,
    ending: &'static str,
}

const fn form(format: &'static str, ending: &'static str) -> Form {
    Form { format, ending }
}

/// By the number that a seed begins with.
pub const FORMS: [Form; 8] = [
    form("jsonl", "jsonl"),
    form("json", "json"),
    form("csv", "csv"),
    form("tsv", "tsv"),
    form("parquet", "parquet"),
    form("wikitext", "raw"),
    form("jsonl", "jsonl.gz"),
    form("text", "txt"),
];

impl Form {
    /// The file with the rows in `folder`.
    pub fn path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("rows.{}", self.ending))
    }

    /// A task whose documents are these rows; its own file is in `folder`, too.
    pub fn task(&self, folder: &Path) -> TaskConfig {
        let Self { format, ending } = self;
        let text = format!(
            "task: rows\noutput_type: generate_until\ntest_split: test\ndoc_to_text: a\n\
             doc_to_target: b\ndata_files:\n  format: {format}\n  splits: {{test: rows.{ending}}}\n  \
             source: Made.\n"
        );
        let path = folder.join("task.yaml");
        fs::write(&path, text).expect("a file");
        let name = path.display().to_string();
        let selected = Catalogue::default().select(&[name]).expect("a task");
        selected[0].tasks()[0].clone()
    }
}
