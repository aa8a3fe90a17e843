//! A layer where nobody asks what its router decided: then a GPU runs the experts without the host in between.

use super::{FeedForward, Layer, with_shared};
use crate::attention::LayerCache;
use crate::bank::Form;
use crate::config::ModelConfig;
use crate::mlp::SharedExpert;
use crate::rotary::Rotary;
use crate::router::gates_at;
use crate::{Error, Result};
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
        let y = match self.form(&normed, config)? {
            Some((Form::Still(layer), shared)) => {
                with_shared(layer.forward(&normed)?, shared, &normed)?
            }
            Some((Form::Trained(layer, experts), shared)) => {
                let (gates, chosen) = self.routed(&layer, &experts, &normed, config)?;
                with_shared(layer.forward(&normed, &gates, &chosen)?, shared, &normed)?
            }
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
        let Some((Form::Trained(layer, experts), shared)) = self.form(&normed, config)? else {
            let y = self.fed(&normed, config, None, None)?.0;
            return product(&(&x + y.reshape(x.shape())?)?, dy);
        };
        let rows = dy.flatten_to(1)?;
        let (gates, chosen) = self.routed(&layer, &experts, &normed, config)?;
        let own = layer.pull(&normed, &gates, &chosen, &rows)?.squeeze(0)?;
        let sum = (product(&x, dy)? + own)?;
        Ok(match shared {
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

    /// The experts as a GPU runs them for rows like `normed: [T, H]`, if it does, and the shared one.
    fn form(
        &self,
        normed: &Tensor,
        config: &ModelConfig,
    ) -> Result<Option<(Form, Option<&SharedExpert>)>> {
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
        Ok(form.map(|form| (form, shared.as_ref())))
    }

    /// The gates `[T · K]` of the positions `[T, K]` that the router chooses on a GPU for `normed: [T, H]`, and these;
    /// `experts` has the expert of each position.
    fn routed(
        &self,
        layer: &TrainedLayer,
        experts: &Tensor,
        normed: &Tensor,
        config: &ModelConfig,
    ) -> Result<(Tensor, Tensor)> {
        let FeedForward::Experts { router, bank, .. } = &self.feed_forward else {
            return Err(Error::Invalid(
                "a layer without experts has no router".into(),
            ));
        };
        let logits = router.logits(normed)?;
        let chosen = layer.choose(&logits)?;
        let experts = experts.index_select(&chosen.flatten_all()?, 0)?;
        let experts = experts.reshape(chosen.shape())?;
        let gates = gates_at(logits, &experts, &config.moe, bank.removed_experts())?;
        Ok((gates, chosen))
    }
}
