//! What a measurement depends on and costs: the day, the processor, the process's resident memory
//! (the last two as Linux reports them); and how much memory the work may take.

use std::sync::OnceLock;

static MAX_MEMORY: OnceLock<u64> = OnceLock::new();

/// Sets the most memory that the work may take, in bytes.
pub fn set_max_memory(bytes: u64) {
    let _ = MAX_MEMORY.set(bytes);
}

/// The most memory that the work may take, in bytes: as set, or three quarters of what is free now.
pub fn max_memory() -> u64 {
    let free = || {
        let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        kib(&info, "MemAvailable:").map_or(u64::MAX, |bytes| bytes / 4 * 3)
    };
    MAX_MEMORY.get().copied().unwrap_or_else(free)
}

/// The bytes behind `key`, of text like that of `/proc`.
fn kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number = line.split_whitespace().next()?.parse::<u64>().ok()?;
    Some(number * 1024)
}

/// The day in UTC: `2026-11-22`.
pub fn today() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d").to_string()
}

/// The processor's name and the number of its cores that this process may use.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("an unknown processor", |(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{name}, {cores} cores")
}

/// The highest resident memory since the last [`reset_peak`], in bytes; zero where it is unknown.
pub fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    kib(&status, "VmHWM:").unwrap_or(0)
}

/// Begins a new measurement of the peak. Where the system does not allow it, later peaks include
/// earlier ones.
pub fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
