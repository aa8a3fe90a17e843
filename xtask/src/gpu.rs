//! `gpu`: one folder with all that a machine with a GPU needs to check the CUDA kernels and whole models, and
//! to time both. That machine needs a driver and NVRTC, for tensors and models CUDA's libraries too, and no Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::{Outcome, cuda, no_arguments, shell};

const SCRIPTS: [(&str, &str); 3] = [
    ("run.sh", include_str!("gpu_run.sh")),
    ("peers.py", include_str!("gpu_peers.py")),
    ("models.py", include_str!("gpu_models.py")),
];
/// What the model that is timed is made of: a name in the folder, and the file.
const MODEL: [(&str, &str); 3] = [
    ("config.json", "fixtures/configs/olmoe-1b-7b-0924.json"),
    (
        "tokenizer/tokenizer.json",
        "fixtures/olmoe-nano/tokenizer.json",
    ),
    (
        "tokenizer/tokenizer_config.json",
        "fixtures/olmoe-nano/tokenizer_config.json",
    ),
];
/// What is built of the kernels: a name in the folder, and what cargo's line about it contains.
const KERNELS: [(&str, &str); 2] = [
    ("tests", "deps/lightmoe_kernels-"),
    ("bench", "benches/cuda/main.rs"),
];
/// What runs operations on tensors, and whole models: linked with CUDA, so built with a toolkit. Each is packed,
/// since most of it is candle's kernels as text.
const LINKED: [(&str, &str); 2] = [
    ("tensors", "deps/lightmoe_kernels-"),
    ("models", "tests/placement.rs"),
];
/// The program, which is packed too.
const PROGRAM: &str = "lightmoe";
/// What a bundle may weigh, so that it can be carried anywhere.
const LIMIT: u64 = 64 << 20;

/// Builds the folder and tells how it is used.
pub fn run(arguments: &[String]) -> Outcome {
    no_arguments(arguments)?;
    let folder = shell::target().join("gpu");
    let _ = fs::remove_dir_all(&folder);
    let tokenizer = folder.join("tokenizer");
    fs::create_dir_all(&tokenizer)
        .map_err(|e| format!("cannot make `{}` ({e})", tokenizer.display()))?;
    let mut size = 0;
    let kernels = built(&mut kernels(), &KERNELS)?;
    for (name, path) in kernels {
        size += copy(&path, &folder.join(name))?;
    }
    let mut linked = built(&mut linked()?, &LINKED)?;
    linked.push((PROGRAM, program()?));
    for (name, path) in linked {
        copy(&path, &folder.join(name))?;
        size += pack(&folder, name)?;
    }
    for (name, path) in MODEL {
        let (from, to) = (shell::root().join(path), folder.join(name));
        size += fs::copy(&from, &to).map_err(|e| cannot_copy(&from, &e))?;
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

/// Builds the tests and timings of the kernels.
fn kernels() -> Command {
    shell::cargo(&[
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
    ])
}

/// Builds the tests in which candle's tensors are on the GPU.
fn linked() -> Result<Command, String> {
    let mut build = cuda::cargo(cuda::TESTS)?;
    build.arg("--no-run");
    Ok(build)
}

/// Builds the program with CUDA.
fn program() -> Result<PathBuf, String> {
    let mut build = cuda::cargo(cuda::BUILD)?;
    match shell::succeeds(&mut build)? {
        true => Ok(shell::target().join("release").join(PROGRAM)),
        false => Err("the program does not build with CUDA".to_owned()),
    }
}

/// Runs a build and gives the paths of `binaries`, with their names.
fn built(
    build: &mut Command,
    binaries: &[(&'static str, &str)],
) -> Result<Vec<(&'static str, PathBuf)>, String> {
    let output = build.output().map_err(|e| shell::cannot_start(build, &e))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("the build failed:\n{messages}"));
    }
    let find = |&(name, source): &(&'static str, &str)| {
        let line = messages.lines().find(|line| line.contains(source));
        let path = line.and_then(|line| line.split_once('(')?.1.strip_suffix(')'));
        let path =
            path.ok_or_else(|| format!("cargo does not tell where `{source}` is:\n{messages}"))?;
        Ok((name, shell::root().join(path)))
    };
    binaries.iter().map(find).collect()
}

/// Copies a binary without its symbols, and gives its size.
fn copy(from: &Path, to: &Path) -> Result<u64, String> {
    let mut strip = Command::new("strip");
    if !shell::succeeds(strip.arg("-o").arg(to).arg(from)).unwrap_or(false) {
        fs::copy(from, to).map_err(|e| cannot_copy(from, &e))?;
    }
    size(to)
}

fn cannot_copy(path: &Path, error: &std::io::Error) -> String {
    format!("cannot copy `{}` ({error})", path.display())
}

/// Puts a packed file in the place of another, and gives its size.
fn pack(folder: &Path, name: &str) -> Result<u64, String> {
    let path = folder.join(name);
    if !shell::succeeds(Command::new("xz").args(["-f", "-3", "-T0"]).arg(&path))? {
        return Err(format!("xz could not pack `{}`", path.display()));
    }
    size(&folder.join(format!("{name}.xz")))
}

fn size(path: &Path) -> Result<u64, String> {
    let size = fs::metadata(path).map(|file| file.len());
    size.map_err(|e| format!("cannot read `{}` ({e})", path.display()))
}
