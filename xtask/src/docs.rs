//! `docs`: the pages that are what the program says of itself.

use std::fs;
use std::process::{Command, ExitCode};

use crate::{Outcome, binary, shell};

/// Each page, and the arguments that print it.
const PAGES: [(&str, &[&str]); 2] = [
    ("docs/reference.md", &["reference"]),
    ("docs/tasks.md", &["tasks", "--markdown"]),
];

/// Writes the pages, or with `--check` compares them.
pub fn run(arguments: &[String]) -> Outcome {
    let check = match arguments {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => return Err("the only argument is `--check`".to_owned()),
    };
    let lightmoe = binary::build()?;
    for (page, arguments) in PAGES {
        let mut print = Command::new(&lightmoe);
        print.args(arguments);
        let output = print
            .output()
            .map_err(|e| shell::cannot_start(&print, &e))?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            let command = arguments.join(" ");
            return Err(format!(
                "`lightmoe {command}` failed: {}",
                message.trim_end()
            ));
        }
        let page = shell::root().join(page);
        let shown = page.display();
        if !check {
            fs::write(&page, &output.stdout)
                .map_err(|e| format!("cannot write `{shown}` ({e})"))?;
            eprintln!("wrote {shown}");
        } else if fs::read(&page).is_ok_and(|old| old == output.stdout) {
            eprintln!("{shown} is up to date");
        } else {
            return Err(format!("`{shown}` is out of date; run `cargo xtask docs`"));
        }
    }
    Ok(ExitCode::SUCCESS)
}
