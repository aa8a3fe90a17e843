//! Calls of the program, tiny settings, and runs to compare.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Settings of a run of a few seconds; a recipe file, so that flags can overrule them.
pub const TINY: &str = "task = 'intent'\nsteps = 12\ntrain_examples = 300\neval_examples = 20\n\
                        calibration_tokens = 6000\nbatch_size = 4\n";

/// A file or folder of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// A call of a subcommand.
pub fn command(sub: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lightmoe"));
    command.args([sub, "--quiet"]).stdin(Stdio::null());
    command
}

/// A call of a subcommand that takes a recipe, with [`TINY`] settings.
pub fn tiny(sub: &str) -> Command {
    static RECIPE: OnceLock<PathBuf> = OnceLock::new();
    let recipe = RECIPE.get_or_init(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-tiny.toml");
        fs::write(&path, TINY).unwrap();
        path
    });
    let mut command = command(sub);
    command.arg("--recipe").arg(recipe);
    command
}

/// What may come of a call.
pub trait Outcome {
    /// Must succeed; its standard output.
    fn ok(&mut self) -> String;
    /// Must end with this code; its standard error.
    fn fails(&mut self, code: i32) -> String;
}

impl Outcome for Command {
    #[track_caller]
    fn ok(&mut self) -> String {
        let output = self.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{self:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn fails(&mut self, code: i32) -> String {
        let output = self.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{self:?}: {stderr}");
        stderr
    }
}

/// Sends `signal` to the program as soon as `moment` has come; returns its exit code, if it has one.
#[track_caller]
pub fn end(command: &mut Command, signal: &str, moment: impl Fn() -> bool) -> Option<i32> {
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while !moment() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "ended by itself: {ended:?}");
        assert!(begin.elapsed() < Duration::from_secs(120), "never came");
        sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    Command::new("kill").args([signal, &id]).output().unwrap();
    child.wait().unwrap().code()
}

/// A finished run with [`TINY`] settings, made once.
pub fn base() -> &'static Path {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-base");
        if out.exists() {
            fs::remove_dir_all(&out).unwrap();
        }
        tiny("compress").arg("--out").arg(&out).ok();
        out
    })
}

/// A JSON file.
#[track_caller]
pub fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// Holds a value to the schema of that name.
#[track_caller]
pub fn assert_schema(name: &str, value: &Value) {
    if let Err(error) = validated(name, value) {
        panic!("{error}");
    }
}

/// What of a value is not as the schema of that name says.
pub fn validated(name: &str, value: &Value) -> Result<(), String> {
    let path = repository(&format!("docs/schemas/{name}.schema.json"));
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource(name, json(&path)).unwrap();
    let schema = compiler.compile(name, &mut schemas).unwrap();
    let valid = schemas.validate(value, schema);
    valid.map_err(|error| format!("{name}: {error:#}"))
}

/// The scores of one stage of a finished run: those of its only task.
pub fn scores(run: &Path, stage: &str) -> Value {
    json(&run.join("results.json"))["stages"][stage].clone()
}

/// Names in a folder, sorted; empty if there is none.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Every file below a folder by its name in it.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for name in names(dir) {
        let path = dir.join(&name);
        if path.is_dir() {
            let below = files(&path);
            all.extend(below.into_iter().map(|(n, b)| (format!("{name}/{n}"), b)));
        } else {
            all.insert(name, fs::read(&path).unwrap());
        }
    }
    all
}

/// What of a run must be the same every time: all but times and memory.
fn lasting(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = files(run);
    files.retain(|name, _| {
        let timed = ["results.json", "run.json", "report.html"].contains(&name.as_str());
        !timed && !name.contains("tfevents")
    });
    let mut results = json(&run.join("results.json"));
    for timed in ["seconds", "peak_rss_bytes", "peak_rss_by_stage"] {
        results.as_object_mut().unwrap().remove(timed);
    }
    files.insert("results.json".into(), results.to_string().into_bytes());
    files
}

/// Both runs left the same.
#[track_caller]
pub fn assert_same_run(a: &Path, b: &Path) {
    let (a, b) = (lasting(a), lasting(b));
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    let different: Vec<_> = a.keys().filter(|&name| a[name] != b[name]).collect();
    assert!(different.is_empty(), "{different:?} differ");
}

/// A copy of the built-in model that may be changed.
pub fn model_copy(to: &Path) -> PathBuf {
    fs::create_dir_all(to).unwrap();
    for (name, bytes) in files(&repository("fixtures/olmoe-nano")) {
        fs::write(to.join(name), bytes).unwrap();
    }
    to.to_owned()
}
