//! Whole layers of experts on the CPU, original and compressed, at the shapes of published models:
//! `--out FOLDER [--peers PROGRAM SCRIPT] [MODEL]...` measures, has others measured, and prints a page of Markdown. Layers run
//! as models run them, from given choices and gates on.
//!
//! Shares are of the copy rate and of the rate of a large dense product that were measured in the same run.

#![allow(clippy::print_stdout)]

mod measure;
#[path = "../../../kernels/benches/support/shapes.rs"]
mod shapes;
mod table;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Cargo adds one of its own.
    let arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let arguments: Vec<String> = arguments.collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["--out", folder, "--peers", program, script, ref models @ ..] => {
            measure::run(Path::new(folder), models, Some((program, script)))
        }
        ["--out", folder, ref models @ ..] => measure::run(Path::new(folder), models, None),
        // `cargo bench` and `cargo test` run it with arguments of their own.
        _ => {
            eprintln!("SKIPPED: layers are timed by `cargo xtask bench layers`");
            return ExitCode::SUCCESS;
        }
    };
    match done {
        Ok(results) => {
            print!("{}", table::page(&results));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
