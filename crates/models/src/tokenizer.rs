//! The tokenizer of a model folder, with its chat template.

use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// `tokenizer.json`, the special tokens, and the chat template.
pub struct ModelTokenizer {
    path: PathBuf,
    /// The tokenizer itself.
    pub inner: Tokenizer,
    /// End of text.
    pub eos: u32,
    /// Every token that ends an answer: that one, and those that `generation_config.json` names.
    pub ends: Vec<u32>,
    /// Begin of text, if the tokenizer names one.
    pub bos: Option<u32>,
    config: serde_json::Value,
    template: Option<String>,
}

/// One turn of a conversation.
#[derive(Debug, Clone, Serialize, serde::Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl ModelTokenizer {
    /// Reads the tokenizer of a model folder; `eos` is the id that `config.json` names, used where
    /// the tokenizer's own config names none.
    pub fn load(dir: &Path, eos: Option<u32>) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let inner = Tokenizer::from_file(&path).map_err(|e| {
            Error::tokenizer(
                &path,
                format!("cannot be read: {e}; copy it from the original model"),
            )
        })?;
        let config = optional_json(&dir.join("tokenizer_config.json"))?;
        let named = config.get("eos_token").and_then(token_text);
        let eos = named
            .and_then(|t| inner.token_to_id(&t))
            .or(eos)
            .ok_or_else(|| {
                Error::tokenizer(
                    &path,
                    "no end-of-text token; name `eos_token` in tokenizer_config.json or \
                 `eos_token_id` in config.json",
                )
            })?;
        let generation = optional_json(&dir.join("generation_config.json"))?;
        let mut ends = vec![eos];
        ends.extend(token_ids(&generation["eos_token_id"]).filter(|&id| id != eos));
        let bos = config.get("bos_token").and_then(token_text);
        let bos = bos.and_then(|t| inner.token_to_id(&t));
        let template = optional(&dir.join("chat_template.jinja"))?
            .or_else(|| config.get("chat_template")?.as_str().map(str::to_owned));
        Ok(Self {
            path,
            inner,
            eos,
            ends,
            bos,
            config,
            template,
        })
    }

    /// Takes another chat template.
    #[must_use]
    pub fn with_template(self, template: String) -> Self {
        Self {
            template: Some(template),
            ..self
        }
    }

    /// Text to ids, special tokens not added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encoded(text, false)
    }

    /// Text to ids with what the tokenizer itself puts around a text.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        self.encoded(text, true)
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// Ids to text, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decoded(ids, true)
    }

    /// Ids to text, special tokens among it.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String> {
        self.decoded(ids, false)
    }

    fn encoded(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode(text, add_special)
            .map_err(|e| Error::tokenizer(&self.path, format!("cannot encode the text: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn decoded(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|e| Error::tokenizer(&self.path, format!("cannot decode the ids: {e}")))
    }

    /// Renders a conversation up to where the assistant is to speak.
    pub fn chat(&self, messages: &[ChatMessage]) -> Result<String> {
        let fail = |message: String| Error::tokenizer(&self.path, message);
        let template = self.template.as_deref().ok_or_else(|| {
            fail(
                "the model has no chat template; give records with `prompt` and `completion`"
                    .into(),
            )
        })?;
        let mut env = minijinja::Environment::new();
        // The whitespace rules that `transformers` renders chat templates with.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        env.set_syntax(
            syntax.map_err(|e| fail(format!("the template engine fails: {e}; report it")))?,
        );
        // Published templates call Python's string methods (`.strip()`, …).
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function(
            "raise_exception",
            |text: String| -> std::result::Result<(), _> {
                Err(minijinja::Error::new(
                    minijinja::ErrorKind::InvalidOperation,
                    text,
                ))
            },
        );
        let special = |key| {
            self.config
                .get(key)
                .and_then(token_text)
                .unwrap_or_default()
        };
        env.render_str(
            template,
            minijinja::context! {
                messages => minijinja::value::Serde(messages),
                add_generation_prompt => true,
                bos_token => special("bos_token"),
                eos_token => special("eos_token"),
            },
        )
        .map_err(|e| fail(format!("the chat template fails: {e:#}; check the roles")))
    }
}

/// The text of a file that may be missing, but not unreadable.
fn optional(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

/// What a JSON file says that may be missing; null without it.
fn optional_json(path: &Path) -> Result<serde_json::Value> {
    match optional(path)? {
        Some(text) => serde_json::from_str(&text)
            .map_err(|e| Error::tokenizer(path, format!("not JSON: {e}; repair it"))),
        None => Ok(serde_json::Value::Null),
    }
}

/// One token or a list of them.
fn token_ids(value: &serde_json::Value) -> impl Iterator<Item = u32> {
    let list = value
        .as_array()
        .map_or(std::slice::from_ref(value), Vec::as_slice);
    let ids = list.iter().filter_map(serde_json::Value::as_u64);
    ids.filter_map(|id| u32::try_from(id).ok())
}

/// A special token is a string, or an object with `content`.
fn token_text(value: &serde_json::Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(str::to_owned)
}
