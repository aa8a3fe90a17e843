//! Whole layers of experts on a GPU, original and compressed: `--out FOLDER` measures, `--table FOLDER`
//! writes what was measured, others' times beside it, as Markdown; `--once MODEL TOKENS REPLACED ...` runs
//! layers once, for a profiler.
//!
//! A layer's time is that of one CUDA graph that runs it on several batches, divided by their number, so
//! that no batch finds its weights in the cache. Shares are of the copy rate and of the rate of a large
//! dense product that were measured in the same run.

#![allow(clippy::print_stdout)]

mod measure;
#[path = "../support/shapes.rs"]
mod shapes;
mod table;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--out", folder] => measure::run(Path::new(folder)),
        ["--once", ref cases @ ..] => cases.chunks(3).try_for_each(measure::once),
        ["--table", folder] => table::print(Path::new(folder)),
        ["--out" | "--table", ..] => Err("one folder is missing".into()),
        // `cargo bench` and `cargo test` run it with arguments of their own.
        _ => {
            eprintln!("SKIPPED: the GPU is timed by `cargo xtask gpu`");
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
