//! Packages of Python's registry, unpacked without installing them: the parts of CUDA come as such, for
//! machines without a toolkit.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use crate::shell;

/// Unpacks `packages` (`name==version`) into the folder `name` of the target folder, at first use, and
/// gives its path.
///
/// # Errors
/// If they cannot be had, with the reason.
pub fn folder(name: &str, packages: &[&str]) -> Result<PathBuf, String> {
    let home = shell::target().join(name);
    if home.exists() {
        return Ok(home);
    }
    let python = env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    // Of this process alone, and moved to its place when it is whole.
    let work = shell::target().join(format!("wheels-{}", process::id()));
    let result = unpack(&python, &work, packages).and_then(|unpacked| {
        let parent = home.parent().unwrap_or(&home);
        fs::create_dir_all(parent)
            .and_then(|()| fs::rename(&unpacked, &home))
            // Another process may have been faster.
            .or_else(|e| if home.exists() { Ok(()) } else { Err(e) })
            .map_err(|e| {
                format!(
                    "cannot move what was unpacked to `{}` ({e})",
                    home.display()
                )
            })
    });
    let _ = fs::remove_dir_all(&work);
    result.map(|()| home)
}

/// Downloads the packages and unpacks them in `work`.
fn unpack(python: &OsStr, work: &Path, packages: &[&str]) -> Result<PathBuf, String> {
    let mut download = Command::new(python);
    download.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--retries",
        "1",
        "--timeout",
        "20",
    ]);
    download.args(["--no-deps", "--only-binary=:all:"]);
    download.arg("--dest").arg(work).args(packages);
    if !shell::succeeds(&mut download)? {
        return Err(format!(
            "`pip download {}` failed; name a Python that has pip with PYTHON",
            packages.join(" ")
        ));
    }
    let unpacked = work.join("unpacked");
    let files =
        fs::read_dir(work).map_err(|e| format!("cannot read `{}` ({e})", work.display()))?;
    for wheel in files.flatten().map(|entry| entry.path()) {
        if wheel.extension().is_none_or(|e| e != "whl") {
            continue;
        }
        let mut unpack = Command::new(python);
        unpack
            .args(["-m", "zipfile", "-e"])
            .arg(&wheel)
            .arg(&unpacked);
        if !shell::succeeds(&mut unpack)? {
            return Err(format!("cannot unpack `{}`", wheel.display()));
        }
    }
    Ok(unpacked)
}
