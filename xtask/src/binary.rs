//! `compress`, `pretrain` and others: the release binary, built when it is not up to date.

use std::path::PathBuf;
use std::process::Command;

use crate::{Outcome, shell};

/// Builds the release binary, quietly, and gives its path.
pub fn build() -> Result<PathBuf, String> {
    let name = format!("lightmoe{}", std::env::consts::EXE_SUFFIX);
    let path = shell::target().join("release").join(name);
    if !path.exists() {
        eprintln!("Building `lightmoe`; the first time takes some minutes.");
    }
    let mut build = shell::cargo(&[
        "build",
        "--release",
        "--quiet",
        "--workspace",
        "--bin",
        "lightmoe",
    ]);
    if shell::succeeds(&mut build)? {
        Ok(path)
    } else {
        Err("`lightmoe` does not build; see the messages above".to_owned())
    }
}

/// Runs the release binary in the caller's folder with `command` and then `arguments`.
pub fn run(command: &[&str], arguments: &[String]) -> Outcome {
    let mut binary = Command::new(build()?);
    binary.args(command).args(arguments);
    shell::replace(binary)
}
