//! Holds the workspace to its shape: who may use whom, and some tidiness.

#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Each package, and those of ours that it may use, in tests and benches too.
const MAY_USE: &[(&str, &[&str])] = &[
    ("lightmoe-kernels", &[]),
    ("lightmoe-models", &["lightmoe-kernels"]),
    ("lightmoe-data", &[]),
    (
        "lightmoe-compress",
        &["lightmoe-models", "lightmoe-kernels"],
    ),
    ("lightmoe-train", &["lightmoe-models", "lightmoe-kernels"]),
    (
        "lightmoe-eval",
        &["lightmoe-models", "lightmoe-data", "lightmoe-kernels"],
    ),
    ("lightmoe-export", &["lightmoe-models"]),
    (
        "lightmoe",
        &[
            "lightmoe-kernels",
            "lightmoe-models",
            "lightmoe-data",
            "lightmoe-compress",
            "lightmoe-train",
            "lightmoe-eval",
            "lightmoe-export",
        ],
    ),
    ("xtask", &[]),
];

/// The one package that may hold `unsafe` code.
const UNSAFE: &str = "lightmoe-kernels";

/// No Rust file is longer.
const MAX_LINES: usize = 500;

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap().to_owned()
}

fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn name(package: &Value) -> &str {
    package["name"].as_str().unwrap()
}

/// Every Rust file of the packages, with its text.
fn rust_files() -> Vec<(PathBuf, String)> {
    let mut folders = vec![root().join("crates"), root().join("xtask")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                files.push((path, text));
            }
        }
    }
    assert!(!files.is_empty());
    files
}

#[test]
fn no_package_uses_one_that_it_may_not() {
    for package in packages() {
        let name = name(&package);
        let allowed = MAY_USE.iter().find(|(of, _)| *of == name);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("`{name}` is missing in `MAY_USE`"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let used = dependency["name"].as_str().unwrap();
            let ours = MAY_USE.iter().any(|(of, _)| *of == used);
            assert!(
                !ours || allowed.contains(&used),
                "`{name}` may not use `{used}`; move what it needs, or change the architecture"
            );
        }
    }
}

#[test]
fn only_the_kernels_may_be_unsafe() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(manifest.contains("unsafe_code = \"deny\""));
    for package in packages() {
        let path = package["manifest_path"].as_str().unwrap();
        let manifest = fs::read_to_string(path).unwrap();
        let inherits = manifest.contains("[lints]\nworkspace = true");
        assert_eq!(inherits, name(&package) != UNSAFE, "`[lints]` in {path}");
    }
    let allow = concat!("allow(unsafe", "_code");
    for (path, text) in rust_files() {
        assert!(
            !text.contains(allow),
            "unsafe code allowed in {}",
            path.display()
        );
    }
}

#[test]
fn files_are_short_and_finished() {
    let unfinished = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!("));
    for (path, text) in rust_files() {
        let shown = path.display();
        let lines = text.lines().count();
        assert!(
            lines <= MAX_LINES,
            "{shown} has {lines} lines, at most {MAX_LINES}; split it"
        );
        for call in &unfinished {
            assert!(!text.contains(call.as_str()), "`{call}` in {shown}");
        }
    }
}
