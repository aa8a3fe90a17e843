//! The whole model: embedding, layers, last norm, head.

use crate::attention::LayerCache;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::layer::{Layer, ParameterKind, Routing, Visitor};
use crate::writer::CheckpointWriter;
use crate::{Error, Result, names};
use candle_core::{Device, Tensor};
use lightmoe_kernels::{Rope, linear, rms_norm};

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

/// Keys and values of all layers.
#[derive(Debug, Clone)]
pub struct Cache(Vec<LayerCache>);

/// What [`Decoder::forward`] shows of each layer: its number, its input `[B, T, H]`, its routing.
pub type Observer<'a> = dyn FnMut(usize, &Tensor, &Routing) -> Result<()> + 'a;

/// A model in memory.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: ModelConfig,
    ends: Ends,
    /// The layers.
    pub layers: Vec<Layer>,
}

/// What stands before and behind the layers.
#[derive(Debug, Clone)]
pub struct Ends {
    embed: Tensor,
    norm: Tensor,
    head: Option<Tensor>,
    rope: Rope,
}

impl Ends {
    /// Reads embedding, last norm and head.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        config.check_runnable()?;
        let (v, h) = (config.vocab_size, config.hidden_size);
        let tied = config.tie_word_embeddings;
        let embed = checkpoint.tensor(names::EMBED, &[v, h])?;
        let norm = checkpoint.tensor(names::FINAL_NORM, &[h])?;
        let head = (!tied)
            .then(|| checkpoint.tensor(names::HEAD, &[v, h]))
            .transpose()?;
        Ok(Self::new(config, embed, norm, head))
    }

    pub(crate) fn new(
        config: &ModelConfig,
        embed: Tensor,
        norm: Tensor,
        head: Option<Tensor>,
    ) -> Self {
        let rope = Rope::new(
            config.head_dim,
            config.rope_theta,
            config.max_position_embeddings,
        );
        Self {
            embed,
            norm,
            head,
            rope,
        }
    }

    /// Embedding, last norm and head under the names of the checkpoint.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut out = vec![
            (names::EMBED.to_owned(), self.embed.clone()),
            (names::FINAL_NORM.to_owned(), self.norm.clone()),
        ];
        out.extend(
            self.head
                .iter()
                .map(|h| (names::HEAD.to_owned(), h.clone())),
        );
        out
    }

    /// The tables of the rotary embedding.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Embeds ids: `[B, T, H]`. Ids beyond the vocabulary and an empty batch are errors.
    pub fn embed(&self, tokens: Tokens<'_>) -> Result<Tensor> {
        let (vocab, hidden) = self.embed.dims2()?;
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
        let ids = Tensor::new(tokens.ids, &Device::Cpu)?;
        let len = tokens.ids.len() / tokens.rows;
        Ok(self
            .embed
            .index_select(&ids, 0)?
            .reshape((tokens.rows, len, hidden))?)
    }

    /// Final norm: `[B, T, H]` → `[B · T, H]`.
    fn finish(&self, x: &Tensor, eps: f64) -> Result<Tensor> {
        Ok(rms_norm(&x.flatten_to(1)?, &self.norm, eps)?)
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

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// An empty cache for [`Decoder::forward`].
    pub fn cache(&self) -> Cache {
        Cache(vec![LayerCache::default(); self.layers.len()])
    }

    /// Hidden states after the last norm, `[B · T, H]`. With a cache the tokens continue it. The
    /// observer sees each layer's input and routing.
    pub fn forward(
        &self,
        tokens: Tokens<'_>,
        cache: Option<&mut Cache>,
        observe: &mut Observer<'_>,
    ) -> Result<Tensor> {
        if cache
            .as_ref()
            .is_some_and(|c| c.0.len() != self.layers.len())
        {
            return Err(Error::Invalid(
                "the cache belongs to another model; make one with `Decoder::cache`".into(),
            ));
        }
        let mut x = self.ends.embed(tokens)?;
        let mut caches = cache.map(|c| c.0.iter_mut());
        for (l, layer) in self.layers.iter().enumerate() {
            let cache = caches.as_mut().and_then(Iterator::next);
            let (y, routing) = layer.forward(&x, &self.config, &self.ends.rope, cache)?;
            observe(l, &x, &routing)?;
            x = y;
        }
        self.ends.finish(&x, self.config.rms_norm_eps)
    }

    /// Logits of hidden states `[T, H]` → `[T, V]`. Select the rows that matter first.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(linear(
            hidden,
            self.ends.head.as_ref().unwrap_or(&self.ends.embed),
        )?)
    }

    /// Every parameter with its full name, to train, replace or inspect it.
    pub fn visit(&mut self, f: &mut Visitor<'_>) -> Result<()> {
        f(names::EMBED, ParameterKind::Embedding, &mut self.ends.embed)?;
        for (l, layer) in self.layers.iter_mut().enumerate() {
            layer.visit(&mut |name, kind, tensor| f(&names::layer(l, name), kind, tensor))?;
        }
        f(names::FINAL_NORM, ParameterKind::Norm, &mut self.ends.norm)?;
        if let Some(head) = &mut self.ends.head {
            f(names::HEAD, ParameterKind::Embedding, head)?;
        }
        Ok(())
    }

    /// The tensors under the names of the checkpoint; an error while adapters of dense slots or
    /// originals take part, see [`crate::Bank::tensors`].
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut out = self.ends.tensors();
        for (l, layer) in self.layers.iter().enumerate() {
            out.extend(layer.tensors(l)?);
        }
        Ok(out)
    }

    /// Writes the model into a folder begun by the caller, who adds side files and finishes it.
    pub fn write(&self, writer: &mut CheckpointWriter) -> Result<()> {
        for (name, tensor) in self.tensors()? {
            writer.push(name, &tensor)?;
        }
        Ok(())
    }
}
