//! A layer where nobody asks what its router decided: then a GPU runs the experts without the host in between.

use super::{FeedForward, Layer, with_shared};
use crate::Result;
use crate::attention::LayerCache;
use crate::bank::Form;
use crate::config::ModelConfig;
use crate::mlp::SharedExpert;
use crate::rotary::Rotary;
use crate::router::{Router, gates_at};
use candle_core::{DType, Tensor};
use lightmoe_kernels::TrainedLayer;

impl Layer {
    /// As [`Layer::forward`] where nobody asks what the router decided, `[B, T, H]` → `[B, T, H]`: on a GPU the experts run
    /// without the host in between, as far as the kernels can do it ([`lightmoe_kernels::WholeLayer`] where nothing
    /// trains, else [`lightmoe_kernels::TrainedLayer`]).
    ///
    /// # Errors
    /// As [`Layer::forward`].
    pub fn hidden_states(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let (x, normed) = self.attended(x, config, rotary, cache)?;
        let y = match self.experts(&normed, config)? {
            Some(experts) => experts.forward(&normed, config)?,
            None => self.fed(&normed, config, None, None)?.0,
        };
        Ok((&x + y.reshape(x.shape())?)?)
    }

    /// A number that has the gradients of `Σ y·dy`, with `y: [B, T, H]` what [`Layer::hidden_states`] gives for
    /// `x: [B, T, H]`, but need not be that sum: what only the sum would need is not computed. `[]`, of f32.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    pub fn pull(
        &self,
        x: &Tensor,
        config: &ModelConfig,
        rotary: &Rotary,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let (x, normed) = self.attended(x, config, rotary, None)?;
        let product = |y: &Tensor, dy: &Tensor| -> Result<Tensor> {
            Ok((y * dy)?.sum_all()?.to_dtype(DType::F32)?)
        };
        let rows = dy.flatten_to(1)?;
        let experts = self.experts(&normed, config)?;
        let Some(
            experts @ Experts {
                form: Form::Trained(layer, positions),
                ..
            },
        ) = &experts
        else {
            let y = self.fed(&normed, config, None, None)?.0;
            return product(&(&x + y.reshape(x.shape())?)?, dy);
        };
        let (gates, chosen) = experts.routed(layer, positions, &normed, config)?;
        let own = layer.pull(&normed, &gates, &chosen, &rows)?.squeeze(0)?;
        let sum = (product(&x, dy)? + own)?;
        Ok(match experts.shared {
            Some(shared) => (sum + product(&shared.forward(&normed)?, &rows)?)?,
            None => sum,
        })
    }

    /// Drops what a GPU keeps to run the experts. It is made again when they run, of the tensors that are there then; until
    /// that it holds those that were there before.
    pub fn release(&self) {
        if let FeedForward::Experts { whole, .. } = &self.feed_forward {
            whole.release();
        }
    }

    /// The experts as a GPU runs them for rows like `normed: [T, H]`, if it does.
    fn experts(&self, normed: &Tensor, config: &ModelConfig) -> Result<Option<Experts<'_>>> {
        let FeedForward::Experts {
            router,
            shared,
            bank,
            whole,
        } = &self.feed_forward
        else {
            return Ok(None);
        };
        let form = whole.form(normed, router, bank, &config.moe)?;
        Ok(form.map(|form| Experts {
            form,
            router,
            removed: bank.removed_experts(),
            shared: shared.as_ref(),
        }))
    }
}

/// The experts of a layer as a GPU runs them.
struct Experts<'a> {
    form: Form,
    router: &'a Router,
    removed: &'a [usize],
    shared: Option<&'a SharedExpert>,
}

impl Experts<'_> {
    /// The gates `[T · K]` of the positions `[T, K]` that the router chooses on the GPU for `normed: [T, H]`, and these;
    /// `experts` has the expert of each position.
    fn routed(
        &self,
        layer: &TrainedLayer,
        experts: &Tensor,
        normed: &Tensor,
        config: &ModelConfig,
    ) -> Result<(Tensor, Tensor)> {
        let logits = self.router.logits(normed)?;
        let chosen = layer.choose(&logits)?;
        let experts = experts.index_select(&chosen.flatten_all()?, 0)?;
        let experts = experts.reshape(chosen.shape())?;
        let gates = gates_at(logits, &experts, &config.moe, self.removed)?;
        Ok((gates, chosen))
    }

    /// What they and the shared one give of `normed: [T, H]`.
    fn forward(&self, normed: &Tensor, config: &ModelConfig) -> Result<Tensor> {
        let y = match &self.form {
            Form::Still(layer) => layer.forward(normed)?,
            Form::Trained(layer, experts) => {
                let (gates, chosen) = self.routed(layer, experts, normed, config)?;
                layer.forward(normed, &gates, &chosen)?
            }
        };
        with_shared(y, self.shared, normed)
    }
}
