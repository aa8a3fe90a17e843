//! `cargo xtask COMMAND`: what people who work in this repository run. One file per command;
//! nothing but the standard library, so that it compiles in seconds.

mod bench;
mod binary;
mod browser;
mod cuda;
mod docs;
mod fixtures;
mod fuzz;
mod gpu;
mod nvrtc;
mod shell;
mod stand_in;
mod test;
mod wheels;

use std::process::ExitCode;

/// What a command ends with: an exit code, or a message that says what to do.
type Outcome = Result<ExitCode, String>;

/// A command of `cargo xtask`.
struct Command {
    name: &'static str,
    arguments: &'static str,
    about: &'static str,
    run: fn(&[String]) -> Outcome,
}

const COMMANDS: &[Command] = &[
    Command {
        name: "compress",
        arguments: "[ARGUMENTS]",
        about: "Build `lightmoe` and run `lightmoe compress ARGUMENTS`",
        run: |arguments| binary::run(&["compress"], arguments),
    },
    Command {
        name: "compare",
        arguments: "[ARGUMENTS]",
        about: "Build `lightmoe` and run `lightmoe compare ARGUMENTS`",
        run: |arguments| binary::run(&["compare"], arguments),
    },
    Command {
        name: "pretrain",
        arguments: "[ARGUMENTS]",
        about: "Build `lightmoe` and run `lightmoe pretrain ARGUMENTS`",
        run: |arguments| binary::run(&["pretrain"], arguments),
    },
    Command {
        name: "test",
        arguments: "",
        about: "The whole check: format, lints, tests",
        run: test::run,
    },
    Command {
        name: "bench",
        arguments: "kernels|layers|quality|usage|scale [ARGUMENTS]",
        about: "Time kernels or layers, compare the methods, show the built-in model, or run a full-size one",
        run: bench::run,
    },
    Command {
        name: "browser",
        arguments: "[RUN|PAGE]...",
        about: "Open the report and the comparison in headless Chromium, without a network, and check them",
        run: browser::run,
    },
    Command {
        name: "cuda",
        arguments: "[CARGO ARGUMENTS]",
        about: "Build `lightmoe` with CUDA, to run models on a GPU; brings a toolkit where there is none",
        run: cuda::run,
    },
    Command {
        name: "gpu",
        arguments: "",
        about: "Build the folder that checks and times the CUDA kernels on a machine with a GPU",
        run: gpu::run,
    },
    Command {
        name: "stand-in",
        arguments: "[TEST ARGUMENTS]",
        about: "Run the tests of a GPU without one: kernels, candle's too, on the CPU; brings a toolkit",
        run: stand_in::run,
    },
    Command {
        name: "fixtures",
        arguments: "[harness|overlap]",
        about: "Make the fixtures of PyTorch again, or those of lm-evaluation-harness or sacreBLEU, and compare",
        run: fixtures::run,
    },
    Command {
        name: "fuzz",
        arguments: "[--runs N] [TARGET]...",
        about: "Feed damaged files to what reads them; needs a nightly compiler and cargo-fuzz",
        run: fuzz::run,
    },
    Command {
        name: "docs",
        arguments: "[--check]",
        about: "Write docs/reference.md, docs/tasks.md and docs/schemas from what the program says of itself, or compare",
        run: docs::run,
    },
    Command {
        name: "help",
        arguments: "",
        about: "Print this list",
        run: |_| help(),
    },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.split_first() {
        None => help(),
        Some((name, _)) if name == "--help" || name == "-h" => help(),
        Some((name, rest)) => match COMMANDS.iter().find(|c| c.name == name) {
            Some(command) => (command.run)(rest),
            None => {
                eprintln!(
                    "error: unknown command `{name}`; use one of these\n\n{}",
                    list()
                );
                return ExitCode::from(2);
            }
        },
    };
    outcome.unwrap_or_else(|message| {
        eprintln!("error: {message}");
        ExitCode::FAILURE
    })
}

/// The commands, one per line.
fn list() -> String {
    COMMANDS
        .iter()
        .map(|c| {
            format!(
                "  {:<37} {}\n",
                format!("{} {}", c.name, c.arguments),
                c.about
            )
        })
        .collect()
}

#[allow(clippy::print_stdout, reason = "this is what was asked for")]
fn help() -> Outcome {
    print!("usage: cargo xtask COMMAND\n\n{}", list());
    Ok(ExitCode::SUCCESS)
}

/// Refuses arguments of a command that takes none.
fn no_arguments(arguments: &[String]) -> Result<(), String> {
    match arguments.first() {
        None => Ok(()),
        Some(first) => Err(format!(
            "unexpected argument `{first}`; this command takes none"
        )),
    }
}
