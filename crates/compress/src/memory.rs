//! How many tokens may run through a layer at once.

use crate::{Error, Result};
use lightmoe_models::ModelConfig;
use lightmoe_models::config::Attention;

/// Tokens that are enough to keep every core busy with every expert.
pub(crate) const ENOUGH: usize = 8192;
/// What the program needs beside weights and activations, in bytes.
const PROGRAM: u64 = 128 << 20;
const F32: u64 = 4;
/// How often what a layer computes of a token is held while it is differentiated: the values, their
/// gradients, and what the sums over an expert's tokens take.
pub(crate) const BACKWARD: u64 = 3;
/// Logits that are computed at a time on the way back.
pub(crate) const LOGITS: usize = 1 << 24;

/// The size of a batch, in tokens, that runs through any layer of the model within `max_memory`
/// bytes: weights are f32, and so is what a layer computes of each token, of which there are `copies`;
/// `beside` bytes are taken. At least `longest`.
///
/// # Errors
/// [`Error::Invalid`] with what is needed, if a layer and the longest sample, or the embedding, do
/// not fit.
pub fn batch_tokens(
    config: &ModelConfig,
    longest: usize,
    max_memory: u64,
    beside: u64,
    copies: u64,
) -> Result<usize> {
    // On the way back, embedding and head are there together, and some logits with their gradients.
    let ends = match copies {
        1 => embedding_bytes(config),
        _ => 2 * embedding_bytes(config) + 4 * F32 * LOGITS as u64,
    };
    let weights = (layer_bytes(config) + beside).max(ends) + PROGRAM;
    let of_token = copies * token_bytes(config);
    let needed = weights + longest as u64 * of_token;
    if needed > max_memory {
        return Err(Error::Invalid(format!(
            "a layer of this model and a sample of {longest} tokens need {:.2} GiB, but at most \
             {:.2} GiB may be used; raise `--max-memory`, or shorten the samples",
            gib(needed),
            gib(max_memory)
        )));
    }
    let room = (max_memory - weights) / of_token.max(1);
    Ok(usize::try_from(room)
        .map_or(ENOUGH, |room| room.min(ENOUGH))
        .max(longest))
}

/// Bytes of the largest layer as f32.
pub fn layer_bytes(config: &ModelConfig) -> u64 {
    let counts = config.parameters();
    let layers = config.num_layers.max(1) as u64;
    let experts = config.num_moe_layers().max(1) as u64;
    let shared = counts.routed_experts + counts.shared_experts + counts.router;
    let dense = counts.dense_mlp / config.first_dense_layers.max(1) as u64;
    F32 * (counts.attention / layers + counts.norms / layers + (shared / experts).max(dense))
}

/// Bytes of the second moments of a layer's experts, and of one more.
pub fn moment_bytes(config: &ModelConfig) -> u64 {
    let (h, f) = (
        config.hidden_size as u64,
        config.moe.intermediate_size as u64,
    );
    F32 * (config.moe.num_experts as u64 + 1) * (h * h + f * f)
}

/// Bytes of what errors of a layer's experts cost, halves of symmetric matrices, and for each thread what
/// is added to them.
pub fn damage_bytes(config: &ModelConfig) -> u64 {
    let (h, f) = (
        config.hidden_size as u64,
        config.moe.intermediate_size as u64,
    );
    let halves = config.moe.num_experts as u64 * (h * (h + 1) + f * (f + 1)) / 2;
    let threads = rayon::current_num_threads() as u64;
    F32 * (halves + h * h + threads * 3 * h.max(f).pow(2))
}

/// Bytes that sampling the tokens of a layer takes.
pub fn sample_bytes(config: &ModelConfig) -> u64 {
    F32 * (crate::samples::numbers(config) + crate::reception::numbers(config)) as u64
}

/// Bytes of what is collected of each expert's inputs.
pub fn input_bytes(config: &ModelConfig) -> u64 {
    F32 * crate::inputs::numbers(config) as u64
}

fn embedding_bytes(config: &ModelConfig) -> u64 {
    F32 * config.vocab_size as u64 * config.hidden_size as u64
}

/// Bytes that a token takes in a layer: the residual stream and its norms, the attention, the
/// router, and the rows of its experts, each with what comes in, both halves, their product and
/// what goes out.
fn token_bytes(config: &ModelConfig) -> u64 {
    let (moe, h) = (&config.moe, config.hidden_size);
    let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
    let attention = match config.attention {
        // Projected, normed and rotated, the value, and what comes out.
        Attention::GroupedQuery { .. } => (4 * heads + 4 * kv_heads) * config.head_dim,
        // The same of both parts of queries and keys, put together, and all filled up to one width.
        Attention::MultiHeadLatent { v_head_dim, .. } => {
            11 * heads * config.head_dim.max(v_head_dim)
        }
    };
    let expert = 2 * h + 3 * moe.intermediate_size;
    let beside = 3 * moe
        .shared_intermediate_size
        .max(config.dense_intermediate_size);
    let numbers = 9 * h + attention + 4 * moe.num_experts + moe.top_k * expert + beside;
    F32 * numbers as u64
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
