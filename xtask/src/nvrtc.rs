//! CUDA's compiler as a library, an ordinary package of Python's registry: with it the CUDA kernels are
//! compiled on a machine without a GPU.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use crate::shell;

const PACKAGE: &str = "nvidia-cuda-nvrtc==13.0.88";
const LIBRARY: &str = "nvidia/cu13/lib";

/// The folder of NVRTC's library, brought into the target folder at first use.
///
/// # Errors
/// If it cannot be had, with the reason.
pub fn folder() -> Result<PathBuf, String> {
    let home = shell::target()
        .join("nvrtc")
        .join(PACKAGE.replace("==", "-"));
    let library = home.join(LIBRARY);
    if library.exists() {
        return Ok(library);
    }
    let python = env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    // Of this process alone, and moved to its place when it is whole.
    let work = shell::target().join(format!("nvrtc-{}", process::id()));
    let result = unpack(&python, &work).and_then(|unpacked| {
        let parent = home.parent().unwrap_or(&home);
        fs::create_dir_all(parent)
            .and_then(|()| fs::rename(&unpacked, &home))
            // Another process may have been faster.
            .or_else(|e| if library.exists() { Ok(()) } else { Err(e) })
            .map_err(|e| {
                format!(
                    "cannot move what was unpacked to `{}` ({e})",
                    home.display()
                )
            })
    });
    let _ = fs::remove_dir_all(&work);
    result?;
    if !library.exists() {
        return Err(format!("{PACKAGE} has no `{LIBRARY}` here"));
    }
    Ok(library)
}

/// Downloads the package and unpacks it in `work`.
fn unpack(python: &OsStr, work: &Path) -> Result<PathBuf, String> {
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
    download.arg("--dest").arg(work).arg(PACKAGE);
    if !shell::succeeds(&mut download)? {
        return Err(format!(
            "`pip download {PACKAGE}` failed; name a Python that has pip with PYTHON"
        ));
    }
    let wheel = fs::read_dir(work)
        .map_err(|e| format!("cannot read `{}` ({e})", work.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| format!("no wheel in `{}`", work.display()))?;
    let unpacked = work.join("unpacked");
    let mut unpack = Command::new(python);
    unpack
        .args(["-m", "zipfile", "-e"])
        .arg(&wheel)
        .arg(&unpacked);
    if !shell::succeeds(&mut unpack)? {
        return Err(format!("cannot unpack `{}`", wheel.display()));
    }
    Ok(unpacked)
}

/// Lets a command find NVRTC, and tells it that it must.
pub fn bring(command: &mut Command, library: PathBuf) {
    let given = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let folders = std::iter::once(library).chain(env::split_paths(&given));
    if let Ok(path) = env::join_paths(folders) {
        command
            .env("LD_LIBRARY_PATH", path)
            .env("LIGHTMOE_NVRTC", "1");
    }
}
