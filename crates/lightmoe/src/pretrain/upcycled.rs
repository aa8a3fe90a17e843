//! Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): a model whose experts all begin as copies of the
//! one MLP that a trained model has in each layer. Such experts have much in common, which a shared base can hold.

use super::PretrainRecipe;
use crate::source::{is_model_folder, model_fingerprint};
use anyhow::{Context, Result, ensure};
use lightmoe_models::{Checkpoint, Decoder, LanguageModel, ParameterKind};
use std::collections::HashMap;
use std::path::Path;

/// How the names of down projections end.
const DOWN: &str = "down_proj.weight";
/// What is left of a router's first weights.
const ROUTER_SHARE: f64 = 0.02;

/// The model that another begins as.
pub(super) struct Start {
    dense: Decoder,
    /// Hash of its files.
    pub fingerprint: String,
}

impl Start {
    /// The model in `folder`, if one of the recipe's shape and with this tokenizer can begin as it.
    ///
    /// # Errors
    /// If it cannot be read, or differs in more than the number of experts.
    pub(super) fn load(folder: &Path, recipe: &PretrainRecipe, tokenizer: &str) -> Result<Self> {
        let dense = Self::read(folder, recipe, tokenizer);
        dense.with_context(|| format!("`upcycle_from` is `{}`", folder.display()))
    }

    fn read(folder: &Path, recipe: &PretrainRecipe, tokenizer: &str) -> Result<Self> {
        ensure!(
            is_model_folder(folder),
            "it is no model folder: it has no config.json; train that model first"
        );
        let checkpoint = Checkpoint::open(folder)?;
        checkpoint.check()?;
        let path = folder.join("tokenizer.json");
        let its_tokenizer = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read `{}`", path.display()))?;
        ensure!(
            its_tokenizer == tokenizer,
            "its tokenizer is another one; train it on the same text"
        );
        let config = checkpoint.config();
        let mut one = recipe.clone();
        (one.model.num_experts, one.model.num_experts_per_tok) = (1, 1);
        // How its one expert was balanced does not matter.
        one.training.balance = config.moe.router_aux_loss_coef;
        let wanted = one.model_config(config.vocab_size)?;
        ensure!(
            *config == wanted,
            "its config.json is not that of `[model]` with `num_experts = 1` and `num_experts_per_tok = 1`; \
             train it by a recipe that differs in these alone"
        );
        Ok(Self {
            dense: Decoder::load(&checkpoint)?,
            fingerprint: model_fingerprint(folder)?,
        })
    }

    /// Gives `model` the weights: each expert is a copy. Routers become so small that they choose at random, with gates
    /// of about `1 / E`, and down projections grow by `E / K`: so the model begins as the other one.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub(super) fn put(mut self, model: &mut Decoder) -> Result<()> {
        let mut weights = HashMap::new();
        self.dense.visit(&mut |name, _, tensor| {
            weights.insert(name.to_owned(), tensor.clone());
            Ok(())
        })?;
        let moe = &LanguageModel::config(model).moe;
        let growth = moe.num_experts as f64 / moe.top_k as f64;
        model.visit(&mut |name, kind, tensor| {
            let weight = &weights[name];
            *tensor = match kind {
                // The other one's has no choice.
                ParameterKind::Router => (&*tensor * ROUTER_SHARE)?,
                ParameterKind::Expert => {
                    let copies = weight.broadcast_as(tensor.shape())?.contiguous()?;
                    match name.ends_with(DOWN) {
                        true => (copies * growth)?,
                        false => copies,
                    }
                }
                _ => weight.clone(),
            };
            Ok(())
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightmoe_models::Tokens;

    #[test]
    fn a_model_begins_as_the_one_it_is_made_of() -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/olmoe-nano.toml");
        let mut recipe = PretrainRecipe::load(&path)?;
        (recipe.model.num_experts, recipe.model.num_experts_per_tok) = (6, 2);
        (recipe.model.hidden_size, recipe.model.intermediate_size) = (16, 8);
        (
            recipe.model.num_hidden_layers,
            recipe.model.num_attention_heads,
        ) = (2, 2);
        let mut model = Decoder::random(&recipe.model_config(50)?, 1)?;
        (recipe.model.num_experts, recipe.model.num_experts_per_tok) = (1, 1);
        let dense = Decoder::random(&recipe.model_config(50)?, 2)?;
        let ids: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
        let tokens = Tokens::one(&ids);
        let wanted = dense.hidden_states(tokens, None)?;
        let start = Start {
            dense,
            fingerprint: String::new(),
        };
        start.put(&mut model)?;
        let hidden = model.hidden_states(tokens, None)?;
        let difference = (hidden - &wanted)?.sqr()?.sum_all()?;
        let share = (difference / wanted.sqr()?.sum_all()?)?.sqrt()?;
        assert!(share.to_scalar::<f32>()? < 0.02, "{share}");
        Ok(())
    }
}
