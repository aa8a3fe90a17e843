//! A server, its client, and what is expected of them.

use crate::server::{Hub, Seen, files};
use lightmoe_models::hub::{HubName, HubOptions, Want, fetch};
use lightmoe_models::{Error, Result};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

pub const WEIGHTS: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const TIMEOUT: Duration = Duration::from_millis(400);

/// A server and the cache of its only client.
pub struct World {
    pub hub: Hub,
    pub cache: TempDir,
    pub options: HubOptions,
}

impl World {
    pub fn new(files: BTreeMap<String, Vec<u8>>) -> Self {
        let hub = Hub::new(files);
        let cache = tempfile::tempdir().unwrap();
        let options = HubOptions {
            endpoint: hub.endpoint.clone(),
            cache: cache.path().to_owned(),
            token: None,
            offline: false,
            timeout: TIMEOUT,
        };
        Self {
            hub,
            cache,
            options,
        }
    }

    pub fn fetch(&self, name: &str, want: Want) -> Result<PathBuf> {
        let name = HubName::parse(name).unwrap();
        fetch(&name, want, &self.options, &mut |_, _, _| true)
    }

    pub fn whole(&self) -> Result<PathBuf> {
        self.fetch("org/tiny", Want::Whole)
    }

    pub fn offline(&self) -> Self {
        let options = HubOptions {
            offline: true,
            ..self.options.clone()
        };
        Self {
            hub: Hub::new(BTreeMap::new()),
            cache: tempfile::tempdir().unwrap(),
            options,
        }
    }

    /// Files in a folder of the model's cache, sorted.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let folder = self.cache.path().join("models--org--tiny").join(folder);
        let entries = fs::read_dir(folder).into_iter().flatten();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub fn partial(&self) -> Option<String> {
        let mut names = self.names("blobs").into_iter();
        names.find(|n| n.ends_with(".incomplete"))
    }
}

pub fn mixtral() -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity/mixtral");
    let mut files = files(&folder);
    files.remove("reference.safetensors");
    files
}

/// The same in two shards, with a shard that no index names.
pub fn sharded() -> BTreeMap<String, Vec<u8>> {
    let mut files = mixtral();
    let bytes = files.remove(WEIGHTS).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let mut map = serde_json::Map::new();
    let tensors = weights.tensors();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let shard = format!("model-0000{}-of-00002.safetensors", i + 1);
        for (name, _) in part {
            map.insert(name.clone(), shard.clone().into());
        }
        let part = part.iter().map(|(n, t)| (n, t));
        files.insert(shard, safetensors::serialize(part, None).unwrap());
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    files.insert(INDEX.into(), index.to_string().into_bytes());
    files.insert("consolidated.safetensors".into(), bytes);
    files
}

pub fn of<'a>(seen: &'a [Seen], file: &str) -> Vec<&'a Seen> {
    let end = format!("/{file}");
    seen.iter().filter(|s| s.path.ends_with(&end)).collect()
}

pub fn ranges(seen: &[Seen]) -> Vec<Option<&str>> {
    let downloads = of(seen, WEIGHTS).into_iter().filter(|s| s.method == "GET");
    downloads
        .map(|s| s.headers.get("range").map(String::as_str))
        .collect()
}

#[track_caller]
pub fn says(result: Result<PathBuf>, words: &[&str]) -> Error {
    let error = result.unwrap_err();
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "{message}");
    }
    error
}

#[track_caller]
pub fn refused(result: Result<PathBuf>, words: &[&str]) {
    let error = says(result, words);
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
}

#[track_caller]
pub fn failed(result: Result<PathBuf>, words: &[&str]) {
    let error = says(result, words);
    assert!(matches!(error, Error::Hub(_)), "{error:?}");
}
