//! What the original and the result answer, with the words that differ marked.

use serde::Serialize;
use similar::{ChangeTag, TextDiff};

use crate::contrast::{Answer, AnswerPair};

/// One test item.
#[derive(Serialize)]
pub(super) struct Shown {
    prompt: String,
    target: String,
    original: Vec<Piece>,
    result: Vec<Piece>,
    /// Whether both say the same.
    same: bool,
}

/// A part of an answer.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Piece {
    text: String,
    /// Whether the other answer has other words here.
    differs: bool,
}

/// The answers with their differences.
pub(super) fn shown(pairs: &[AnswerPair]) -> Vec<Shown> {
    let shown = |pair: &AnswerPair| {
        let (before, after) = (written(&pair.original), written(&pair.result));
        let diff = TextDiff::from_words(&before, &after);
        let pieces = |own: ChangeTag| {
            let mut pieces: Vec<Piece> = Vec::new();
            let changes = diff.iter_all_changes();
            for change in changes.filter(|c| [own, ChangeTag::Equal].contains(&c.tag())) {
                let differs = change.tag() == own;
                match pieces.last_mut() {
                    Some(piece) if piece.differs == differs => piece.text += change.value(),
                    _ => pieces.push(Piece {
                        text: change.value().to_owned(),
                        differs,
                    }),
                }
            }
            pieces
        };
        Shown {
            prompt: pair.prompt.clone(),
            target: pair.target.trim().to_owned(),
            original: pieces(ChangeTag::Delete),
            result: pieces(ChangeTag::Insert),
            same: before == after,
        }
    };
    pairs.iter().map(shown).collect()
}

/// An answer as it is read: what was cut off ends with dots.
fn written(answer: &Answer) -> String {
    match (answer.text.is_empty(), answer.whole) {
        (_, false) => format!("{} …", answer.text),
        (true, true) => "(nothing)".to_owned(),
        (false, true) => answer.text.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str, whole: bool) -> Answer {
        Answer {
            text: text.to_owned(),
            whole,
        }
    }

    #[test]
    fn the_words_that_differ_are_marked_and_the_texts_stay_whole() {
        let pair = |original, result| AnswerPair {
            prompt: "p".to_owned(),
            target: " t".to_owned(),
            original,
            result,
        };
        let shown = shown(&[
            pair(answer("it is 12 now", true), answer("it is 14 now", false)),
            pair(answer("yes", true), answer("yes", true)),
            pair(answer("", true), answer("no", true)),
        ]);
        let text = |pieces: &[Piece]| pieces.iter().map(|p| p.text.as_str()).collect::<String>();
        let marked = |pieces: &[Piece]| -> Vec<String> {
            let marked = pieces.iter().filter(|p| p.differs);
            marked.map(|p| p.text.trim().to_owned()).collect()
        };
        assert_eq!(text(&shown[0].original), "it is 12 now");
        assert_eq!(text(&shown[0].result), "it is 14 now …");
        assert_eq!(marked(&shown[0].original), ["12"]);
        assert_eq!(marked(&shown[0].result)[0], "14");
        assert!(shown[1].same && marked(&shown[1].result).is_empty());
        assert_eq!(text(&shown[2].original), "(nothing)");
        assert!(!shown[2].same);
    }
}
