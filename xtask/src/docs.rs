//! `docs`: the reference page is what the program says of itself.

use std::fs;
use std::process::{Command, ExitCode};

use crate::{Outcome, binary, shell};

/// Writes `docs/reference.md`, or with `--check` compares it.
pub fn run(arguments: &[String]) -> Outcome {
    let check = match arguments {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => return Err("the only argument is `--check`".to_owned()),
    };
    let mut reference = Command::new(binary::build()?);
    reference.arg("reference");
    let output = reference
        .output()
        .map_err(|e| shell::cannot_start(&reference, &e))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "`lightmoe reference` failed: {}",
            message.trim_end()
        ));
    }
    let page = shell::root().join("docs/reference.md");
    let shown = page.display();
    if !check {
        fs::write(&page, &output.stdout).map_err(|e| format!("cannot write `{shown}` ({e})"))?;
        eprintln!("wrote {shown}");
    } else if fs::read(&page).is_ok_and(|old| old == output.stdout) {
        eprintln!("{shown} is up to date");
    } else {
        return Err(format!("`{shown}` is out of date; run `cargo xtask docs`"));
    }
    Ok(ExitCode::SUCCESS)
}
