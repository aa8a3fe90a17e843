//! Progress bars and interruption: the only place that writes to the terminal while work goes on.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::termios::{SetArg, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::{flag, low_level};
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::thread;

/// Ctrl-C was pressed.
static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// The program is to end.
static TERMINATED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static QUIET: OnceLock<bool> = OnceLock::new();

/// Catches Ctrl-C and SIGTERM: long work ends at its next safe point and can be resumed.
///
/// # Errors
/// If the handler cannot be installed.
pub fn catch_interrupts() -> io::Result<()> {
    flag::register(SIGINT, INTERRUPTED.clone())?;
    for signal in [SIGTERM, SIGHUP] {
        flag::register(signal, TERMINATED.clone())?;
    }
    Ok(())
}

/// Ends a mode of the terminal in which what is pasted has marks around it.
const PLAIN_PASTE: &str = "\x1b[?2004l";

/// From now on the program ends at once where it is told to: it mostly waits for its user. A terminal is
/// left as it is now, whatever an editor of lines makes of it meanwhile.
///
/// # Errors
/// If the signals cannot be waited for.
pub fn end_when_terminated() -> io::Result<()> {
    // None of a pipe or a file.
    let terminal = tcgetattr(io::stdin()).ok();
    let mut signals = Signals::new([SIGTERM, SIGHUP])?;
    let wait = move || {
        let Some(signal) = signals.forever().next() else {
            return;
        };
        // A terminal that is gone needs nothing any more.
        if let Some(terminal) = &terminal {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, terminal);
            if io::stderr().is_terminal() {
                let _ = writeln!(io::stderr(), "{PLAIN_PASTE}");
            }
        }
        low_level::exit(128 + signal);
    };
    thread::Builder::new().name("end".into()).spawn(wait)?;
    Ok(())
}

/// Begins nothing more where [`end_when_terminated`] is about to end the program.
pub fn rest_when_terminated() {
    while TERMINATED.load(Ordering::Relaxed) {
        thread::park();
    }
}

/// Whether the user asked to stop.
pub fn stopped() -> bool {
    INTERRUPTED.load(Ordering::Relaxed) || TERMINATED.load(Ordering::Relaxed)
}

/// Ctrl-C stopped what it was meant for, and the program goes on.
pub fn forget_interrupt() {
    INTERRUPTED.store(false, Ordering::Relaxed);
}

/// Draws no bars from now on.
pub fn set_quiet(quiet: bool) {
    let _ = QUIET.set(quiet);
}

/// Writes a line about work that was finished, unless quiet.
pub fn say(line: &str) {
    if QUIET.get() != Some(&true) {
        // A reader that has gone away wants no message.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// A bar of one piece of work.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar named `what` of `total` steps; invisible when quiet or without a terminal.
    pub fn new(what: &str, total: usize) -> Self {
        let style = "{prefix:>10} {bar:30.cyan/blue} {pos}/{len} {elapsed}<{eta} {msg}";
        Self::styled(what, total, style)
    }

    /// A bar of the `total` bytes of a file.
    pub fn bytes(file: &str, total: usize) -> Self {
        let style = "{prefix} {bar:30.cyan/blue} {percent}% {bytes}/{total_bytes} \
                     {bytes_per_sec} {eta}";
        Self::styled(file, total, style)
    }

    fn styled(what: &str, total: usize, style: &str) -> Self {
        let target = match QUIET.get() {
            Some(true) => ProgressDrawTarget::hidden(),
            _ => ProgressDrawTarget::stderr(),
        };
        let bar = ProgressBar::with_draw_target(Some(total as u64), target);
        // The template is a constant; should it ever not parse, the default style serves.
        bar.set_style(
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_prefix(what.to_owned());
        Self(bar)
    }

    /// Shows `done` of the total and answers whether to go on.
    pub fn at(&self, done: usize) -> bool {
        self.0.set_position(done as u64);
        !stopped()
    }

    /// As [`Progress::at`], with the total, for callers that learn it late.
    pub fn of(&self, done: usize, total: usize) -> bool {
        self.0.set_length(total as u64);
        self.at(done)
    }

    /// A word beside the bar.
    pub fn note(&self, text: String) {
        self.0.set_message(text);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
