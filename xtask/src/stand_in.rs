//! `stand-in`: the tests of a GPU on a machine without one. Libraries that take the place of the driver, NVRTC, cuBLAS,
//! cuRAND and CUDA's runtime run kernels on the CPU, our own and candle's (`crates/kernels/tests/stand_in`).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Outcome, cuda, shell};

const SOURCES: &str = "crates/kernels/tests/stand_in";

/// What is compiled: a source, the name that programs are linked with, and how it is optimised.
const LIBRARIES: &[(&str, &str, &str)] = &[
    ("driver.cpp", "libcuda.so.1", "-O2"),
    ("nvrtc.cpp", "libnvrtc.so.13", "-O2"),
    ("cublas.cpp", "libcublas.so.13", "-O3"),
    ("curand.cpp", "libcurand.so.10", "-O2"),
    ("runtime.cpp", "libcudart.so.13", "-O2"),
];

/// Runs the tests of kernels, tensors and models on the stand-ins, those that `arguments` name or all.
pub fn run(arguments: &[String]) -> Outcome {
    let folder = match place()? {
        Place::Folder(folder) => folder,
        Place::Missing(reason) => return Err(reason),
    };
    let candle = shell::package("candle-kernels")?.join("src");
    let mut command = cuda::cargo(cuda::TESTS)?;
    command.arg("--").args(arguments);
    bring(&mut command, &folder);
    command.env("LIGHTMOE_CANDLE_KERNELS", candle);
    Ok(shell::code(shell::succeeds(&mut command)?))
}

/// Where the libraries are, or why they cannot be had on this machine.
pub enum Place {
    Folder(PathBuf),
    Missing(String),
}

/// The folder of the libraries, made anew where their sources have changed.
///
/// # Errors
/// If they do not compile.
pub fn place() -> Result<Place, String> {
    if !cfg!(all(
        target_os = "linux",
        target_env = "gnu",
        target_arch = "x86_64"
    )) {
        let reason = "the stand-ins for CUDA's libraries are for Linux on x86-64";
        return Ok(Place::Missing(reason.to_owned()));
    }
    let (from, to) = (
        shell::root().join(SOURCES),
        shell::target().join("stand-in"),
    );
    let failed = |e: std::io::Error| format!("cannot set up `{}` ({e})", to.display());
    let mut texts = Vec::new();
    copy(&from, &to, &mut texts).map_err(failed)?;
    texts.sort_unstable();
    let all = texts.concat();
    let made = to.join("made-of");
    if fs::read_to_string(&made).is_ok_and(|had| had == all) {
        return Ok(Place::Folder(to));
    }
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut words = compiler.split_whitespace();
    let program = words.next().unwrap_or("c++");
    if Command::new(program).arg("--version").output().is_err() {
        return Ok(Place::Missing(format!(
            "there is no C++ compiler `{program}`"
        )));
    }
    for &(source, name, optimised) in LIBRARIES {
        let mut command = Command::new(program);
        command
            .args(words.clone())
            .args(["-std=c++20", "-w", "-fPIC", "-shared", optimised])
            .args(["-Wl,--default-symver", "-ldl", "-pthread"])
            .arg(format!("-Wl,-soname,{name}"))
            .arg("-o")
            .arg(to.join(name))
            .arg(to.join(source));
        if !shell::succeeds(&mut command)? {
            return Err(format!("`{SOURCES}/{source}` does not compile"));
        }
        let plain = name.split(".so").next().unwrap_or(name);
        let link = to.join(format!("{plain}.so"));
        let _ = fs::remove_file(&link);
        fs::copy(to.join(name), &link).map_err(failed)?;
    }
    fs::write(&made, all).map_err(failed)?;
    Ok(Place::Folder(to))
}

/// Copies sources, and collects their texts.
fn copy(from: &Path, to: &Path, texts: &mut Vec<String>) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for file in fs::read_dir(from)? {
        let file = file?;
        let to = to.join(file.file_name());
        if file.file_type()?.is_dir() {
            copy(&file.path(), &to, texts)?;
            continue;
        }
        let text = fs::read_to_string(file.path())?;
        fs::write(&to, &text)?;
        texts.push(format!("{}\n{text}", file.path().display()));
    }
    Ok(())
}

/// Lets tests find the libraries, and tells them that there is a GPU.
pub fn bring(command: &mut Command, folder: &Path) {
    shell::find_libraries(command, folder)
        .env("LIGHTMOE_KERNEL_CACHE", folder.join("cache"))
        .env("LIGHTMOE_GPU", "1");
}
