//! The text of tokens as they come.

use crate::{ModelTokenizer, Result};

/// No character has more bytes, so none takes more tokens.
const LONGEST_CHARACTER: usize = 4;
/// What decoding gives for the bytes of a character that is not whole.
const INCOMPLETE: char = char::REPLACEMENT_CHARACTER;

/// Turns tokens into text, piece by piece: characters appear when they are whole, and what may be the
/// beginning of a text that ends the answer is held back until it is known.
pub struct TextStream<'a> {
    tokenizer: &'a ModelTokenizer,
    ends: &'a [String],
    ids: Vec<u32>,
    /// Decoding begins here: what a token says may depend on the one before it.
    begin: usize,
    /// Tokens up to here are in the text.
    done: usize,
    /// Text that is not given out yet.
    held: String,
    is_ended: bool,
}

impl<'a> TextStream<'a> {
    /// A text that any of `ends` ends, none of which is empty.
    pub fn new(tokenizer: &'a ModelTokenizer, ends: &'a [String]) -> Self {
        Self {
            tokenizer,
            ends,
            ids: Vec::new(),
            begin: 0,
            done: 0,
            held: String::new(),
            is_ended: false,
        }
    }

    /// Whether a text that ends the answer has come; it is no part of what is given out.
    pub fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// What the next token adds that can be shown.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        let waits = text.is_empty() || text.ends_with(INCOMPLETE);
        if !waits || self.ids.len() - self.done > LONGEST_CHARACTER {
            (self.begin, self.done) = (self.done, self.ids.len());
            self.held.push_str(&text);
        }
        Ok(self.release())
    }

    /// The rest, when no more tokens come.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn finish(mut self) -> Result<String> {
        let text = self.pending()?;
        self.held.push_str(&text);
        let mut rest = self.release();
        if !self.is_ended {
            rest.push_str(&self.held);
        }
        Ok(rest)
    }

    /// The text of the tokens that are not done.
    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.begin..self.done])?;
        let all = self.tokenizer.decode(&self.ids[self.begin..])?;
        let same = before.chars().zip(all.chars()).take_while(|(a, b)| a == b);
        Ok(all.chars().skip(same.count()).collect())
    }

    /// Takes out what cannot belong to a text that ends the answer.
    fn release(&mut self) -> String {
        if self.is_ended {
            return String::new();
        }
        let found = self
            .ends
            .iter()
            .filter_map(|end| self.held.find(end.as_str()));
        if let Some(at) = found.min() {
            self.is_ended = true;
            return self.held.drain(..at).collect();
        }
        let is_beginning = |text: &str| self.ends.iter().any(|end| end.starts_with(text));
        let mut places = self.held.char_indices().map(|(at, _)| at);
        let at = places
            .find(|&at| is_beginning(&self.held[at..]))
            .unwrap_or(self.held.len());
        self.held.drain(..at).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, Value, json};
    use std::fs;
    use std::path::Path;

    /// Pieces of bytes, as in GPT-2.
    fn bytes() -> ModelTokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/olmoe-nano");
        ModelTokenizer::load(&folder, None).unwrap()
    }

    /// Pieces of text with a mark for spaces, and bytes where there is none, as in Llama.
    fn fallback() -> ModelTokenizer {
        let pieces = ["<unk>", "</s>", "▁", "▁Hi", "there", "▁there", "!"].map(str::to_owned);
        let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
        let all = pieces.into_iter().chain(bytes).enumerate();
        let vocab: Map<String, Value> = all.map(|(id, text)| (text, id.into())).collect();
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [{
                "id": 1, "content": "</s>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            }],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {
                "type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>",
                "byte_fallback": true,
            },
        });
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        ModelTokenizer::load(folder.path(), Some(1)).unwrap()
    }

    fn pieces(tokenizer: &ModelTokenizer, ids: &[u32], ends: &[&str]) -> Vec<String> {
        let ends: Vec<String> = ends.iter().map(|&end| end.to_owned()).collect();
        let mut stream = TextStream::new(tokenizer, &ends);
        let mut pieces: Vec<String> = Vec::new();
        for &id in ids {
            pieces.push(stream.push(id).unwrap());
            if stream.is_ended() {
                break;
            }
        }
        pieces.push(stream.finish().unwrap());
        pieces
    }

    #[test]
    fn characters_appear_when_they_are_whole() {
        let tokenizer = bytes();
        let text = "naïve 🦀🦀 = 42, ganz schön ümlautig – 書く";
        let ids = tokenizer.encode(text).unwrap();
        let said = pieces(&tokenizer, &ids, &[]);
        assert_eq!(said.concat(), text);
        assert!(
            said.iter().all(|piece| !piece.contains(INCOMPLETE)),
            "{said:?}"
        );
        assert!(
            said.iter().any(String::is_empty) && said.len() > 12,
            "{said:?}"
        );
        // What never becomes whole is shown at the end, and does not hold back what follows.
        let crab = tokenizer.encode("🦀").unwrap();
        assert_eq!(crab.len(), 4);
        assert_eq!(pieces(&tokenizer, &crab[..3], &[]).concat(), "\u{fffd}");
        let broken = [&crab[..2], &tokenizer.encode("a cat").unwrap()[..]].concat();
        assert_eq!(pieces(&tokenizer, &broken, &[]).concat(), "\u{fffd}a cat");
        let noise = vec![crab[1]; 40];
        let said = pieces(&tokenizer, &noise, &[]);
        assert_eq!(said.concat(), "\u{fffd}".repeat(40));
        assert!(said.iter().filter(|piece| !piece.is_empty()).count() > 4);
    }

    #[test]
    fn spaces_stay_where_the_decoder_strips_the_first() {
        let tokenizer = fallback();
        let crab: Vec<u32> = "🦀".bytes().map(|byte| 7 + u32::from(byte)).collect();
        let ids = [&[3, 5][..], &crab, &[6, 1, 3]].concat();
        assert_eq!(tokenizer.decode(&ids).unwrap(), "Hi there🦀! Hi");
        let said = pieces(&tokenizer, &ids, &[]);
        assert_eq!(said[..7], ["Hi", " there", "", "", "", "🦀", "!"]);
        assert_eq!(said.concat(), "Hi there🦀! Hi");
    }

    #[test]
    fn a_text_that_ends_the_answer_is_not_shown() {
        let tokenizer = bytes();
        let said = |text: &str, ends: &[&str]| {
            let ids = tokenizer.encode(text).unwrap();
            pieces(&tokenizer, &ids, ends)
        };
        assert_eq!(said("a b STOP c", &["STOP"]).concat(), "a b ");
        // The one that comes first ends it.
        assert_eq!(said("one\n\ntwo Q: x", &["Q:", "\n\n"]).concat(), "one");
        // A beginning is held back until it is known to be none, and shown if it never is.
        let pieces = said("a STO b", &["STOP"]);
        assert_eq!(pieces.concat(), "a STO b");
        assert!(pieces.contains(&String::new()), "{pieces:?}");
        assert_eq!(said("a STO", &["STOP"]).concat(), "a STO");
        assert_eq!(said("aab", &["ab"]).concat(), "a");
        assert_eq!(said("ü – ö", &["– ö"]).concat(), "ü ");
    }
}
