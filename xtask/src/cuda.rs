//! `cuda`: the program with CUDA, which runs models on NVIDIA GPUs. Building it needs CUDA's toolkit; where
//! there is none, its parts come from Python's registry, and a stand-in for the driver's library, which only
//! a machine with a GPU has, is made to link against.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, shell, wheels};

/// The parts of the toolkit that building and linking need.
const PACKAGES: &[&str] = &[
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-curand==10.4.0.35",
    "nvidia-cublas==13.0.2.14",
];
/// The GPUs that candle's kernels are compiled for, and all later ones: those from the A100 on.
const LEAST: &str = "80";
/// What is built if nothing else is said.
pub const BUILD: &[&str] = &[
    "build",
    "--release",
    "--package",
    "lightmoe",
    "--features",
    "cuda",
];

/// The tests in which candle's tensors are on a GPU, and those of models there.
pub const TESTS: &[&str] = &[
    "test",
    "--package",
    "lightmoe-kernels",
    "--package",
    "lightmoe-train",
    "--release",
    "--features",
    "lightmoe-kernels/linked",
    "--lib",
    "--test",
    "placement",
];

/// Runs cargo with a toolkit: the build of the program, or other `arguments`.
pub fn run(arguments: &[String]) -> Outcome {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    shell::replace(cargo(match arguments.is_empty() {
        true => BUILD,
        false => &arguments,
    })?)
}

/// Cargo with a toolkit.
///
/// # Errors
/// If there is none, with the reason.
pub fn cargo(arguments: &[&str]) -> Result<Command, String> {
    let home = match env::var_os("CUDA_HOME").map(PathBuf::from) {
        Some(home) => home,
        None => toolkit()?,
    };
    let mut command = shell::cargo(arguments);
    let path = env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(home.join("bin")).chain(env::split_paths(&path));
    let path = env::join_paths(path).map_err(|e| format!("cannot extend PATH ({e})"))?;
    command.env("PATH", path).env("CUDA_HOME", &home);
    if env::var_os("CUDA_COMPUTE_CAP").is_none() {
        command.env("CUDA_COMPUTE_CAP", LEAST);
    }
    Ok(command)
}

/// The folder of a toolkit made of the packages.
fn toolkit() -> Result<PathBuf, String> {
    let home = wheels::folder("cuda/13.0", PACKAGES)?.join("nvidia/cu13");
    let failed = |e: std::io::Error| format!("cannot set up `{}` ({e})", home.display());
    let stub = home.join("lib/libcuda.so");
    if !stub.exists() {
        arrange(&home).map_err(failed)?;
        stand_in(&home, &stub)?;
    }
    Ok(home)
}

/// What an installer would have done: programs may be run, and libraries have names without a version.
fn arrange(home: &Path) -> std::io::Result<()> {
    for folder in ["bin", "nvvm/bin"] {
        for file in fs::read_dir(home.join(folder))?.flatten() {
            if file.file_type()?.is_file() {
                fs::set_permissions(file.path(), fs::Permissions::from_mode(0o755))?;
            }
        }
    }
    let linked = |from: &str, to: &Path| match symlink(from, to) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    linked("lib", &home.join("lib64"))?;
    for file in fs::read_dir(home.join("lib"))?.flatten() {
        let name = file.file_name();
        let name = name.to_string_lossy();
        if let Some((plain, _)) = name.split_once(".so.") {
            linked(&name, &home.join(format!("lib/{plain}.so")))?;
        }
    }
    Ok(())
}

/// Makes a library with the driver's names, to link against and never to run with: all that the bindings
/// may ask for.
fn stand_in(home: &Path, stub: &Path) -> Result<(), String> {
    let bindings = shell::package("cudarc")?.join("src/driver/sys/mod.rs");
    let bindings = fs::read_to_string(&bindings)
        .map_err(|e| format!("cannot read `{}` ({e})", bindings.display()))?;
    let mut names: Vec<&str> = bindings
        .split("fn cu")
        .skip(1)
        .filter_map(|rest| {
            rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .next()
        })
        .filter(|name| name.starts_with(|c: char| c.is_ascii_uppercase()))
        .collect();
    names.sort_unstable();
    names.dedup();
    let mut source = String::new();
    for name in names {
        // Whoever runs with it is told that there is no device.
        let _ = writeln!(source, "int cu{name}(void) {{ return 100; }}");
    }
    let path = home.join("libcuda.c");
    fs::write(&path, source).map_err(|e| format!("cannot write `{}` ({e})", path.display()))?;
    let mut compile = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()));
    compile.args(["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]);
    match shell::succeeds(compile.arg(stub).arg(&path))? {
        true => Ok(()),
        false => Err("the stand-in for the driver's library does not compile".to_owned()),
    }
}
