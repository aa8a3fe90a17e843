//! The tokenizer of the built-in tasks: whole English words, invented words by
//! syllable, numbers 0 to 99 (0 to 30 where no space goes before), anything else by
//! byte; lossless.
//!
//! It is an ordinary byte-level BPE `tokenizer.json` with `ignore_merges`, so that
//! every library of the ecosystem loads it: a word of the vocabulary is taken as a
//! whole, and the only merges are those that form syllables.

use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use crate::example::text_ids;
use crate::pretrain::Source;
use crate::rng::stream;
use crate::words::{CONSONANTS, VOWELS, is_invented};
use crate::{Error, Result, Task};

/// The end-of-text token, which also stands for the beginning.
pub const EOS: &str = "<|endoftext|>";
/// Id of [`EOS`].
pub const EOS_ID: u32 = 0;
/// The padding token.
pub const PAD: &str = "<|padding|>";
/// Id of [`PAD`].
pub const PAD_ID: u32 = 1;

/// A line break with the indentation after it, a word, a number of up to two digits,
/// a run of underscores or of other signs, each but the first with the space before it; or one white space.
const PATTERN: &str = r"\n *| ?[A-Za-z]+| ?[0-9]{1,2}| ?_+| ?[^\sA-Za-z0-9_]+|\s";

/// Texts of each source and task that are read for their words.
const SAMPLE: usize = 6_000;

/// The space of byte-level vocabularies.
const SPACE: char = 'Ġ';
/// The line break of byte-level vocabularies.
const BREAK: char = 'Ċ';

static DEFINITION: LazyLock<Value> = LazyLock::new(define);

/// Builds the tokenizer, the same on every machine.
///
/// The first call in a process takes about half a second, for it reads samples of
/// all generators; later ones parse the cached definition.
///
/// # Errors
/// [`Error::Tokenizer`] if the `tokenizers` library refuses the definition.
pub fn build() -> Result<Tokenizer> {
    serde_json::from_value(DEFINITION.clone())
        .map_err(|error: serde_json::Error| Error::Tokenizer(error.to_string()))
}

/// The content of `tokenizer_config.json` that belongs to [`build`]: special tokens,
/// and a chat template that writes messages one after the other, as
/// [`crate::render`] does with a prompt and a completion.
pub fn tokenizer_config() -> Value {
    let mut config = plain_config();
    config["model_max_length"] = 2048.into();
    config["chat_template"] = "{% for m in messages %}{% if m['role'] == 'assistant' %} \
        {{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        .into();
    config
}

/// The content of `tokenizer_config.json` for a tokenizer with our special tokens and no more.
pub fn plain_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": null,
        "clean_up_tokenization_spaces": false,
    })
}

fn define() -> Value {
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
                            "trim_offsets": true, "use_regex": false});
    let (vocabulary, merges) = vocabulary();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(EOS_ID, EOS), special(PAD_ID, PAD)],
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": false},
            byte_level,
        ]},
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                  "vocab": vocabulary, "merges": merges},
    })
}

/// A fast way to the same ids: the texts of this crate are whole pieces and
/// invented words, which need no merging.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    ids: HashMap<String, u32>,
    tokenizer: Tokenizer,
}

impl Table {
    /// A table of [`build`]'s tokenizer.
    pub(crate) fn new() -> Result<Self> {
        let tokenizer = build()?;
        let ids = tokenizer
            .get_vocab(false)
            .into_iter()
            .filter(|(token, _)| token.is_ascii() || token.starts_with([SPACE, BREAK]))
            .map(|(token, id)| (token.replace(SPACE, " ").replace(BREAK, "\n"), id))
            .collect();
        Ok(Self { ids, tokenizer })
    }

    /// Appends the ids of `text` to `out`.
    pub(crate) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        for piece in pieces(text) {
            if let Some(&id) = self.ids.get(piece) {
                out.push(id);
            } else if !self.spell(piece, out) {
                out.extend(text_ids(&self.tokenizer, piece)?);
            }
        }
        Ok(())
    }

    /// Appends the syllables of an invented word, or nothing if it is not one.
    fn spell(&self, piece: &str, out: &mut Vec<u32>) -> bool {
        let word = piece.strip_prefix(' ').unwrap_or(piece);
        if !is_invented(word) {
            return false;
        }
        let before = out.len();
        let first = piece.len() - word.len() + 2;
        let mut rest = Some(&piece[..first]);
        let mut at = first;
        while let Some(syllable) = rest {
            let Some(&id) = self.ids.get(syllable) else {
                out.truncate(before);
                return false;
            };
            out.push(id);
            rest = piece.get(at..at + 2);
            at += 2;
        }
        true
    }
}

/// Tokens with their ids, and the merges.
fn vocabulary() -> (Map<String, Value>, Vec<[String; 2]>) {
    let mut tokens = vec![EOS.to_string(), PAD.to_string()];
    tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
    tokens.extend((0..=99).map(|number| format!("{SPACE}{number}")));
    let mut merges = Vec::new();
    for (first, second) in CONSONANTS
        .iter()
        .flat_map(|c| VOWELS.iter().map(move |v| (c.to_string(), v.to_string())))
    {
        tokens.push(format!("{first}{second}"));
        merges.push([first, second]);
    }
    for syllable in merges.clone() {
        let syllable = syllable.concat();
        tokens.push(format!("{SPACE}{syllable}"));
        merges.push([SPACE.to_string(), syllable]);
    }
    let known: BTreeSet<String> = tokens.iter().cloned().collect();
    tokens.extend(words().into_iter().filter(|word| !known.contains(word)));
    let ids = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, Value::from(id)))
        .collect();
    (ids, merges)
}

/// Every piece of the generators' texts that is to be one token, in byte-level form.
fn words() -> BTreeSet<String> {
    let mut words = BTreeSet::new();
    let mut read = |text: &str| {
        for piece in pieces(text) {
            let word = piece.trim_start_matches(' ');
            if !is_invented(word) && !words.contains(piece) {
                words.insert(piece.to_string());
            }
        }
    };
    for source in Source::ALL {
        let mut rng = stream(0, "vocabulary", 0, source as u64);
        (0..SAMPLE).for_each(|_| read(&source.document(&mut rng)));
    }
    for task in Task::ALL {
        let mut rng = stream(0, "vocabulary", 1, task as u64);
        (0..SAMPLE).for_each(|_| read(&task.draw(&mut rng).example.text()));
    }
    words
        .into_iter()
        .map(|word| word.bytes().map(byte_char).collect())
        .collect()
}

/// The character by which byte-level vocabularies write `byte`.
fn byte_char(byte: u8) -> char {
    let is_printed = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if is_printed(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&other| !is_printed(other)).count();
    char::from_u32(0x100 + rank as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Cuts `text` where [`PATTERN`] does.
pub(crate) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let length = piece_length(rest)?;
        let (piece, after) = rest.split_at(length);
        rest = after;
        Some(piece)
    })
}

fn piece_length(text: &str) -> Option<usize> {
    let run = |from: usize, most: usize, keep: fn(char) -> bool| {
        from + text[from..]
            .chars()
            .take(most)
            .take_while(|&c| keep(c))
            .map(char::len_utf8)
            .sum::<usize>()
    };
    let first = text.chars().next()?;
    if first == '\n' {
        return Some(run(1, usize::MAX, |c| c == ' '));
    }
    let start = usize::from(first == ' ');
    Some(match text[start..].chars().next() {
        Some(c) if c.is_ascii_alphabetic() => run(start, usize::MAX, |c| c.is_ascii_alphabetic()),
        Some(c) if c.is_ascii_digit() => run(start, 2, |c| c.is_ascii_digit()),
        Some('_') => run(start, usize::MAX, |c| c == '_'),
        Some(c) if !c.is_whitespace() => run(start, usize::MAX, |c| {
            !c.is_whitespace() && !c.is_ascii_alphanumeric() && c != '_'
        }),
        _ => first.len_utf8(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pretrain::Mix;

    #[test]
    fn pieces_are_those_of_the_pattern() {
        let tokenizer = build().unwrap();
        for text in [
            "a  b\n\n   c \n d\t e\r\n 12 345 6789x",
            "Größe 東京 ok \u{a0}x {\"a_b\": 1}}  __(__)_, _",
        ] {
            let mut from = 0;
            let mut joined = Vec::new();
            for piece in pieces(text) {
                joined.extend(tokenizer.encode(piece, false).unwrap().get_ids().to_vec());
                from += piece.len();
            }
            assert_eq!(from, text.len());
            assert_eq!(joined, tokenizer.encode(text, false).unwrap().get_ids());
        }
    }

    #[test]
    fn the_table_gives_the_ids_of_the_tokenizer() {
        let table = Table::new().unwrap();
        let documents = Mix::default()
            .documents(6)
            .take(3_000)
            .map(|(_, text)| text);
        let others = [
            "naïve  Katumi katumix ĠĊ",
            "xyz\n\n 100",
            "katumi katu ka lake",
        ];
        for text in documents.chain(others.map(String::from)) {
            let mut ids = Vec::new();
            table.encode(&text, &mut ids).unwrap();
            assert_eq!(ids, text_ids(&table.tokenizer, &text).unwrap(), "{text}");
        }
    }

    #[test]
    fn bytes_have_the_characters_of_byte_level_vocabularies() {
        assert_eq!(byte_char(b' '), SPACE);
        assert_eq!(byte_char(b'\n'), BREAK);
        assert_eq!(byte_char(b'a'), 'a');
        assert_eq!(byte_char(0xad), '\u{143}');
    }
}
