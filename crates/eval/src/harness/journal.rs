//! What was finished before an interruption: one line a result, behind a line that says of which work.

use super::found::{Found, RowScore};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::ops::Not;
use std::path::{Path, PathBuf};

/// Results on disk, or nowhere.
#[derive(Default)]
pub struct Journal {
    file: Option<(PathBuf, File)>,
    /// What an earlier run left.
    entries: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    fingerprint: String,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Entry {
    Row {
        row: usize,
        #[serde(flatten)]
        score: RowScore,
        /// Whether the cache knew it.
        #[serde(default, skip_serializing_if = "Not::not")]
        cached: bool,
    },
    Answer {
        prompt: usize,
        answer: String,
        /// Likewise.
        #[serde(default, skip_serializing_if = "Not::not")]
        cached: bool,
    },
}

impl Journal {
    /// Opens the journal of a work; one of another work begins anew. A line that was cut off in the
    /// middle ends it.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read or written.
    pub(super) fn open(path: &Path, fingerprint: &str) -> Result<Self> {
        let io = |source| Error::Io {
            path: path.into(),
            source,
        };
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
            Err(e) => return Err(io(e)),
        };
        let mut lines = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        let header: Option<Header> = lines
            .next()
            .and_then(|line| serde_json::from_str(line).ok());
        let entries: Vec<Entry> = match header {
            Some(header) if header.fingerprint == fingerprint => lines
                .map_while(|line| serde_json::from_str(line).ok())
                .collect(),
            _ => Vec::new(),
        };
        let mut whole = serde_json::to_string(&Header {
            fingerprint: fingerprint.to_owned(),
        })?;
        whole.push('\n');
        whole.push_str(&lines_of(&entries)?);
        lightmoe_models::folder::write_file(path, whole.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        Ok(Self {
            file: Some((path.to_owned(), file)),
            entries,
        })
    }

    /// Whether it knows nothing of its work.
    pub(super) fn is_new(&self) -> bool {
        self.entries.is_empty()
    }

    /// What is known of a work of so many rows and prompts.
    pub(super) fn found(&self, rows: usize, prompts: usize) -> Found {
        let mut found = Found {
            rows: vec![None; rows],
            answers: vec![None; prompts],
            cached: [Vec::new(), Vec::new()],
        };
        for entry in &self.entries {
            match entry {
                Entry::Row { row, score, cached } if *row < rows => {
                    found.rows[*row] = Some(*score);
                    found.cached[0].extend(cached.then_some(*row));
                }
                Entry::Answer {
                    prompt,
                    answer,
                    cached,
                } if *prompt < prompts => {
                    found.answers[*prompt] = Some(answer.clone());
                    found.cached[1].extend(cached.then_some(*prompt));
                }
                _ => {}
            }
        }
        found
    }

    /// Adds the scores of rows.
    pub(super) fn add_rows(&mut self, rows: &[usize], found: &Found) -> Result<()> {
        let entry = |&row: &usize| {
            found.rows[row].map(|score| Entry::Row {
                row,
                score,
                cached: found.cached[0].binary_search(&row).is_ok(),
            })
        };
        self.append(rows.iter().filter_map(entry).collect())
    }

    /// Adds the answers to prompts.
    pub(super) fn add_answers(&mut self, prompts: &[usize], found: &Found) -> Result<()> {
        let entry = |&prompt: &usize| {
            let answer = found.answers[prompt].clone();
            answer.map(|answer| Entry::Answer {
                prompt,
                answer,
                cached: found.cached[1].binary_search(&prompt).is_ok(),
            })
        };
        self.append(prompts.iter().filter_map(entry).collect())
    }

    fn append(&mut self, entries: Vec<Entry>) -> Result<()> {
        let Some((path, file)) = &mut self.file else {
            return Ok(());
        };
        // One write for all: a kill leaves whole lines but for the last.
        file.write_all(lines_of(entries)?.as_bytes())
            .map_err(|source| Error::Io {
                path: path.clone(),
                source,
            })
    }
}

/// Entries as JSON lines.
pub(super) fn lines_of(entries: impl IntoIterator<Item = impl Serialize>) -> Result<String> {
    let mut lines = String::new();
    for entry in entries {
        lines.push_str(&serde_json::to_string(&entry)?);
        lines.push('\n');
    }
    Ok(lines)
}
