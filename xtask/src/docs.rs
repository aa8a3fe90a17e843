//! `docs`: the pages that are what the program says of itself, and the schemas of its files.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::{Outcome, binary, shell};

/// Each page, and the arguments that print it.
const PAGES: [(&str, &[&str]); 2] = [
    ("docs/reference.md", &["reference"]),
    ("docs/tasks.md", &["tasks", "--markdown"]),
];
const SCHEMAS: &str = "docs/schemas";

/// Writes the pages, or with `--check` compares them.
pub fn run(arguments: &[String]) -> Outcome {
    let check = match arguments {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => return Err("the only argument is `--check`".to_owned()),
    };
    let lightmoe = binary::build()?;
    for (page, arguments) in PAGES {
        write(page, &said(&lightmoe, arguments)?, check)?;
    }
    let names = said(&lightmoe, &["reference", "--schemas"])?;
    for name in String::from_utf8_lossy(&names).lines() {
        let schema = said(&lightmoe, &["reference", "--schema", name])?;
        write(&format!("{SCHEMAS}/{name}.schema.json"), &schema, check)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What the program prints.
fn said(lightmoe: &Path, arguments: &[&str]) -> Result<Vec<u8>, String> {
    let mut print = Command::new(lightmoe);
    print.args(arguments);
    let output = print
        .output()
        .map_err(|e| shell::cannot_start(&print, &e))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let command = arguments.join(" ");
    Err(format!(
        "`lightmoe {command}` failed: {}",
        message.trim_end()
    ))
}

fn write(page: &str, text: &[u8], check: bool) -> Result<(), String> {
    let path = shell::root().join(page);
    let shown = path.display();
    let cannot = |e| format!("cannot write `{shown}` ({e})");
    if !check {
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).map_err(cannot)?;
        fs::write(&path, text).map_err(cannot)?;
        eprintln!("wrote {shown}");
    } else if fs::read(&path).is_ok_and(|old| old == text) {
        eprintln!("{shown} is up to date");
    } else {
        return Err(format!("`{shown}` is out of date; run `cargo xtask docs`"));
    }
    Ok(())
}
