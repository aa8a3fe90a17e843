//! The text of the CUDA kernels of attention and of what lies between products, and of the choice of experts, run on
//! the CPU: a coroutine for each thread of a block, with the instructions of a GPU written out (`stand_in/device.h`),
//! against the plainest way in double precision. It needs a C++ compiler and no GPU, and sees what the text computes,
//! not what a card makes of it.
#![cfg(all(target_os = "linux", target_env = "gnu", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// The kernels' texts, in the order in which they build on each other.
const SOURCES: [&str; 7] = [
    "ptx.cuh",
    "common.cuh",
    "choose.cuh",
    "attention.cuh",
    "attention.cu",
    "attention_backward.cu",
    "tokens.cu",
];
/// Memory that a launch gives to a block, and how the emulation calls it.
const DYNAMIC: &str = "extern __shared__ uint4 pool[];";
const EMULATED: &str = "uint4* const pool = reinterpret_cast<uint4*>(emulation::block->dynamic);";

#[test]
fn kernels_give_what_they_should() {
    let named = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let compiler = || {
        let mut words = named.split_whitespace();
        let mut compiler = Command::new(words.next().unwrap_or("c++"));
        compiler.args(words);
        compiler
    };
    if compiler().arg("--version").output().is_err() {
        eprintln!("SKIPPED: no `{named}`, so no kernel ran on the CPU");
        return;
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let text = |name| fs::read_to_string(here.join("cuda").join(name)).unwrap();
    let kernels: String = SOURCES.map(text).concat().replace(DYNAMIC, EMULATED);
    fs::write(folder.path().join("kernels.inc"), kernels).unwrap();
    let program = folder.path().join("emulated");
    let built = compiler()
        .args(["-std=c++20", "-O2", "-w", "-pthread", "-I"])
        .arg(folder.path())
        .arg("-I")
        .arg(here.join("tests/stand_in"))
        .arg(here.join("tests/emulated/main.cpp"))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{said}");
    let ran = Command::new(&program).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}");
    assert!(
        said.contains("dv:") && said.contains("of logits:"),
        "{said}"
    );
}
