//! The reference of the command line, made from its definition, and that of the files.

use crate::cli::{Cli, ReferenceArgs};
use crate::schemas;
use clap::{Command, CommandFactory};
use std::fmt::Write;

/// The page, or what is asked for of the schemas.
///
/// # Errors
/// [`crate::preflight::Refused`] for a schema that there is not.
pub fn run(args: &ReferenceArgs) -> anyhow::Result<String> {
    match (&args.schema, args.schemas) {
        (Some(name), _) => schemas::print(name),
        (None, true) => Ok(schemas::names()),
        (None, false) => Ok(markdown()),
    }
}

/// All commands with their options as Markdown; `docs/reference.md` holds it.
fn markdown() -> String {
    let mut text = String::from(
        "# Reference\n\nMade by `cargo xtask docs`. The options of `compress` are the keys of a \
         recipe file too, with `_` for `-`.\n",
    );
    // Fixed, so that the page does not depend on the terminal.
    let root = Cli::command().term_width(100).disable_help_subcommand(true);
    section(&mut text, root, "");
    text.truncate(text.trim_end().len());
    text
}

fn section(text: &mut String, mut command: Command, parents: &str) {
    let name = format!("{parents}{}", command.get_name());
    let help = command.clone().bin_name(&name).render_long_help();
    let help: Vec<String> = help
        .to_string()
        .lines()
        .map(|l| l.trim_end().to_owned())
        .collect();
    // Writing to a string cannot fail.
    let _ = write!(text, "\n## `{name}`\n\n```text\n{}\n```\n", help.join("\n"));
    for sub in command.get_subcommands_mut() {
        section(text, sub.clone().term_width(100), &format!("{name} "));
    }
}
