//! What programs that a model wrote can do, and what not: each escape is tried in the sandbox, where it
//! has to fail, and outside, where it works.

use lightmoe::sandbox::{Limits, Sandbox};
use lightmoe_eval::harness::Judge;
use serde_json::json;
use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A function for programs: whether the operating system refuses an action.
const REFUSED: &str = "
import os
def refused(action):
    try:
        action()
    except OSError:
        return True
    return False
";

/// The sandbox, where there is a Python and the machine has all protections.
fn sandbox(limits: Limits) -> Option<Sandbox> {
    match Sandbox::new(Path::new(env!("CARGO_BIN_EXE_lightmoe")), limits) {
        Ok(sandbox) => Some(sandbox),
        Err(reason) if reason.contains("python3") || reason.contains("this machine cannot") => {
            eprintln!("SKIPPED, programs cannot be run here: {reason}");
            None
        }
        Err(reason) => panic!("{reason}"),
    }
}

/// Whether a program passes as any program of the user's does.
fn passes_outside(program: &str) -> bool {
    let mut python = Command::new("python3");
    python.args(["-c", program]).stderr(Stdio::null());
    python.stdin(Stdio::null()).status().unwrap().success()
}

#[track_caller]
fn assert_passes(sandbox: &Sandbox, program: &str, passes: bool) {
    assert_eq!(sandbox.passes(program), Ok(passes), "{program}");
}

#[test]
fn programs_pass_that_come_to_their_end() {
    let Some(sandbox) = sandbox(Limits::default()) else {
        return;
    };
    for program in [
        "assert 1 + 1 == 2",
        "name = 'é'\r\nassert len(name) == 1",
        "import collections, decimal, heapq, itertools, math, random, re, typing",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "open('x', 'w').write('1')\nassert open('x').read() == '1'",
        "import tempfile\ntempfile.NamedTemporaryFile().write(b'1')",
        "assert open('/etc/passwd').read()",
        "import sys\nassert sys.stdin.read() == ''",
        "import os\nassert not {'PATH', 'HOME', 'USER', 'CARGO'} & set(os.environ)",
        // The same order each time.
        "assert list({'a', 'b', 'c', 'd'}) == list({'a', 'b', 'c', 'd'})",
    ] {
        assert_passes(&sandbox, program, true);
    }
    for program in [
        "assert 1 + 1 == 3",
        "def f(:",
        "exit()",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "input()",
        "import os, signal\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        "\0",
        "",
    ] {
        assert_passes(&sandbox, program, program.is_empty());
    }
}

#[test]
fn nothing_is_written_outside_of_its_folder() {
    let Some(sandbox) = sandbox(Limits::default()) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (path, kept) = (folder.path().display(), folder.path().join("kept"));
    for action in [
        format!("open('{path}/new', 'w')"),
        format!("open('{path}/kept', 'w')"),
        format!("open('{path}/kept', 'a').write('more')"),
        format!("os.open('{path}/kept', os.O_RDONLY | os.O_TRUNC)"),
        format!("os.truncate('{path}/kept', 1)"),
        format!("os.mkdir('{path}/new')"),
        format!("os.symlink('{path}/kept', '{path}/new')"),
        format!("os.link('{path}/kept', '{path}/new')"),
        format!("os.mkfifo('{path}/new')"),
        format!("os.rename('{path}/kept', '{path}/new')"),
        format!("os.chmod('{path}/kept', 0o777)"),
        format!("os.utime('{path}/kept', (1, 1))"),
        format!("os.remove('{path}/kept')"),
    ] {
        fs::write(&kept, "kept").unwrap();
        let about = |path: &Path| {
            let about = fs::metadata(path).unwrap();
            (
                about.mode(),
                about.mtime(),
                about.mtime_nsec(),
                about.nlink(),
            )
        };
        let before = about(&kept);
        let program = format!("{REFUSED}assert refused(lambda: {action})");
        assert_passes(&sandbox, &program, true);
        assert_eq!(fs::read_to_string(&kept).unwrap(), "kept", "{action}");
        assert_eq!(about(&kept), before, "{action}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{action}");
        assert!(!passes_outside(&program), "{action}");
        for left in fs::read_dir(folder.path()).unwrap() {
            let left = left.unwrap().path();
            let _ = fs::remove_file(&left).or_else(|_| fs::remove_dir(&left));
        }
    }
}

#[test]
fn there_is_no_network_and_no_socket() {
    let Some(sandbox) = sandbox(Limits::default()) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let network = TcpListener::bind("127.0.0.1:0").unwrap();
    let local = UnixListener::bind(folder.path().join("socket")).unwrap();
    network.set_nonblocking(true).unwrap();
    local.set_nonblocking(true).unwrap();
    let address = network.local_addr().unwrap();
    let actions = [
        format!(
            "socket.create_connection(('127.0.0.1', {}))",
            address.port()
        ),
        format!(
            "socket.socket(socket.AF_UNIX).connect('{}/socket')",
            folder.path().display()
        ),
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(('127.0.0.1', 0))".to_owned(),
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)".to_owned(),
    ];
    for action in &actions {
        let program = format!("{REFUSED}import socket\nassert refused(lambda: {action})");
        assert_passes(&sandbox, &program, true);
    }
    let nobody_came = |error: std::io::Error| error.kind() == ErrorKind::WouldBlock;
    assert!(nobody_came(network.accept().unwrap_err()));
    assert!(nobody_came(local.accept().unwrap_err()));
    for action in &actions {
        let program = format!("{REFUSED}import socket\nassert refused(lambda: {action})");
        assert!(!passes_outside(&program), "{action}");
    }
    assert!(network.accept().is_ok() && local.accept().is_ok());
}

#[test]
fn other_processes_are_out_of_reach_and_new_ones_are_not_started() {
    let Some(sandbox) = sandbox(Limits::default()) else {
        return;
    };
    let here = std::process::id();
    for action in [
        "os.fork()".to_owned(),
        "os.posix_spawn('/bin/true', ['true'], {})".to_owned(),
        "__import__('subprocess').run(['true'])".to_owned(),
        "__import__('multiprocessing').Process(target=print).start()".to_owned(),
        format!("os.kill({here}, 0)"),
        format!("open('/proc/{here}/environ').read()"),
        format!("open('/proc/{here}/mem')"),
        format!("__import__('resource').prlimit({here}, 7)"),
    ] {
        let program = format!("{REFUSED}assert refused(lambda: {action})");
        assert_passes(&sandbox, &program, true);
        assert!(!passes_outside(&program), "{action}");
    }
}

#[test]
fn time_memory_and_files_come_to_an_end() {
    let limits = Limits {
        processor_seconds: 1,
        clock_seconds: 3,
        memory: 300 << 20,
        files: 4 << 20,
    };
    let more = Limits {
        processor_seconds: 20,
        clock_seconds: 60,
        memory: 1 << 30,
        files: 16 << 20,
    };
    let (Some(sandbox), Some(larger)) = (sandbox(limits), sandbox(more)) else {
        return;
    };
    for program in [
        "x = bytearray(400 << 20)",
        "open('x', 'wb').write(bytes(6 << 20))",
        "for name in 'abc': open(name, 'wb').write(bytes(2 << 20))",
        "import time\nwhile time.process_time() < 2: pass",
        "import time\ntime.sleep(4)",
    ] {
        let begin = Instant::now();
        assert_passes(&sandbox, program, false);
        assert!(begin.elapsed() < Duration::from_secs(30), "{program}");
        assert_passes(&larger, program, true);
    }
    // What would fill the memory of the kernel, or keep a program alive.
    for program in [
        "for n in range(9000): open(str(n), 'w').close()",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except \
         OSError: pass\nwhile True: pass",
        "import threading, time\nthreading.Thread(target=time.sleep, args=[1000]).start()\ntime.sleep(1000)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import os\nos.execv('/bin/sleep', ['sleep', '1000'])",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[1000]).start()",
    ] {
        let begin = Instant::now();
        assert_passes(&sandbox, program, false);
        assert!(begin.elapsed() < Duration::from_secs(30), "{program}");
    }
}

/// Whether a process runs whose arguments hold a text, besides those of the sandbox.
fn runs(text: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap();
    let mut arguments =
        processes.filter_map(|process| fs::read(process.ok()?.path().join("cmdline")).ok());
    arguments.any(|arguments| {
        let arguments = String::from_utf8_lossy(&arguments).into_owned();
        arguments.contains(text) && !arguments.contains("sandbox-")
    })
}

#[test]
fn a_program_ends_with_the_one_that_started_it() {
    if sandbox(Limits::default()).is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().display().to_string();
    let find = "import sys; print(sys.executable)";
    let python = Command::new("python3").args(["-c", find]).output().unwrap();
    let itself = env!("CARGO_BIN_EXE_lightmoe");
    let limits = Limits {
        clock_seconds: 600,
        ..Limits::default()
    };
    let order = json!({
        "itself": itself,
        "python": String::from_utf8(python.stdout).unwrap().trim(),
        "folder": &name,
        "limits": limits,
    });
    // It tries not to be told, and to leave its group.
    let program = folder.path().join("given.py");
    fs::write(
        &program,
        "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0)\ntry: os.setsid()\nexcept OSError: pass\n\
         time.sleep(600)",
    )
    .unwrap();
    let mut outer = Command::new(itself)
        .args(["sandbox-outer", &order.to_string()])
        .stdin(fs::File::open(&program).unwrap())
        .spawn()
        .unwrap();
    let within = |seconds, is_so: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while !is_so() && Instant::now() < deadline {
            sleep(Duration::from_millis(20));
        }
        is_so()
    };
    assert!(within(30, &|| runs(&name)));
    // Long enough for its attempts.
    sleep(Duration::from_millis(500));
    outer.kill().unwrap();
    outer.wait().unwrap();
    assert!(within(30, &|| !runs(&name)));
}
