//! What the two processes of the sandbox do to themselves.

use super::{FAILED, INNER, Order, PASSED, calls};
use landlock::{
    ABI, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr,
};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, mount};
use rustix::process::{
    Resource, Rlimit, Signal, getgid, getuid, set_parent_process_death_signal, setrlimit,
};
use std::ffi::CString;
use std::fmt::Display;
use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Runs a program's text and ends with [`ENDED`] if nothing goes wrong: a number that no program ends
/// with by chance.
const RUNNER: &str = include_str!("runner.py");
const ENDED: i32 = 86;
/// Who the program is in its namespace: nobody.
const NOBODY: u32 = 65534;
/// Files that a program may have open, and have in its folder.
const OPEN_FILES: u64 = 64;
const FILES: u64 = 4096;
/// Between two looks at the program.
const PAUSE: Duration = Duration::from_millis(3);
/// Landlock with the right to truncate: Linux 6.2.
const LANDLOCK: ABI = ABI::V3;

fn missing(protection: &str, error: impl Display) -> String {
    format!(
        "this machine cannot {protection} ({error}), and programs that a model wrote are not run with \
         less; run them on Linux 6.2 or later, outside of containers that forbid it"
    )
}

/// Takes namespaces of its own, starts `inner` in them, and ends it when time is up.
pub(super) fn outer(order: &Order) -> Result<u8, String> {
    let (user, group) = (getuid().as_raw(), getgid().as_raw());
    let namespaces = [
        (CloneFlags::CLONE_NEWUSER, "users"),
        (CloneFlags::CLONE_NEWPID, "processes"),
        (CloneFlags::CLONE_NEWNET, "network"),
        (CloneFlags::CLONE_NEWIPC, "messages"),
        (CloneFlags::CLONE_NEWNS, "mounts"),
    ];
    for (flag, name) in namespaces {
        unshare(flag).map_err(|e| missing(&format!("give a program its own {name}"), e))?;
        if flag == CloneFlags::CLONE_NEWUSER {
            for (file, text) in [
                ("setgroups", "deny".to_owned()),
                ("uid_map", format!("{NOBODY} {user} 1")),
                ("gid_map", format!("{NOBODY} {group} 1")),
            ] {
                fs::write(format!("/proc/self/{file}"), text)
                    .map_err(|e| missing("make a program nobody", e))?;
            }
        }
    }
    let size = CString::new(format!(
        "size={},nr_inodes={FILES},mode=700",
        order.limits.files
    ))
    .map_err(|e| missing("name a size", e))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount(
        "tmpfs",
        order.folder.as_path(),
        "tmpfs",
        flags,
        size.as_c_str(),
    )
    .map_err(|e| missing("give a program a folder in memory", e))?;
    let told = serde_json::to_string(order).map_err(|e| e.to_string())?;
    let mut inner = Command::new(&order.itself);
    inner.args([INNER, &told]).env_clear();
    let mut inner = inner
        .spawn()
        .map_err(|e| missing("start a process among its own", e))?;
    let deadline = Instant::now() + Duration::from_secs(order.limits.clock_seconds);
    loop {
        match inner.try_wait() {
            Ok(Some(status)) if status.code() == Some(ENDED) => return Ok(PASSED),
            Ok(Some(_)) => return Ok(FAILED),
            Ok(None) if Instant::now() < deadline => sleep(PAUSE),
            // The kernel ends what is left in the namespace with its first process.
            ended => {
                let killed = inner.kill().and_then(|()| inner.wait());
                return match ended.and(killed) {
                    Ok(_) => Ok(FAILED),
                    Err(e) => Err(format!("cannot end a program ({e})")),
                };
            }
        }
    }
}

/// Becomes Python with the program on standard input, within all limits.
pub(super) fn inner(order: &Order) -> Result<ExitCode, String> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| missing("end a program with the one that started it", e))?;
    let mut program = Vec::new();
    std::io::stdin()
        .read_to_end(&mut program)
        .map_err(|e| format!("cannot read the program ({e})"))?;
    let path = order.folder.join("program.py");
    fs::write(&path, program).map_err(|e| format!("cannot write the program ({e})"))?;
    let mut python = Command::new(&order.python);
    python
        .args(["-s", "-B", "-c", RUNNER])
        .arg(&path)
        .arg(ENDED.to_string())
        .current_dir(&order.folder)
        .env_clear()
        // Sets have the same order each time, and libraries of arithmetic start no threads.
        .envs([("PYTHONHASHSEED", "0"), ("OMP_NUM_THREADS", "1")])
        .env("TMPDIR", &order.folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    write_nowhere_but(order).map_err(|e| missing("keep a program from writing (Landlock)", e))?;
    calls::forbid().map_err(|e| missing("filter system calls (seccomp)", e))?;
    let limits = &order.limits;
    for (resource, most) in [
        // The first process of a namespace takes no notice of the signal of a lower soft limit.
        (Resource::Cpu, limits.processor_seconds),
        (Resource::Fsize, limits.files),
        (Resource::Nofile, OPEN_FILES),
        (Resource::Core, 0),
        // Last, for this process itself may have more.
        (Resource::As, limits.memory),
    ] {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit).map_err(|e| missing("limit a program", e))?;
    }
    Err(format!(
        "cannot start `{}` ({})",
        order.python.display(),
        python.exec()
    ))
}

/// Gives up writing, making, removing and renaming files outside of the program's folder.
fn write_nowhere_but(order: &Order) -> Result<(), Box<dyn std::error::Error>> {
    let writing = AccessFs::from_write(LANDLOCK);
    let nothing = AccessFs::WriteFile | AccessFs::Truncate;
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(writing)?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new(&order.folder)?, writing))?
        .add_rule(PathBeneath::new(PathFd::new("/dev/null")?, nothing))?
        .restrict_self()?;
    Ok(())
}
