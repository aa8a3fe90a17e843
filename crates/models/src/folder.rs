//! Writes that a reader never sees half done: into a temporary sibling, synced, then renamed.

use crate::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |e| Error::io(path, e)
}

fn sibling(target: &Path, suffix: &str) -> PathBuf {
    let name = target
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    target.with_file_name(format!(".{name}.{suffix}"))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(io(path))
}

/// Writes a whole file: temporary sibling, sync, rename.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::create_dir_all(parent(path)).map_err(io(path))?;
    let temporary = sibling(path, "partial");
    let mut file = File::create(&temporary).map_err(io(&temporary))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(io(&temporary))?;
    fs::rename(&temporary, path).map_err(io(path))?;
    sync_folder(parent(path))
}

/// A folder under construction. Dropped without [`PartialFolder::commit`], it is removed.
pub struct PartialFolder {
    target: PathBuf,
    partial: PathBuf,
    committed: bool,
}

impl PartialFolder {
    /// Begins a folder that will appear at `target`; what an earlier, killed run left is removed.
    pub fn new(target: &Path) -> Result<Self> {
        let partial = sibling(target, "partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(io(&partial))?;
        }
        fs::create_dir_all(&partial).map_err(io(&partial))?;
        Ok(Self {
            target: target.to_owned(),
            partial,
            committed: false,
        })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Syncs every file and puts the folder in its place, replacing what stood there.
    pub fn commit(mut self) -> Result<()> {
        for entry in fs::read_dir(&self.partial).map_err(io(&self.partial))? {
            let path = entry.map_err(io(&self.partial))?.path();
            File::open(&path)
                .and_then(|f| f.sync_all())
                .map_err(io(&path))?;
        }
        sync_folder(&self.partial)?;
        // A folder cannot replace a folder in one step: the old one steps aside first, and a kill in
        // between leaves it under its other name, never a mixture.
        let old = sibling(&self.target, "old");
        if old.exists() {
            fs::remove_dir_all(&old).map_err(io(&old))?;
        }
        if self.target.exists() {
            fs::rename(&self.target, &old).map_err(io(&self.target))?;
        }
        fs::rename(&self.partial, &self.target).map_err(io(&self.target))?;
        self.committed = true;
        sync_folder(parent(&self.target))?;
        if old.exists() {
            fs::remove_dir_all(&old).map_err(io(&old))?;
        }
        Ok(())
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: the next run removes what is left.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}
