//! The whole model: embedding, layers, last norm, head; in memory, or read layer by layer.

use crate::attention::LayerCache;
use crate::bank::Bank;
use crate::cache::Cache;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::layer::{Layer, ParameterKind, Source, Visitor};
use crate::norm::Norm;
use crate::placement::Placement;
use crate::rotary::Rotary;
use crate::router::Routing;
use crate::writer::CheckpointWriter;
use crate::{Error, Result, names};
use candle_core::{DType, Device, Tensor};
use lightmoe_kernels::{as_rows, linear};
use std::borrow::Cow;

/// Token ids of a batch, right-padded: `[rows, len]`, row-major. Under causal attention, padding on
/// the right changes nothing on the left; whoever reads the outputs skips the padded positions.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// `rows · len` ids.
    pub ids: &'a [u32],
    /// Number of sequences.
    pub rows: usize,
}

impl<'a> Tokens<'a> {
    /// One sequence.
    pub fn one(ids: &'a [u32]) -> Self {
        Self { ids, rows: 1 }
    }
}

/// What [`LanguageModel::forward`] shows of each layer: its number, its input `[B, T, H]`, and its
/// routing where it has experts.
pub type Observer<'a> = dyn FnMut(usize, &Tensor, Option<&Routing>) -> Result<()> + 'a;

/// The table of the embedding.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// `[V, H]`
    table: Tensor,
}

impl Embedding {
    /// Reads it from a checkpoint.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::build(checkpoint.config(), &|name, shape| {
            checkpoint.tensor(&names::whole(name), shape)
        })
    }

    fn build(config: &ModelConfig, get: &Source<'_>) -> Result<Self> {
        let table = get(names::EMBED, &[config.vocab_size, config.hidden_size])?;
        Ok(Self { table })
    }

    /// Embeds ids: `[B, T, H]`. Ids beyond the vocabulary and an empty batch are errors.
    pub fn embed(&self, tokens: Tokens<'_>) -> Result<Tensor> {
        let (vocab, hidden) = self.table.dims2()?;
        if tokens.rows == 0
            || tokens.ids.is_empty()
            || !tokens.ids.len().is_multiple_of(tokens.rows)
        {
            return Err(Error::Invalid(format!(
                "{} token ids do not fill {} rows; give at least one token a row",
                tokens.ids.len(),
                tokens.rows
            )));
        }
        if let Some(id) = tokens.ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::Invalid(format!(
                "token id {id} is outside the vocabulary of {vocab}; use the model's own tokenizer"
            )));
        }
        let ids = Tensor::new(tokens.ids, self.table.device())?;
        let len = tokens.ids.len() / tokens.rows;
        let rows = as_rows(&self.table.index_select(&ids, 0)?)?;
        Ok(rows.reshape((tokens.rows, len, hidden))?)
    }
}

/// What stands before and behind the layers.
#[derive(Debug, Clone)]
pub struct Ends {
    embedding: Embedding,
    norm: Norm,
    /// `[V, H]`; none where it is the embedding.
    head: Option<Tensor>,
    /// `[V]`
    head_bias: Option<Tensor>,
    rotary: Rotary,
}

impl Ends {
    /// Takes embedding, last norm and head from `get`.
    pub(crate) fn build(config: &ModelConfig, get: &Source<'_>) -> Result<Self> {
        let (v, h) = (config.vocab_size, config.hidden_size);
        let bias = format!("{}.bias", names::HEAD);
        Ok(Self {
            embedding: Embedding::build(config, get)?,
            norm: Norm::build(names::FINAL_NORM, config, get)?,
            head: (!config.tie_word_embeddings)
                .then(|| get(names::HEAD, &[v, h]))
                .transpose()?,
            head_bias: config.head_bias.then(|| get(&bias, &[v])).transpose()?,
            rotary: Rotary::new(config),
        })
    }

    /// Reads them from a checkpoint.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::build(checkpoint.config(), &|name, shape| {
            checkpoint.tensor(&names::whole(name), shape)
        })
    }

    fn visit_front(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        let table = &mut self.embedding.table;
        f(names::EMBED, ParameterKind::Embedding, table)
    }

    fn visit_back(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        self.norm.visit(f)?;
        if let Some(head) = &mut self.head {
            f(names::HEAD, ParameterKind::Embedding, head)?;
        }
        if let Some(bias) = &mut self.head_bias {
            let name = format!("{}.bias", names::HEAD);
            f(&name, ParameterKind::Embedding, bias)?;
        }
        Ok(())
    }

    /// Embedding, last norm and head under the names of the checkpoint.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut out = Vec::new();
        let mut push = |name: &str, _, tensor: &mut Tensor| {
            out.push((names::whole(name), tensor.clone()));
            Ok(())
        };
        // Visiting wants mutable tensors; cloning them copies handles, not weights.
        let mut ends = self.clone();
        ends.visit_front(&mut push)?;
        ends.visit_back(&mut push)?;
        Ok(out)
    }

    /// Embeds ids, as [`Embedding::embed`] does.
    ///
    /// # Errors
    /// Ids beyond the vocabulary, an empty batch.
    pub fn embed(&self, tokens: Tokens<'_>) -> Result<Tensor> {
        self.embedding.embed(tokens)
    }

    /// The angles of the positions, for [`Layer::forward`].
    pub fn rotary(&self) -> &Rotary {
        &self.rotary
    }

    /// Logits of what comes out of the last layer, `[T, H]` → `[T, V]`.
    ///
    /// # Errors
    /// If the width is another.
    pub fn head(&self, hidden: &Tensor) -> Result<Tensor> {
        self.logits(&self.norm.forward(hidden)?)
    }

    /// Where they are, and so the whole model is.
    pub fn device(&self) -> &Device {
        self.embedding.table.device()
    }

    /// Logits of normed hidden states `[T, H]` → `[T, V]`.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let head = self.head.as_ref().unwrap_or(&self.embedding.table);
        let logits = at_least_f32(linear(hidden, head)?)?;
        Ok(match &self.head_bias {
            Some(bias) => logits.broadcast_add(&bias.to_dtype(logits.dtype())?)?,
            None => logits,
        })
    }
}

/// What probabilities are computed from, in f32 where it comes as 16-bit floats.
pub(crate) fn at_least_f32(x: Tensor) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::BF16 | DType::F16 => x.to_dtype(DType::F32)?,
        _ => x,
    })
}

/// A model that can be run, wherever its layers are.
pub trait LanguageModel: Sync {
    /// The configuration.
    fn config(&self) -> &ModelConfig;

    /// What stands before and behind the layers.
    fn ends(&self) -> &Ends;

    /// Layer `number`, from 0.
    ///
    /// # Errors
    /// What reading it brings.
    fn layer(&self, number: usize) -> Result<Cow<'_, Layer>>;

    /// Whether two passes may run at the same time, each of which takes memory of its own: on the CPU,
    /// whose cores one pass does not keep busy all the time.
    fn runs_side_by_side(&self) -> bool {
        self.ends().device().is_cpu()
    }

    /// An empty cache for [`LanguageModel::forward`].
    fn cache(&self) -> Cache {
        let layers = (0..self.config().num_layers).map(|_| LayerCache::default());
        Cache(layers.collect())
    }

    /// Hidden states after the last norm, `[B · T, H]`. With a cache the tokens continue it.
    ///
    /// # Errors
    /// Ids beyond the vocabulary, a cache of another model, more tokens than the context holds.
    fn hidden_states(&self, tokens: Tokens<'_>, cache: Option<&mut Cache>) -> Result<Tensor> {
        self.forward(tokens, cache, &mut |_, _, _| Ok(()))
    }

    /// The same, while the observer sees each layer's input and routing.
    ///
    /// # Errors
    /// As [`LanguageModel::hidden_states`].
    fn forward(
        &self,
        tokens: Tokens<'_>,
        cache: Option<&mut Cache>,
        observe: &mut Observer<'_>,
    ) -> Result<Tensor> {
        let (config, rotary) = (self.config(), &self.ends().rotary);
        pass(self, tokens, cache, &mut |l, x, cache| {
            let (y, routing) = self.layer(l)?.forward(x, config, rotary, cache)?;
            observe(l, x, routing.as_ref())?;
            Ok(y)
        })
    }

    /// Logits of hidden states `[T, H]` → `[T, V]`. Select the rows that matter first.
    ///
    /// # Errors
    /// If the width is another.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.ends().logits(hidden)
    }
}

/// A pass that nobody watches, so that layers may run whole.
fn unobserved<M: LanguageModel>(
    model: &M,
    tokens: Tokens<'_>,
    cache: Option<&mut Cache>,
) -> Result<Tensor> {
    let (config, rotary) = (model.config(), &model.ends().rotary);
    pass(model, tokens, cache, &mut |l, x, cache| {
        model.layer(l)?.hidden_states(x, config, rotary, cache)
    })
}

/// What a layer, by its number, makes of its input `[B, T, H]`.
type Step<'a> = dyn FnMut(usize, &Tensor, Option<&mut LayerCache>) -> Result<Tensor> + 'a;

/// From tokens to hidden states after the last norm, `[B · T, H]`, by a `step` for each layer.
fn pass<M: LanguageModel + ?Sized>(
    model: &M,
    tokens: Tokens<'_>,
    cache: Option<&mut Cache>,
    step: &mut Step<'_>,
) -> Result<Tensor> {
    let (layers, ends) = (model.config().num_layers, model.ends());
    if cache.as_ref().is_some_and(|c| c.0.len() != layers) {
        return Err(Error::Invalid(
            "the cache belongs to another model; make one with `cache`".into(),
        ));
    }
    let mut x = ends.embedding.embed(tokens)?;
    let mut caches = cache.map(|c| c.0.iter_mut());
    for l in 0..layers {
        x = step(l, &x, caches.as_mut().and_then(Iterator::next))?;
    }
    ends.norm.forward(&x.flatten_to(1)?)
}

/// A model in memory.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: ModelConfig,
    ends: Ends,
    /// The layers.
    pub layers: Vec<Layer>,
}

impl LanguageModel for Decoder {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn ends(&self) -> &Ends {
        &self.ends
    }

    fn layer(&self, number: usize) -> Result<Cow<'_, Layer>> {
        Ok(Cow::Borrowed(&self.layers[number]))
    }

    fn hidden_states(&self, tokens: Tokens<'_>, cache: Option<&mut Cache>) -> Result<Tensor> {
        unobserved(self, tokens, cache)
    }
}

/// A model on disk: each pass reads every layer, and holds one at a time.
pub struct StreamedDecoder {
    checkpoint: Checkpoint,
    ends: Ends,
}

impl StreamedDecoder {
    /// Reads what stands before and behind the layers.
    ///
    /// # Errors
    /// What reading it brings.
    pub fn new(checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self {
            ends: Ends::load(checkpoint)?,
            checkpoint: checkpoint.clone(),
        })
    }
}

impl LanguageModel for StreamedDecoder {
    fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    fn ends(&self) -> &Ends {
        &self.ends
    }

    fn layer(&self, number: usize) -> Result<Cow<'_, Layer>> {
        Ok(Cow::Owned(Layer::load(&self.checkpoint, number)?))
    }

    fn hidden_states(&self, tokens: Tokens<'_>, cache: Option<&mut Cache>) -> Result<Tensor> {
        unobserved(self, tokens, cache)
    }

    /// Each would hold a layer of its own and read all of them.
    fn runs_side_by_side(&self) -> bool {
        false
    }
}

impl Decoder {
    /// Reads a whole checkpoint.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let config = checkpoint.config().clone();
        let ends = Ends::load(checkpoint)?;
        let layers = (0..config.num_layers)
            .map(|l| Layer::load(checkpoint, l))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            config,
            ends,
            layers,
        })
    }

    pub(crate) fn from_parts(config: ModelConfig, ends: Ends, layers: Vec<Layer>) -> Self {
        Self {
            config,
            ends,
            layers,
        }
    }

    /// The experts of every layer that has some.
    pub fn banks(&self) -> impl Iterator<Item = &Bank> {
        self.layers.iter().filter_map(Layer::bank)
    }

    /// The experts of every layer that has some, to change them.
    pub fn banks_mut(&mut self) -> impl Iterator<Item = &mut Bank> {
        self.layers.iter_mut().filter_map(Layer::bank_mut)
    }

    /// Every parameter with its full name, to train, replace or inspect it.
    pub fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        let ends = &mut self.ends;
        ends.visit_front(&mut |name, kind, tensor| f(&names::whole(name), kind, tensor))?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            layer.visit(&mut |name, kind, tensor| f(&names::layer(l, name), kind, tensor))?;
        }
        ends.visit_back(&mut |name, kind, tensor| f(&names::whole(name), kind, tensor))
    }

    /// The tensors under the names of the checkpoint; an error while adapters of dense slots or
    /// originals take part, see [`crate::Bank::tensors`].
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut out = self.ends.tensors()?;
        for (l, layer) in self.layers.iter().enumerate() {
            out.extend(layer.tensors(l)?);
        }
        Ok(out)
    }

    /// As [`Decoder::write`], of a model that began as `start`: where that was read with fewer digits than
    /// its files have, numbers that have not moved since keep those of the files.
    pub fn write_over(&self, writer: &CheckpointWriter, start: &Checkpoint) -> Result<()> {
        let rounded = start.placement().dtype;
        if rounded == DType::F32 {
            return self.write(writer);
        }
        let host = Placement::default();
        let files = start.on(&host);
        for (name, tensor) in self.tensors()? {
            if tensor.dtype() == DType::U32 {
                // Places of rows were never rounded.
                writer.push(&name, &tensor)?;
                continue;
            }
            let tensor = host.put(&tensor)?;
            let own = files.tensor(&name, tensor.dims())?;
            let stayed = host.put(&own.to_dtype(rounded)?)?.eq(&tensor)?;
            writer.push(&name, &stayed.where_cond(&own, &tensor)?)?;
        }
        Ok(())
    }

    /// Writes the model into a folder begun by the caller, who adds side files and finishes it.
    pub fn write(&self, writer: &CheckpointWriter) -> Result<()> {
        for (name, tensor) in self.tensors()? {
            writer.push(name, &tensor)?;
        }
        Ok(())
    }
}
