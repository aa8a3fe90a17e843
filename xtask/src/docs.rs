//! `docs`: the pages that are what the program says of itself, and the schemas of its files.

use std::fs;
use std::path::{Path, PathBuf};
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
    let mut files = Vec::new();
    for name in String::from_utf8_lossy(&names).lines() {
        let schema = said(&lightmoe, &["reference", "--schema", name])?;
        let file = format!("{name}.schema.json");
        write(&format!("{SCHEMAS}/{file}"), &schema, check)?;
        files.push(file);
    }
    for stale in others(&shell::root().join(SCHEMAS), &files)? {
        remove(&stale, check)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What lies in a folder besides these files.
fn others(folder: &Path, files: &[String]) -> Result<Vec<PathBuf>, String> {
    let cannot = |e| format!("cannot read `{}` ({e})", folder.display());
    let entries = fs::read_dir(folder).map_err(cannot)?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(cannot)?;
        let name = entry.file_name();
        if !files.iter().any(|file| name == file.as_str()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Removes a file that the program no longer says, or with `check` refuses it.
fn remove(path: &Path, check: bool) -> Result<(), String> {
    let shown = path.display();
    if check {
        return Err(format!(
            "`{shown}` is the schema of nothing; run `cargo xtask docs`, which removes it"
        ));
    }
    fs::remove_file(path).map_err(|e| format!("cannot remove `{shown}` ({e})"))?;
    eprintln!("removed {shown}");
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_file_is_found() {
        let folder = shell::target().join("tmp").join("docs-of-nothing");
        fs::create_dir_all(&folder).unwrap();
        for name in ["plan.schema.json", "old.schema.json"] {
            fs::write(folder.join(name), "{}").unwrap();
        }
        let known = ["plan.schema.json".to_owned()];
        let found = others(&folder, &known).unwrap();
        assert_eq!(found, [folder.join("old.schema.json")]);
        let refused = remove(&found[0], true).unwrap_err();
        assert!(refused.contains("old.schema.json"), "{refused}");
        assert!(found[0].exists());
        remove(&found[0], false).unwrap();
        assert!(others(&folder, &known).unwrap().is_empty());
    }
}
