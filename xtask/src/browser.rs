//! `browser`: opens the pages that the program writes in headless Chromium, without a network, and looks
//! for errors, requests, overflow and faint text. Needs Chromium and Python; says so and fails where
//! one is missing, since then nothing is checked.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Outcome, binary, shell};

const SCRIPT: &str = include_str!("browser.py");
/// The names that Chromium and its kin have.
const NAMES: [&str; 4] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
];

/// Runs that between them have every section of the report, and a small comparison: a name, the
/// subcommand with its arguments, and the page that it leaves.
const RUNS: [(&str, &str, &str); 3] = [
    (
        "runs/lightmoe",
        "compress --steps 150 --eval-examples 200 --min-score 0.97 --max-bytes 4MB",
        "report.html",
    ),
    (
        "runs/budget",
        "compress --method budget --ratio 0.7 --steps 0 --calibration-tokens 4096 \
         --eval-examples 200",
        "report.html",
    ),
    (
        "compare",
        "compare --methods lightmoe,reap,lora:rank=4 --ratios 0.3,0.5 --tasks math,intent --seeds 1 \
         --steps 10 --eval-examples 20",
        "index.html",
    ),
];

/// Looks at the pages that are given, or of the runs that are given, or of small runs made for it.
pub fn run(arguments: &[String]) -> Outcome {
    let chromium = chromium()?;
    let folder = shell::target().join("browser");
    let pages = match arguments {
        [] => make(&folder)?,
        given => given.iter().map(|path| page(Path::new(path))).collect(),
    };
    let pictures = folder.join("pictures");
    let _ = fs::remove_dir_all(&pictures);
    let python = env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let mut look = Command::new(python);
    look.args(["-c", SCRIPT])
        .arg(chromium)
        .arg(pictures)
        .args(pages);
    match shell::succeeds(&mut look)? {
        true => Ok(shell::code(true)),
        false => Err("a page is not as it should be; see above".to_owned()),
    }
}

/// The page of a run, or the path itself.
fn page(path: &Path) -> PathBuf {
    let pages = ["report.html", "index.html"].map(|name| path.join(name));
    let found = pages.into_iter().find(|page| page.is_file());
    found.unwrap_or_else(|| path.to_owned())
}

/// Compresses the built-in model in small ways; the pages that this leaves.
fn make(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let lightmoe = binary::build()?;
    if folder.exists() {
        fs::remove_dir_all(folder)
            .map_err(|e| format!("cannot remove `{}` ({e})", folder.display()))?;
    }
    let mut pages = Vec::new();
    for (name, arguments, page) in RUNS {
        eprintln!("lightmoe {arguments}");
        let out = folder.join(name);
        let mut run = Command::new(&lightmoe);
        run.args(arguments.split(' ')).arg("--out").arg(&out);
        // Its table is of no interest here.
        run.stdout(Stdio::null());
        if !shell::succeeds(&mut run)? {
            return Err(format!("`lightmoe {arguments}` failed; see above"));
        }
        pages.push(out.join(page));
    }
    // Its first page was written before the others were there.
    let mut report = Command::new(&lightmoe);
    report.args(["report", "--run"]).arg(folder.join(RUNS[0].0));
    report.stdout(Stdio::null());
    match shell::succeeds(&mut report)? {
        true => Ok(pages),
        false => Err("`lightmoe report` failed; see above".to_owned()),
    }
}

/// The browser of the variable CHROMIUM, or the first that starts.
fn chromium() -> Result<OsString, String> {
    let named = env::var_os("CHROMIUM").into_iter();
    let known = NAMES.iter().map(OsString::from);
    let starts = |name: &OsString| {
        let mut version = Command::new(name);
        version.arg("--version");
        version.stdout(Stdio::null()).stderr(Stdio::null());
        version.status().is_ok_and(|status| status.success())
    };
    named.chain(known).find(starts).ok_or_else(|| {
        format!(
            "no page was looked at, for want of Chromium, sought as {}; install one, or set CHROMIUM \
             to its path",
            NAMES.join(", ")
        )
    })
}
