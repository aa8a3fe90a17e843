//! `fixtures`: makes the parity fixtures again with PyTorch and compares every byte; then exports a
//! compressed model and compares its logits with those that `transformers` computes of the export.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::{Outcome, binary, no_arguments, shell};

const FOLDER: &str = "fixtures/parity";
const FAMILIES: [&str; 9] = [
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek",
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "phimoe",
];
const FUSED_NAMES: &str = "fused_names.json";
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
    let committed = root.join(FOLDER);
    let mut same = true;
    let of_families = FAMILIES
        .iter()
        .flat_map(|f| FILES.map(|file| Path::new(f).join(file)));
    for path in of_families.chain([FUSED_NAMES.into()]) {
        let equal = read(&made.join(&path))? == read(&committed.join(&path))?;
        eprintln!(
            "  {:<9} {}",
            if equal { "identical" } else { "DIFFERENT" },
            path.display()
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
    let exported = check_export(&python)?;
    Ok(shell::code(same && exported))
}

/// Compresses the built-in model with little training, exports it, and lets `transformers` judge.
fn check_export(python: &OsStr) -> Result<bool, String> {
    let lightmoe = binary::build()?;
    let folder = shell::target().join("parity-export");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .map_err(|e| format!("cannot remove `{}` ({e})", folder.display()))?;
    }
    let (run, dense) = (folder.join("run"), folder.join("dense"));
    let logits = folder.join("logits.safetensors");
    let mut compress = Command::new(&lightmoe);
    compress.args(["compress", "--quiet", "--steps", "50", "--eval-examples"]);
    compress.args(["50", "--out"]).arg(&run);
    // The table of the run is of no interest here.
    compress.stdout(Stdio::null());
    let mut export = Command::new(&lightmoe);
    export.args(["export", "--quiet", "--kind", "dense", "--dtype", "f32"]);
    export.arg("--model").arg(&run).arg("--out").arg(&dense);
    // Of the compressed model, not of the export.
    let mut reference = Command::new(&lightmoe);
    reference
        .args(["logits", "--quiet", "--model"])
        .arg(run.join("model"));
    reference.arg("--out").arg(&logits);
    let mut check = Command::new(python);
    check.arg(shell::root().join(FOLDER).join("check_export.py"));
    check.arg(&dense).arg(&logits);
    for step in [&mut compress, &mut export, &mut reference, &mut check] {
        if !shell::succeeds(step)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("cannot read `{}` ({e})", path.display()))
}
