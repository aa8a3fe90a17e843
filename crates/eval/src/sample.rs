//! What became of each example: one JSON object a line, as `samples_<task>.jsonl` of
//! lm-evaluation-harness.

use crate::Result;
use lightmoe_models::folder::write_file;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One scored example.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Sample {
    /// Number of the example, from 0.
    pub index: usize,
    /// The prompt, whole, even if its beginning was cut off to fit.
    pub prompt: String,
    /// The reference completion.
    pub target: String,
    /// The greedy completion without white space around it: the target where that is what greedy
    /// decoding gives, what was generated where the metrics need it, otherwise unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<String>,
    /// Whether the greedy completion is right.
    pub exact_match: bool,
    /// Negative log-likelihood of the target, nats per answer token (end token included).
    pub nll: f64,
    /// Answer tokens, the end token included.
    pub answer_tokens: usize,
    /// Number of the likeliest choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice: Option<usize>,
    /// Number of the choice with the highest log-likelihood per byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice_norm: Option<usize>,
    /// Number of the right choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub right_choice: Option<usize>,
    /// Negative log-likelihood of each choice in nats, without an end token.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choice_nll: Vec<f64>,
}

/// Writes samples as JSONL. The file appears whole or not at all.
///
/// # Errors
/// [`crate::Error::Model`] if the file cannot be written.
pub fn write_samples(path: &Path, samples: &[Sample]) -> Result<()> {
    let mut text = Vec::new();
    for sample in samples {
        serde_json::to_writer(&mut text, sample)?;
        text.push(b'\n');
    }
    Ok(write_file(path, &text)?)
}
