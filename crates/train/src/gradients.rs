//! The gradients of the objective, and how they fit in memory: a batch in parts, and the activations of one
//! layer at a time.

use crate::objective::{Losses, Part, TrainBatch, load_balance, losses, objective_of};
use crate::teacher::Teacher;
use crate::trainer::{Parameter, TrainOptions};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use lightmoe_models::{Decoder, LanguageModel};

/// What a step found.
pub(crate) struct Found {
    /// The task's loss, of the whole batch.
    pub(crate) task: f64,
    pub(crate) balance: Option<f64>,
    pub(crate) distance: Option<f64>,
    /// The gradient of each parameter; `None` for those that have none.
    pub(crate) gradients: Vec<Option<Tensor>>,
}

impl Found {
    fn none(parameters: &[Parameter]) -> Self {
        Self {
            task: 0.0,
            balance: None,
            distance: None,
            gradients: vec![None; parameters.len()],
        }
    }

    /// Adds gradients.
    fn add(&mut self, grads: &mut GradStore, parameters: &[Parameter]) -> Result<()> {
        for (sum, parameter) in self.gradients.iter_mut().zip(parameters) {
            if let Some(more) = grads.remove(&parameter.var) {
                let more = more.detach();
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + more)?,
                    None => more,
                });
            }
        }
        Ok(())
    }

    /// Adds losses of a part that counts as `share`, and gives their sum, to be differentiated.
    fn total(&mut self, losses: &Losses, share: f64, weights: [f64; 2]) -> Result<Tensor> {
        let value = |loss: &Tensor| Ok::<_, Error>(f64::from(loss.to_scalar::<f32>()?) * share);
        self.task += value(&losses.task)?;
        let mut total = losses.task.clone();
        let others = [
            (&losses.balance, &mut self.balance, weights[0]),
            (&losses.distance, &mut self.distance, weights[1]),
        ];
        for (loss, sum, weight) in others {
            if let Some(loss) = loss {
                *sum = Some(sum.unwrap_or(0.0) + value(loss)?);
                total = (total + (loss * weight)?)?;
            }
        }
        Ok(match share == 1.0 {
            true => total,
            false => (total * share)?,
        })
    }
}

/// The gradients of the objective on the batch of `step`.
pub(crate) fn gradients(
    model: &Decoder,
    options: &TrainOptions,
    (step, batch): (usize, &TrainBatch),
    teacher: Option<&Teacher<'_>>,
    parameters: &[Parameter],
) -> Result<Found> {
    let mut found = Found::none(parameters);
    let weights = [
        options.balance,
        teacher.map_or(0.0, |teacher| teacher.weight),
    ];
    let parts = batch.parts(options.micro_batch)?;
    let all: usize = parts.iter().map(|part| part.targets.len()).sum();
    for part in &parts {
        let share = part.targets.len() as f64 / all as f64;
        if options.recompute {
            layer_by_layer(
                model,
                (step, part),
                teacher,
                parameters,
                &mut found,
                (share, weights),
            )?;
        } else {
            let losses = objective_of(model, (step, part), options.balance > 0.0, teacher)?;
            let mut grads = found.total(&losses, share, weights)?.backward()?;
            found.add(&mut grads, parameters)?;
        }
    }
    Ok(found)
}

/// The same of a part, while no more than what goes into each layer is kept: the layers run again on the way
/// back, one at a time (Chen et al., arXiv 1604.06174).
fn layer_by_layer(
    model: &Decoder,
    (step, part): (usize, &Part),
    teacher: Option<&Teacher<'_>>,
    parameters: &[Parameter],
    found: &mut Found,
    (share, weights): (f64, [f64; 2]),
) -> Result<()> {
    let (config, ends) = (model.config(), model.ends());
    let tokens = part.batch.tokens();
    let balance = weights[0] / config.num_moe_layers().max(1) as f64;
    let mut x = ends.embed(tokens)?.detach();
    let mut inputs = Vec::with_capacity(model.layers.len());
    for layer in &model.layers {
        // As it is given them on the way back, so that it runs in the same way.
        let given = Var::from_tensor(&x)?;
        let y = match balance > 0.0 {
            true => layer.forward(&given, config, ends.rotary(), None)?.0,
            false => layer.hidden_states(&given, config, ends.rotary(), None)?,
        };
        inputs.push(x);
        x = y.detach();
    }
    let top = Var::from_tensor(&x)?;
    let at = Tensor::new(part.batch.predicting(), top.device())?;
    let logits = ends.head(&top.flatten_to(1)?.index_select(&at, 0)?)?;
    let (task, distance) = losses(&logits, (step, part), teacher)?;
    let losses = Losses {
        task,
        balance: None,
        distance,
    };
    let mut grads = found.total(&losses, share, weights)?.backward()?;
    let mut gradient = grads.remove(&top).map(|gradient| gradient.detach());
    found.add(&mut grads, parameters)?;
    for (layer, input) in model.layers.iter().zip(inputs).rev() {
        let Some(after) = gradient.take() else {
            return Ok(());
        };
        let x = Var::from_tensor(&input)?;
        let sum = match balance > 0.0 {
            false => layer.pull(&x, config, ends.rotary(), &after)?,
            true => {
                let (y, routing) = layer.forward(&x, config, ends.rotary(), None)?;
                let sum = (y * after)?.sum_all()?.to_dtype(DType::F32)?;
                match routing {
                    None => sum,
                    Some(routing) => {
                        let own = load_balance(&[routing])?;
                        let value = f64::from(own.to_scalar::<f32>()?) * share
                            / config.num_moe_layers() as f64;
                        found.balance = Some(found.balance.unwrap_or(0.0) + value);
                        (sum + (own * (balance * share))?)?
                    }
                }
            }
        };
        let mut grads = sum.backward()?;
        gradient = grads.remove(&x).map(|gradient| gradient.detach());
        found.add(&mut grads, parameters)?;
    }
    if let Some(after) = gradient {
        let embedded = ends.embed(tokens)?;
        if embedded.track_op() {
            let mut grads = (embedded * after)?.sum_all()?.backward()?;
            found.add(&mut grads, parameters)?;
        }
    }
    Ok(())
}
