//! Folders and processes.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crate::Outcome;

/// The root of the repository.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where cargo puts what it builds.
pub fn target() -> PathBuf {
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// The cargo that runs this command, in the root of the repository.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

/// The folder of a package that this one depends on.
///
/// # Errors
/// If cargo does not tell.
pub fn package(name: &str) -> Result<PathBuf, String> {
    let mut metadata = cargo(&["metadata", "--format-version", "1", "--all-features"]);
    let found = metadata.output().map_err(|e| cannot_start(&metadata, &e))?;
    let text = String::from_utf8_lossy(&found.stdout);
    let folder = format!("/{name}-");
    // Behind the name stands a version.
    let is_it = |part: &&str| {
        let version = part.rsplit_once(&folder).map(|(_, version)| version);
        let begins = |v: &str| v.starts_with(|c: char| c.is_ascii_digit());
        part.ends_with("/Cargo.toml") && version.is_some_and(begins)
    };
    let manifest = text.split('"').find(is_it);
    let folder = manifest.and_then(|manifest| Path::new(manifest).parent());
    folder
        .map(Path::to_owned)
        .ok_or_else(|| format!("cargo does not tell where `{name}` is"))
}

/// Lets a command find the libraries of a folder, before all others.
pub fn find_libraries<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    let given = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let folders = std::iter::once(folder.to_owned()).chain(env::split_paths(&given));
    match env::join_paths(folders) {
        Ok(path) => command.env("LD_LIBRARY_PATH", path),
        Err(_) => command,
    }
}

/// Runs a command to its end and tells whether it succeeded.
pub fn succeeds(command: &mut Command) -> Result<bool, String> {
    let status = command.status().map_err(|e| cannot_start(command, &e))?;
    Ok(status.success())
}

/// Puts the command in the place of this process, so that signals and its exit code go to and come
/// from it alone.
#[cfg(unix)]
pub fn replace(mut command: Command) -> Outcome {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(cannot_start(&command, &error))
}

/// Runs the command and ends with its exit code.
#[cfg(not(unix))]
pub fn replace(mut command: Command) -> Outcome {
    let status = command.status().map_err(|e| cannot_start(&command, &e))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Success or failure as an exit code.
pub fn code(success: bool) -> ExitCode {
    if success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The message for a command that did not even start.
pub fn cannot_start(command: &Command, error: &std::io::Error) -> String {
    let program = command.get_program().to_string_lossy();
    format!("cannot start `{program}` ({error}); check that it is installed")
}

/// The Python of the variable PYTHON, if it has `modules`; otherwise to `install` is advised.
pub fn python(modules: &str, install: &str) -> Result<OsString, String> {
    let python = env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let mut probe = Command::new(&python);
    probe.args(["-c", &format!("import {modules}")]);
    probe.stdout(Stdio::null()).stderr(Stdio::null());
    match succeeds(&mut probe)? {
        true => Ok(python),
        false => Err(format!(
            "`{}` cannot import {modules}; install {install}, or set PYTHON to a Python that has them",
            python.to_string_lossy()
        )),
    }
}
