//! Build: a plan and a checkpoint become a checkpoint. What stays is copied byte by byte; in memory
//! are the bases of a layer, and a few experts under work.

mod bias;
mod layer;

use crate::methods::{AdapterInit, BaseInit, MethodName};
use crate::observations::Observations;
use crate::plan::{LayerPlan, Plan, SlotForm};
use crate::{Error, Result};
use layer::Layer;
use lightmoe_models::{
    BankLayout, Checkpoint, CheckpointWriter, Format, LayerLayout, Manifest, ModelConfig,
    Projections, SlotLayout,
};
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
            SlotForm::Adapted {
                group, rank, bias, ..
            } => SlotLayout::Adapted { group, rank, bias },
            SlotForm::Mixed { bases, rank } => SlotLayout::Mixed { bases, rank },
            SlotForm::Constant => SlotLayout::Constant,
            SlotForm::Removed { .. } => SlotLayout::Removed,
        };
        LayerLayout {
            slots: self.slots.iter().map(|s| form(s.form)).collect(),
            main: self.main,
            factored: self.factored,
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
    /// What was observed; only constants, biases, bases by least squares, and whitened and fitted factors need it.
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
    let settings = &plan.settings;
    let whitened = settings.adapters == AdapterInit::Whitened;
    let by_moments = whitened || settings.base == BaseInit::LeastSquares;
    let biased = plan.layers.iter().any(LayerPlan::has_biases);
    let moments = match inputs.observations {
        Some(seen) if by_moments => Some(seen.moments()?),
        None if by_moments || biased || settings.adapters == AdapterInit::Fitted => {
            return Err(Error::Invalid(
                "the plan has factors, bases or biases that follow what was observed; give the observations that \
                 it was made from"
                    .to_owned(),
            ));
        }
        _ => None,
    };
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
        let planned = plan.layers.iter().find(|p| p.layer == l);
        let fitted = inputs.observations.filter(|_| {
            let changed = planned.is_some_and(|plan| plan.replaced() > 0);
            changed && plan.settings.adapters == AdapterInit::Fitted
        });
        let fitted = fitted.map(|seen| seen.damage(config, l));
        // The planner reckons with what the biases of its own factors save.
        let reckoned =
            plan.method == MethodName::Budget && settings.adapters == AdapterInit::Fitted;
        let biased = inputs
            .observations
            .filter(|_| !reckoned && planned.is_some_and(LayerPlan::has_biases));
        let biased = biased.map(|seen| seen.inputs(config, l));
        let layer = Layer {
            checkpoint,
            seed: inputs.seed,
            settings: &plan.settings,
            plan: planned,
            moments: moments.as_ref(),
            observed: seen.and_then(|mut layers| layers.find(|o| o.layer == l)),
            damage: fitted.transpose()?,
            inputs: biased.transpose()?,
        };
        if tensors.iter().any(|(name, _)| !writer.is_done(name)) {
            layer.write(tensors, &writer)?;
            writer.checkpoint()?;
        }
        if !progress(l + 1, config.num_layers) {
            return Err(Error::Interrupted);
        }
    }
    writer.copy_side_files(checkpoint.dir())?;
    Ok(writer.finish(&plan.layout(config).annotate(config)?)?)
}

/// The bases of the layer `layer` of a plan as whole matrices, whatever form `build` stores them in:
/// gate and up `[M, F, H]`, down `[M, H, F]`. Recovery of factored bases begins with them.
///
/// # Errors
/// If the plan has no bases there, or the model cannot be read.
pub fn whole_bases(inputs: &BuildInputs<'_>, layer: usize) -> Result<Projections> {
    let plan = inputs.plan.layers.iter().find(|p| p.layer == layer);
    let plan = plan.filter(|plan| plan.groups > 0).ok_or_else(|| {
        Error::Invalid(format!(
            "the plan has no bases in layer {layer}; plan again"
        ))
    })?;
    let of = Layer {
        checkpoint: inputs.checkpoint,
        seed: inputs.seed,
        settings: &inputs.plan.settings,
        plan: Some(plan),
        moments: None,
        observed: None,
        damage: None,
        inputs: None,
    };
    of.bases(plan)
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
