//! What a model learns from beside the tokens: the predictions of another one, the uncompressed one, as
//! MC-SMoE recovers (arXiv 2310.01334, section 3.2).
//!
//! The other one runs beside it, or its likeliest tokens were kept before: then it need not be in memory
//! together with the trained one, and may be larger than memory itself.

use crate::objective::{Part, TrainBatch, distance};
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use lightmoe_kernels::top_k;
use lightmoe_models::{Decoder, LanguageModel, TensorFile, Tokens, folder};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The most tokens of one pass of the other model, unless one batch has more.
const PASS: usize = 1 << 14;
/// The most bytes of a file of predictions beside its numbers: the header, and what the file system adds.
const AROUND: u64 = 8 << 10;
/// Below this a probability counts as none.
const NONE: f64 = 1e-30;

/// Where the other model's predictions come from.
#[derive(Clone, Copy)]
pub enum Predictions<'a> {
    /// The model runs; nothing of it is trained.
    Model(&'a Decoder),
    /// They were kept.
    Kept(&'a KeptPredictions),
}

/// A model that another one learns from.
#[derive(Clone, Copy)]
pub struct Teacher<'a> {
    /// What it predicts.
    pub predictions: Predictions<'a>,
    /// Weight of the distance to it beside the cross entropy.
    pub weight: f64,
    /// What the logits of both are divided by.
    pub temperature: f64,
}

impl Teacher<'_> {
    /// The distance of the logits `student: [A, V]` of the targets of a part of the batch of `step` from the
    /// teacher's. `[]`
    ///
    /// # Errors
    /// If the model fails, or what was kept cannot be read.
    pub(crate) fn distance(&self, student: &Tensor, step: usize, part: &Part) -> Result<Tensor> {
        match self.predictions {
            Predictions::Model(model) => {
                let theirs = logits(model, &part.batch)?;
                distance(student, &theirs, self.temperature)
            }
            Predictions::Kept(kept) => {
                let theirs = kept
                    .read(step)?
                    .of_targets(&part.targets, student.device())?;
                distance_to_top(student, &theirs, self.temperature)
            }
        }
    }
}

/// The logits of the targets of a batch, `[A, V]`.
fn logits(model: &dyn LanguageModel, batch: &TrainBatch) -> Result<Tensor> {
    let hidden = model.hidden_states(batch.tokens(), None)?;
    let at = Tensor::new(batch.predicting(), hidden.device())?;
    Ok(model.logits(&hidden.index_select(&at, 0)?)?)
}

/// The likeliest tokens that a model predicts for `A` targets, `k` each, at one temperature.
#[derive(Debug, Clone)]
struct TopTokens {
    /// Their ids, the likeliest first: `[A, k]`, u32.
    ids: Tensor,
    /// `ln` of their probabilities among all tokens: `[A, k]`.
    log_probabilities: Tensor,
}

impl TopTokens {
    /// Those of some targets, where they are compared.
    fn of_targets(&self, targets: &Range<usize>, device: &Device) -> Result<Self> {
        let of = |all: &Tensor| {
            all.narrow(0, targets.start, targets.len())?
                .to_device(device)
        };
        Ok(Self {
            ids: of(&self.ids)?.contiguous()?,
            log_probabilities: of(&self.log_probabilities)?,
        })
    }

    /// Those of `logits: [A, V]`; `k` is at most `V`.
    ///
    /// # Errors
    /// If the tensors fail.
    fn of(logits: &Tensor, k: usize, temperature: f64) -> Result<Self> {
        let all = log_softmax(&(logits.detach() / temperature)?, D::Minus1)?;
        let rows = all.dim(0)?;
        let ids = Tensor::from_vec(top_k(&all, k)?, (rows, k), all.device())?;
        Ok(Self {
            log_probabilities: all.gather(&ids, 1)?,
            ids,
        })
    }
}

/// The same as [`distance`] of distributions over the teacher's likeliest tokens and one token more, which
/// stands for all others: never more than the distance, and zero only where the likeliest tokens have the
/// teacher's probabilities. `[]`
///
/// # Errors
/// If the shapes do not fit.
fn distance_to_top(student: &Tensor, teacher: &TopTokens, temperature: f64) -> Result<Tensor> {
    let own = log_softmax(&(student / temperature)?, D::Minus1)?;
    let top = &teacher.log_probabilities;
    let probabilities = top.exp()?;
    let among = (&probabilities * (top - own.gather(&teacher.ids, 1)?)?)?.sum(D::Minus1)?;
    // Of all other tokens: one minus the rest would be noise where the rest is nearly all.
    let away = Tensor::full(f32::NEG_INFINITY, top.shape(), top.device())?;
    let away = away.to_dtype(own.dtype())?;
    let others = own.detach().zeros_like()?;
    let others = others.scatter(&teacher.ids, &away, 1)?;
    let own_rest = ((own + others)?.exp()?.sum(D::Minus1)? + NONE)?.log()?;
    let rest = (1.0 - probabilities.sum(D::Minus1)?)?.clamp(0.0, 1.0)?;
    let of_rest = (&rest * ((&rest + NONE)?.log()? - own_rest)?)?;
    Ok(((among + of_rest)?.mean_all()? * temperature.powi(2))?)
}

/// What a model predicts for the batches of a training, its likeliest tokens, in a folder: for each step
/// `<step>.safetensors` with `ids` and `log_probabilities`, both `[A, k]` and f32 (ids are exact up to 2²⁴).
pub struct KeptPredictions {
    folder: PathBuf,
    fingerprint: String,
    k: usize,
    temperature: f64,
}

impl KeptPredictions {
    /// Those of the `k` likeliest tokens at `temperature`, in `folder`. The fingerprint names all that
    /// decides them but these.
    pub fn new(folder: &Path, fingerprint: &str, k: usize, temperature: f64) -> Self {
        Self {
            folder: folder.to_owned(),
            fingerprint: format!("{fingerprint}/{k}/{temperature}"),
            k,
            temperature,
        }
    }

    /// Keeps what the model that `open` opens predicts for the batches of `steps` steps. Several batches are
    /// read in one pass, since a model on disk is read once for each; always the same ones together, so that
    /// work that was stopped goes on to the same numbers, and passes that are there whole stay. `each(done)`
    /// is told of steps that are done and may stop the work by `false`.
    ///
    /// # Errors
    /// If the file system has no room for them all, before the model is opened; if the model fails, predicts
    /// what are no numbers, or files cannot be written.
    pub fn keep<'a>(
        &self,
        open: &dyn Fn() -> Result<Box<dyn LanguageModel + 'a>>,
        steps: usize,
        batch: &dyn Fn(usize) -> Result<TrainBatch>,
        each: &mut dyn FnMut(usize) -> bool,
    ) -> Result<bool> {
        folder::check_room(&self.folder, self.missing(steps, batch)?)?;
        let mut model = None;
        let mut step = 0;
        while step < steps {
            let first = step;
            let (mut some, mut longest, mut rows) = (Vec::new(), 0, 0);
            while step < steps {
                let next = batch(step)?;
                longest = next.length().max(longest);
                rows += next.rows;
                if !some.is_empty() && longest * rows > PASS {
                    break;
                }
                some.push((step, next));
                step += 1;
            }
            if (first..step).any(|step| self.open(step).is_err()) {
                let model = match &mut model {
                    Some(model) => model,
                    none => none.insert(open()?),
                };
                self.pass(&**model, &some)?;
            }
            if !each(step) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Bytes of what is not kept yet.
    fn missing(&self, steps: usize, batch: &dyn Fn(usize) -> Result<TrainBatch>) -> Result<u64> {
        let mut bytes = 0u64;
        for step in (0..steps).filter(|&step| self.open(step).is_err()) {
            let numbers = 2 * batch(step)?.predicting().len() as u64;
            let own = numbers.saturating_mul(4).saturating_mul(self.k as u64);
            bytes = bytes.saturating_add(own).saturating_add(AROUND);
        }
        Ok(bytes)
    }

    /// Removes all that was kept, after it has served.
    ///
    /// # Errors
    /// If the folder cannot be removed.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder).map_err(|e| Error::io(&self.folder, e))
    }

    /// Reads several batches at once and writes what is predicted for each.
    fn pass(&self, model: &dyn LanguageModel, some: &[(usize, TrainBatch)]) -> Result<()> {
        let longest = some.iter().map(|(_, batch)| batch.length()).max();
        let length = longest.unwrap_or(0);
        let (mut ids, mut rows) = (Vec::new(), 0);
        for (_, batch) in some {
            for row in batch.tokens.chunks_exact(batch.length()) {
                ids.extend_from_slice(row);
                ids.resize(ids.len() + length - row.len(), 0);
            }
        }
        let all = Tokens {
            ids: &ids,
            rows: ids.len() / length,
        };
        let hidden = model.hidden_states(all, None)?;
        for (step, batch) in some {
            let own = batch.length() as u32;
            let place = |at: u32| (rows as u32 + at / own) * length as u32 + at % own;
            let at: Vec<u32> = batch.predicting().into_iter().map(place).collect();
            rows += batch.rows;
            let logits =
                model.logits(&hidden.index_select(&Tensor::new(at, hidden.device())?, 0)?)?;
            self.write(*step, &TopTokens::of(&logits, self.k, self.temperature)?)?;
        }
        Ok(())
    }

    fn path(&self, step: usize) -> PathBuf {
        self.folder.join(format!("{step}.safetensors"))
    }

    fn write(&self, step: usize, top: &TopTokens) -> Result<()> {
        let path = self.path(step);
        let fail = |e: safetensors::SafeTensorError| Error::state(&path, e.to_string());
        let bytes = |t: &Tensor| -> Result<Vec<u8>> {
            let values = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
        };
        let sum = top.log_probabilities.sum_all()?.to_dtype(DType::F32)?;
        if !sum.to_scalar::<f32>()?.is_finite() {
            return Err(Error::Invalid(format!(
                "the model to learn from predicts what are no numbers at step {step}; check it with \
                 `lightmoe evaluate`"
            )));
        }
        let (ids, numbers) = (bytes(&top.ids)?, bytes(&top.log_probabilities)?);
        let view = |bytes| TensorView::new(Dtype::F32, top.ids.dims().to_vec(), bytes);
        let tensors = [
            ("ids", view(&ids).map_err(fail)?),
            ("log_probabilities", view(&numbers).map_err(fail)?),
        ];
        let metadata = HashMap::from([("fingerprint".to_owned(), self.fingerprint.clone())]);
        let file = serialize(tensors, Some(metadata)).map_err(fail)?;
        Ok(folder::write_file(&path, &file)?)
    }

    fn open(&self, step: usize) -> Result<TensorFile> {
        let path = self.path(step);
        let file = TensorFile::open(path.clone())?;
        match file.entry("fingerprint") == Some(&self.fingerprint) {
            true => Ok(file),
            false => Err(Error::state(
                &path,
                "it holds predictions for a run with other settings",
            )),
        }
    }

    fn read(&self, step: usize) -> Result<TopTokens> {
        let file = self.open(step)?;
        let shape = file.shape("ids").unwrap_or_default().to_vec();
        let tensor = |name: &str| -> Result<Tensor> {
            let values = file.values(name, &shape)?;
            Ok(Tensor::from_vec(values, &shape[..], &Device::Cpu)?)
        };
        Ok(TopTokens {
            ids: tensor("ids")?.to_dtype(DType::U32)?,
            log_probabilities: tensor("log_probabilities")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    /// With all tokens it is the distance itself; with fewer never more, and zero between equals.
    #[test]
    fn the_distance_to_the_likeliest_tokens() {
        let (rows, width, temperature) = (4, 7, 2.0);
        let tensor = |start: f64| {
            let numbers = (0..rows * width).map(|i| (start + i as f64 * 1.7).sin() * 3.0);
            Tensor::from_vec(numbers.collect::<Vec<_>>(), (rows, width), &Device::Cpu).unwrap()
        };
        let (own, other) = (tensor(0.3), tensor(1.1));
        let to_top = |own: &Tensor, k: usize| {
            let top = TopTokens::of(&other, k, temperature).unwrap();
            distance_to_top(own, &top, temperature).unwrap()
        };
        let number = |t: Tensor| t.to_scalar::<f64>().unwrap();
        let whole = number(distance(&own, &other, temperature).unwrap());
        let found: Vec<f64> = (1..=width).map(|k| number(to_top(&own, k))).collect();
        assert!((found[width - 1] - whole).abs() < 1e-12 && whole > 0.1);
        assert!(
            found.windows(2).all(|two| two[0] <= two[1] + 1e-12),
            "{found:?}"
        );
        assert!(found[0] > 0.0 && found[0] < whole);
        assert!((1..=width).all(|k| number(to_top(&other, k)).abs() < 1e-12));

        let student = Var::from_tensor(&own).unwrap();
        let grads = to_top(student.as_tensor(), 3).backward().unwrap();
        let grad = grads.get(&student).unwrap().flatten_all().unwrap();
        let values = own.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (i, grad) in grad.to_vec1::<f64>().unwrap().into_iter().enumerate() {
            let moved = |step: f64| {
                let mut values = values.clone();
                values[i] += step;
                number(to_top(
                    &Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap(),
                    3,
                ))
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slope - grad).abs() < 1e-8, "{i}: {grad} is not {slope}");
        }
    }
}
