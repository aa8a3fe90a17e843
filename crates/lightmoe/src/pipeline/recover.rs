//! Stage recover: a built model is trained.

use super::{INTERRUPTED, load_model};
use crate::device;
use crate::preflight::check_original;
use crate::progress::Progress;
use crate::recipe::Recipe;
use anyhow::{Result, bail, ensure};
use lightmoe_compress::methods::{AdapterInit, Kind, MethodName};
use lightmoe_compress::plan::Plan;
use lightmoe_compress::{BuildInputs, whole_bases};
use lightmoe_data::{Encoded, Sampler};
use lightmoe_models::{Checkpoint, CheckpointWriter, Decoder, Format, Manifest, ParameterKind};
use lightmoe_train::{
    AnnealingShape, Folders, Group, KeptPredictions, Outcome, Predictions, Recovery, RowPruning,
    Teacher, TrainBatch, TrainOptions, finish_recovery, prepare_recovery, train, unfold_bases,
};
use std::path::Path;

/// What stage recover works on.
pub struct RecoverInputs<'a> {
    /// The uncompressed model.
    pub original: &'a Checkpoint,
    /// The built model.
    pub built: &'a Checkpoint,
    /// The plan it was built from.
    pub plan: &'a Plan,
    /// The training sequences.
    pub encoded: Vec<Encoded>,
    /// Identifies the run for its training checkpoint.
    pub fingerprint: &'a str,
    /// Steps between training checkpoints.
    pub checkpoint_every: usize,
}

/// Stage recover: trains the built model → the model folder `target`. State and loss curve go to
/// `folders`; an interrupted recovery found there is continued.
///
/// # Errors
/// If the training diverges, the work was stopped, or files cannot be written.
pub fn recover_stage(
    inputs: RecoverInputs<'_>,
    recipe: &Recipe,
    folders: &Folders,
    target: &Path,
) -> Result<()> {
    check_original(inputs.original)?;
    CheckpointWriter::check_target(target)?;
    let (original, built, plan) = (inputs.original, inputs.built, inputs.plan);
    let fingerprint = &device::fingerprint(inputs.fingerprint, &device::placement(built))?;
    let pad = built.config().pad_token_id.unwrap_or(0);
    let sampler = Sampler::new(inputs.encoded, recipe.batch_size, recipe.seed)?.with_pad(pad);
    let batch = |step| {
        let batch = sampler.batch(step);
        Ok(TrainBatch {
            tokens: batch.tokens,
            rows: batch.rows,
            loss_mask: batch.loss_mask,
        })
    };
    let distills = recipe.distill > 0.0;
    // Before the built model is in memory: the original may need all of it.
    let kept = match distills && recipe.distill_top_k > 0 {
        true => Some(keep_predictions(
            original,
            recipe,
            (fingerprint, folders),
            &batch,
        )?),
        false => None,
    };
    let placed = |checkpoint: &Checkpoint| checkpoint.on(&device::placement(checkpoint));
    let mut model = Decoder::load(&placed(built))?;
    let mut annealing = recipe.annealing();
    let fades = plan.method.kind() == Kind::Replace || plan.method == MethodName::Budget;
    if plan.mean_replaced() == 0.0 || !fades {
        // There is nothing to fade out.
        annealing.shape = AnnealingShape::None;
    }
    let recovery = Recovery {
        kept_rank: plan.settings.kept_rank,
        base_rank: plan.settings.base_rank,
        trained_rank: plan.settings.trained_rank,
        anneal: annealing.beta(0, recipe.steps) > 0.0,
        adapters_fade_in: plan.settings.adapters != AdapterInit::Fresh,
        seed: recipe.seed,
    };
    prepare_recovery(&mut model, &placed(original), &recovery)?;
    let merged = BuildInputs {
        checkpoint: original,
        plan,
        observations: None,
        seed: recipe.seed,
    };
    unfold_bases(&mut model, &mut |layer| {
        whole_bases(&merged, layer)
            .map_err(|e| lightmoe_train::Error::Invalid(format!("{:#}", anyhow::Error::from(e))))
    })?;
    let options = TrainOptions {
        annealing,
        ..train_options(recipe, fingerprint, inputs.checkpoint_every)
    };
    let beside = match distills && kept.is_none() {
        true => Some(Decoder::load(&placed(original))?),
        false => None,
    };
    let beside = beside.as_ref().map(Predictions::Model);
    let predictions = beside.or(kept.as_ref().map(Predictions::Kept));
    let teacher = predictions.map(|predictions| Teacher {
        predictions,
        weight: recipe.distill,
        temperature: recipe.distill_temperature,
    });
    let bar = Progress::new("recover", recipe.steps);
    let mut recent = None;
    let outcome = train(
        &mut model,
        &options,
        folders,
        &batch,
        teacher.as_ref(),
        &mut |point| {
            let mean = recent.map_or(point.loss, |r| 0.95 * r + 0.05 * point.loss);
            recent = Some(mean);
            bar.note(format!("loss {mean:.3} β {:.2}", point.beta));
            bar.at(point.step + 1)
        },
    )?;
    if outcome == Outcome::Interrupted {
        bail!(INTERRUPTED);
    }
    finish_recovery(&mut model)?;
    let format = Format::new(built.dtype(), built.scheme());
    let mut manifest = Manifest::of(built.config(), built.layout())?;
    built.keep_types(&mut manifest)?;
    let extras = built.extras()?;
    let mut writer = CheckpointWriter::new(target, &format, &manifest, &extras)?;
    model.write_over(&writer, &placed(built))?;
    writer.copy_extras(built, &extras)?;
    writer.copy_side_files(built.dir())?;
    writer.finish(&built.config().raw)?;
    kept.map_or(Ok(()), |kept| Ok(kept.remove()?))
}

/// Keeps the original's likeliest tokens for the batches of the recovery beside its training state.
fn keep_predictions(
    original: &Checkpoint,
    recipe: &Recipe,
    (fingerprint, folders): (&str, &Folders),
    batch: &dyn Fn(usize) -> lightmoe_train::Result<TrainBatch>,
) -> Result<KeptPredictions> {
    let k = recipe.distill_top_k;
    let vocabulary = original.config().vocab_size;
    ensure!(
        k <= vocabulary,
        "`distill_top_k` is {k}, and the vocabulary has {vocabulary} tokens; give fewer, or 0 for all"
    );
    let kept = KeptPredictions::new(
        &folders.state.join("predictions"),
        fingerprint,
        k,
        recipe.distill_temperature,
    );
    folders.check(fingerprint)?;
    let bar = Progress::new("predict", recipe.steps);
    let open =
        || load_model(original).map_err(|e| lightmoe_train::Error::Invalid(format!("{e:#}")));
    match kept.keep(&open, recipe.steps, batch, &mut |done| bar.at(done))? {
        true => Ok(kept),
        false => bail!(INTERRUPTED),
    }
}

fn train_options(recipe: &Recipe, fingerprint: &str, checkpoint_every: usize) -> TrainOptions {
    let mut kinds = vec![
        ParameterKind::Base,
        ParameterKind::Adapter,
        ParameterKind::Scale,
    ];
    if recipe.train_router {
        kinds.push(ParameterKind::Router);
    }
    TrainOptions {
        steps: recipe.steps,
        learning_rate: recipe.learning_rate(),
        beta1: 0.9,
        beta2: 0.999,
        clip_norm: recipe.clip_norm,
        micro_batch: recipe.micro_batch_size,
        recompute: recipe.gradient_checkpointing,
        balance: 0.0,
        annealing: recipe.annealing(),
        pruning: RowPruning::default(),
        groups: vec![Group {
            kinds,
            weight_decay: recipe.weight_decay,
        }],
        checkpoint_every,
        fingerprint: fingerprint.to_owned(),
    }
}
