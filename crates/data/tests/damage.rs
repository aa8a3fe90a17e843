//! Data files with a byte changed: rows or an error that names the file, and never a panic.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../../fuzz/forms.rs"]
mod forms;

use forms::FORMS;
use lightmoe_data::harness::{PromptOptions, build_prompts};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The number of Parquet among the forms.
const PARQUET: usize = 4;
/// Long enough for every change on a machine that does little else.
const MOST: Duration = Duration::from_secs(60);

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
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
        let task = FORMS[form].task(folder.path());
        let path = FORMS[form].path(folder.path());
        let name = path.file_name().unwrap().to_str().unwrap();
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
                        assert!(error.contains(name), "{error}");
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
