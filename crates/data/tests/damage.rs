//! Data files with a byte changed: rows or an error that names the file, and never a panic.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lightmoe_data::harness::{Catalogue, PromptOptions, TaskConfig, build_prompts};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Forms of files and the endings of their names, by the number that a seed of the fuzz target `rows`
/// begins with.
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
const PARQUET: usize = 4;
/// Long enough for every change on a machine that does little else.
const MOST: Duration = Duration::from_secs(60);

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// A task whose documents are the rows of a file of a form, in `folder`.
fn task(folder: &Path, form: usize) -> TaskConfig {
    let (format, ending) = FORMS[form];
    let text = format!(
        "task: rows\noutput_type: generate_until\ntest_split: test\ndoc_to_text: Q\n\
         doc_to_target: A\ndata_files:\n  format: {format}\n  splits: {{test: rows.{ending}}}\n  \
         source: Made.\n"
    );
    let path = folder.join("task.yaml");
    fs::write(&path, text).unwrap();
    let name = path.display().to_string();
    let selected = Catalogue::default().select(&[name]).unwrap();
    selected[0].tasks()[0].clone()
}

/// The form and bytes of every seed and every Parquet file that is committed, the short ones first.
fn files() -> Vec<(usize, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(repository("fuzz/seeds/rows")).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        files.push((usize::from(bytes[0]) % FORMS.len(), bytes[1..].to_vec()));
    }
    let mut folders = vec![repository("fixtures/parquet")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|ending| ending == "parquet") => {
                    files.push((PARQUET, fs::read(path).unwrap()));
                }
                false => {}
            }
        }
    }
    files.sort_by_key(|(form, bytes)| (bytes.len(), *form));
    files.dedup();
    files
}

#[test]
fn a_changed_byte_brings_an_error_or_rows() {
    let (begin, folder) = (Instant::now(), tempfile::tempdir().unwrap());
    let files = files();
    let parquet = files.iter().filter(|(form, _)| *form == PARQUET).count();
    assert!(parquet >= 4 && files.len() >= 9, "{}", files.len());
    let (mut read, mut refused) = (0, 0);
    for (form, whole) in files {
        let (task, ending) = (task(folder.path(), form), FORMS[form].1);
        let path = folder.path().join(format!("rows.{ending}"));
        fs::write(&path, &whole).unwrap();
        // In place: to write the whole file for each change takes long on some disks.
        let file = File::options().write(true).open(&path).unwrap();
        for (place, byte) in whole.iter().enumerate() {
            for change in [0x01, 0x80, 0xff] {
                file.write_all_at(&[byte ^ change], place as u64).unwrap();
                let folders = [path.clone()];
                match build_prompts(&task, &folders, &PromptOptions::default()) {
                    Ok(_) => read += 1,
                    Err(error) => {
                        refused += 1;
                        let error = error.to_string();
                        assert!(error.contains(&format!("rows.{ending}")), "{error}");
                    }
                }
            }
            file.write_all_at(&[*byte], place as u64).unwrap();
            if begin.elapsed() > MOST {
                eprintln!("stopped at byte {place} of {}, after {MOST:?}", whole.len());
                break;
            }
        }
    }
    assert!(
        read > 100 && refused > 100,
        "{read} read, {refused} refused"
    );
}
