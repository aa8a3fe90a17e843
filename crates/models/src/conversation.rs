//! One sequence that grows turn by turn, of which nothing is read twice.

use crate::Result;
use crate::cache::Cache;
use crate::config::RopeScaling;
use crate::decoder::LanguageModel;
use crate::generate::{GenerateOptions, Next, Step, go_on};

/// Keys and values of what a model has read, for the next turn to go on from.
pub struct Conversation<'m> {
    model: &'m dyn LanguageModel,
    cache: Cache,
    /// The tokens in the cache.
    read: Vec<u32>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Its tokens, up to and without the one that ends it.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt that had been read before.
    pub known: usize,
}

impl<'m> Conversation<'m> {
    /// Nothing is read yet.
    pub fn new(model: &'m dyn LanguageModel) -> Self {
        Self {
            model,
            cache: model.cache(),
            read: Vec::new(),
        }
    }

    /// Continues `prompt`, the whole conversation so far; as much of its beginning as was read in
    /// earlier turns is not read again. `each` sees every new token.
    ///
    /// # Errors
    /// As [`crate::generate_rows`]; the next turn is then read from its beginning.
    pub fn answer(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        each: &mut dyn FnMut(u32) -> Result<Next>,
    ) -> Result<Turn> {
        // After an error layers may have read different amounts, so an empty cache is left until then.
        let mut cache = std::mem::replace(&mut self.cache, self.model.cache());
        let read = std::mem::take(&mut self.read);
        let same = prompt.iter().zip(&read).take_while(|(a, b)| a == b).count();
        let known = match self.model.config().rope_scaling {
            // Its angles depend on how long the whole sequence is.
            RopeScaling::Long(_) => 0,
            // The last token says what comes next.
            _ => same.min(prompt.len().saturating_sub(1)),
        };
        cache.truncate(known);
        let prompts = [prompt.to_vec()];
        let each = &mut |_, step: Step<'_>| match step {
            Step::Token([.., token]) => each(*token),
            _ => Ok(Next::Continue),
        };
        let (mut rows, cache) = go_on(self.model, cache, &prompts, options, each)?;
        let tokens = rows.pop().unwrap_or_default();
        let [mut read] = prompts;
        read.extend(&tokens);
        // The last token of an answer is not always read.
        read.truncate(cache.len());
        (self.cache, self.read) = (cache, read);
        Ok(Turn { tokens, known })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Decoder, Error, ModelConfig, generate};
    use serde_json::{Value, json};
    use std::path::Path;

    fn model(family: &str, more: &Value) -> Decoder {
        let mut raw = json!({
            "model_type": family, "vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        });
        let more = more.as_object().unwrap().clone();
        raw.as_object_mut().unwrap().extend(more);
        let config = ModelConfig::from_json(&raw, Path::new("config.json")).unwrap();
        Decoder::random(&config, 3).unwrap()
    }

    fn latent() -> Decoder {
        let latent = json!({
            "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 4,
            "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
        });
        model("deepseek_v2", &latent)
    }

    fn grouped() -> Decoder {
        let grouped = json!({"intermediate_size": 8, "num_local_experts": 4, "sliding_window": 6});
        model("mixtral", &grouped)
    }

    /// Turns that go on, go back and begin anew say what a model says that has read nothing before.
    #[test]
    fn what_was_read_before_changes_nothing() {
        for model in [grouped(), latent()] {
            let mut options = GenerateOptions::greedy(5, Vec::new());
            let mut conversation = Conversation::new(&model);
            let mut answer = |prompt: &[u32], options: &GenerateOptions| {
                let go_on = &mut |_| Ok(Next::Continue);
                let turn = conversation.answer(prompt, options, go_on).unwrap();
                let alone = generate(&model, &[prompt.to_vec()], options, &mut |_| true).unwrap();
                assert_eq!(turn.tokens, alone[0]);
                turn
            };
            let first: Vec<u32> = (1..12).collect();
            let turn = answer(&first, &options);
            assert_eq!((turn.known, turn.tokens.len()), (0, 5));
            let said = turn.tokens.clone();
            // The last token of the answer was not read.
            let second = [&first[..], &said, &[7, 8]].concat();
            assert_eq!(answer(&second, &options).known, 15);
            // An answer that ends by a token was read to its last.
            options.ends = vec![said[3]];
            assert_eq!(answer(&first, &options).known, 10);
            let cut = said.iter().position(|&token| token == said[3]).unwrap();
            let third = [&first[..], &said[..cut], &[9]].concat();
            assert_eq!(answer(&third, &options).known, 11 + cut);
            // Something else was said, and the same again.
            let other = [&first[..6], &[40, 41]].concat();
            assert_eq!(answer(&other, &options).known, 6);
            assert_eq!(answer(&other, &options).known, 7);
            assert_eq!(answer(&[30], &options).known, 0);
        }
    }

    #[test]
    fn a_stopped_turn_is_remembered_and_a_failed_one_forgotten() {
        let model = grouped();
        let options = GenerateOptions::greedy(9, Vec::new());
        let mut conversation = Conversation::new(&model);
        let prompt: Vec<u32> = (1..10).collect();
        let mut seen = 0;
        let stop = &mut |_| {
            seen += 1;
            Ok(if seen < 3 { Next::Continue } else { Next::Stop })
        };
        let turn = conversation.answer(&prompt, &options, stop).unwrap();
        assert_eq!(turn.tokens.len(), 3);
        let next = [&prompt[..], &turn.tokens, &[5]].concat();
        let go_on = &mut |_| Ok(Next::Continue);
        assert_eq!(
            conversation.answer(&next, &options, go_on).unwrap().known,
            11
        );
        for wrong in [vec![], vec![1; 64], [&next[..], &[50]].concat()] {
            conversation.answer(&wrong, &options, go_on).unwrap_err();
            assert_eq!(
                conversation.answer(&prompt, &options, go_on).unwrap().known,
                0
            );
        }
        let fail = &mut |_| Err(Error::Interrupted);
        conversation.answer(&prompt, &options, fail).unwrap_err();
        assert_eq!(
            conversation.answer(&prompt, &options, go_on).unwrap().known,
            0
        );
    }
}
