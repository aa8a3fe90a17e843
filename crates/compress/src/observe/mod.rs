//! Observe: what the routers do on the task's training tokens (LightMoE §3.1, eq. 1–3).
//!
//! One pass over the weights, one layer in memory at a time. The hidden states of the samples travel
//! from layer to layer in files, of which the page cache keeps what fits; so a run that was stopped
//! goes on with the layer where it stopped.

mod back;
mod sums;

use crate::memory::{
    BACKWARD, ENOUGH, batch_tokens, damage_bytes, input_bytes, moment_bytes, sample_bytes,
};
use crate::observations::{LayerObservations, Observations, moments_folder};
use crate::states::{Keep, States, StatesWriter, Values, Work};
use crate::{Error, Result};
use back::Way;
use candle_core::Tensor;
use lightmoe_kernels::return_freed_memory;
use lightmoe_models::{
    Checkpoint, Embedding, Layer, LayerObserver, ModelConfig, Placement, Rotary, Tokens,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use sums::{BatchSums, Sums};

/// How much an error of what a layer gives matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Sensitivity {
    /// By the gradients of the loss on labels drawn from the model: a second pass over the weights, from
    /// the last layer to the first.
    Fisher,
    /// By the size of the hidden state that goes into the layer, every direction and every token alike: a
    /// stand-in without gradients, whose numbers are no nats.
    Relative,
}

impl Sensitivity {
    /// What damages that go by it are in.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Fisher => "nats a token",
            Self::Relative => "of the hidden states' squares",
        }
    }
}

/// What to record beside routing and outputs, which is always recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Statistics {
    /// Second moments of what each expert is given, and the spectra of its matrices on them; memory
    /// and disk of `4·E·(H² + F²)` bytes a layer.
    pub moments: bool,
    /// Mean outputs over all tokens: every token through every expert.
    pub all_outputs: bool,
    /// A [sample](crate::samples) of tokens with what every expert gives for them, at most 16 MiB a
    /// layer, and some whole [sequences](crate::reception) for every third layer.
    pub samples: bool,
    /// What errors of the experts [cost](crate::damage): half the memory and disk of `moments`, and for
    /// gradients the hidden states of all layers on disk, `4·H` bytes a token and layer.
    pub damage: Option<Sensitivity>,
    /// What biases need: some of what each expert is [given](crate::inputs), at most 128 tokens an expert, and
    /// with `damage` what ranks cost beside a bias, a third more of its decompositions.
    pub bias: bool,
}

impl Statistics {
    /// What either wants.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            moments: self.moments || other.moments,
            all_outputs: self.all_outputs || other.all_outputs,
            samples: self.samples || other.samples,
            damage: self.damage.or(other.damage),
            bias: self.bias || other.bias,
        }
    }
}

/// Changes a layer once it was observed, before the samples go on through it: for methods that
/// compress layer after layer, each on what the compressed layers before it give.
pub type Successor<'a> = dyn Fn(&LayerObservations, &mut Layer) -> Result<()> + 'a;

/// What [`observe`] needs beside the model and the samples.
#[derive(Clone, Copy)]
pub struct ObserveOptions<'a> {
    /// Names the model and the data.
    pub fingerprint: &'a str,
    /// Folder for what lies between two layers, and for moments and samples; what it holds is removed
    /// at the end.
    pub state: &'a Path,
    /// What to record beside routing and outputs.
    pub statistics: Statistics,
    /// Where the answer of each sample begins, in tokens: what the model is to predict, as far as
    /// [`Sensitivity::Fisher`] goes. Empty: all but the first token of each.
    pub answers: &'a [usize],
    /// What becomes of each layer before the samples go on; `None`: it stays.
    pub successor: Option<&'a Successor<'a>>,
    /// The most memory to use, in bytes.
    pub max_memory: u64,
}

/// What [`observe`] saw, and what it took. [`Observed::save`] ends the run: until then the same call
/// goes on behind the last layer.
#[derive(Debug)]
pub struct Observed {
    states: States,
    /// Whether something lies beside the observations.
    beside: bool,
    /// The routing.
    pub observations: Observations,
    /// Reading and converting weights, in this run.
    pub read: Duration,
    /// All that is done with a layer once it is read, in this run; all of the way back.
    pub compute: Duration,
}

impl Observed {
    /// Writes the observations to `path`, with moments and samples in the folder beside it, and removes
    /// what lay between the layers.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn save(self, path: &Path) -> Result<Observations> {
        let (found, target) = (moments_in(self.states.folder()), moments_folder(path));
        let io = |source| Error::Io {
            path: target.clone(),
            source,
        };
        // Those of earlier observations at this path; if there are none of ours, a run that was killed
        // here has moved them already.
        if target.is_dir() && (found.is_dir() || !self.beside) {
            std::fs::remove_dir_all(&target).map_err(io)?;
        }
        if found.is_dir() {
            std::fs::rename(&found, &target).map_err(io)?;
        }
        self.observations.save(path)?;
        self.states.remove()?;
        Ok(Observations {
            moments: target.is_dir().then_some(target),
            ..self.observations
        })
    }
}

/// Samples of one batch, right-padded to `width`.
pub(crate) struct Batch<'a> {
    pub(crate) samples: &'a [&'a Vec<u32>],
    pub(crate) width: usize,
}

impl Batch<'_> {
    /// Whether a token of the padded batch is one of a sample.
    fn holds(&self, token: usize) -> bool {
        token % self.width < self.samples[token / self.width].len()
    }

    /// The tokens of the padded batch that are of a sample.
    fn held(&self) -> Vec<u32> {
        let tokens = 0..(self.samples.len() * self.width) as u32;
        tokens.filter(|&t| self.holds(t as usize)).collect()
    }
}

/// Where moments and samples of an unfinished run lie.
fn moments_in(state: &Path) -> PathBuf {
    state.join("moments")
}

/// Runs `samples` (token ids, as in training, without padding) through the model and records the
/// routing of every MoE layer. `progress(done, total)` counts layers and may stop the work by
/// `false`; the same call goes on behind the last layer that was done.
///
/// # Errors
/// [`Error::Invalid`] if there are no samples, one is empty, or the memory is too little for a layer;
/// [`Error::Interrupted`] if the work was stopped; what reading the weights may bring.
pub fn observe(
    checkpoint: &Checkpoint,
    samples: &[Vec<u32>],
    options: &ObserveOptions<'_>,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Observed> {
    // Wherever the model runs, rounding would add up in the sums.
    let checkpoint = &checkpoint.on(&checkpoint.placement().exact());
    let config = checkpoint.config();
    if samples.is_empty() || samples.iter().any(Vec::is_empty) {
        return Err(Error::Invalid(
            "observe needs at least one sample, and none may be empty; give more training data"
                .to_owned(),
        ));
    }
    let asked = options.statistics;
    let returns = asked.damage == Some(Sensitivity::Fisher);
    if returns && options.successor.is_some() {
        return Err(Error::Invalid(
            "gradients of a model whose layers change while it is observed are of no model; observe for \
             such methods apart"
                .to_owned(),
        ));
    }
    // Samples of like length together, so that little is padded.
    let mut numbers: Vec<usize> = (0..samples.len()).collect();
    numbers.sort_by_key(|&i| std::cmp::Reverse(samples[i].len()));
    let order: Vec<&Vec<u32>> = numbers.iter().map(|&i| &samples[i]).collect();
    let begins = |&i: &usize| options.answers.get(i).copied().unwrap_or(1);
    let answers: Vec<usize> = numbers.iter().map(begins).collect();
    let beside = [
        (asked.moments, moment_bytes(config)),
        (asked.damage.is_some(), damage_bytes(config)),
        (asked.samples, sample_bytes(config)),
        (asked.bias, input_bytes(config)),
    ];
    let beside = beside.iter().filter(|what| what.0).map(|what| what.1).sum();
    let copies = if returns { BACKWARD } else { 1 };
    let most = batch_tokens(config, order[0].len(), options.max_memory, beside, copies)?;
    let work = Work::new(
        samples,
        &format!(
            "{}{:?}{:?}",
            options.fingerprint, options.statistics, options.answers
        ),
    );
    // A run that goes on keeps the batches of the one before, if there is memory for them.
    let found = States::find(options.state, &work).filter(|found| found.batch_tokens <= most);
    let tokens = found.as_ref().map_or(most, |found| found.batch_tokens);
    let batches = batches(&order, tokens);
    let states = States::new(options.state, config.hidden_size, &batches);
    let (first, mut seen) = match states.resume(found.is_some())? {
        Some((layer, seen)) => (layer, seen),
        None => {
            states.begin(&work, tokens)?;
            embed(checkpoint, &batches, &states)?;
            let none = Observations {
                layers: Vec::new(),
                tokens: samples.iter().map(|s| s.len() as u64).sum(),
                samples: samples.len() as u64,
                fingerprint: options.fingerprint.to_owned(),
                sensitivity: asked.damage,
                moments: None,
            };
            (0, none)
        }
    };
    let rotary = Rotary::new(config);
    let (mut read, mut compute) = (Duration::ZERO, Duration::ZERO);
    let back = config.num_layers - config.moe_layers().next().unwrap_or(config.num_layers);
    let total = config.num_layers + if returns { back } else { 0 };
    for l in first..config.num_layers {
        let begin = Instant::now();
        let mut layer = Layer::load(checkpoint, l)?;
        read += begin.elapsed();
        let begin = Instant::now();
        let mut next = states.writer(Values::Hidden, l + 1)?;
        let mut sums = Sums::new(config, options.statistics, l, seen.tokens as usize);
        if let Some(bank) = layer.bank() {
            sums.weights(bank)?;
        }
        let pass = Pass {
            states: &states,
            batches: &batches,
            placement: checkpoint.placement(),
            config,
            rotary: &rotary,
            number: l,
            is_tight: tokens < ENOUGH,
        };
        match (options.successor, layer.bank().is_some()) {
            (Some(successor), true) => {
                pass.run(&layer, Some(&mut sums), None)?;
                let observed = sums.finish(l, samples, &layer, options)?;
                successor(&observed, &mut layer)?;
                seen.layers.push(observed);
                pass.run(&layer, None, Some(&mut next))?;
            }
            (_, experts) => {
                pass.run(&layer, Some(&mut sums), Some(&mut next))?;
                if experts {
                    seen.layers.push(sums.finish(l, samples, &layer, options)?);
                }
            }
        }
        next.close()?;
        let keep = if returns { Keep::All } else { Keep::Last };
        states.record(&seen, Values::Hidden, l + 1, keep)?;
        if pass.is_tight {
            drop(layer);
            return_freed_memory();
        }
        compute += begin.elapsed();
        if !progress(l + 1, total) {
            return Err(Error::Interrupted);
        }
    }
    if returns {
        let begin = Instant::now();
        let pass = Pass {
            states: &states,
            batches: &batches,
            placement: checkpoint.placement(),
            config,
            rotary: &rotary,
            number: 0,
            is_tight: tokens < ENOUGH,
        };
        let way = Way {
            checkpoint,
            answers: &answers,
            folder: &moments_in(options.state),
            bias: asked.bias,
        };
        let layers = config.num_layers;
        seen = way.go(&pass, seen, &mut |done| progress(layers + done, total))?;
        compute += begin.elapsed();
    }
    Ok(Observed {
        states,
        beside: asked.moments || asked.samples || asked.bias || asked.damage.is_some(),
        observations: seen,
        read,
        compute,
    })
}

/// The samples on their way through one layer.
struct Pass<'a> {
    states: &'a States,
    batches: &'a [Batch<'a>],
    /// Where the layers are.
    placement: &'a Placement,
    config: &'a ModelConfig,
    rotary: &'a Rotary,
    number: usize,
    /// Whether memory decides how large a batch is.
    is_tight: bool,
}

impl Pass<'_> {
    /// What goes into `layer` of batch `number`, or its gradient, where the layers are: `[B, T, H]`.
    fn read(&self, what: Values, layer: usize, number: usize) -> Result<Tensor> {
        let states = self
            .states
            .read(what, layer, number, &self.batches[number])?;
        Ok(self.placement.put(&states)?)
    }

    /// Runs all batches; `sums` looks on, and `next` takes what comes out.
    fn run(
        &self,
        layer: &Layer,
        mut sums: Option<&mut Sums>,
        mut next: Option<&mut StatesWriter<'_>>,
    ) -> Result<()> {
        for (i, batch) in self.batches.iter().enumerate() {
            let hidden = self.read(Values::Hidden, self.number, i)?;
            if let Some(sums) = sums.as_deref_mut() {
                sums.input(&hidden, batch)?;
            }
            let mut looking = sums.as_deref_mut().map(|sums| BatchSums { sums, batch });
            let observer: &mut dyn LayerObserver = match &mut looking {
                Some(looking) => looking,
                None => &mut (),
            };
            let (hidden, _) =
                layer.forward_observed(&hidden, self.config, self.rotary, None, observer)?;
            if let Some(next) = next.as_deref_mut() {
                next.push(&hidden)?;
            }
        }
        Ok(())
    }
}

/// Writes the states before the first layer.
fn embed(checkpoint: &Checkpoint, batches: &[Batch<'_>], states: &States) -> Result<()> {
    let embedding = Embedding::load(checkpoint)?;
    let mut first = states.writer(Values::Hidden, 0)?;
    for batch in batches {
        let mut ids = vec![0u32; batch.samples.len() * batch.width];
        for (row, sample) in ids.chunks_exact_mut(batch.width).zip(batch.samples) {
            row[..sample.len()].copy_from_slice(sample);
        }
        let rows = batch.samples.len();
        first.push(&embedding.embed(Tokens { ids: &ids, rows })?)?;
    }
    first.close()
}

/// Batches of at most `tokens` tokens, padding included, but of at least one sample.
fn batches<'a>(order: &'a [&'a Vec<u32>], tokens: usize) -> Vec<Batch<'a>> {
    let mut batches = Vec::new();
    let mut rest = order;
    while let Some(longest) = rest.first() {
        let width = longest.len();
        let (samples, later) = rest.split_at((tokens / width).clamp(1, rest.len()));
        rest = later;
        batches.push(Batch { samples, width });
    }
    batches
}
