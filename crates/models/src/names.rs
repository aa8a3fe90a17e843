//! Tensor names: the published ones of the family, and ours for what replaces an expert.
//!
//! A compressed slot keeps its expert's name with PEFT's `lora_A`/`lora_B`; bases stand beside the
//! experts as `mlp.bases.<group>`.

/// The embedding, `[V, H]`.
pub const EMBED: &str = "model.embed_tokens.weight";
/// The last norm, `[H]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The output head, `[V, H]`.
pub const HEAD: &str = "lm_head.weight";

/// `model.layers.<layer>.<rest>.weight`
pub fn layer(layer: usize, rest: &str) -> String {
    format!("model.layers.{layer}.{rest}.weight")
}

/// One matrix of an expert; `projection` is `gate_proj`, `up_proj` or `down_proj`, optionally with
/// `.lora_A` or `.lora_B`.
pub fn expert(layer_number: usize, expert: usize, projection: &str) -> String {
    layer(layer_number, &format!("mlp.experts.{expert}.{projection}"))
}

/// One matrix of a shared base.
pub fn base(layer_number: usize, group: usize, projection: &str) -> String {
    layer(layer_number, &format!("mlp.bases.{group}.{projection}"))
}
