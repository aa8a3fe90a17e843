//! Writes that a reader never sees half done: into a temporary sibling, synced, then renamed.

use crate::{Error, Result};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |e| Error::io(path, e)
}

/// `.<name>.<suffix>` beside `target`.
fn sibling(target: &Path, suffix: &str) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        return Err(Error::Invalid(format!(
            "`{}` does not end in a name; give the path of a file or folder",
            target.display()
        )));
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".");
    hidden.push(suffix);
    Ok(target.with_file_name(hidden))
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
    let temporary = sibling(path, "partial")?;
    fs::create_dir_all(parent(path)).map_err(io(path))?;
    let mut file = File::create(&temporary).map_err(io(&temporary))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(io(&temporary))?;
    fs::rename(&temporary, path).map_err(io(path))?;
    sync_folder(parent(path))
}

/// Refuses what cannot fit the file system on which `target`, a file or folder that may not be there yet,
/// is to have `needed` bytes more.
///
/// # Errors
/// [`Error::Invalid`] with both sizes; [`Error::Io`] if the file system cannot be asked.
pub fn check_room(target: &Path, needed: u64) -> Result<()> {
    let place = target.ancestors().find(|place| place.exists());
    let place = place.unwrap_or(Path::new("."));
    let found = rustix::fs::statvfs(place).map_err(|e| Error::io(place, e.into()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if needed <= free {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(Error::Invalid(format!(
        "`{}` needs {:.2} GiB, but its file system has {:.2} GiB left; free some, or give another \
         folder",
        target.display(),
        gib(needed),
        gib(free)
    )))
}

/// The earlier version of `target` that a kill between the two renames of
/// [`PartialFolder::commit`] left under its other name.
pub fn abandoned(target: &Path) -> Option<PathBuf> {
    let old = sibling(target, "old").ok()?;
    (old.is_dir() && !target.exists()).then_some(old)
}

/// Ends what a kill in the middle of [`PartialFolder::commit`] left open: the earlier version
/// returns to `target` if nothing stands there, otherwise it is removed. Only who writes `target`
/// may call this: a reader would race the writer. Returns whether the earlier version came back.
pub fn recover(target: &Path) -> Result<bool> {
    let old = sibling(target, "old")?;
    if abandoned(target).is_some() {
        fs::rename(&old, target).map_err(io(&old))?;
        sync_folder(parent(target))?;
        return Ok(true);
    }
    if old.exists() {
        fs::remove_dir_all(&old).map_err(io(&old))?;
    }
    Ok(false)
}

/// A folder under construction. Dropped without [`PartialFolder::commit`] or
/// [`PartialFolder::keep`], it is removed.
pub struct PartialFolder {
    target: PathBuf,
    partial: PathBuf,
    old: PathBuf,
    /// Not to be thrown away: every file is written and synced, or another run goes on with it.
    kept: bool,
}

impl PartialFolder {
    /// Begins a folder that will appear at `target`, where a link is followed. What an earlier,
    /// killed run left is removed or, if it is the only version of `target`, put back.
    pub fn new(target: &Path) -> Result<Self> {
        let folder = Self::resume(target)?;
        if folder.partial.exists() {
            fs::remove_dir_all(&folder.partial).map_err(io(&folder.partial))?;
        }
        fs::create_dir_all(&folder.partial).map_err(io(&folder.partial))?;
        Ok(folder)
    }

    /// The same with what an earlier run left under construction still in it, if anything.
    pub fn resume(target: &Path) -> Result<Self> {
        let target = match fs::symlink_metadata(target) {
            Ok(found) if found.is_symlink() => fs::canonicalize(target).map_err(io(target))?,
            _ => target.to_owned(),
        };
        recover(&target)?;
        if target.exists() && !target.is_dir() {
            return Err(Error::Invalid(format!(
                "`{}` is no folder; give the path of a folder, or of a new one",
                target.display()
            )));
        }
        let (partial, old) = (sibling(&target, "partial")?, sibling(&target, "old")?);
        fs::create_dir_all(&partial).map_err(io(&partial))?;
        Ok(Self {
            target,
            partial,
            old,
            kept: false,
        })
    }

    /// Leaves the folder as it is under its hidden name, for a run that goes on with it.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Where the folder will stand.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Syncs every file and puts the folder in its place, replacing what stood there. If that place
    /// cannot be had, the error names where the finished folder is kept.
    pub fn commit(&mut self) -> Result<()> {
        for entry in fs::read_dir(&self.partial).map_err(io(&self.partial))? {
            let path = entry.map_err(io(&self.partial))?.path();
            File::open(&path)
                .and_then(|f| f.sync_all())
                .map_err(io(&path))?;
        }
        sync_folder(&self.partial)?;
        self.kept = true;
        // A folder cannot replace a folder in one step: the old one steps aside first, and a kill in
        // between leaves it under its other name, never a mixture; see `recover`.
        self.step_aside()?;
        self.step_in()?;
        sync_folder(parent(&self.target))?;
        // Best effort: the new folder stands, and the next run removes what is left of the old.
        let _ = fs::remove_dir_all(&self.old);
        Ok(())
    }

    fn step_aside(&self) -> Result<()> {
        if self.target.exists() {
            fs::rename(&self.target, &self.old).map_err(|e| self.kept(&e))?;
        }
        Ok(())
    }

    fn step_in(&self) -> Result<()> {
        fs::rename(&self.partial, &self.target).map_err(|e| {
            // The old version first: it may be in use.
            let _ = recover(&self.target);
            self.kept(&e)
        })
    }

    fn kept(&self, e: &std::io::Error) -> Error {
        Error::Invalid(format!(
            "the finished folder cannot be moved to `{}`: {e}; it is kept as `{}`, move it yourself",
            self.target.display(),
            self.partial.display()
        ))
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.kept {
            // Best effort: the next run removes what is left.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(folder: &Path) -> String {
        fs::read_to_string(folder.join("a")).unwrap()
    }

    fn begin(target: &Path, content: &str) -> PartialFolder {
        let folder = PartialFolder::new(target).unwrap();
        fs::write(folder.path().join("a"), content).unwrap();
        folder
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_commit_replaces_the_whole_folder_and_leaves_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("deep/out");
        begin(&target, "one").commit().unwrap();
        fs::write(target.join("b"), "stays behind").unwrap();
        begin(&target, "two").commit().unwrap();
        assert_eq!(text(&target), "two");
        assert_eq!(names(&target), ["a"]);
        assert_eq!(names(target.parent().unwrap()), ["out"]);
    }

    #[test]
    fn a_drop_removes_the_partial_folder_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        begin(&target, "one").commit().unwrap();
        drop(begin(&target, "two"));
        assert_eq!(text(&target), "one");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn leftovers_of_a_killed_run_are_cleared() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let killed = begin(&target, "half");
        fs::write(killed.path().join("b"), "rest").unwrap();
        std::mem::forget(killed);
        assert_eq!(names(root.path()), [".out.partial"]);
        begin(&target, "whole").commit().unwrap();
        assert_eq!(names(&target), ["a"]);
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn a_kill_between_the_renames_loses_nothing() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        begin(&target, "one").commit().unwrap();
        let killed = begin(&target, "two");
        killed.step_aside().unwrap();
        std::mem::forget(killed);
        assert_eq!(names(root.path()), [".out.old", ".out.partial"]);
        assert_eq!(abandoned(&target).unwrap(), root.path().join(".out.old"));
        // The next run brings the old version back before it writes anything, and keeps it if it
        // dies in its turn.
        drop(begin(&target, "three"));
        assert_eq!(text(&target), "one");
        assert_eq!(names(root.path()), ["out"]);
        assert!(!recover(&target).unwrap() && abandoned(&target).is_none());
    }

    #[test]
    fn a_kill_after_the_renames_keeps_the_new_version() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        begin(&target, "one").commit().unwrap();
        let killed = begin(&target, "two");
        killed.step_aside().unwrap();
        killed.step_in().unwrap();
        std::mem::forget(killed);
        assert_eq!(names(root.path()), [".out.old", "out"]);
        assert!(!recover(&target).unwrap());
        assert_eq!(text(&target), "two");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn a_failed_move_restores_the_old_version() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        begin(&target, "one").commit().unwrap();
        let folder = begin(&target, "two");
        folder.step_aside().unwrap();
        fs::remove_dir_all(folder.path()).unwrap();
        folder.step_in().unwrap_err();
        assert_eq!(text(&target), "one");
    }

    #[test]
    fn a_finished_folder_without_a_place_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let mut folder = begin(&target, "two");
        // A file where the folder is to go, come up in the meantime.
        fs::write(&target, "in the way").unwrap();
        fs::create_dir(root.path().join(".out.old")).unwrap();
        let message = folder.commit().unwrap_err().to_string();
        let kept = root.path().join(".out.partial");
        assert!(message.contains(&*kept.to_string_lossy()), "{message}");
        assert_eq!(text(&kept), "two");
    }

    #[test]
    fn what_cannot_be_a_folder_is_refused_at_once() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        write_file(&file, b"x").unwrap();
        for target in [file.as_path(), Path::new("/"), Path::new("..")] {
            let message = PartialFolder::new(target).err().unwrap().to_string();
            assert!(message.contains("give the path"), "{message}");
        }
        assert_eq!(names(root.path()), ["file"]);
    }

    #[test]
    fn a_link_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let (real, link) = (root.path().join("disk/real"), root.path().join("link"));
        fs::create_dir_all(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        begin(&link, "one").commit().unwrap();
        assert_eq!(text(&real), "one");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("new/a");
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(path.parent().unwrap()), ["a"]);
    }

    #[test]
    fn what_cannot_fit_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("new/folder");
        for place in [target.as_path(), Path::new("new/folder")] {
            check_room(place, 0).unwrap();
            let message = check_room(place, u64::MAX).unwrap_err().to_string();
            assert!(
                message.contains("new/folder` needs 17179869184.00 GiB"),
                "{message}"
            );
        }
        assert!(!root.path().join("new").exists());
    }
}
