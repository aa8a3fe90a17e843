//! Tensor names, and where a tensor lies in the files.
//!
//! Inside, every family's tensors have the names that most families publish, one tensor for each
//! matrix of an expert. Where files differ, [`Scheme`] translates at the border: other names, or
//! the experts of a layer stacked in one tensor as transformers 5 holds them. What replaces an
//! expert has names of our own: a compressed slot keeps its expert's name with PEFT's
//! `lora_A`/`lora_B` and may have a `bias` of its down projection, or has `transform` and `mixing` where it
//! is mixed from the layer's `mlp.basis.<number>`; bases stand beside the experts as `mlp.bases.<group>`,
//! factored ones with `lora_A`/`lora_B`, and `rows` of a sparse matrix at the places `index`.

use crate::families::Family;
use crate::layout::{BankLayout, SlotLayout};

/// What a router of DeepSeek-V3 adds to its scores, within its layer.
pub(crate) const CORRECTION: &str = "mlp.gate.e_score_correction_bias";

/// Whether it is a parameter of a router.
pub(crate) fn is_router(name: &str) -> bool {
    name.contains(".mlp.gate.")
}

/// The embedding, `[V, H]`.
pub const EMBED: &str = "model.embed_tokens";
/// The last norm, `[H]`.
pub const FINAL_NORM: &str = "model.norm";
/// The output head, `[V, H]`.
pub const HEAD: &str = "lm_head";

/// The three matrices of an expert.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Those that mixed slots mix from bases.
pub const MIXED: [&str; 2] = ["gate_proj", "up_proj"];

/// `<name>.weight`, or `name` as it is if it is that of a bias.
pub fn whole(name: &str) -> String {
    let weight = if name.ends_with("bias") {
        ""
    } else {
        ".weight"
    };
    format!("{name}{weight}")
}

/// A parameter of layer `layer`, by its name within the layer.
pub fn layer(layer: usize, rest: &str) -> String {
    whole(&format!("model.layers.{layer}.{rest}"))
}

/// The layer that a parameter belongs to, if it belongs to one.
pub fn layer_of(name: &str) -> Option<usize> {
    let (number, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    number.parse().ok()
}

/// One matrix of an expert; `projection` is one of [`PROJECTIONS`], optionally with `.lora_A`,
/// `.lora_B`, `.transform` or `.mixing`.
pub fn expert(layer_number: usize, expert: usize, projection: &str) -> String {
    layer(layer_number, &format!("mlp.experts.{expert}.{projection}"))
}

/// One matrix of a shared base; `projection` is one of [`PROJECTIONS`], for a factored one with
/// `.lora_A`, `.lora_B`, `.rows` or `.index`.
pub fn base(layer_number: usize, group: usize, projection: &str) -> String {
    layer(layer_number, &format!("mlp.bases.{group}.{projection}"))
}

/// Whether a tensor holds places of rows, and so whole numbers, and not weights.
pub fn is_index(name: &str) -> bool {
    name.ends_with(".index.weight") && name.contains(".mlp.bases.")
}

/// The vectors of all experts that scale the input of a projection.
pub fn scales(layer_number: usize, projection: &str) -> String {
    layer(layer_number, &format!("mlp.scales.{projection}"))
}

/// One of the bases that mixed slots share; `projection` is one of [`MIXED`].
pub fn basis(layer_number: usize, number: usize, projection: &str) -> String {
    layer(layer_number, &format!("mlp.basis.{number}.{projection}"))
}

/// The vector that stands for an expert's output.
pub fn constant(layer_number: usize, expert: usize) -> String {
    layer(layer_number, &format!("mlp.experts.{expert}.constant"))
}

/// The vector that is added to what the down projection of an adapted slot gives.
pub fn bias(layer_number: usize, expert: usize) -> String {
    layer(
        layer_number,
        &format!("mlp.experts.{expert}.down_proj.bias"),
    )
}

/// How the files hold the experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertPacking {
    /// One tensor for each matrix, as checkpoints are published.
    Separate,
    /// `gate_up_proj` `[n, 2F, H]`, gate rows first, and `down_proj` `[n, H, F]`, as transformers 5
    /// holds them; `n` counts the experts that have matrices of their own, ascending.
    Fused,
}

/// Names and packing of a checkpoint's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// Whose names.
    pub family: Family,
    /// How experts are packed.
    pub packing: ExpertPacking,
}

/// Where a tensor of ours lies in a tensor of the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file's name for the tensor that holds it.
    pub name: String,
    /// The shape of that tensor.
    pub shape: Vec<usize>,
    /// Elements before ours.
    pub offset: usize,
}

impl Place {
    /// A tensor of its own.
    pub fn whole(name: &str, shape: &[usize]) -> Self {
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            offset: 0,
        }
    }
}

impl Scheme {
    /// As `family` publishes.
    pub fn published(family: Family) -> Self {
        Self {
            family,
            packing: ExpertPacking::Separate,
        }
    }

    /// That of files with these tensors.
    pub fn detect<'a>(family: Family, mut names: impl Iterator<Item = &'a str>) -> Self {
        let renames = matches!(family, Family::Mixtral | Family::Phimoe);
        let fused = names.any(|name| {
            name.ends_with(".mlp.experts.gate_up_proj") || (renames && name.contains(".mlp."))
        });
        Self {
            family,
            packing: match fused {
                true => ExpertPacking::Fused,
                false => ExpertPacking::Separate,
            },
        }
    }

    /// Where the tensor `name` of this shape lies in files of a model with this layout.
    pub fn place(&self, name: &str, shape: &[usize], layout: &BankLayout) -> Place {
        if self.packing == ExpertPacking::Fused
            && let Some(place) = fused(name, shape, layout)
        {
            return place;
        }
        Place::whole(&self.renamed(name), shape)
    }

    fn renamed(&self, name: &str) -> String {
        match (self.family, self.packing) {
            // The names of the first release of Mixtral: `w1` gates, `w3` goes up, `w2` down.
            (Family::Mixtral | Family::Phimoe, ExpertPacking::Separate) => name
                .replace(".mlp.", ".block_sparse_moe.")
                .replace(".gate_proj.", ".w1.")
                .replace(".up_proj.", ".w3.")
                .replace(".down_proj.", ".w2."),
            (Family::Phimoe, ExpertPacking::Fused) => name.replace(".mlp.gate.", ".mlp.router."),
            (Family::Deepseek | Family::DeepseekV2 | Family::DeepseekV3, _) => {
                name.replace(".mlp.shared_expert.", ".mlp.shared_experts.")
            }
            _ => name.to_owned(),
        }
    }
}

/// The place of a dense slot's matrix in the stack of its layer; `None` for any other tensor.
fn fused(name: &str, shape: &[usize], layout: &BankLayout) -> Option<Place> {
    let (number, rest) = name
        .strip_prefix("model.layers.")?
        .split_once(".mlp.experts.")?;
    let (expert, rest) = rest.split_once('.')?;
    let (number, expert) = (number.parse().ok()?, expert.parse::<usize>().ok()?);
    let projection = rest.strip_suffix(".weight")?;
    let part = PROJECTIONS.iter().position(|p| *p == projection)?;
    let slots = &layout.layers.get(&number)?.slots;
    if slots.get(expert) != Some(&SlotLayout::Dense) {
        return None;
    }
    let dense = |slots: &[SlotLayout]| slots.iter().filter(|s| **s == SlotLayout::Dense).count();
    let (before, all) = (dense(slots.get(..expert)?), dense(slots));
    let (&[rows, columns], size) = (shape, shape.iter().product::<usize>()) else {
        return None;
    };
    let stack = |name: &str| format!("model.layers.{number}.mlp.experts.{name}");
    Some(match part {
        2 => Place {
            name: stack("down_proj"),
            shape: vec![all, rows, columns],
            offset: before * size,
        },
        half => Place {
            name: stack("gate_up_proj"),
            shape: vec![all, 2 * rows, columns],
            offset: (2 * before + half) * size,
        },
    })
}
