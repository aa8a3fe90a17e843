//! Models and data sets by the names that they have on the Hugging Face Hub, brought into the Hub's
//! ordinary cache folder, which other programs share.
//!
//! The layout of the cache and the addresses are those of `hf-hub`. Its downloader is not used: it
//! accepts truncated files, takes an answer to another range for the rest of a file, waits for ever,
//! and sends the token to the servers that the Hub redirects to.

mod client;
mod name;

pub use name::HubName;

use crate::checkpoint::SINGLE;
use crate::index::{INDEX, read_index, shards};
use crate::{Error, Result};
use client::Client;
use hf_hub::{Cache, CacheRepo};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

const CONFIG: &str = "config.json";
/// The page of a model or data set.
pub const README: &str = "README.md";

/// Files wanted beside config and weights, by the beginnings of their names.
const SIDE_FILES: [&str; 10] = [
    "LICENSE",
    "README.md",
    "added_tokens.json",
    "chat_template",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer",
    "vocab.json",
    "vocab.txt",
];

/// How the Hub is reached.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// The Hub's address, without a slash at its end.
    pub endpoint: String,
    /// The cache: a folder of `models--<org>--<name>` and `datasets--<org>--<name>`.
    pub cache: PathBuf,
    /// Sent to the endpoint and to no other server.
    pub token: Option<String>,
    /// The cache alone is used, never the network.
    pub offline: bool,
    /// The longest wait for a connection, and for the next bytes.
    pub timeout: Duration,
}

/// How much of a model is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// `config.json`.
    ConfigOnly,
    /// All that is needed to run, train and export the model.
    Whole,
}

/// Told of each file its name, the bytes that are here and those that it has; answers whether to go
/// on.
pub type OnBytes<'a> = dyn FnMut(&str, u64, u64) -> bool + 'a;

/// The folder of a model in the cache, where what is wanted is put if it is not there.
///
/// # Errors
/// [`Error::Invalid`] if the model, or a file that it needs, does not exist, may not be read, or is
/// not in the cache that must suffice; [`Error::Hub`] if the network or the server fails: what has
/// come is kept, and the next call goes on there; [`Error::Interrupted`]; [`Error::Io`].
pub fn fetch(
    name: &HubName,
    want: Want,
    options: &HubOptions,
    on_bytes: &mut OnBytes<'_>,
) -> Result<PathBuf> {
    let cache = Cache::new(options.cache.clone()).repo(name.repo());
    if options.offline {
        return cached(name, want, options, &cache);
    }
    let client = Client::new(name, options, &cache);
    let (commit, files) = client.listing()?;
    let snapshot = cache.pointer_path(&commit);
    let has = |file: &str| files.iter().any(|f| f == file);
    let mut bring = |file: &str| client.bring(&commit, file, on_bytes);
    if !has(CONFIG) {
        return Err(Error::Invalid(format!(
            "`{name}` on {} has no {CONFIG}; give a repository with a model in the Hugging Face \
             layout",
            options.endpoint
        )));
    }
    bring(CONFIG)?;
    if want == Want::Whole {
        // The weights come last: where they are, the rest is too.
        let weights = match (has(SINGLE), has(INDEX)) {
            (true, _) => SINGLE,
            (false, true) => INDEX,
            (false, false) => {
                return Err(Error::Invalid(format!(
                    "`{name}` on {} has no safetensors, neither `{SINGLE}` nor `{INDEX}`; give a \
                     revision that has them, or convert its weights",
                    options.endpoint
                )));
            }
        };
        for file in files.iter().filter(|file| is_side_file(file)) {
            bring(file)?;
        }
        bring(weights)?;
        if weights == INDEX {
            for shard in shards(&read_index(&snapshot.join(INDEX))?) {
                bring(shard)?;
            }
        }
    }
    remember(name, options, &cache, &commit)?;
    Ok(snapshot)
}

/// Lets a branch or tag mean a commit in the cache.
fn remember(name: &HubName, options: &HubOptions, cache: &CacheRepo, commit: &str) -> Result<()> {
    if commit == name.revision() {
        return Ok(());
    }
    let reference = reference(name, &options.cache);
    cache
        .create_ref(commit)
        .map_err(|e| Error::io(reference, e))
}

/// The file in the cache that says which commit a branch or tag is.
fn reference(name: &HubName, cache: &Path) -> PathBuf {
    let folder = cache.join(name.repo().folder_name());
    folder.join("refs").join(name.revision())
}

/// The folder where the files of a revision are in the cache, or would be.
pub fn snapshot(name: &HubName, cache: &Path) -> PathBuf {
    let commit = std::fs::read_to_string(reference(name, cache)).ok();
    let commit = commit.as_deref().map_or(name.revision(), str::trim);
    Cache::new(cache.to_owned())
        .repo(name.repo())
        .pointer_path(commit)
}

/// Chooses of the names of all files, and by what [`README`] says, the files that are wanted.
pub type Choose<'a> = dyn Fn(&[String], Option<&str>) -> Vec<String> + 'a;

/// The folder of a data set in the cache, where the files that are wanted are put if they are not
/// there.
///
/// # Errors
/// As [`fetch`]; [`Error::Invalid`] if no file is wanted, or there may be no download.
pub fn fetch_files(
    name: &HubName,
    options: &HubOptions,
    choose: &Choose<'_>,
    on_bytes: &mut OnBytes<'_>,
) -> Result<PathBuf> {
    if options.offline {
        return Err(Error::Invalid(format!(
            "HF_HUB_OFFLINE is set, and the cache `{}` lacks files of the data set `{name}`; unset it \
             to download",
            options.cache.display()
        )));
    }
    let cache = Cache::new(options.cache.clone()).repo(name.repo());
    let client = Client::new(name, options, &cache);
    let (commit, mut files) = client.listing()?;
    files.retain(|file| is_inside(file));
    let snapshot = cache.pointer_path(&commit);
    let mut bring = |file: &str| client.bring(&commit, file, on_bytes);
    let mut readme = None;
    if files.iter().any(|file| file == README) {
        bring(README)?;
        let path = snapshot.join(README);
        readme = Some(std::fs::read_to_string(&path).map_err(|e| Error::io(path, e))?);
    }
    let wanted = choose(&files, readme.as_deref());
    if wanted.is_empty() {
        return Err(Error::Invalid(format!(
            "`{name}` on {} has none of the wanted files among its {}; give another data set or \
             revision, or the files themselves",
            options.endpoint,
            files.len()
        )));
    }
    for file in &wanted {
        bring(file)?;
    }
    remember(name, options, &cache, &commit)?;
    Ok(snapshot)
}

/// Whether a path stays in the folder that it is put into.
fn is_inside(file: &str) -> bool {
    let mut words = Path::new(file).components();
    words.all(|word| matches!(word, Component::Normal(_)))
}

fn is_side_file(file: &str) -> bool {
    // Program text that `auto_map` names: a dense export needs it where the original does.
    let program = file.ends_with(".py");
    !file.contains('/') && (program || SIDE_FILES.iter().any(|side| file.starts_with(side)))
}

/// What the cache holds, if it is enough. A revision is a reference to a commit, or the commit.
fn cached(name: &HubName, want: Want, options: &HubOptions, cache: &CacheRepo) -> Result<PathBuf> {
    let config = cache
        .get(CONFIG)
        .unwrap_or_else(|| cache.pointer_path(name.revision()).join(CONFIG));
    let snapshot = config.parent().unwrap_or(&config).to_owned();
    let missing = match config.exists() {
        false => Some(CONFIG.to_owned()),
        true if want == Want::Whole => missing_weights(&snapshot)?,
        true => None,
    };
    match missing {
        None => Ok(snapshot),
        Some(file) => Err(Error::Invalid(format!(
            "HF_HUB_OFFLINE is set, and the cache `{}` lacks `{file}` of `{name}`; unset it to \
             download",
            options.cache.display()
        ))),
    }
}

/// The first file of weights that a snapshot lacks.
fn missing_weights(snapshot: &Path) -> Result<Option<String>> {
    let index = snapshot.join(INDEX);
    if snapshot.join(SINGLE).exists() {
        return Ok(None);
    }
    if !index.exists() {
        return Ok(Some(SINGLE.to_owned()));
    }
    let index = read_index(&index)?;
    let missing = shards(&index)
        .into_iter()
        .find(|shard| !snapshot.join(shard).exists());
    Ok(missing.map(str::to_owned))
}
