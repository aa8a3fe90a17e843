//! Tells the program which commit it is built from, where it is built in a repository.

use std::path::Path;
use std::process::Command;

fn main() {
    // Everything that is compiled in, and where git notes what is checked out.
    println!("cargo:rerun-if-changed=..");
    for file in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", file]);
        // A file that is not there would make cargo run this every time.
        if let Some(path) = path.filter(|path| Path::new(path).exists()) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    if let Some(hash) = git(&[
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]) {
        println!("cargo:rustc-env=LIGHTMOE_GIT_HASH={hash}");
    }
}

/// What git answers, if there is a git and a repository.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}
