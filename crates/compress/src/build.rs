//! Build: a plan and a checkpoint become a checkpoint, one layer in memory at a time.
//!
//! The base of a group is the mean of its members' weights, weighted by their importance (LightMoE
//! eq. 4), for each of the three matrices; adapters start as Gaussian · zero, so a built model
//! computes with the bases alone until it is recovered.

use crate::methods::BaseInit;
use crate::plan::{LayerPlan, Plan, SlotForm};
use crate::{Error, Result};
use candle_core::Tensor;
use lightmoe_models::random::{gaussian, stream};
use lightmoe_models::{
    Adapters, Bank, BankLayout, Checkpoint, CheckpointWriter, Ends, Layer, LayerLayout,
    ModelConfig, Projections, SlotLayout,
};
use std::path::Path;

impl Plan {
    /// The layout of the model that the plan describes.
    pub fn layout(&self, config: &ModelConfig) -> BankLayout {
        let mut layout = BankLayout::dense(config);
        let planned = self.layers.iter().map(|l| (l.layer, l.layout()));
        layout.layers.extend(planned);
        layout
    }
}

impl LayerPlan {
    /// The layout of the layer that the plan describes.
    pub fn layout(&self) -> LayerLayout {
        let form = |form: SlotForm| match form {
            SlotForm::Dense => SlotLayout::Dense,
            SlotForm::Adapted { group, rank, .. } => SlotLayout::Adapted { group, rank },
        };
        LayerLayout {
            slots: self.slots.iter().map(|s| form(s.form)).collect(),
        }
    }
}

/// Builds the compressed checkpoint in the folder `target`, in the element type of the original.
/// `progress(done, total)` counts layers and may stop the work by `false`; then nothing remains.
///
/// # Errors
/// [`Error::Invalid`] if the plan is for another model, [`Error::Interrupted`] if the work was stopped;
/// what reading and writing may bring.
pub fn build(
    checkpoint: &Checkpoint,
    plan: &Plan,
    seed: u64,
    target: &Path,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<()> {
    let config = checkpoint.config();
    plan.check_model(config)?;
    let mut writer = CheckpointWriter::new(target, checkpoint.dtype(), config.family)?;
    for (name, tensor) in Ends::load(checkpoint)?.tensors() {
        writer.push(name, &tensor)?;
    }
    for l in 0..config.num_layers {
        let mut layer = Layer::load(checkpoint, l)?;
        if let Some(layer_plan) = plan.layers.iter().find(|p| p.layer == l) {
            let slots = layer_plan.layout();
            layer.bank = replace(&layer.bank, layer_plan, &slots, config, plan, seed)?;
        }
        for (name, tensor) in layer.tensors(l)? {
            writer.push(name, &tensor)?;
        }
        if !progress(l + 1, config.num_layers) {
            return Err(Error::Interrupted);
        }
    }
    writer.copy_side_files(checkpoint.dir())?;
    Ok(writer.finish(&plan.layout(config).annotate(config)?)?)
}

fn replace(
    bank: &Bank,
    plan: &LayerPlan,
    layout: &LayerLayout,
    config: &ModelConfig,
    whole: &Plan,
    seed: u64,
) -> Result<Bank> {
    let mut bases: Vec<Projections> = Vec::new();
    for group in 0..plan.groups {
        let members: Vec<usize> = plan.members(group).collect();
        let scores: Vec<f64> = members.iter().map(|&e| plan.slots[e].score).collect();
        let experts = bank.experts_of(&members)?.ok_or_else(|| {
            Error::Invalid(format!(
                "layer {}: group {group} is empty; plan again",
                plan.layer
            ))
        })?;
        let mean = experts.map(|w| Ok(weighted_mean(w, &scores)?))?;
        bases.push(match whole.settings.base {
            BaseInit::GateWeighted => mean,
            BaseInit::Random => {
                let mut rng = stream(seed, &format!("base/{}/{group}", plan.layer));
                let mut random = mean.clone();
                for (_, w) in random.named_mut() {
                    *w = gaussian(&mut rng, root_mean_square(w)?, w.dims())?;
                }
                random
            }
        });
    }
    let stack = |pick: fn(&Projections) -> &Tensor| -> Result<Tensor> {
        Ok(Tensor::stack(
            &bases.iter().map(pick).collect::<Vec<_>>(),
            0,
        )?)
    };
    let bases = match plan.groups {
        0 => None,
        _ => Some(Projections {
            gate: stack(|p| &p.gate)?,
            up: stack(|p| &p.up)?,
            down: stack(|p| &p.down)?,
        }),
    };
    // The adapters belong to slots in the order of the new bank.
    let mut bank = bank.replace(layout, bases, None)?;
    let adapted = bank.adapted_experts();
    bank.adapters = Adapters::fresh(config, plan.layer, adapted, layout.rank(), seed)?;
    Ok(bank)
}

/// `Σ s_i W_i / Σ s_i` over the first dimension; the plain mean where no expert has a score, so that
/// experts without calibration tokens make no NaN.
fn weighted_mean(w: &Tensor, scores: &[f64]) -> candle_core::Result<Tensor> {
    let total: f64 = scores.iter().sum();
    let weights: Vec<f32> = scores
        .iter()
        .map(|s| if total > 0.0 { s / total } else { 1.0 / scores.len() as f64 } as f32)
        .collect();
    let weights = Tensor::from_vec(weights, (scores.len(), 1, 1), w.device())?;
    w.broadcast_mul(&weights)?.sum(0)
}

fn root_mean_square(w: &Tensor) -> candle_core::Result<f64> {
    Ok(f64::from(w.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt())
}
