//! The process's resident memory, as Linux reports it.

/// The highest resident memory since the last [`reset_peak`], in bytes; zero where it is unknown.
pub fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find(|l| l.starts_with("VmHWM:"))
        .unwrap_or_default();
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|v| v.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Begins a new measurement of the peak. Where the system does not allow it, later peaks include
/// earlier ones.
pub fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
