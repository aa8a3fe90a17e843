//! What a measurement depends on and costs: the day, the machine, the process's resident memory
//! (the last two as Linux reports them); and how much memory the work may take.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
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

/// What ran and where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Environment {
    /// The commit that the program was built from, with `-dirty` behind it where files differed from
    /// it; null where it was not built in a repository.
    pub git_hash: Option<String>,
    /// Operating system and architecture: `linux x86_64`.
    pub system: String,
    /// The processor's name.
    pub processor: String,
    /// Its cores that the process may use.
    pub cores: usize,
    /// Memory of the machine, in bytes; zero where it is unknown.
    pub memory_bytes: u64,
}

impl Environment {
    /// That of this process.
    pub fn here() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let name = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("an unknown processor".to_owned(), |(_, name)| {
                name.trim().to_owned()
            });
        Self {
            git_hash: option_env!("LIGHTMOE_GIT_HASH").map(str::to_owned),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            processor: name,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib(&read("/proc/meminfo"), "MemTotal:").unwrap_or(0),
        }
    }
}

/// The processor's name and the number of its cores that this process may use.
pub fn processor() -> String {
    let here = Environment::here();
    format!("{}, {} cores", here.processor, here.cores)
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
