//! `test`: the whole check. Everything in the release profile, because the tests train small
//! models, and so that dependencies are compiled for one profile only.

use std::process::ExitCode;
use std::time::Instant;

use crate::stand_in::{self, Place};
use crate::{Outcome, no_arguments, nvrtc, shell};

/// The steps: a name, and the arguments of cargo.
const STEPS: &[(&str, &[&str])] = &[
    ("format", &["fmt", "--all", "--check"]),
    (
        "lints",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--release",
            "--features",
            CUDA,
            "--",
            "-D",
            "warnings",
        ],
    ),
    (
        "no CUDA",
        &["check", "--workspace", "--all-targets", "--release"],
    ),
    (
        "tests",
        &["test", "--workspace", "--release", "--features", CUDA],
    ),
    // What models on a GPU are made of, on the CPU.
    (
        "composed",
        &[
            "test",
            "--package",
            "lightmoe-kernels",
            "--package",
            "lightmoe-models",
            "--package",
            "lightmoe-train",
            "--release",
            "--features",
            "lightmoe-kernels/composed",
            "--test",
            "reference",
            "--test",
            "refusals",
            "--test",
            "gradients",
            "--test",
            "parity",
            "--test",
            "bank",
            "--test",
            "placement",
            "--test",
            "memory",
            "--test",
            "recovery",
            "--test",
            "teacher",
        ],
    ),
];

/// The tests of the kernels themselves on the stand-in for a GPU, but for the slowest.
const STAND_IN: &[&str] = &[
    "test",
    "--workspace",
    "--release",
    "--features",
    CUDA,
    "--lib",
    "--",
    "cuda::",
    "--skip",
    "wide",
    "--skip",
    "small_gradients",
];

/// The CUDA kernels build everywhere.
const CUDA: &str = "lightmoe-kernels/cuda";

/// What is not run here, and the command that runs it.
const SKIPPED: &[(&str, &str)] = &[
    (
        "making the PyTorch parity fixtures again",
        "cargo xtask fixtures",
    ),
    ("the comparison of methods", "cargo xtask bench quality"),
    ("the timing of kernels", "cargo xtask bench kernels"),
    ("the CUDA kernels, and models, on a GPU", "cargo xtask gpu"),
    (
        "tensors and models on a stand-in for a GPU, and its slowest tests",
        "cargo xtask stand-in",
    ),
    ("the program with CUDA", "cargo xtask cuda"),
    ("the pages in a browser", "cargo xtask browser"),
    ("fuzzing", "cargo xtask fuzz"),
];

/// Runs every step, whatever became of the one before it, and sums up.
pub fn run(arguments: &[String]) -> Outcome {
    no_arguments(arguments)?;
    let mut summary = String::new();
    let mut failed = 0;
    let nvrtc = nvrtc::folder();
    for (name, arguments) in STEPS {
        eprintln!("\n== {name}: cargo {}", arguments.join(" "));
        let start = Instant::now();
        let mut command = shell::cargo(arguments);
        if let Ok(library) = &nvrtc {
            nvrtc::bring(&mut command, library);
        }
        let passed = shell::succeeds(&mut command)?;
        failed += usize::from(!passed);
        summary += &line(name, passed, start);
    }
    match stand_in::place() {
        Ok(Place::Folder(folder)) => {
            let start = Instant::now();
            eprintln!("\n== stand-in: cargo {}", STAND_IN.join(" "));
            let mut command = shell::cargo(STAND_IN);
            stand_in::bring(&mut command, &folder);
            let passed = shell::succeeds(&mut command)?;
            failed += usize::from(!passed);
            summary += &line("stand-in", passed, start);
        }
        Ok(Place::Missing(reason)) => {
            summary += &format!("  SKIPPED  kernels on a stand-in for a GPU: {reason}\n");
        }
        Err(reason) => {
            failed += 1;
            summary += &format!("  FAILED   stand-in: {reason}\n");
        }
    }
    if let Err(reason) = nvrtc {
        summary += &format!(
            "  SKIPPED  compiling the CUDA kernels, unless NVRTC is installed: {reason}\n"
        );
    }
    for (what, command) in SKIPPED {
        summary += &format!("  SKIPPED  {what}: run `{command}`\n");
    }
    eprint!("\n== summary\n{summary}");
    match failed {
        0 => Ok(ExitCode::SUCCESS),
        1 => Err("1 step failed; see above".to_owned()),
        n => Err(format!("{n} steps failed; see above")),
    }
}

/// What the summary says of a step.
fn line(name: &str, passed: bool, start: Instant) -> String {
    let result = if passed { "ok" } else { "FAILED" };
    let seconds = start.elapsed().as_secs_f64();
    format!("  {result:<8} {name:<8} {seconds:>7.1} s\n")
}
