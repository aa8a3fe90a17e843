//! Models and data sets on the Hugging Face Hub: what the environment says of it, and a bar for each
//! file.

use crate::preflight::Refused;
use crate::progress::Progress;
use anyhow::Result;
use lightmoe_models::Error;
use lightmoe_models::hub::{
    Choose, HubName, HubOptions, OnBytes, Want, fetch, fetch_files, snapshot,
};
use std::path::PathBuf;
use std::time::Duration;

/// The folder of a model on the Hub in the cache; what is wanted of it is downloaded if need be.
///
/// # Errors
/// [`Refused`] if there is no such model, or it may not be read; if the download fails.
pub fn download(name: &HubName, want: Want) -> Result<PathBuf> {
    shown(&mut |on_bytes| fetch(name, want, &from_environment(), on_bytes))
}

/// Brings the files of a data set that `choose` names into the cache; their folder.
///
/// # Errors
/// [`Refused`] if there is no such data set or none of its files is wanted, or it may not be read; if
/// the download fails.
pub fn download_files(name: &HubName, choose: &Choose<'_>) -> Result<PathBuf> {
    shown(&mut |on_bytes| fetch_files(name, &from_environment(), choose, on_bytes))
}

/// Where the files of a data set are in the cache, or would be.
pub fn cached(name: &HubName) -> PathBuf {
    snapshot(name, &from_environment().cache)
}

/// Downloads with a bar for each file.
fn shown(
    download: &mut dyn FnMut(&mut OnBytes<'_>) -> lightmoe_models::Result<PathBuf>,
) -> Result<PathBuf> {
    let mut bar: Option<(String, Progress)> = None;
    let folder = download(&mut |file, done, all| {
        if bar.as_ref().is_none_or(|(of, _)| of != file) {
            drop(bar.take());
            bar = Some((file.to_owned(), Progress::bytes(file, all as usize)));
        }
        bar.as_ref()
            .is_none_or(|(_, bar)| bar.of(done as usize, all as usize))
    });
    folder.map_err(|e| match e {
        Error::Invalid(message) => Refused(message).into(),
        other => other.into(),
    })
}

fn from_environment() -> HubOptions {
    options(&|key| std::env::var(key).ok())
}

/// The variables that Hugging Face's own library reads, read as it does.
fn options(variable: &dyn Fn(&str) -> Option<String>) -> HubOptions {
    let first = |keys: &[&str]| {
        keys.iter()
            .find_map(|k| variable(k).filter(|v| !v.is_empty()))
    };
    let is_true = |keys: &[&str]| {
        let value = first(keys).unwrap_or_default().to_uppercase();
        ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
    };
    let user = std::env::home_dir().unwrap_or_default();
    let path = |keys: &[&str]| {
        first(keys).map(|text| match text.strip_prefix("~/") {
            Some(rest) => user.join(rest),
            None => PathBuf::from(text),
        })
    };
    let home = path(&["HF_HOME"]).unwrap_or_else(|| {
        let caches = path(&["XDG_CACHE_HOME"]).unwrap_or_else(|| user.join(".cache"));
        caches.join("huggingface")
    });
    let token = first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).or_else(|| {
        let file = path(&["HF_TOKEN_PATH"]).unwrap_or_else(|| home.join("token"));
        std::fs::read_to_string(file).ok()
    });
    let endpoint = first(&["HF_ENDPOINT"]).unwrap_or_else(|| "https://huggingface.co".into());
    let seconds = first(&["HF_HUB_DOWNLOAD_TIMEOUT"]).and_then(|s| s.parse().ok());
    HubOptions {
        endpoint: endpoint.trim_end_matches('/').to_owned(),
        cache: path(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).unwrap_or_else(|| home.join("hub")),
        token: token
            .map(|t| t.replace(['\r', '\n'], "").trim().to_owned())
            .filter(|t| !t.is_empty() && !is_true(&["HF_HUB_DISABLE_IMPLICIT_TOKEN"])),
        offline: is_true(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]),
        timeout: Duration::from_secs(seconds.filter(|&s| s > 0).unwrap_or(10)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(set: &[(&str, &str)]) -> HubOptions {
        options(&|key| Some(set.iter().find(|(k, _)| *k == key)?.1.to_owned()))
    }

    #[test]
    fn nothing_set_means_the_hub_and_the_home_folder() {
        let (options, home) = (with(&[("HF_TOKEN_PATH", "/none")]), std::env::home_dir());
        assert_eq!(options.endpoint, "https://huggingface.co");
        assert_eq!(options.cache, home.unwrap().join(".cache/huggingface/hub"));
        assert_eq!((options.token, options.offline), (None, false));
        assert_eq!(options.timeout, Duration::from_secs(10));
    }

    #[test]
    fn the_narrower_variable_counts() {
        let cache = |set: &[(&str, &str)]| with(set).cache;
        let (xdg, home) = (("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h"));
        assert_eq!(cache(&[xdg]), PathBuf::from("/x/huggingface/hub"));
        assert_eq!(cache(&[xdg, home]), PathBuf::from("/h/hub"));
        assert_eq!(cache(&[home, ("HF_HUB_CACHE", "/c")]), PathBuf::from("/c"));
        assert_eq!(
            cache(&[("HF_HUB_CACHE", "~/c")]),
            std::env::home_dir().unwrap().join("c")
        );
    }

    #[test]
    fn the_token_is_the_variable_or_else_the_file() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "of-file\n").unwrap();
        let home = ("HF_HOME", folder.path().to_str().unwrap());
        assert_eq!(with(&[home]).token.unwrap(), "of-file");
        assert_eq!(with(&[home, ("HF_TOKEN", " it ")]).token.unwrap(), "it");
        let disabled = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
        assert_eq!(with(&[home, disabled]).token, None);
    }

    #[test]
    fn offline_takes_the_words_of_python() {
        for (word, offline) in [
            ("1", true),
            ("on", true),
            ("Yes", true),
            ("TRUE", true),
            ("0", false),
            ("", false),
            ("no", false),
        ] {
            assert_eq!(with(&[("HF_HUB_OFFLINE", word)]).offline, offline, "{word}");
        }
        let options = with(&[
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "3"),
        ]);
        assert_eq!(options.endpoint, "http://mirror");
        assert_eq!(options.timeout, Duration::from_secs(3));
    }
}
