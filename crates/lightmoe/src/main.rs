//! The program: parse, run, print, exit.

use clap::Parser;
use lightmoe::cli::{BenchCommand, Cli, Command, LogFormat};
use lightmoe::preflight::Refused;
use lightmoe::{
    benchmarks, commands, compare, machine, paired, progress, quality, reference, sandbox, scale,
    speed, usage,
};
use lightmoe_data::harness::catches_panics;
use std::io::Write;
use std::panic;
use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = sandbox::enter() {
        return code;
    }
    keep_quiet_of_caught_panics();
    lightmoe_kernels::tune_process();
    let cli = Cli::parse();
    log(cli.log_format);
    progress::set_quiet(cli.quiet);
    if let Some(bytes) = cli.max_memory {
        machine::set_max_memory(bytes);
    }
    let outcome = progress::catch_interrupts()
        .map_err(anyhow::Error::from)
        .and_then(|()| run(cli.command));
    let (text, code) = match outcome {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => {
            let code = match (progress::stopped(), error.is::<Refused>()) {
                (true, _) => 130,
                (_, true) => 2,
                _ => 1,
            };
            // A reader that has gone away wants no message.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            return ExitCode::from(code);
        }
    };
    let _ = writeln!(std::io::stdout(), "{text}");
    code
}

/// Damage of a data file, for which its reader panics, has a message of its own.
fn keep_quiet_of_caught_panics() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !catches_panics() {
            usual(info);
        }
    }));
}

fn run(command: Command) -> anyhow::Result<String> {
    match command {
        Command::Compress(args) => commands::run_compress(args),
        Command::Compare(args) => compare::run(args),
        Command::Observe(args) => commands::run_observe(args),
        Command::Plan(args) => commands::run_plan(args),
        Command::Build(args) => commands::run_build(args),
        Command::Recover(args) => commands::run_recover(args),
        Command::Evaluate(args) => commands::run_evaluate(args),
        Command::Divergence(args) => commands::run_divergence(args),
        Command::CompareResults(args) => paired::run(&args),
        Command::Report(args) => commands::run_report(args),
        Command::Tasks(args) => benchmarks::list(&args),
        Command::Export(args) => commands::run_export(args),
        Command::Unpack(args) => commands::run_unpack(args),
        Command::Inspect(args) => commands::run_inspect(args),
        Command::Generate(args) => commands::run_generate(args),
        Command::Chat(args) => commands::run_chat(args),
        Command::Logits(args) => commands::run_logits(args),
        Command::Synthesize(args) => commands::run_synthesize(args),
        Command::Pretrain(args) => commands::run_pretrain(args),
        Command::Bench(BenchCommand::Quality(args)) => quality::run(args),
        Command::Bench(BenchCommand::Usage(args)) => usage::run(args),
        Command::Bench(BenchCommand::Scale(args)) => scale::run(args),
        Command::Bench(BenchCommand::Methods(args)) => scale::methods::run(args),
        Command::Bench(BenchCommand::Speed(args)) => speed::run(args),
        Command::Reference(args) => reference::run(&args),
    }
}

/// Logs go to standard error; `RUST_LOG` sets the level.
fn log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}
