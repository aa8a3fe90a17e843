//! Runs Python programs that a model wrote, so that they do no harm.
//!
//! The program itself is called twice more, each time to become less: [`enter`] finds out. The `outer`
//! process takes namespaces of its own (users, processes, network, messages, mounts) and puts a small
//! file system in memory over the program's folder. The `inner` one, the first process of its namespace,
//! gives itself limits and a filter of system calls, gives up writing anywhere but in that folder, and
//! becomes Python. When time is up, `outer` ends `inner`, and the kernel all that is in its namespace.
//!
//! Invariant: a program runs under all of these or not at all.

#[cfg(target_os = "linux")]
mod calls;
#[cfg(target_os = "linux")]
mod inside;

use lightmoe_eval::harness::Judge;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::io::{ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// Names of the two processes, in place of a subcommand.
const OUTER: &str = "sandbox-outer";
const INNER: &str = "sandbox-inner";
/// Exit codes of `outer`: of a program that came to its end, and of one that did not. Anything else is
/// an error of ours.
const PASSED: u8 = 0;
const FAILED: u8 = 1;

/// What a program may use.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    /// Seconds of processor time.
    pub processor_seconds: u64,
    /// Seconds on the clock: programs that wait, and a machine that is busy with others.
    pub clock_seconds: u64,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of files.
    pub files: u64,
}

impl Default for Limits {
    /// Twice the time that the tests of HumanEval allow, there on the clock: what passes there passes on
    /// a slower or busy machine as well.
    fn default() -> Self {
        Self {
            processor_seconds: 6,
            clock_seconds: 20,
            memory: 2 << 30,
            files: 64 << 20,
        }
    }
}

/// A place to run programs in.
#[derive(Debug)]
pub struct Sandbox {
    /// This program.
    itself: PathBuf,
    python: PathBuf,
    limits: Limits,
}

/// What the processes are told.
#[derive(Serialize, Deserialize)]
struct Order {
    itself: PathBuf,
    python: PathBuf,
    folder: PathBuf,
    limits: Limits,
}

impl Sandbox {
    /// A sandbox that was tried with a program that does nothing. `itself` is this program's file.
    ///
    /// # Errors
    /// If there is no Python 3, or the machine lacks a protection; which one, and what to do.
    pub fn new(itself: &Path, limits: Limits) -> Result<Self, String> {
        let sandbox = Self {
            itself: itself.to_owned(),
            python: find_python()?,
            limits,
        };
        match sandbox.passes("pass")? {
            true => Ok(sandbox),
            false => Err(format!(
                "`{}` does not run in the sandbox within {} s; check that it is a whole Python 3",
                sandbox.python.display(),
                sandbox.limits.clock_seconds
            )),
        }
    }
}

impl Judge for Sandbox {
    fn passes(&self, program: &str) -> Result<bool, String> {
        let cannot = |what: &str, e: &dyn std::fmt::Display| format!("cannot {what} ({e})");
        let folder = tempfile::tempdir().map_err(|e| cannot("make a temporary folder", &e))?;
        let order = Order {
            itself: self.itself.clone(),
            python: self.python.clone(),
            folder: folder.path().to_owned(),
            limits: self.limits.clone(),
        };
        let order = serde_json::to_string(&order).map_err(|e| cannot("write its order", &e))?;
        let mut outer = Command::new(&self.itself);
        outer
            .args([OUTER, &order])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A Ctrl-C ends the evaluation, which waits for the programs that run.
            .process_group(0);
        let mut outer = outer
            .spawn()
            .map_err(|e| cannot("start this program once more", &e))?;
        if let Some(mut stdin) = outer.stdin.take()
            && let Err(e) = stdin.write_all(program.as_bytes())
            // It ended before it read anything, and says why.
            && e.kind() != ErrorKind::BrokenPipe
        {
            return Err(cannot("hand over a program", &e));
        }
        let output = outer
            .wait_with_output()
            .map_err(|e| cannot("wait for a program", &e))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let code = output
            .status
            .code()
            .and_then(|code| u8::try_from(code).ok());
        match (said.trim(), code) {
            ("", Some(PASSED)) => Ok(true),
            ("", Some(FAILED)) => Ok(false),
            ("", _) => Err(format!("the sandbox ended with {}", output.status)),
            (said, _) => Err(said.to_owned()),
        }
    }
}

/// The file of the Python 3 that PATH leads to; what lies there may be a script that starts it.
fn find_python() -> Result<PathBuf, String> {
    let mut python = Command::new("python3");
    python.args(["-c", "import sys; print(sys.executable)"]);
    let output = python.stdin(Stdio::null()).output();
    let path = output.ok().filter(|output| output.status.success());
    let path = path.and_then(|output| String::from_utf8(output.stdout).ok());
    let path = path.map(|path| PathBuf::from(path.trim()));
    path.filter(|path| path.is_file()).ok_or_else(|| {
        "no working `python3` was found on PATH, which runs the programs; install Python 3".into()
    })
}

/// If this process is one of the sandbox, does its part. Must come before anything starts a thread.
pub fn enter() -> Option<ExitCode> {
    let arguments: Vec<_> = std::env::args_os().skip(1).take(2).collect();
    let [name, order] = arguments.as_slice() else {
        return None;
    };
    let part = [OUTER, INNER]
        .into_iter()
        .find(|part| name == OsStr::new(part))?;
    let order = order
        .to_str()
        .and_then(|order| serde_json::from_str(order).ok());
    let ended = match order {
        Some(order) => play(part, &order),
        None => Err("the sandbox was given no order; it is for this program's own use".into()),
    };
    Some(ended.unwrap_or_else(|problem: String| {
        // There is nobody else to tell.
        let _ = writeln!(std::io::stderr(), "{problem}");
        ExitCode::from(2)
    }))
}

#[cfg(target_os = "linux")]
fn play(part: &str, order: &Order) -> Result<ExitCode, String> {
    match part {
        OUTER => inside::outer(order).map(ExitCode::from),
        _ => inside::inner(order),
    }
}

#[cfg(not(target_os = "linux"))]
fn play(_: &str, _: &Order) -> Result<ExitCode, String> {
    Err("programs that a model wrote are run on Linux alone, whose protections this needs".into())
}
