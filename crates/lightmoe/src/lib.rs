//! The pipeline of stages and what it tells its user.
//!
//! Invariant: this is the only crate that prints, reads the environment or ends the process, and
//! within it only `main`, [`progress`], the text of [`speak`], the turns of
//! [`commands::run_chat`] and [`hub`], which reads the Hub's variables, do.

pub mod benchmarks;
pub mod calibration;
pub mod cli;
pub mod commands;
pub mod compare;
pub mod compeft;
pub mod compress;
pub mod contrast;
pub mod device;
pub mod divergence;
pub mod hub;
pub mod inspect;
pub mod items;
pub mod keep;
pub mod machine;
pub mod paired;
pub mod pipeline;
pub mod preflight;
pub mod pretrain;
pub mod progress;
pub mod quality;
pub mod recipe;
pub mod reference;
pub mod report;
pub mod results;
pub mod run;
pub mod runner;
pub mod sandbox;
pub mod scale;
pub mod schemas;
pub mod settings;
pub mod source;
pub mod speak;
pub mod speed;
mod spread;
pub mod tokens;
pub mod usage;
pub mod verdict;
mod versioned;

use sha2::{Digest, Sha256};

/// A short name of anything that can be written as JSON: the first half of its SHA-256.
///
/// # Errors
/// If the value cannot be written as JSON.
pub fn fingerprint(value: &impl serde::Serialize) -> anyhow::Result<String> {
    let digest = Sha256::digest(serde_json::to_vec(value)?);
    Ok(digest[..16].iter().map(|b| format!("{b:02x}")).collect())
}
