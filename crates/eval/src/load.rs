//! How often the routers of a model choose each expert.

use crate::{Error, Result};
use lightmoe_models::{LanguageModel, Tokens};

/// The load of one layer's experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLoad {
    /// The layer's number in the model.
    pub layer: usize,
    /// How many tokens chose each expert, `[E]`.
    pub tokens: Vec<u64>,
}

/// Counts, for every layer with experts, how many tokens of `sequences` chose each; padding counts
/// nowhere. A batch has at most `batch_tokens` tokens with padding, or one sequence. `progress` sees how
/// many sequences are read, of how many; its `false` stops the work.
///
/// # Errors
/// [`Error::Interrupted`], and what the model brings: ids beyond the vocabulary, more tokens than the
/// context holds.
pub fn expert_load(
    model: &dyn LanguageModel,
    sequences: &[Vec<u32>],
    batch_tokens: usize,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<LayerLoad>> {
    let experts = model.config().moe.num_experts;
    let mut loads: Vec<LayerLoad> = Vec::new();
    let mut order: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    order.retain(|sequence| !sequence.is_empty());
    // Sequences of about one length are padded least.
    order.sort_by_key(|sequence| sequence.len());
    let (mut rest, mut done) = (&order[..], 0);
    while let Some(longest) = rest.last().map(|sequence| sequence.len()) {
        let rows = (batch_tokens / longest).clamp(1, rest.len());
        let (before, batch) = rest.split_at(rest.len() - rows);
        rest = before;
        let mut ids = Vec::with_capacity(rows * longest);
        for sequence in batch {
            let end = ids.len() + longest;
            ids.extend_from_slice(sequence);
            // The value of the padding does not matter: nothing on its left sees it.
            ids.resize(end, 0);
        }
        let tokens = Tokens { rows, ids: &ids };
        model.forward(tokens, None, &mut |layer, _, routing| {
            let Some(routing) = routing else {
                return Ok(());
            };
            let at = loads.iter().position(|load| load.layer == layer);
            let at = at.unwrap_or_else(|| {
                let tokens = vec![0; experts];
                loads.push(LayerLoad { layer, tokens });
                loads.len() - 1
            });
            let chosen = routing.chosen.len() / ids.len();
            let rows = routing.chosen.chunks_exact(longest * chosen);
            for (row, sequence) in rows.zip(batch) {
                for &expert in &row[..sequence.len() * chosen] {
                    loads[at].tokens[expert as usize] += 1;
                }
            }
            Ok(())
        })?;
        done += rows;
        if !progress(done, order.len()) {
            return Err(Error::Interrupted);
        }
    }
    Ok(loads)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightmoe_models::{Decoder, ModelConfig};
    use std::path::Path;

    #[test]
    fn every_token_is_counted_once_for_each_choice_however_it_is_batched() {
        let raw = serde_json::json!({
            "model_type": "olmoe", "vocab_size": 40, "hidden_size": 16,
            "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3,
            "num_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        });
        let config = ModelConfig::from_json(&raw, Path::new("config.json")).unwrap();
        let model = Decoder::random(&config, 3).unwrap();
        let sequence = |i: u32| (0..1 + i % 9).map(|k| (i * 7 + k * 3) % 40).collect();
        let mut sequences: Vec<Vec<u32>> = (0..30).map(sequence).collect();
        sequences.push(Vec::new());
        let tokens: u64 = sequences.iter().map(|s| s.len() as u64).sum();
        let load = |batch| expert_load(&model, &sequences, batch, &mut |_, _| true).unwrap();
        let (together, alone) = (load(4096), load(1));
        assert_eq!(together, alone);
        let layers: Vec<usize> = together.iter().map(|l| l.layer).collect();
        assert_eq!(layers, [0, 1, 2]);
        for layer in &together {
            assert_eq!(layer.tokens.iter().sum::<u64>(), 2 * tokens);
            assert!(layer.tokens.iter().all(|&t| t <= tokens));
        }
        let stopped = expert_load(&model, &sequences, 1, &mut |done, _| done < 3);
        assert!(matches!(stopped, Err(Error::Interrupted)));
    }
}
