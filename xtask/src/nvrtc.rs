//! CUDA's compiler as a library, an ordinary package of Python's registry: with it the CUDA kernels are
//! compiled on a machine without a GPU.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use crate::wheels;

const PACKAGE: &str = "nvidia-cuda-nvrtc==13.0.88";
const LIBRARY: &str = "nvidia/cu13/lib";

/// The folder of NVRTC's library, brought into the target folder at first use.
///
/// # Errors
/// If it cannot be had, with the reason.
pub fn folder() -> Result<PathBuf, String> {
    let name = format!("nvrtc/{}", PACKAGE.replace("==", "-"));
    let library = wheels::folder(&name, &[PACKAGE])?.join(LIBRARY);
    match library.exists() {
        true => Ok(library),
        false => Err(format!("{PACKAGE} has no `{LIBRARY}` here")),
    }
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
