//! The pipeline of stages and what it tells its user.

pub mod pretrain;
pub mod progress;
pub mod report;
pub mod results;

use sha2::{Digest, Sha256};

/// A short name of anything that can be written as JSON: the first half of its SHA-256.
///
/// # Errors
/// If the value cannot be written as JSON.
pub fn fingerprint(value: &impl serde::Serialize) -> anyhow::Result<String> {
    let digest = Sha256::digest(serde_json::to_vec(value)?);
    Ok(digest[..16].iter().map(|b| format!("{b:02x}")).collect())
}
