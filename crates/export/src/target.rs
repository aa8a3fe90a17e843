//! Where an export may be written.

use crate::card::MARKER;
use crate::{Error, Result};
use lightmoe_models::folder;
use std::fs;
use std::path::Path;

/// Refuses a target whose replacement would lose something: a file, a folder that holds the source,
/// and a folder that is neither empty nor an earlier export (known by its card).
pub(crate) fn check(source: &Path, target: &Path) -> Result<()> {
    let fail = |message: &str| Error::Target {
        path: target.to_owned(),
        message: message.to_owned(),
    };
    // What a killed export left half moved is first put back, so that it is seen here.
    folder::recover(target)?;
    let Ok(real) = target.canonicalize() else {
        return Ok(());
    };
    let entries = match fs::read_dir(&real) {
        Ok(mut entries) => entries.next(),
        Err(_) => {
            return Err(fail(
                "is no folder that can be read; give another path, or a new one",
            ));
        }
    };
    if source.canonicalize().is_ok_and(|s| s.starts_with(&real)) {
        return Err(fail(
            "holds the checkpoint to export; choose another folder",
        ));
    }
    let card = fs::read_to_string(real.join("README.md")).unwrap_or_default();
    if entries.is_some() && !card.contains(MARKER) {
        return Err(fail(
            "is not empty and holds no earlier export; choose another folder, or empty it first",
        ));
    }
    Ok(())
}
