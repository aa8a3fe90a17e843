//! CUDA's compiler as a library, an ordinary package of Python's registry: with it the CUDA kernels are
//! compiled on a machine without a GPU.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

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
    let wheels = shell::target().join("nvrtc").join("wheels");
    let mut download = Command::new(&python);
    download.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]);
    download.arg("--dest").arg(&wheels).arg(PACKAGE);
    if !shell::succeeds(&mut download)? {
        return Err(format!("`pip download {PACKAGE}` failed"));
    }
    let wheel = fs::read_dir(&wheels)
        .map_err(|e| format!("cannot read `{}` ({e})", wheels.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| format!("no wheel in `{}`", wheels.display()))?;
    // Unpacked beside its place, so that half a package is not taken for one.
    let unpacked = shell::target().join("nvrtc").join("unpacked");
    let _ = fs::remove_dir_all(&unpacked);
    let mut unpack = Command::new(&python);
    unpack
        .args(["-m", "zipfile", "-e"])
        .arg(&wheel)
        .arg(&unpacked);
    if !shell::succeeds(&mut unpack)? {
        return Err(format!("cannot unpack `{}`", wheel.display()));
    }
    fs::rename(&unpacked, &home)
        .and_then(|()| fs::remove_dir_all(&wheels))
        .map_err(|e| {
            format!(
                "cannot move what was unpacked to `{}` ({e})",
                home.display()
            )
        })?;
    Ok(library)
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
