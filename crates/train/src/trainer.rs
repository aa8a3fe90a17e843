//! The training loop.

use crate::curve::{Curve, Point};
use crate::gradients::gradients;
use crate::objective::TrainBatch;
use crate::pruning::{PrunedRows, RowPruning};
use crate::schedule::{Annealing, LearningRate};
use crate::teacher::Teacher;
use crate::{Error, Result, state};
use candle_core::{DType, Var};
use lightmoe_kernels::{AdamW, Moments};
use lightmoe_models::{Decoder, ParameterKind};
use std::path::PathBuf;

/// Parameters that are trained alike.
#[derive(Debug, Clone)]
pub struct Group {
    /// Which parameters.
    pub kinds: Vec<ParameterKind>,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// How to train.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// Number of steps.
    pub steps: usize,
    /// Learning rate by step.
    pub learning_rate: LearningRate,
    /// AdamW's first decay.
    pub beta1: f64,
    /// AdamW's second decay.
    pub beta2: f64,
    /// Largest norm of the gradient; a longer one is scaled down to it.
    pub clip_norm: f64,
    /// Weight of the load-balancing loss; zero leaves it out.
    pub balance: f64,
    /// Sequences that run at once, whose gradients are added to those of the batch; zero for all of it.
    pub micro_batch: usize,
    /// Whether the layers run again on the way back, so that the activations of one at a time are in memory.
    pub recompute: bool,
    /// β by step.
    pub annealing: Annealing,
    /// How the sparse parts of factored bases lose their rows.
    pub pruning: RowPruning,
    /// What is trained; the rest is frozen.
    pub groups: Vec<Group>,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Identifies the run; a checkpoint of another run is refused.
    pub fingerprint: String,
}

/// Where a training run writes.
#[derive(Debug, Clone)]
pub struct Folders {
    /// The checkpoint.
    pub state: PathBuf,
    /// The loss curve.
    pub logs: PathBuf,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// The caller stopped it; a checkpoint is on disk.
    Interrupted,
}

/// A trained parameter.
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) var: Var,
    pub(crate) moments: Moments,
    /// The rows of the sparse part of factored bases.
    pub(crate) rows: Option<PrunedRows>,
    weight_decay: f64,
}

impl Folders {
    /// Refuses the training state of another run, before work that only serves this one.
    ///
    /// # Errors
    /// If there is such a state, or it is damaged.
    pub fn check(&self, fingerprint: &str) -> Result<()> {
        state::check(&self.state.join(state::FILE), fingerprint)
    }
}

/// Trains the parameters of `model` that the groups name. `batch(step)` must be a pure function.
/// A checkpoint found in the state folder is continued. `each` sees every step and may stop the run
/// by `false`. With a `teacher` the model learns from it beside the batches.
pub fn train(
    model: &mut Decoder,
    options: &TrainOptions,
    folders: &Folders,
    batch: &dyn Fn(usize) -> Result<TrainBatch>,
    teacher: Option<&Teacher<'_>>,
    each: &mut dyn FnMut(&Point) -> bool,
) -> Result<Outcome> {
    let mut parameters = select(model, &options.groups)?;
    let state_path = folders.state.join(state::FILE);
    let start = state::load(&state_path, &options.fingerprint, &mut parameters)?.unwrap_or(0);
    let mut curve = Curve::open(&folders.logs, start)?;
    for step in start..options.steps {
        let beta = options.annealing.beta(step, options.steps);
        model.banks_mut().for_each(|bank| bank.anneal(beta));
        let point = advance(
            model,
            options,
            (step, beta),
            (&batch(step)?, teacher),
            &mut parameters,
        )?;
        curve.push(&point)?;
        let go_on = each(&point);
        let done = step + 1;
        if done == options.steps || !go_on || done.is_multiple_of(options.checkpoint_every.max(1)) {
            state::save(&state_path, done, &options.fingerprint, &parameters)?;
        }
        if !go_on && done < options.steps {
            return Ok(Outcome::Interrupted);
        }
    }
    model.banks_mut().for_each(|bank| bank.anneal(0.0));
    Ok(Outcome::Finished)
}

/// Makes variables of the selected parameters; they stay part of the model.
fn select(model: &mut Decoder, groups: &[Group]) -> Result<Vec<Parameter>> {
    let mut parameters = Vec::new();
    model.visit(&mut |name, kind, tensor| {
        if let Some(group) = groups.iter().find(|g| g.kinds.contains(&kind)) {
            // What learns is f32 whatever the rest of the model is: its steps are too small for less.
            let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?)?;
            *tensor = var.as_tensor().clone();
            parameters.push(Parameter {
                name: name.to_owned(),
                var,
                moments: Moments::default(),
                rows: None,
                weight_decay: group.weight_decay,
            });
        }
        Ok(())
    })?;
    if parameters.is_empty() {
        return Err(Error::Invalid(
            "nothing to train: the model has no parameters of the chosen kinds; choose a rank \
             above zero or train the router"
                .into(),
        ));
    }
    for bank in model.banks() {
        let (Some(shape), Some(sparse)) = (bank.factored_bases(), &bank.bases) else {
            continue;
        };
        for (projection, stack) in sparse.named() {
            let found = parameters.iter_mut().find(|p| p.var.id() == stack.id());
            if let Some(parameter) = found {
                parameter.rows = Some(PrunedRows::new(stack, shape.rows(projection))?);
            }
        }
    }
    Ok(parameters)
}

fn advance(
    model: &Decoder,
    options: &TrainOptions,
    (step, beta): (usize, f64),
    (batch, teacher): (&TrainBatch, Option<&Teacher<'_>>),
    parameters: &mut [Parameter],
) -> Result<Point> {
    let mut found = gradients(model, options, (step, batch), teacher, parameters)?;
    let mut squares = 0.0;
    for grad in found.gradients.iter().flatten() {
        squares += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let (loss, grad_norm) = (found.task, squares.sqrt());
    if !loss.is_finite() || !grad_norm.is_finite() {
        return Err(Error::Invalid(format!(
            "step {step}: the loss is {loss} and the gradient's norm {grad_norm}; lower the \
             learning rate"
        )));
    }
    let lr = options.learning_rate.at(step, options.steps);
    for (p, grad) in parameters.iter_mut().zip(&mut found.gradients) {
        let update = AdamW {
            lr,
            beta1: options.beta1,
            beta2: options.beta2,
            eps: 1e-8,
            weight_decay: p.weight_decay,
            step: step + 1,
            grad_scale: (options.clip_norm / grad_norm).min(1.0),
        };
        // Without a gradient (the bases while β = 1) a parameter stays as it is. Experts and bases are
        // stacked, so one that no token reached has a gradient of zeros and moves by its moments.
        let grad = grad.take();
        if let Some(grad) = &grad {
            update.update(p.var.as_tensor(), grad, &mut p.moments)?;
        }
        if let Some(rows) = &mut p.rows {
            if let Some(grad) = &grad {
                let decay = options.pruning.decay;
                rows.observe(p.var.as_tensor(), grad, update.grad_scale, decay)?;
            }
            let all = p.var.dim(1)?;
            let kept = options
                .pruning
                .kept(step + 1, options.steps, all, rows.kept);
            rows.prune(&p.var, kept)?;
        }
    }
    Ok(Point {
        step,
        loss,
        balance: found.balance,
        distance: found.distance,
        lr,
        beta,
        grad_norm,
        tokens: batch.tokens.len(),
    })
}
