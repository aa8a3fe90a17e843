//! CUDA's compiler as a library, an ordinary package of Python's registry: with it the CUDA kernels are
//! compiled on a machine without a GPU.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{shell, wheels};

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
pub fn bring(command: &mut Command, library: &Path) {
    shell::find_libraries(command, library).env("LIGHTMOE_NVRTC", "1");
}
