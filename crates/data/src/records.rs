//! Training data of the user's own: JSONL records and plain text.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde::{Deserialize, Serialize};

use crate::{Error, Example, Result};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, ...
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A line as it may be written; one of the two forms must be complete.
#[derive(Deserialize)]
struct Record {
    prompt: Option<String>,
    completion: Option<String>,
    messages: Option<Vec<Message>>,
}

/// Reads examples, one JSON object per line; blank lines are skipped.
///
/// A line is `{"prompt", "completion"}`, or `{"messages": [{"role", "content"}, ..]}`
/// whose last message is the assistant's: its content is the completion, and
/// `render_chat` makes the prompt of those before. Other keys are ignored. `check` says what
/// else is wrong with an example, such as its length in tokens.
///
/// # Errors
/// [`Error::Read`] if the file cannot be read, [`Error::Empty`] if it has no record,
/// and [`Error::Record`] with the 1-based line number for a line that is not one.
pub fn read_jsonl(
    path: &Path,
    render_chat: &dyn Fn(&[Message]) -> Result<String, String>,
    check: &dyn Fn(&Example) -> Result<(), String>,
) -> Result<Vec<Example>> {
    let text = read(path)?;
    let mut examples = Vec::new();
    for (line, content) in (1..).zip(text.lines()) {
        if content.trim().is_empty() {
            continue;
        }
        let example = parse(content, render_chat)
            .and_then(|example| check(&example).map(|()| example))
            .map_err(|problem| Error::Record {
                path: path.into(),
                line,
                problem,
            })?;
        examples.push(example);
    }
    if examples.is_empty() {
        return Err(Error::Empty { path: path.into() });
    }
    Ok(examples)
}

/// Reads a UTF-8 text file.
///
/// # Errors
/// [`Error::Read`] if the file cannot be read, [`Error::Empty`] if it holds nothing
/// but white space.
pub fn read_text(path: &Path) -> Result<String> {
    let text = read(path)?;
    if text.trim().is_empty() {
        return Err(Error::Empty { path: path.into() });
    }
    Ok(text)
}

/// The text of a file; one that ends in `.gz` is unpacked.
///
/// # Errors
/// [`Error::Read`]
pub(crate) fn read(path: &Path) -> Result<String> {
    let mut text = String::new();
    let whole = open(path).and_then(|mut file| file.read_to_string(&mut text));
    whole.map_err(|source| Error::Read {
        path: path.into(),
        source,
    })?;
    Ok(text)
}

/// Opens a file that may be packed.
pub(crate) fn open(path: &Path) -> std::io::Result<Box<dyn Read>> {
    let file = File::open(path)?;
    Ok(match path.extension().is_some_and(|e| e == "gz") {
        true => Box::new(MultiGzDecoder::new(file)),
        false => Box::new(file),
    })
}

fn parse(
    line: &str,
    render_chat: &dyn Fn(&[Message]) -> Result<String, String>,
) -> Result<Example, String> {
    let record: Record =
        serde_json::from_str(line).map_err(|error| format!("not a valid record ({error})"))?;
    let example = match (record.prompt, record.completion, record.messages) {
        (Some(prompt), Some(completion), None) => Example::new(prompt, completion),
        (None, None, Some(mut messages)) => {
            let last = messages.pop().ok_or("`messages` is empty")?;
            if last.role != "assistant" {
                return Err(format!(
                    "the last message is of role `{}`, not `assistant`",
                    last.role
                ));
            }
            if messages.is_empty() {
                return Err("there is no message before the assistant's".into());
            }
            let prompt = render_chat(&messages)
                .map_err(|problem| format!("the chat template failed: {problem}"))?;
            Example::new(prompt, last.content)
        }
        (Some(_), None, None) => return Err("`prompt` without `completion`".into()),
        (None, Some(_), None) => return Err("`completion` without `prompt`".into()),
        (None, None, None) => return Err("neither `prompt` nor `messages` is there".into()),
        (_, _, Some(_)) => {
            return Err("`messages` and `prompt` or `completion` are both there".into());
        }
    };
    if example.prompt.is_empty() {
        return Err("the prompt is empty".into());
    }
    if example.completion.trim().is_empty() {
        return Err("the completion is empty".into());
    }
    Ok(example)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn read_lines(lines: &str) -> Result<Vec<Example>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        fs::write(&path, lines).unwrap();
        let render = |messages: &[Message]| match messages[0].content.as_str() {
            "fail" => Err("no such role".into()),
            first => Ok(format!("<{}>{first}", messages.len())),
        };
        let check = |example: &Example| match example.completion.len() {
            0..=5 => Ok(()),
            n => Err(format!("{n} letters")),
        };
        read_jsonl(&path, &render, &check)
    }

    #[test]
    fn both_forms_are_read() {
        let examples = read_lines(concat!(
            "{\"prompt\": \"a\", \"completion\": \"b\", \"id\": 3}\n\n",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, ",
            "{\"role\": \"assistant\", \"content\": \"yes\"}]}\n",
        ));
        let want = [Example::new("a", "b"), Example::new("<1>hi", "yes")];
        assert_eq!(examples.unwrap(), want);
    }

    #[test]
    fn errors_name_the_line_and_the_problem() {
        let user = r#"{"role": "user", "content": "hi"}"#;
        let fail = r#"{"role": "user", "content": "fail"}"#;
        let assistant = r#"{"role": "assistant", "content": "yes"}"#;
        for (line, problem) in [
            ("{", "not a valid record"),
            (r#"{"prompt": 3, "completion": "b"}"#, "not a valid record"),
            (r#"{"prompt": "a"}"#, "`prompt` without `completion`"),
            (r#"{"completion": "a"}"#, "`completion` without `prompt`"),
            ("{}", "neither `prompt` nor `messages`"),
            (
                r#"{"prompt": "a", "completion": " "}"#,
                "completion is empty",
            ),
            (r#"{"messages": []}"#, "`messages` is empty"),
            (&format!(r#"{{"messages": [{user}]}}"#), "role `user`"),
            (
                &format!(r#"{{"messages": [{assistant}]}}"#),
                "no message before",
            ),
            (
                &format!(r#"{{"messages": [{fail}, {assistant}]}}"#),
                "the chat template failed: no such role",
            ),
            (
                &format!(r#"{{"prompt": "a", "messages": [{user}, {assistant}]}}"#),
                "both there",
            ),
        ] {
            let lines = format!("{{\"prompt\": \"a\", \"completion\": \"b\"}}\n\n{line}\n");
            let message = read_lines(&lines).unwrap_err().to_string();
            assert!(message.contains("train.jsonl` line 3:"), "{message}");
            assert!(message.contains(problem), "{message}");
        }
    }

    #[test]
    fn empty_and_missing_files_are_errors() {
        assert!(matches!(read_lines("\n \n"), Err(Error::Empty { .. })));
        let missing = Path::new("no/such/file");
        assert!(matches!(read_text(missing), Err(Error::Read { .. })));
    }
}
