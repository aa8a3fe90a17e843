//! `fixtures`: makes the parity fixtures again with PyTorch and compares every byte.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::{Outcome, no_arguments, shell};

const FOLDER: &str = "fixtures/parity";
const FILES: [&str; 3] = ["config.json", "model.safetensors", "reference.safetensors"];

/// Makes the fixtures in the target folder, so that the committed ones stay as they are.
pub fn run(arguments: &[String]) -> Outcome {
    no_arguments(arguments)?;
    let python = env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let mut probe = Command::new(&python);
    probe.args(["-c", "import torch, transformers, safetensors, numpy"]);
    probe.stdout(Stdio::null()).stderr(Stdio::null());
    if !shell::succeeds(&mut probe)? {
        return Err(format!(
            "`{}` has no torch, transformers, safetensors or numpy; install the versions that \
             {FOLDER}/README.md names, or set PYTHON to a Python that has them",
            python.to_string_lossy()
        ));
    }
    let root = shell::root();
    let made = shell::target().join("parity");
    let mut make = Command::new(&python);
    make.arg(root.join(FOLDER).join("make_parity.py"))
        .arg(&made);
    if !shell::succeeds(&mut make)? {
        return Err("make_parity.py failed; see the messages above".to_owned());
    }
    let committed = root.join(FOLDER).join("olmoe");
    let mut same = true;
    for file in FILES {
        let equal = read(&made.join(file))? == read(&committed.join(file))?;
        eprintln!(
            "  {:<9} {file}",
            if equal { "identical" } else { "DIFFERENT" }
        );
        same &= equal;
    }
    if !same {
        eprintln!(
            "The new files are in `{}`. Other versions or another CPU can differ in the last \
             bits; to replace the committed files, keep all of one run together.",
            made.display()
        );
    }
    Ok(shell::code(same))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("cannot read `{}` ({e})", path.display()))
}
