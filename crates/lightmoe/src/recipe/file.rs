//! The recipe as a file, and what two of them differ by.

use super::Recipe;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::path::Path;

impl Recipe {
    /// The recipe as TOML.
    ///
    /// # Errors
    /// If it cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).context("the recipe cannot be written as TOML")
    }

    /// Reads a resolved recipe.
    ///
    /// # Errors
    /// If it cannot be read or is none.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the recipe `{}`", path.display()))?;
        Self::parse(&text).with_context(|| format!("in the recipe `{}`", path.display()))
    }

    /// Reads the text of a resolved recipe.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(text: &str) -> Result<Self> {
        Ok(toml::from_str(text)?)
    }

    /// Refuses another recipe than this one, naming each key that differs.
    ///
    /// # Errors
    /// If they differ.
    pub fn same_as(&self, earlier: &Self) -> Result<()> {
        let differences = differences(self, earlier)?;
        if !differences.is_empty() {
            bail!(
                "the run in this folder had another recipe: {differences}; give the same settings to \
                 resume, or another `--out`"
            );
        }
        Ok(())
    }
}

/// The keys that differ between two objects, with both values, as part of a sentence.
///
/// # Errors
/// If one cannot be written as JSON.
pub(crate) fn differences(now: &impl Serialize, then: &impl Serialize) -> Result<String> {
    let (now, then) = (serde_json::to_value(now)?, serde_json::to_value(then)?);
    let keys = |v: &serde_json::Value| -> Vec<String> {
        v.as_object()
            .map(|m| m.keys().cloned().collect())
            .unwrap_or_default()
    };
    let mut all = keys(&then);
    all.extend(keys(&now).into_iter().filter(|k| then.get(k).is_none()));
    let show = |v: Option<&serde_json::Value>| v.map_or("unset".into(), ToString::to_string);
    let differences: Vec<String> = all
        .iter()
        .filter(|k| now.get(k) != then.get(k))
        .map(|k| {
            let (then, now) = (show(then.get(k)), show(now.get(k)));
            format!("`{k}` was {then} and is now {now}")
        })
        .collect();
    Ok(differences.join(", "))
}
