//! `fixtures`: makes the parity fixtures again with PyTorch and compares every byte; then exports a
//! compressed model and compares its logits with those that `transformers` computes of the export.
//! `fixtures harness`: the same for what lm-evaluation-harness says of the built-in model;
//! `fixtures overlap`: for what sacreBLEU, `rouge_score` and it say of texts.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Outcome, binary, no_arguments, shell};

const FOLDER: &str = "fixtures/parity";
const HARNESS: &str = "fixtures/harness";
const OVERLAP: &str = "fixtures/overlap";
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
    match arguments.split_first() {
        Some((first, rest)) if first == "harness" => {
            no_arguments(rest)?;
            return harness();
        }
        Some((first, rest)) if first == "overlap" => {
            no_arguments(rest)?;
            return overlap();
        }
        _ => no_arguments(arguments)?,
    }
    let python = shell::python("torch, transformers, safetensors, numpy", &versions(FOLDER))?;
    let root = shell::root();
    let made = shell::target().join("parity");
    let mut make = Command::new(&python);
    make.arg(root.join(FOLDER).join("make_parity.py"))
        .arg(&made);
    if !shell::succeeds(&mut make)? {
        return Err("make_parity.py failed; see the messages above".to_owned());
    }
    let committed = root.join(FOLDER);
    let of_families = FAMILIES
        .iter()
        .flat_map(|f| FILES.map(|file| Path::new(f).join(file)));
    let same = compare(&made, &committed, of_families.chain([FUSED_NAMES.into()]))?;
    let exported = check_export(&python)?;
    Ok(shell::code(same && exported))
}

/// Lets other programs judge texts again.
fn overlap() -> Outcome {
    let (committed, made) = made_by(
        "lm_eval, sacrebleu, rouge_score",
        OVERLAP,
        "make_overlap.py",
    )?;
    let files = ["overlap.json", "math.json", "paired.json"].map(PathBuf::from);
    Ok(shell::code(compare(&made, &committed, files.into_iter())?))
}

/// What to install for a fixture.
fn versions(folder: &str) -> String {
    format!("the versions that {folder}/README.md names")
}

/// The folder of a fixture, and the one where its script has made it again.
fn made_by(modules: &str, folder: &str, script: &str) -> Result<(PathBuf, PathBuf), String> {
    let python = shell::python(modules, &versions(folder))?;
    let committed = shell::root().join(folder);
    let name = committed.file_name().unwrap_or_default();
    let made = shell::target().join(name);
    let mut make = Command::new(&python);
    make.arg(committed.join(script)).arg(&made);
    // The harness writes much to the terminal.
    make.stdout(Stdio::null()).stderr(Stdio::null());
    match shell::succeeds(&mut make)? {
        true => Ok((committed, made)),
        false => Err(format!(
            "{folder}/{script} failed; run it by itself to see why"
        )),
    }
}

/// Lets lm-evaluation-harness score the built-in model again.
fn harness() -> Outcome {
    let (committed, made) = made_by("lm_eval", HARNESS, "make_harness.py")?;
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::from("data"), PathBuf::from("expected")];
    while let Some(folder) = folders.pop() {
        let path = committed.join(&folder);
        let cannot = |e| format!("cannot read `{}` ({e})", path.display());
        for entry in fs::read_dir(&path).map_err(cannot)? {
            let name = folder.join(entry.map_err(cannot)?.file_name());
            match committed.join(&name).is_dir() {
                true => folders.push(name),
                false => files.push(name),
            }
        }
    }
    files.sort();
    Ok(shell::code(compare(&made, &committed, files.into_iter())?))
}

/// Whether the files are the same in both folders, byte by byte.
fn compare(
    made: &Path,
    committed: &Path,
    files: impl Iterator<Item = PathBuf>,
) -> Result<bool, String> {
    let mut same = true;
    for path in files {
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
    Ok(same)
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
