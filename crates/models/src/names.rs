//! Tensor names. Inside, every family's tensors have the names that most families publish; where a
//! family publishes others, [`stored`] translates at the border to the file. What replaces an expert
//! has names of our own: a compressed slot keeps its expert's name with PEFT's `lora_A`/`lora_B`;
//! bases stand beside the experts as `mlp.bases.<group>`.

use crate::families::Family;

/// The embedding, `[V, H]`.
pub const EMBED: &str = "model.embed_tokens.weight";
/// The last norm, `[H]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The output head, `[V, H]`.
pub const HEAD: &str = "lm_head.weight";

/// `model.layers.<layer>.<rest>.weight`, or as it is where `rest` ends in `.bias`.
pub fn layer(layer: usize, rest: &str) -> String {
    let weight = if rest.ends_with(".bias") {
        ""
    } else {
        ".weight"
    };
    format!("model.layers.{layer}.{rest}{weight}")
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

/// The name in the checkpoint files of `family`.
pub fn stored(family: Family, name: &str) -> String {
    match family {
        // The names of the first release of Mixtral: `w1` gates, `w3` goes up, `w2` down.
        Family::Mixtral => name
            .replace(".mlp.", ".block_sparse_moe.")
            .replace(".gate_proj.", ".w1.")
            .replace(".up_proj.", ".w3.")
            .replace(".down_proj.", ".w2."),
        _ => name.to_owned(),
    }
}
