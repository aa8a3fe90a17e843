//! What the templates of a task say of one document.

use super::config::{Choices, TaskConfig};
use super::python::text_of;
use super::template::{Engine, Fields};
use serde_json::Value;

/// What a prompt says: a text, or the number of a choice.
pub(super) enum Text {
    Words(String),
    Choice(usize),
}

/// The templates of a task.
pub(super) struct Texts<'a> {
    pub(super) task: &'a TaskConfig,
    pub(super) engine: &'a Engine,
}

impl Texts<'_> {
    pub(super) fn prompt(&self, doc: &Fields) -> Result<Text, String> {
        let template = self.task.doc_to_text.as_deref().unwrap_or_default();
        Ok(match self.numbered(template, doc)? {
            Value::Number(n) if self.task.doc_to_choice.is_some() => {
                Text::Choice(n.as_u64().ok_or("`doc_to_text` is negative")? as usize)
            }
            other => Text::Words(text_of(&other)),
        })
    }

    pub(super) fn target(&self, doc: &Fields) -> Result<Value, String> {
        let template = self.task.doc_to_target.as_deref().unwrap_or_default();
        self.numbered(template, doc)
    }

    /// What a template says; digits are a number where there are choices, unless a field holds them.
    fn numbered(&self, template: &str, doc: &Fields) -> Result<Value, String> {
        let value = self.engine.value(template, doc)?;
        if doc.contains_key(template) || value.is_array() {
            return Ok(value);
        }
        let text = text_of(&value);
        let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        Ok(match is_number && self.task.doc_to_choice.is_some() {
            true => text.parse::<u64>().map_or(Value::String(text), Value::from),
            false => Value::String(text),
        })
    }

    pub(super) fn choices(&self, doc: &Fields) -> Result<Vec<String>, String> {
        let template = match &self.task.doc_to_choice {
            None => return Ok(Vec::new()),
            Some(Choices::Fixed(list)) => return Ok(list.clone()),
            Some(Choices::Of(template)) => template,
        };
        match self.engine.value(template, doc)? {
            Value::Array(list) if !list.is_empty() => Ok(list.iter().map(text_of).collect()),
            other => Err(format!(
                "`doc_to_choice` gives {other}, no list of choices; let it be a field's name or \
                 one expression in {{{{ }}}}"
            )),
        }
    }

    pub(super) fn written(&self, template: &str, doc: &Fields) -> Result<String, String> {
        self.engine
            .value(template, doc)
            .map(|value| text_of(&value))
    }
}

/// The right choices: a target's number, its text, or several of them; or the number that the prompt
/// is.
pub(super) fn right_choices(
    text: &Text,
    target: &Value,
    choices: &[String],
) -> Result<Vec<usize>, String> {
    if choices.is_empty() {
        return Ok(Vec::new());
    }
    let of = |target: &Value| {
        let number = match target {
            Value::Number(number) => number.as_u64().map(|n| n as usize),
            Value::Bool(number) => Some(usize::from(*number)),
            other => choices.iter().position(|choice| *choice == text_of(other)),
        };
        number.filter(|n| *n < choices.len()).ok_or_else(|| {
            format!(
                "the right choice is {target}, which is none of {} choices; correct `doc_to_target` (a \
                 field with a number as text wants {{{{ }}}} around its name)",
                choices.len()
            )
        })
    };
    match (text, target) {
        (Text::Choice(number), _) => Ok(vec![of(&Value::from(*number))?]),
        (Text::Words(_), Value::Array(list)) => list.iter().map(of).collect(),
        (Text::Words(_), other) => Ok(vec![of(other)?]),
    }
}

/// A choice by number.
pub(super) fn chosen(choices: &[String], number: i64) -> Result<String, String> {
    let choice = usize::try_from(number).ok().and_then(|n| choices.get(n));
    choice
        .cloned()
        .ok_or_else(|| format!("there is no choice {number} of {}", choices.len()))
}
