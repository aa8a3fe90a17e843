//! Files of JSON whose layout has a version.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::Path;

/// What every such file begins with.
#[derive(Deserialize)]
struct Head {
    schema_version: u32,
}

/// Reads the file at `path`, whose layout must have this `version`; `advice` says what to do about a file
/// that cannot be used.
///
/// # Errors
/// If it cannot be read, is no such file, or is of another version.
pub(crate) fn load<T: DeserializeOwned>(path: &Path, version: u32, advice: &str) -> Result<T> {
    let name = path.display();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read `{name}`; check the path"))?;
    let damaged = || format!("`{name}` is damaged or another file; {advice}");
    // The version first: another one may have other fields.
    let head: Head = serde_json::from_str(&text).with_context(damaged)?;
    ensure!(
        head.schema_version == version,
        "`{name}` has schema version {}, expected {version}; {advice}",
        head.schema_version
    );
    serde_json::from_str(&text).with_context(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    struct File {
        schema_version: u32,
        word: String,
    }

    #[test]
    fn what_cannot_be_used_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.json");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            load::<File>(&path, 2, "remove it").map_err(|error| error.to_string())
        };
        let file = load(r#"{"schema_version": 2, "word": "w"}"#).unwrap();
        assert_eq!((file.schema_version, file.word.as_str()), (2, "w"));
        for (text, said) in [
            ("{", "is damaged"),
            (r#"{"schema_version": 2}"#, "is damaged"),
            // Of another layout, too.
            (r#"{"schema_version": 3}"#, "schema version 3, expected 2"),
        ] {
            let error = load(text).unwrap_err();
            assert!(
                error.contains(said) && error.contains("remove it"),
                "{error}"
            );
            assert!(error.contains("file.json"), "{error}");
        }
    }
}
