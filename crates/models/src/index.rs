//! `model.safetensors.index.json`: which shard of a checkpoint has which tensor.

use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Which shard has which tensor, if there are several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The names of the shards that an index names, sorted.
pub(crate) fn shards(index: &BTreeMap<String, String>) -> BTreeSet<&str> {
    index.values().map(String::as_str).collect()
}

/// Reads an index file.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    parse_index(&text)
        .map_err(|message| Error::config(path, format!("{message}; download it again")))
}

/// The shard of each tensor, from the text of an index. Shards are files beside the index and
/// nothing else.
///
/// # Errors
/// What is wrong with it, as part of a sentence.
pub fn parse_index(text: &str) -> std::result::Result<BTreeMap<String, String>, String> {
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
    let map = value
        .get("weight_map")
        .and_then(|m| m.as_object())
        .filter(|m| !m.is_empty())
        .ok_or("`weight_map` is no object with entries")?;
    map.iter()
        .map(|(tensor, shard)| match shard.as_str() {
            Some(shard) if Path::new(shard).file_name() == Some(shard.as_ref()) => {
                Ok((tensor.clone(), shard.to_owned()))
            }
            _ => Err(format!(
                "`weight_map` gives `{tensor}` the shard {shard}, which is no file name"
            )),
        })
        .collect()
}
