//! The decoder against candle-transformers' Qwen3-MoE, which is OLMoE where there is one head.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/qwen3_moe.rs"]
mod qwen3_moe;
mod support;

use candle_core::{Device, Tensor};
use lightmoe_models::{Decoder, LanguageModel, Tokens};
use qwen3_moe::qwen3_moe;
use serde_json::json;
use support::{Folder, Random, assert_close, config_with};

/// f32, the same sums in another order.
const TOLERANCE: f64 = 1e-5;

#[test]
fn whole_prompts_and_single_tokens_with_a_cache_agree() {
    for (renormalize, k) in [(false, 2), (true, 3), (false, 8)] {
        let folder = Folder::new();
        let config = config_with(json!({
            "num_attention_heads": 1, "num_key_value_heads": 1,
            "norm_topk_prob": renormalize, "num_experts_per_tok": k,
        }));
        let model = Decoder::load(&folder.original(&config)).unwrap();
        let mut theirs = qwen3_moe(&model);
        let (ids, mut cache) = (Random::new(6).ids(20), model.cache());
        // The prompt at once, then token by token.
        let mut at = 0;
        for length in [13, 1, 1, 1, 1, 1, 1, 1] {
            let chunk = &ids[at..at + length];
            let tokens = Tokens::one(chunk);
            let hidden = model
                .forward(tokens, Some(&mut cache), &mut |_, _, _| Ok(()))
                .unwrap();
            let last = hidden.narrow(0, length - 1, 1).unwrap();
            let input = Tensor::new(chunk, &Device::Cpu).unwrap();
            let expected = theirs.forward(&input.unsqueeze(0).unwrap(), at).unwrap();
            assert_close(
                &model.logits(&last).unwrap(),
                &expected.squeeze(0).unwrap(),
                TOLERANCE,
            );
            at += length;
        }
    }
}
