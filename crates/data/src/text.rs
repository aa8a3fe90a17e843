//! Plain text as data: documents of files, a tokenizer trained on them, and windows of tokens.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use rand::seq::SliceRandom;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::example::text_ids;
use crate::records::{open, read};
use crate::rng::stream;
use crate::tokenizer::{EOS, PAD};
use crate::{Encoded, Error, Result};

/// The smallest vocabulary of [`train_tokenizer`]: two special tokens and all bytes.
pub const SMALLEST_VOCABULARY: usize = 258;

/// A line of a file of documents; other fields are ignored.
#[derive(Deserialize)]
struct Document {
    text: String,
}

/// The files that `pattern` names: itself, or by `*`, `?` and `[…]`, sorted.
///
/// # Errors
/// [`Error::DataFile`] if there is none.
pub fn find_documents(pattern: &str) -> Result<Vec<PathBuf>> {
    let path = Path::new(pattern);
    if path.exists() {
        return Ok(vec![path.into()]);
    }
    let refuse = |problem: String| Error::DataFile {
        path: path.into(),
        problem: format!("{problem}; check the pattern and the permissions"),
    };
    let matches = glob::glob(pattern).map_err(|e| refuse(e.to_string()))?;
    let found = matches.map(|found| found.map_err(|e| refuse(e.to_string())));
    let found = found.collect::<Result<Vec<PathBuf>>>()?;
    match found.is_empty() {
        false => Ok(found),
        true => Err(Error::DataFile {
            path: path.into(),
            problem:
                "there is no such file; give text files, or files of records with `text` that \
                      end in .jsonl or .jsonl.gz"
                    .into(),
        }),
    }
}

/// Whether a file's name ends in `ending`, or in `ending` and `.gz`.
fn ends_in(path: &Path, ending: &str) -> bool {
    let name = path.to_string_lossy();
    name.trim_end_matches(".gz").ends_with(ending)
}

/// Whether a file holds text, and no records of questions and answers: its name ends in `.txt`, or in
/// `.jsonl` and its first line has a `text` and neither `prompt` nor `completion` nor `messages`;
/// either may be packed (`.gz`).
///
/// # Errors
/// [`Error::Read`]
pub fn is_text(path: &Path) -> Result<bool> {
    if !ends_in(path, ".jsonl") {
        return Ok(ends_in(path, ".txt"));
    }
    let first = first_line(path).map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    let fields = serde_json::from_str::<Map<String, Value>>(&first).ok();
    let records = ["prompt", "completion", "messages"];
    Ok(fields.is_some_and(|fields| {
        fields.contains_key("text") && !records.iter().any(|field| fields.contains_key(*field))
    }))
}

/// The first line that is not empty; the file may be large, and no more of it is read.
fn first_line(path: &Path) -> std::io::Result<String> {
    let mut lines = BufReader::new(open(path)?).lines();
    let is_empty =
        |line: &std::io::Result<String>| line.as_ref().is_ok_and(|line| line.trim().is_empty());
    let first = lines.find(|line| !is_empty(line));
    first.unwrap_or_else(|| Ok(String::new()))
}

/// Reads the documents of a file: the field `text` of every line of one that ends in `.jsonl` or
/// `.jsonl.gz`, or the whole of any other as one document. Nothing is changed in them.
///
/// # Errors
/// [`Error::Read`] if the file cannot be read, [`Error::Empty`] if it holds no text, and
/// [`Error::Document`] with the 1-based line number for a line that is no document.
pub fn read_documents(path: &Path) -> Result<Vec<String>> {
    let text = read(path)?;
    let documents = match ends_in(path, ".jsonl") {
        false => vec![text],
        true => (1..)
            .zip(text.split('\n'))
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(line, content)| {
                parse(content).map_err(|problem| Error::Document {
                    path: path.into(),
                    line,
                    problem,
                })
            })
            .collect::<Result<_>>()?,
    };
    match documents.iter().all(|document| document.trim().is_empty()) {
        true => Err(Error::Empty { path: path.into() }),
        false => Ok(documents),
    }
}

fn parse(line: &str) -> Result<String, String> {
    let document: Document =
        serde_json::from_str(line).map_err(|error| format!("not a document ({error})"))?;
    match document.text.trim().is_empty() {
        true => Err("`text` is empty".into()),
        false => Ok(document.text),
    }
}

/// Trains a byte-level BPE tokenizer on `documents`, the same for the same documents: [`EOS`] and
/// [`PAD`] first, then the bytes, then merges, up to `vocab_size` tokens; fewer if the documents hold no
/// more pairs to merge. Text is cut before merging as GPT-2 does, so no token spans two words.
///
/// # Errors
/// [`Error::Tokenizer`] if `vocab_size` is below [`SMALLEST_VOCABULARY`], or the `tokenizers` library
/// fails.
pub fn train_tokenizer(documents: &[String], vocab_size: usize) -> Result<Tokenizer> {
    if vocab_size < SMALLEST_VOCABULARY {
        return Err(Error::Tokenizer(format!(
            "a vocabulary of {vocab_size} tokens cannot hold all bytes; give at least \
             {SMALLEST_VOCABULARY}"
        )));
    }
    let special = |token: &str| AddedToken::from(token, true).normalized(false);
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .special_tokens(vec![special(EOS), special(PAD)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    let byte_level = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(byte_level));
    tokenizer.with_decoder(Some(byte_level));
    tokenizer
        .train(&mut TrainerWrapper::from(trainer), documents.iter())
        .map_err(|error| Error::Tokenizer(error.to_string()))?;
    Ok(tokenizer)
}

/// The tokens of `documents` in a row, each document followed by `eos`.
///
/// # Errors
/// [`Error::Tokenizer`] if the tokenizer fails.
pub fn pack(tokenizer: &Tokenizer, eos: u32, documents: &[String]) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    for document in documents {
        tokens.extend(text_ids(tokenizer, document)?);
        tokens.push(eos);
    }
    Ok(tokens)
}

/// Windows over `tokens`, each of which is predicted in one of them, as lm-evaluation-harness makes
/// them for perplexities. A window has at most `length` tokens and one that is only predicted. The first
/// one begins with `prefix`; each next one predicts `stride` tokens more, from 1 to `length`, and reads
/// as much before them as there is room for.
pub fn windows(tokens: &[u32], prefix: u32, length: usize, stride: usize) -> Vec<Encoded> {
    let length = length.max(1);
    let mut windows = Vec::new();
    let mut done = 0;
    while done < tokens.len() {
        let count = match done {
            0 => length,
            _ => stride.clamp(1, length),
        };
        let end = tokens.len().min(done + count);
        let window: Vec<u32> = match done {
            0 => std::iter::once(prefix)
                .chain(tokens[..end].iter().copied())
                .collect(),
            _ => tokens[end - length - 1..end].to_vec(),
        };
        windows.push(Encoded {
            answer_start: window.len() - (end - done),
            tokens: window,
        });
        done = end;
    }
    windows
}

/// Puts windows in an order that `seed` decides, so that the first of them are of the whole text.
pub fn shuffle(windows: &mut [Encoded], seed: u64) {
    windows.shuffle(&mut stream(seed, "text", 0, 0));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{EOS_ID, PAD_ID};
    use flate2::{Compression, write::GzEncoder};
    use std::fs;
    use std::io::Write;

    fn prose() -> Vec<String> {
        let words = [
            "the ship",
            "a whale",
            "the whaler",
            "sailed",
            "on the sea",
            "— Größe",
        ];
        let sentence = |i: usize| {
            let word = |k: usize| words[(i * (k + 3) + k * k) % words.len()];
            format!("{} {} {}.\n", word(0), word(1), word(2))
        };
        (0..4)
            .map(|d| (d..60 + d).map(sentence).collect())
            .collect()
    }

    #[test]
    fn a_tokenizer_is_trained_always_to_the_same_bytes_and_loses_nothing() {
        let documents = prose();
        let train = |size| train_tokenizer(&documents, size).unwrap();
        let tokenizer = train(280);
        assert_eq!(tokenizer.get_vocab_size(true), 280);
        let ids = [EOS, PAD].map(|token| tokenizer.token_to_id(token));
        assert_eq!(ids, [Some(EOS_ID), Some(PAD_ID)]);
        let bytes = tokenizer.to_string(true).unwrap();
        for _ in 0..8 {
            assert!(train(280).to_string(true).unwrap() == bytes);
        }
        assert!(train(270).to_string(true).unwrap() != bytes);
        // There is no more to merge than the few words.
        assert!(train(5000).get_vocab_size(true) < 400);
        let strange = "naïve 東京\r\n\u{0}  the whale";
        for text in [strange, &documents[1]] {
            let ids = text_ids(&tokenizer, text).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
        assert!(text_ids(&tokenizer, &documents[1]).unwrap().len() < documents[1].len() / 2);
        let few = train_tokenizer(&documents, 257).unwrap_err().to_string();
        assert!(few.contains("257") && few.contains("258"), "{few}");
    }

    #[test]
    fn documents_are_packed_with_an_end_token_and_cut_into_windows() {
        let documents = prose();
        let tokenizer = train_tokenizer(&documents, 270).unwrap();
        let tokens = pack(&tokenizer, EOS_ID, &documents).unwrap();
        let parts: Vec<&[u32]> = tokens.split(|&t| t == EOS_ID).collect();
        assert_eq!(parts.len(), documents.len() + 1);
        assert_eq!(tokenizer.decode(parts[2], false).unwrap(), documents[2]);
    }

    #[test]
    fn every_token_is_predicted_in_one_window() {
        let tokens: Vec<u32> = (1..=11).collect();
        let cut = windows(&tokens, 0, 4, 4);
        let rows: Vec<&[u32]> = cut.iter().map(|w| &w.tokens[..]).collect();
        assert_eq!(
            rows,
            [&[0, 1, 2, 3, 4][..], &[4, 5, 6, 7, 8], &[7, 8, 9, 10, 11]]
        );
        let starts: Vec<usize> = cut.iter().map(|w| w.answer_start).collect();
        assert_eq!(starts, [1, 1, 2]);
        for (length, stride) in [(4, 1), (3, 2), (1, 1), (20, 7), (0, 0)] {
            let cut = windows(&tokens, 0, length, stride);
            let predicted = cut.iter().flat_map(|w| &w.tokens[w.answer_start..]);
            assert_eq!(predicted.copied().collect::<Vec<_>>(), tokens);
            assert!(cut.iter().all(|w| w.answer_start > 0));
            assert!(cut.iter().all(|w| w.tokens.len() <= length.max(1) + 1));
        }
        assert!(windows(&[], 0, 4, 4).is_empty());
        let order = |seed| {
            let mut cut = windows(&tokens, 0, 1, 1);
            shuffle(&mut cut, seed);
            cut.iter().map(|w| w.tokens[1]).collect::<Vec<_>>()
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        assert_ne!(order(1), tokens);
    }

    #[test]
    fn text_and_records_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let is = |name: &str, content: &str| {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            is_text(&path).unwrap()
        };
        assert!(is("a.txt", "{\"prompt\": \"a\"}"));
        assert!(is("b.jsonl", "\n{\"text\": \"a\", \"title\": \"b\"}\n"));
        assert!(!is(
            "c.jsonl",
            "{\"prompt\": \"a\", \"completion\": \"b\", \"text\": \"c\"}"
        ));
        assert!(!is("d.jsonl", "{\"messages\": [], \"text\": \"c\"}"));
        assert!(!is("e.jsonl", "no record"));
        assert!(!is("f.json", "{\"text\": \"a\"}"));
        assert!(is_text(&folder.path().join("none.jsonl")).is_err());
        // No more is read than the first line, which must be readable.
        let rest = [&b"{\"text\": \"a\"}\n"[..], &b"\xff\n".repeat(9000)].concat();
        let path = folder.path().join("g.jsonl");
        fs::write(&path, &rest).unwrap();
        assert!(is_text(&path).unwrap());
        fs::write(&path, &rest[14..]).unwrap();
        assert!(is_text(&path).is_err());
    }

    #[test]
    fn files_are_read_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let lines = "{\"title\": \"A\", \"text\": \"one\\r\\n\"}\n\n{\"text\": \"two\"}\n";
        fs::write(path("b.jsonl"), lines).unwrap();
        fs::write(path("a.txt"), lines).unwrap();
        let file = fs::File::create(path("c.jsonl.gz")).unwrap();
        let mut packed = GzEncoder::new(file, Compression::fast());
        packed.write_all(lines.as_bytes()).unwrap();
        packed.finish().unwrap();
        let read = |name: &str| read_documents(&path(name)).unwrap();
        assert_eq!(read("a.txt"), [lines]);
        assert_eq!(read("b.jsonl"), ["one\r\n", "two"]);
        assert_eq!(read("c.jsonl.gz"), ["one\r\n", "two"]);
        let all = find_documents(&path("*.jsonl*").to_string_lossy()).unwrap();
        assert_eq!(all, [path("b.jsonl"), path("c.jsonl.gz")]);
        let none = find_documents(&path("*.md").to_string_lossy()).unwrap_err();
        assert!(none.to_string().contains("*.md"), "{none}");
        for (line, problem) in [
            ("{", "not a document"),
            ("{\"title\": \"A\"}", "`text`"),
            ("{\"text\": 3}", "not a document"),
            ("{\"text\": \" \"}", "`text` is empty"),
        ] {
            fs::write(path("d.jsonl"), format!("{lines}{line}\n")).unwrap();
            let message = read_documents(&path("d.jsonl")).unwrap_err().to_string();
            assert!(message.contains("d.jsonl` line 4: "), "{message}");
            assert!(message.contains(problem), "{message}");
        }
        fs::write(path("e.txt"), " \n").unwrap();
        let empty = read_documents(&path("e.txt"));
        assert!(matches!(empty, Err(Error::Empty { .. })));
    }
}
