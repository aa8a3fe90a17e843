//! `fuzz`: feeds damaged files to what reads them. Needs a nightly compiler and
//! `cargo-fuzz`, which nothing else here does.

use std::fs;
use std::process::{Command, ExitCode, Stdio};

use crate::{Outcome, shell};

/// Inputs for each target, if the caller does not say.
const RUNS: u64 = 1_000_000;
/// Most memory of a target, and of one allocation in it, in MiB; and the longest input in bytes.
const LIMITS: [&str; 3] = [
    "-rss_limit_mb=1024",
    "-malloc_limit_mb=256",
    "-max_len=4096",
];

/// Builds and runs the targets one after the other; the first that fails ends it.
pub fn run(arguments: &[String]) -> Outcome {
    let all = targets()?;
    let (runs, chosen) = read(arguments, &all)?;
    check_tools()?;
    for target in &chosen {
        eprintln!("\n== fuzz: {target}, {runs} inputs");
        let corpus = format!("corpus/{target}");
        let seeds = format!("seeds/{target}");
        let folder = shell::root().join("fuzz");
        fs::create_dir_all(folder.join(&corpus))
            .map_err(|e| format!("cannot make the folder `fuzz/{corpus}` ({e})"))?;
        let mut fuzz = nightly(&["cargo", "fuzz", "run", "--fuzz-dir", "."]);
        fuzz.current_dir(folder)
            .args([target, &corpus, &seeds, "--"]);
        fuzz.arg(format!("-runs={runs}")).args(LIMITS);
        fuzz.arg(format!("-dict=dictionaries/{target}.dict"));
        if !shell::succeeds(&mut fuzz)? {
            return Err(format!(
                "`{target}` failed; if the messages above name an input, keep it as a test of the \
                 crate that read it"
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The number of inputs, and the targets that the arguments name: all, if they name none.
fn read(arguments: &[String], all: &[String]) -> Result<(u64, Vec<String>), String> {
    let (mut runs, mut chosen) = (RUNS, Vec::new());
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--runs" {
            let number = arguments.next().and_then(|n| n.parse().ok());
            runs = number
                .filter(|&n| n > 0)
                .ok_or("`--runs` needs a whole number above 0")?;
        } else if all.contains(argument) {
            chosen.push(argument.clone());
        } else {
            return Err(format!(
                "no fuzz target `{argument}`; use `--runs N`, or some of {}",
                all.join(", ")
            ));
        }
    }
    let none = chosen.is_empty();
    Ok((runs, if none { all.to_vec() } else { chosen }))
}

/// The names of all targets, sorted.
fn targets() -> Result<Vec<String>, String> {
    let folder = shell::root().join("fuzz/targets");
    let fail = |e| format!("cannot read `{}` ({e})", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path.file_stem().map(|name| name.to_string_lossy());
        names.extend(name.map(|name| name.into_owned()));
    }
    names.sort();
    Ok(names)
}

fn check_tools() -> Result<(), String> {
    for (program, remedy) in [
        (
            &["rustc", "--version"],
            "a nightly compiler; run `rustup toolchain install nightly`",
        ),
        (
            &["cargo-fuzz", "--version"],
            "`cargo-fuzz`; run `cargo install --locked cargo-fuzz`",
        ),
    ] {
        let mut probe = nightly(program);
        probe.stdout(Stdio::null()).stderr(Stdio::null());
        if !shell::succeeds(&mut probe)? {
            return Err(format!("fuzzing needs {remedy}"));
        }
    }
    Ok(())
}

/// A program of the nightly toolchain.
fn nightly(command: &[&str]) -> Command {
    let mut rustup = Command::new("rustup");
    rustup.args(["run", "nightly"]).args(command);
    // That of the toolchain that runs this.
    rustup.env_remove("CARGO");
    rustup
}
