//! The pair against models put together by hand.

use super::*;
use crate::batches::Batch;
use crate::likelihood::score_batch;
use lightmoe_models::{Decoder, Tokens};
use rand::Rng;
use std::path::Path;

const VOCAB: usize = 12;

fn model(layers: usize, hidden: usize, seed: u64) -> Decoder {
    let raw = serde_json::json!({
        "model_type": "olmoe", "vocab_size": VOCAB, "hidden_size": hidden,
        "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": layers,
        "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    });
    let config = ModelConfig::from_json(&raw, Path::new("config.json")).unwrap();
    Decoder::random(&config, seed).unwrap()
}

fn rows() -> Vec<Encoded> {
    let mut rng = lightmoe_models::random::stream(7, "rows");
    let row = |length: usize| Encoded {
        tokens: (0..length)
            .map(|_| rng.random_range(0..VOCAB as u32))
            .collect(),
        answer_start: 1 + length / 3,
    };
    let mut rows: Vec<Encoded> = [9, 4, 17, 6, 9].into_iter().map(row).collect();
    // The same input with another last token, which is read once.
    let mut twin = rows[2].clone();
    twin.tokens[16] = (twin.tokens[16] + 1) % VOCAB as u32;
    rows.push(twin);
    rows
}

/// What a model predicts behind each token of a row: probabilities.
fn predicted(model: &Decoder, row: &Encoded) -> Vec<Vec<f64>> {
    let hidden = model.forward(Tokens::one(&row.tokens), None, &mut |_, _, _| Ok(()));
    let logits: Vec<Vec<f32>> = model.logits(&hidden.unwrap()).unwrap().to_vec2().unwrap();
    logits
        .into_iter()
        .map(|logits| {
            let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            logits.iter().map(|&x| f64::from(x).exp() / sum).collect()
        })
        .collect()
}

/// The mean KL divergence a token, written down from its definition.
fn mean_kl(original: &Decoder, other: &Decoder, rows: &[Encoded]) -> f64 {
    let mut kls = Vec::new();
    for row in rows {
        let (p, q) = (predicted(original, row), predicted(other, row));
        for at in row.answer_start - 1..row.tokens.len() - 1 {
            let pairs = p[at].iter().zip(&q[at]);
            kls.push(pairs.map(|(p, q)| p * (p / q).ln()).sum::<f64>());
        }
    }
    kls.iter().sum::<f64>() / kls.len() as f64
}

fn measured(original: &Decoder, compressed: &Decoder, batch_tokens: usize) -> Divergence {
    let models = ModelPair {
        original,
        compressed,
    };
    let go_on = &mut |_, _| true;
    divergence(models, &rows(), Swaps::EachLayer, batch_tokens, go_on).unwrap()
}

#[test]
fn whole_and_by_layer_as_by_hand() {
    let (original, compressed) = (model(3, 16, 1), model(3, 16, 2));
    let rows = rows();
    let found = measured(&original, &compressed, 40);
    let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
    close(found.whole.kl.value, mean_kl(&original, &compressed, &rows));
    assert_eq!(found.layers.len(), 3);
    for of_layer in &found.layers {
        let mut swapped = original.clone();
        swapped.layers[of_layer.layer] = compressed.layers[of_layer.layer].clone();
        close(
            of_layer.distance.kl.value,
            mean_kl(&original, &swapped, &rows),
        );
    }
    assert!(found.kl_quantiles.median <= found.kl_quantiles.p99);
    assert!(found.kl_quantiles.p99 <= found.kl_quantiles.max);
    // Perplexities are those that the evaluation takes.
    let batch = Batch {
        rows: (0..rows.len()).collect(),
        shared: 0,
    };
    for (model, perplexity) in [
        (&original, found.perplexity.original),
        (&compressed, found.perplexity.compressed),
    ] {
        let answers = score_batch(model, &rows, &batch).unwrap();
        let nll: Vec<f64> = answers.into_iter().flat_map(|a| a.nll).collect();
        assert_eq!(nll.len(), found.tokens);
        close(
            perplexity,
            (nll.iter().sum::<f64>() / nll.len() as f64).exp(),
        );
    }
    close(
        found.perplexity.ratio,
        found.perplexity.compressed / found.perplexity.original,
    );
}

#[test]
fn a_model_is_no_way_from_itself() {
    let original = model(2, 16, 1);
    let found = measured(&original, &original, 40);
    for distance in [
        found.whole,
        found.layers[0].distance,
        found.layers[1].distance,
    ] {
        assert_eq!(distance.kl.value, 0.0);
        assert_eq!(distance.top1_agreement.value, 1.0);
        assert_eq!(distance.nll_increase.value, 0.0);
    }
    assert_eq!(found.perplexity.ratio, 1.0);
}

#[test]
fn batches_do_not_matter() {
    let (original, compressed) = (model(2, 16, 1), model(2, 16, 2));
    let (one, all) = (
        measured(&original, &compressed, 1),
        measured(&original, &compressed, 1000),
    );
    let same = |a: f64, b: f64| assert!((a - b).abs() < 1e-5, "{a} {b}");
    same(one.whole.kl.value, all.whole.kl.value);
    same(one.whole.kl.stderr.unwrap(), all.whole.kl.stderr.unwrap());
    same(
        one.layers[1].distance.kl.value,
        all.layers[1].distance.kl.value,
    );
    same(one.kl_quantiles.p99, all.kl_quantiles.p99);
    assert_eq!(one.tokens, all.tokens);
}

#[test]
fn models_of_other_shapes_and_an_interruption_are_errors() {
    let original = model(2, 16, 1);
    let fails = |compressed: &Decoder, rows: &[Encoded], go_on: bool| {
        let models = ModelPair {
            original: &original,
            compressed,
        };
        divergence(models, rows, Swaps::None, 40, &mut |_, _| go_on).unwrap_err()
    };
    let message = fails(&model(3, 16, 1), &rows(), true).to_string();
    assert!(message.contains("number of layers is 2"), "{message}");
    let message = fails(&model(2, 32, 1), &rows(), true).to_string();
    assert!(message.contains("hidden size is 16"), "{message}");
    assert!(matches!(fails(&original, &[], true), Error::Empty));
    assert!(matches!(
        fails(&original, &rows(), false),
        Error::Interrupted
    ));
}
