//! Build: a plan and a checkpoint become a checkpoint. What stays is copied byte by byte; in memory
//! are the sums of the bases under work, and one expert each.
//!
//! The base of a group is the mean of its members' weights, weighted by their importance (LightMoE
//! eq. 4), for each of the three matrices; adapters start as Gaussian · zero, so a built model
//! computes with the bases alone until it is recovered.

use crate::methods::BaseInit;
use crate::observations::{LayerObservations, Observations};
use crate::plan::{LayerPlan, Plan, SlotForm};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use lightmoe_models::random::{gaussian, stream};
use lightmoe_models::{
    Adapters, BankLayout, Checkpoint, CheckpointWriter, Format, LayerLayout, Manifest, ModelConfig,
    NamedShape, SlotLayout, names,
};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
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
            SlotForm::Constant => SlotLayout::Constant,
            SlotForm::Removed => SlotLayout::Removed,
        };
        LayerLayout {
            slots: self.slots.iter().map(|s| form(s.form)).collect(),
        }
    }
}

/// What a checkpoint is built from.
#[derive(Clone, Copy)]
pub struct BuildInputs<'a> {
    /// The original.
    pub checkpoint: &'a Checkpoint,
    /// What becomes of each expert.
    pub plan: &'a Plan,
    /// What was observed; only slots that are constants need it.
    pub observations: Option<&'a Observations>,
    /// Seed of fresh adapters and random bases.
    pub seed: u64,
}

/// Builds the compressed checkpoint in the folder `target`, in the element type and with the names
/// and packing of the original. `progress(done, total)` counts layers and may stop the work by
/// `false`; the same call goes on with the layer where it stopped, or was killed.
///
/// # Errors
/// [`Error::Invalid`] if the plan is for another model, [`Error::Interrupted`] if the work was stopped;
/// what reading and writing may bring, too little room on the disk included.
pub fn build(
    inputs: &BuildInputs<'_>,
    target: &Path,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<()> {
    let (checkpoint, plan) = (inputs.checkpoint, inputs.plan);
    let config = checkpoint.config();
    plan.check_model(config)?;
    if let Some(observations) = inputs.observations {
        observations.check(config)?;
    }
    let mut manifest = Manifest::of(config, &plan.layout(config))?;
    checkpoint.keep_types(&mut manifest)?;
    let extras = checkpoint.extras()?;
    let format = Format::new(checkpoint.dtype(), checkpoint.scheme());
    let key = key(inputs)?;
    let mut writer = CheckpointWriter::resume(target, &format, &manifest, &extras, &key)?;
    writer.copy_extras(checkpoint, &extras)?;
    writer.checkpoint()?;
    let (ends, layers) = manifest.parts();
    writer.copy(checkpoint, ends)?;
    for (l, tensors) in layers.into_iter().enumerate() {
        let seen = inputs.observations.map(|seen| seen.layers.iter());
        let layer = Layer {
            checkpoint,
            seed: inputs.seed,
            base: plan.settings.base,
            plan: plan.layers.iter().find(|p| p.layer == l),
            observed: seen.and_then(|mut layers| layers.find(|o| o.layer == l)),
        };
        if tensors.iter().any(|(name, _)| !writer.is_done(name)) {
            layer.write(tensors, &mut writer)?;
            writer.checkpoint()?;
        }
        if !progress(l + 1, config.num_layers) {
            return Err(Error::Interrupted);
        }
    }
    writer.copy_side_files(checkpoint.dir())?;
    Ok(writer.finish(&plan.layout(config).annotate(config)?)?)
}

/// Names all that decides the content of the result.
fn key(inputs: &BuildInputs<'_>) -> Result<String> {
    let plan = serde_json::to_vec(inputs.plan)
        .map_err(|e| Error::Invalid(format!("the plan cannot be written: {e}")))?;
    let mut hash = Sha256::new();
    hash.update(inputs.seed.to_le_bytes());
    hash.update(&plan);
    hash.update(inputs.checkpoint.stamp()?);
    hash.update(inputs.observations.map_or("", |seen| &seen.fingerprint));
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// One layer under work.
struct Layer<'a> {
    checkpoint: &'a Checkpoint,
    seed: u64,
    base: BaseInit,
    plan: Option<&'a LayerPlan>,
    observed: Option<&'a LayerObservations>,
}

impl Layer<'_> {
    /// Writes all tensors of the layer: those that stay, bases, adapters, constants.
    fn write(&self, tensors: &[NamedShape], writer: &mut CheckpointWriter) -> Result<()> {
        let made = [".mlp.bases.", ".lora_", ".constant."];
        let ours = |name: &str| made.iter().any(|part| name.contains(part));
        let kept: Vec<_> = tensors
            .iter()
            .filter(|(name, _)| !ours(name))
            .cloned()
            .collect();
        writer.copy(self.checkpoint, &kept)?;
        let Some(plan) = self.plan else {
            return Ok(());
        };
        let config = self.checkpoint.config();
        let mut push = |name: String, tensor: &Tensor| match writer.is_done(&name) {
            true => Ok(()),
            false => writer.push(name, tensor),
        };
        // As many at a time as there are threads: each holds the sums of one group.
        let groups: Vec<usize> = (0..plan.groups).collect();
        for some in groups.chunks(rayon::current_num_threads()) {
            let bases = some.par_iter().map(|&group| self.base(plan, group));
            for (&group, base) in some.iter().zip(bases.collect::<Result<Vec<_>>>()?) {
                for (projection, tensor) in names::PROJECTIONS.iter().zip(&base) {
                    push(names::base(plan.layer, group, projection), tensor)?;
                }
            }
        }
        for expert in plan.layout().of_form(SlotLayout::Constant) {
            push(
                names::constant(plan.layer, expert),
                &self.constant(plan, expert)?,
            )?;
        }
        for (expert, _, rank) in plan.layout().adapted() {
            let fresh = Adapters::fresh(config, plan.layer, &[expert], rank, self.seed)?;
            let Some(adapters) = fresh else { continue };
            for (side, stack) in [("lora_A", &adapters.a), ("lora_B", &adapters.b)] {
                for (projection, tensor) in stack.named() {
                    let name = format!("{projection}.{side}");
                    push(names::expert(plan.layer, expert, &name), &tensor.get(0)?)?;
                }
            }
        }
        Ok(())
    }

    /// The mean output of an expert over the tokens that chose it; zero if there were none.
    fn constant(&self, plan: &LayerPlan, expert: usize) -> Result<Tensor> {
        let width = self.checkpoint.config().hidden_size;
        let seen = self
            .observed
            .and_then(|o| Some((o.outputs.as_ref()?, o.selections[expert])));
        let (outputs, count) = seen.ok_or_else(|| {
            Error::Invalid(format!(
                "layer {}: expert {expert} becomes its mean output, which only observations tell; \
                 give those that `observe` wrote",
                plan.layer
            ))
        })?;
        let sum = &outputs.sum[expert * width..(expert + 1) * width];
        let mean: Vec<f32> = sum
            .iter()
            .map(|s| (s / count.max(1) as f64) as f32)
            .collect();
        Ok(Tensor::new(mean, &Device::Cpu)?)
    }

    /// The three matrices of the base of a group.
    fn base(&self, plan: &LayerPlan, group: usize) -> Result<[Tensor; 3]> {
        let members: Vec<usize> = plan.members(group).collect();
        let scores: Vec<f64> = members.iter().map(|&e| plan.slots[e].score).collect();
        let shares = shares(&scores);
        let config = self.checkpoint.config();
        let (h, f) = (config.hidden_size, config.moe.intermediate_size);
        let mut rng = stream(self.seed, &format!("base/{}/{group}", plan.layer));
        let mut base = |projection: &str, shape: [usize; 2]| -> Result<Tensor> {
            let mut sum: Option<Tensor> = None;
            for (&expert, &share) in members.iter().zip(&shares) {
                let name = names::expert(plan.layer, expert, projection);
                let part = (self.checkpoint.tensor(&name, &shape)? * share)?;
                sum = Some(match sum {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
            let mean = sum.ok_or_else(|| {
                let layer = plan.layer;
                Error::Invalid(format!("layer {layer}: group {group} is empty; plan again"))
            })?;
            Ok(match self.base {
                BaseInit::GateWeighted => mean,
                BaseInit::Random => gaussian(&mut rng, root_mean_square(&mean)?, &shape)?,
            })
        };
        let [gate, up, down] = names::PROJECTIONS;
        Ok([base(gate, [f, h])?, base(up, [f, h])?, base(down, [h, f])?])
    }
}

/// `s_i / Σ s_i`; even shares where no expert has a score, so that experts without calibration tokens
/// make no NaN.
fn shares(scores: &[f64]) -> Vec<f64> {
    let total: f64 = scores.iter().sum();
    let even = 1.0 / scores.len() as f64;
    let share = |s: &f64| if total > 0.0 { s / total } else { even };
    scores.iter().map(share).collect()
}

fn root_mean_square(w: &Tensor) -> candle_core::Result<f64> {
    Ok(f64::from(w.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt())
}
