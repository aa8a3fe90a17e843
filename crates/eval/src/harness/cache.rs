//! Answers to requests that evaluations of one model have in common, as `--use_cache` of
//! lm-evaluation-harness keeps them.
//!
//! Every process appends to a file of its own, so several may share a folder. A request is known by what
//! its answer depends on; only the batch that it was computed in is left out, which moves likelihoods in
//! their last digits.

use super::found::RowScore;
use super::work::Prompt;
use crate::{Error, Result};
use lightmoe_data::Encoded;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// A folder of answers.
pub struct RequestCache {
    folder: PathBuf,
    fingerprint: String,
    known: HashMap<String, Known>,
    damaged: Vec<String>,
    /// What this process adds, once there is something.
    added: Mutex<Option<(PathBuf, File)>>,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Known {
    Row(RowScore),
    Answer { answer: String },
}

/// A line of a file.
#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    #[serde(flatten)]
    known: Known,
}

impl RequestCache {
    /// Opens what `folder` holds for the model of a `fingerprint`, which stands for all that decides
    /// answers besides requests, and makes the folder where there is none. Damaged lines are left out.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be made, or something there cannot be read.
    pub fn open(folder: &Path, fingerprint: &str) -> Result<Self> {
        let mut cache = Self {
            folder: folder.join(fingerprint),
            fingerprint: fingerprint.to_owned(),
            known: HashMap::new(),
            damaged: Vec::new(),
            added: Mutex::default(),
        };
        fs::create_dir_all(&cache.folder).map_err(io(&cache.folder))?;
        let entries = fs::read_dir(&cache.folder).map_err(io(&cache.folder))?;
        let paths = entries.map(|entry| entry.map(|entry| entry.path()));
        let paths = paths.collect::<std::io::Result<Vec<_>>>();
        let mut paths = paths.map_err(io(&cache.folder))?;
        paths.retain(|path| path.extension().is_some_and(|ending| ending == "jsonl"));
        // Of several answers to a request, the same one is taken each time.
        paths.sort();
        for path in paths {
            cache.read(&path)?;
        }
        Ok(cache)
    }

    fn read(&mut self, path: &Path) -> Result<()> {
        let bytes = fs::read(path).map_err(io(path))?;
        // What another process is about to write has no end yet.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n');
        let lines = bytes[..whole.map_or(0, |end| end + 1)].split_inclusive(|byte| *byte == b'\n');
        for (number, line) in (1..).zip(lines) {
            match serde_json::from_slice::<Entry>(line) {
                Ok(entry) => {
                    self.known.entry(entry.key).or_insert(entry.known);
                }
                Err(e) => self
                    .damaged
                    .push(format!("`{}` line {number}: {e}", path.display())),
            }
        }
        Ok(())
    }

    /// The lines that could not be read: file, number, and what is wrong.
    pub fn damaged(&self) -> &[String] {
        &self.damaged
    }

    /// The score of a row, if it is known.
    pub(super) fn row(&self, row: &Encoded) -> Option<RowScore> {
        match self.known.get(&self.key(|hash| hash_row(row, hash)))? {
            Known::Row(score) => Some(*score),
            Known::Answer { .. } => None,
        }
    }

    /// The answer to a prompt, if it is known.
    pub(super) fn answer(&self, prompt: &Prompt) -> Option<String> {
        match self
            .known
            .get(&self.key(|hash| hash_prompt(prompt, hash)))?
        {
            Known::Answer { answer } => Some(answer.clone()),
            Known::Row(_) => None,
        }
    }

    /// Adds scores of rows.
    pub(super) fn add_rows<'a>(
        &self,
        rows: impl Iterator<Item = (&'a Encoded, RowScore)>,
    ) -> Result<()> {
        self.append(rows.map(|(row, score)| Entry {
            key: self.key(|hash| hash_row(row, hash)),
            known: Known::Row(score),
        }))
    }

    /// Adds answers to prompts.
    pub(super) fn add_answers<'a>(
        &self,
        prompts: impl Iterator<Item = (&'a Prompt, String)>,
    ) -> Result<()> {
        self.append(prompts.map(|(prompt, answer)| Entry {
            key: self.key(|hash| hash_prompt(prompt, hash)),
            known: Known::Answer { answer },
        }))
    }

    fn key(&self, add: impl FnOnce(&mut Sha256)) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.fingerprint);
        add(&mut hash);
        super::hex(&hash.finalize())
    }

    fn append(&self, entries: impl Iterator<Item = Entry>) -> Result<()> {
        let lines = super::journal::lines_of(entries)?;
        let mut added = self.added.lock().unwrap_or_else(PoisonError::into_inner);
        let (path, file) = match added.take() {
            Some(own) => added.insert(own),
            None => added.insert(self.own_file()?),
        };
        // One write for all: a kill leaves whole lines but for the last.
        file.write_all(lines.as_bytes()).map_err(io(path))
    }

    /// A file that no other process has.
    fn own_file(&self) -> Result<(PathBuf, File)> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |time| time.as_micros());
        let mut number = 0;
        loop {
            let name = format!("{now}-{}-{number}.jsonl", std::process::id());
            let path = self.folder.join(name);
            match File::create_new(&path) {
                Ok(file) => return Ok((path, file)),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(e) => return Err(io(&path)(e)),
            }
        }
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_owned();
    |source| Error::Io { path, source }
}

/// Adds what a row's score depends on besides the model.
pub(super) fn hash_row(row: &Encoded, hash: &mut Sha256) {
    hash.update("row");
    hash_tokens(&row.tokens, row.answer_start, hash);
}

/// Adds what the answer to a prompt depends on besides the model.
pub(super) fn hash_prompt(prompt: &Prompt, hash: &mut Sha256) {
    hash.update("prompt");
    hash_tokens(&prompt.tokens, prompt.most, hash);
    hash.update(format!("{:?}{:?}", prompt.until, prompt.draw));
}

fn hash_tokens(tokens: &[u32], number: usize, hash: &mut Sha256) {
    hash.update((tokens.len() as u64).to_le_bytes());
    hash.update((number as u64).to_le_bytes());
    for token in tokens {
        hash.update(token.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::work::Draw;

    fn row(tokens: &[u32]) -> Encoded {
        Encoded {
            tokens: tokens.to_vec(),
            answer_start: 1,
        }
    }

    fn score(log_likelihood: f64) -> RowScore {
        RowScore {
            log_likelihood,
            greedy: true,
            tokens: 2,
        }
    }

    #[test]
    fn two_that_write_at_once_and_a_damaged_line() {
        let folder = tempfile::tempdir().unwrap();
        let open = |fingerprint: &str| RequestCache::open(folder.path(), fingerprint).unwrap();
        let (one, other) = (open("model"), open("model"));
        let (a, b, c) = (row(&[1, 2, 3]), row(&[1, 2, 4]), row(&[1, 2, 5]));
        one.add_rows([(&a, score(-1.25))].into_iter()).unwrap();
        other.add_rows([(&b, score(-2.5))].into_iter()).unwrap();
        one.add_rows([(&c, score(-3.5))].into_iter()).unwrap();
        // What others add is seen when the folder is opened.
        assert_eq!(one.row(&b), None);
        let found = open("model");
        assert_eq!(found.row(&a), Some(score(-1.25)));
        assert_eq!(found.row(&b), Some(score(-2.5)));
        let shifted = Encoded {
            answer_start: 2,
            ..a.clone()
        };
        assert_eq!((found.row(&shifted), found.row(&row(&[1]))), (None, None));
        assert_eq!(open("another").row(&a), None);
        let mut files: Vec<PathBuf> = fs::read_dir(folder.path().join("model"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert_eq!(files.len(), 2);
        let (path, _) = one.added.lock().unwrap().take().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(
            &path,
            format!("{{\"key\": 1}}\n{}", &text[..text.len() - 9]),
        )
        .unwrap();
        let found = open("model");
        assert_eq!(found.row(&a), Some(score(-1.25)));
        assert_eq!(found.row(&c), None);
        let name = path.display().to_string();
        // The last line has no end, as if it were being written.
        let [damaged] = found.damaged() else {
            panic!("{:?}", found.damaged());
        };
        let is_named = damaged.contains(&name) && damaged.contains("line 1:");
        assert!(is_named, "{damaged}");
    }

    #[test]
    fn prompts_are_told_apart_by_all_that_decides_their_answers() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RequestCache::open(folder.path(), "model").unwrap();
        let prompt = || Prompt {
            tokens: vec![1, 2],
            until: vec!["\n".into()],
            most: 8,
            draw: None,
        };
        let answer = ("four".to_owned(), prompt());
        cache
            .add_answers([(&answer.1, answer.0.clone())].into_iter())
            .unwrap();
        let cache = RequestCache::open(folder.path(), "model").unwrap();
        assert_eq!(cache.answer(&prompt()), Some(answer.0));
        let changes: [fn(&mut Prompt); 4] = [
            |prompt| prompt.tokens.push(3),
            |prompt| prompt.until.push("x".into()),
            |prompt| prompt.most = 9,
            |prompt| {
                prompt.draw = Some(Draw {
                    sampling: (1.0, None),
                    seed: 0,
                })
            },
        ];
        for change in changes {
            let mut other = prompt();
            change(&mut other);
            assert_eq!(cache.answer(&other), None);
        }
    }
}
