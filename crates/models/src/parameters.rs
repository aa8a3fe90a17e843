//! Exact parameter counts from the configuration alone, no weights needed.
//!
//! Arithmetic saturates, so that a damaged file gives an absurd count (which
//! [`ModelConfig::from_json`] refuses) and not an overflow.

use crate::config::{Attention, ModelConfig, NormKind, ProjectionBias, QkNorm, Scoring};

/// How many parameters each part of a model has, all layers together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ParameterCounts {
    /// Token embedding.
    pub embedding: u64,
    /// Attention projections and their biases.
    pub attention: u64,
    /// Every norm, those inside the attention included.
    pub norms: u64,
    /// Routers.
    pub router: u64,
    /// Routed experts.
    pub routed_experts: u64,
    /// Shared experts, their gate included.
    pub shared_experts: u64,
    /// MLPs of the layers without experts.
    pub dense_mlp: u64,
    /// Output head and its bias; without the table where that is the embedding.
    pub head: u64,
}

impl ParameterCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        [
            self.embedding,
            self.attention,
            self.norms,
            self.router,
            self.routed_experts,
            self.shared_experts,
            self.dense_mlp,
            self.head,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

fn product(sizes: &[usize]) -> u64 {
    sizes
        .iter()
        .fold(1, |all: u64, &size| all.saturating_mul(size as u64))
}

fn sum(terms: &[u64]) -> u64 {
    terms.iter().fold(0, |all: u64, &x| all.saturating_add(x))
}

impl ModelConfig {
    /// The model's parameters, part by part.
    pub fn parameters(&self) -> ParameterCounts {
        let hidden = self.hidden_size;
        let layers = self.num_layers;
        let moe_layers = self.num_moe_layers();
        let (attention, inner_norms) = self.attention_parameters();
        let table = product(&[self.vocab_size, hidden]);
        let norm = match self.norm {
            NormKind::Rms => hidden,
            NormKind::Layer => hidden.saturating_mul(2),
        };
        let correction = usize::from(self.moe.scoring == Scoring::Sigmoid);
        let per_layer_norms = inner_norms.saturating_add(product(&[2, norm]));
        ParameterCounts {
            embedding: table,
            attention: attention.saturating_mul(layers as u64),
            norms: per_layer_norms
                .saturating_mul(layers as u64)
                .saturating_add(norm as u64),
            router: product(&[moe_layers, self.moe.num_experts, hidden + correction]),
            routed_experts: self
                .expert_parameters()
                .saturating_mul(product(&[moe_layers, self.moe.num_experts])),
            shared_experts: sum(&[
                product(&[3, moe_layers, hidden, self.moe.shared_intermediate_size]),
                product(&[usize::from(self.moe.shared_gate), moe_layers, hidden]),
            ]),
            dense_mlp: product(&[
                3,
                self.first_dense_layers,
                hidden,
                self.dense_intermediate_size,
            ]),
            head: sum(&[
                if self.tie_word_embeddings { 0 } else { table },
                product(&[usize::from(self.head_bias), self.vocab_size]),
            ]),
        }
    }

    /// Parameters of one routed expert: gate, up and down, `3 H F`.
    pub fn expert_parameters(&self) -> u64 {
        product(&[3, self.hidden_size, self.moe.intermediate_size])
    }

    /// Parameters that work on one token: all but the routed experts that are not chosen, and
    /// but the embedding rows of the other tokens (a tied head counts once, as the head).
    pub fn active_parameters(&self) -> u64 {
        let counts = self.parameters();
        let chosen = self
            .expert_parameters()
            .saturating_mul(product(&[self.num_moe_layers(), self.moe.top_k]));
        let table = product(&[self.vocab_size, self.hidden_size]);
        let rest = sum(&[
            counts.attention,
            counts.norms,
            counts.router,
            counts.shared_experts,
            counts.dense_mlp,
        ]);
        sum(&[rest, table, chosen, self.hidden_size as u64])
    }

    /// Projections and inner norms of one layer's attention.
    fn attention_parameters(&self) -> (u64, u64) {
        let hidden = self.hidden_size;
        match &self.attention {
            Attention::GroupedQuery { qk_norm, bias, .. } => {
                let query = product(&[self.num_heads, self.head_dim]);
                let key = product(&[self.num_kv_heads, self.head_dim]);
                let widths = sum(&[query, key, key]);
                let biases = match bias {
                    ProjectionBias::None => 0,
                    ProjectionBias::QueryKeyValue => widths,
                    ProjectionBias::All => sum(&[widths, hidden as u64]),
                };
                let matrices = sum(&[widths, query]).saturating_mul(hidden as u64);
                let norms = match qk_norm {
                    QkNorm::None => 0,
                    QkNorm::WholeProjection => sum(&[query, key]),
                    QkNorm::PerHead => product(&[2, self.head_dim]),
                };
                (sum(&[matrices, biases]), norms)
            }
            Attention::MultiHeadLatent {
                q_lora_rank,
                kv_lora_rank,
                qk_rope_head_dim,
                qk_nope_head_dim,
                v_head_dim,
            } => {
                let query_width = self.num_heads.saturating_mul(self.head_dim);
                let query = match q_lora_rank {
                    None => product(&[hidden, query_width]),
                    Some(rank) => sum(&[product(&[hidden, *rank]), product(&[*rank, query_width])]),
                };
                let down = product(&[hidden, kv_lora_rank + qk_rope_head_dim]);
                let up = product(&[*kv_lora_rank, self.num_heads, qk_nope_head_dim + v_head_dim]);
                let output = product(&[self.num_heads, *v_head_dim, hidden]);
                let norms = sum(&[q_lora_rank.unwrap_or(0) as u64, *kv_lora_rank as u64]);
                (sum(&[query, down, up, output]), norms)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn config(name: &str) -> ModelConfig {
        let path = format!("{}/../../fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
        ModelConfig::from_file(Path::new(&path)).unwrap()
    }

    #[test]
    fn olmoe_has_its_published_size() {
        let config = config("configs/olmoe-1b-7b-0924.json");
        let counts = config.parameters();
        assert_eq!(config.expert_parameters(), 6_291_456);
        assert_eq!(counts.routed_experts, 6_442_450_944);
        assert_eq!(counts.router, 2_097_152);
        assert_eq!(counts.embedding, counts.head);
        assert_eq!(counts.total(), 6_919_161_856);
        let active = config.active_parameters() as f64 / 1e9;
        assert!((1.1..1.3).contains(&active), "{active}");
    }

    #[test]
    fn deepseek_v2_lite_has_its_published_size() {
        let config = config("configs/deepseek-v2-lite.json");
        let counts = config.parameters();
        assert_eq!(counts.total(), 15_706_484_224);
        assert_eq!(counts.routed_experts, 26 * 64 * 3 * 2048 * 1408);
        assert_eq!(counts.shared_experts, 26 * 3 * 2048 * 2816);
        assert_eq!(counts.dense_mlp, 3 * 2048 * 10944);
        let active = config.active_parameters() as f64 / 1e9;
        assert!((2.2..2.8).contains(&active), "{active}");
    }

    /// The published sizes, from the facts of the published configurations.
    #[test]
    fn other_families_have_their_published_sizes() {
        let mixtral = json!({
            "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        });
        let qwen2 = json!({
            "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
            "num_experts": 60, "num_experts_per_tok": 4,
        });
        let qwen3 = json!({
            "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
            "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": true,
        });
        let deepseek = json!({
            "model_type": "deepseek", "vocab_size": 102400, "hidden_size": 2048,
            "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64,
            "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        });
        let phi = json!({
            "model_type": "phimoe", "vocab_size": 32064, "hidden_size": 4096,
            "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2,
        });
        // Without the layer that guesses further tokens.
        let v3 = json!({
            "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
            "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
            "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
            "n_group": 8, "topk_group": 4, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        });
        for (config, total) in [
            (deepseek, 16_375_728_128),
            (phi, 41_873_153_344),
            (v3, 671_026_419_200),
            (mixtral, 46_702_792_704),
            (qwen2, 14_315_784_192),
            (qwen3, 30_532_122_624),
        ] {
            let config = ModelConfig::from_json(&config, Path::new("config.json")).unwrap();
            assert_eq!(config.parameters().total(), total, "{}", config.family);
        }
    }

    #[test]
    fn a_tied_head_a_bias_and_a_query_latent_change_the_count() {
        let mut tied = config("configs/olmoe-1b-7b-0924.json");
        let before = tied.parameters();
        tied.tie_word_embeddings = true;
        assert_eq!(before.total() - tied.parameters().total(), before.head);
        assert_eq!(
            tied.active_parameters(),
            config("configs/olmoe-1b-7b-0924.json").active_parameters()
        );
        if let Attention::GroupedQuery { bias, .. } = &mut tied.attention {
            *bias = ProjectionBias::All;
        }
        let biases = tied.parameters().attention - before.attention;
        assert_eq!(biases, 16 * 4 * 2048);
        let mut latent = config("configs/deepseek-v2-lite.json");
        let full = latent.parameters();
        if let Attention::MultiHeadLatent { q_lora_rank, .. } = &mut latent.attention {
            *q_lora_rank = Some(100);
        }
        let low = latent.parameters();
        let saved = 27 * (2048 * 3072 - 100 * (2048 + 3072));
        assert_eq!(full.attention - low.attention, saved);
        assert_eq!(low.norms - full.norms, 27 * 100);
    }

    /// Two counts that agree: by formula, and by the list of tensors.
    #[test]
    fn the_count_agrees_with_the_manifest() {
        for name in [
            "configs/olmoe-1b-7b-0924.json",
            "configs/deepseek-v2-lite.json",
            "parity/deepseek_v3/config.json",
            "parity/phimoe/config.json",
        ] {
            let config = config(name);
            let layout = crate::BankLayout::dense(&config);
            let manifest = crate::Manifest::of(&config, &layout).unwrap();
            assert_eq!(manifest.parameters(), config.parameters().total(), "{name}");
        }
    }

    /// The committed checkpoints hold as many values as their configurations promise.
    #[test]
    fn the_count_agrees_with_real_tensors() {
        for family in [
            "olmoe",
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "deepseek",
            "deepseek_v2",
            "deepseek_v2_lite",
            "deepseek_v3",
            "phimoe",
        ] {
            let root = env!("CARGO_MANIFEST_DIR");
            let folder = format!("{root}/../../fixtures/parity/{family}/");
            let bytes = std::fs::read(folder + "model.safetensors").unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let sizes = tensors.tensors().into_iter();
            let stored: usize = sizes
                .map(|(_, view)| view.shape().iter().product::<usize>())
                .sum();
            let counts = config(&format!("parity/{family}/config.json")).parameters();
            assert_eq!(counts.total(), stored as u64, "{family}");
        }
    }
}
