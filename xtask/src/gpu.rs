//! `gpu`: one folder with all that a machine with a GPU needs to check the CUDA kernels and to time
//! them. That machine needs a driver and NVRTC, and no Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::{Outcome, no_arguments, shell};

const SCRIPTS: [(&str, &str); 2] = [
    ("run.sh", include_str!("gpu_run.sh")),
    ("peers.py", include_str!("gpu_peers.py")),
];
/// What is built: a name in the folder, and what cargo's line about it contains.
const BINARIES: [(&str, &str); 2] = [
    ("tests", "deps/lightmoe_kernels-"),
    ("bench", "benches/cuda/main.rs"),
];
/// What a bundle may weigh, so that it can be carried anywhere.
const LIMIT: u64 = 64 << 20;

/// Builds the folder and tells how it is used.
pub fn run(arguments: &[String]) -> Outcome {
    no_arguments(arguments)?;
    let folder = shell::target().join("gpu");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(|e| format!("cannot make `{}` ({e})", folder.display()))?;
    let mut size = 0;
    for (name, built) in BINARIES
        .iter()
        .zip(build()?)
        .map(|((name, _), path)| (name, path))
    {
        size += copy(&built, &folder.join(name))?;
    }
    for (name, text) in SCRIPTS {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|e| format!("cannot write `{}` ({e})", path.display()))?;
        size += text.len() as u64;
    }
    if size > LIMIT {
        return Err(format!("the bundle has {size} bytes, more than {LIMIT}"));
    }
    eprintln!(
        "{} ({:.1} MiB)\nOn a machine with a GPU: bash {}/run.sh",
        folder.display(),
        size as f64 / f64::from(1 << 20),
        folder.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// The binaries, in the order of [`BINARIES`].
fn build() -> Result<Vec<PathBuf>, String> {
    let mut build = shell::cargo(&[
        "test",
        "--package",
        "lightmoe-kernels",
        "--release",
        "--features",
        "cuda",
        "--no-run",
        "--lib",
        "--bench",
        "cuda",
    ]);
    let output = build
        .output()
        .map_err(|e| shell::cannot_start(&build, &e))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("the build failed:\n{messages}"));
    }
    let find = |source: &str| {
        let line = messages.lines().find(|line| line.contains(source));
        let path = line.and_then(|line| line.split_once('(')?.1.strip_suffix(')'));
        path.map(|path| shell::root().join(path))
            .ok_or_else(|| format!("cargo does not tell where `{source}` is:\n{messages}"))
    };
    BINARIES.iter().map(|(_, source)| find(source)).collect()
}

fn copy(from: &Path, to: &Path) -> Result<u64, String> {
    fs::copy(from, to).map_err(|e| format!("cannot copy `{}` ({e})", from.display()))
}
