//! A method as the user names it, with recipe keys of its own: `lightmoe:base=random`.

use crate::settings::Settings;
use anyhow::{Context, Result, anyhow, bail, ensure};
use lightmoe_compress::methods::MethodName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Keys that the grid decides.
const GRID: [(&str, &str); 12] = [
    ("model", "--model"),
    ("task", "--tasks"),
    ("train", "--recipe"),
    ("eval_text", "--recipe"),
    ("calibrate", "--recipe"),
    ("also", "--recipe"),
    ("method", "--methods"),
    ("ratio", "--ratios"),
    ("threshold", "--ratios"),
    ("bytes", "--ratios"),
    ("max_damage", "--ratios"),
    ("seed", "--seeds"),
];

/// A method with the recipe keys that make it a row of its own.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Variant {
    /// As the user wrote it.
    pub label: String,
    /// The method.
    pub method: MethodName,
    /// Its keys, the method among them.
    pub settings: Settings,
}

impl Variant {
    /// The variants of a list. A piece with `=` and without a method's name before it is a further
    /// key of the variant before it.
    ///
    /// # Errors
    /// If one is none, or stands there twice.
    pub fn list(text: &str) -> Result<Vec<Self>> {
        let mut labels: Vec<String> = Vec::new();
        for piece in text.split(',').map(str::trim) {
            match labels.last_mut() {
                Some(last) if piece.contains('=') && !piece.contains(':') => {
                    *last += &format!(",{piece}");
                }
                _ => labels.push(piece.to_owned()),
            }
        }
        labels.iter().map(|label| label.parse()).collect()
    }

    /// The label as part of a file's name.
    pub fn file_name(&self) -> String {
        self.label.replace([':', ','], "-")
    }
}

impl PartialEq for Variant {
    fn eq(&self, other: &Self) -> bool {
        self.label == other.label
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

impl From<Variant> for String {
    fn from(variant: Variant) -> Self {
        variant.label
    }
}

impl TryFrom<String> for Variant {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl FromStr for Variant {
    type Err = anyhow::Error;

    fn from_str(label: &str) -> Result<Self> {
        let (name, keys) = label.split_once(':').unwrap_or((label, ""));
        let method: MethodName = name.parse()?;
        let mut table = toml::Table::new();
        for pair in keys.split(',').filter(|_| label.contains(':')) {
            let (key, value) = pair.split_once('=').with_context(|| {
                format!("`{pair}` in the method `{label}`; write `method:key=value,key=value`")
            })?;
            if let Some((_, flag)) = GRID.iter().find(|(known, _)| *known == key) {
                bail!("`{key}` in the method `{label}` is for the whole comparison; give `{flag}`");
            }
            let value = value.parse().or_else(|_| format!("'{value}'").parse());
            let value: toml::Value = value
                .map_err(|_| anyhow!("`{pair}` in the method `{label}` has no value to read"))?;
            ensure!(
                table.insert(key.to_owned(), value).is_none(),
                "`{key}` stands twice in the method `{label}`; keep one"
            );
        }
        let settings = table.try_into().map_err(|error: toml::de::Error| {
            let message = error.message().replace('\n', " ");
            anyhow!("in the method `{label}`: {message}; see docs/reference.md for the keys")
        })?;
        Ok(Self {
            label: label.to_owned(),
            method,
            settings: Settings {
                method: Some(method.to_string()),
                ..settings
            },
        })
    }
}

/// Refuses keys that the grid decides in settings common to all cells, which alone say what all have in common: the
/// model, its texts, and what plans are calibrated on.
///
/// # Errors
/// Naming the key and the option for it.
pub fn check_common(settings: &Settings) -> Result<()> {
    let keys = given(settings)?;
    let taken = GRID
        .iter()
        .filter(|(key, _)| !["model", "train", "eval_text", "calibrate"].contains(key));
    for (key, flag) in taken.chain(&[("lr", "--rates")]) {
        ensure!(
            !keys.contains_key(*key),
            "`{key}` in the recipe: the comparison decides it; give `{flag}`"
        );
    }
    Ok(())
}

/// The settings that were given, by key.
///
/// # Errors
/// If they cannot be written as JSON.
pub fn given(settings: &Settings) -> Result<serde_json::Map<String, serde_json::Value>> {
    let mut keys = match serde_json::to_value(settings)? {
        serde_json::Value::Object(keys) => keys,
        _ => serde_json::Map::new(),
    };
    keys.retain(|_, value| !value.is_null());
    Ok(keys)
}
