//! What small models predict, before and after they were built.

use super::*;
use lightmoe_compress::{Sensitivity, build};
use lightmoe_models::{LanguageModel, Tokens};

/// The model that `plan` describes, in `folder`.
pub fn built(
    checkpoint: &Checkpoint,
    plan: &Plan,
    seen: &Observations,
    folder: &TempDir,
) -> Checkpoint {
    let path = folder.path().join("built");
    let _ = std::fs::remove_dir_all(&path);
    let inputs = BuildInputs {
        checkpoint,
        plan,
        observations: Some(seen),
        seed: 0,
    };
    build(&inputs, &path, &mut |_, _| true).unwrap();
    Checkpoint::open(&path).unwrap()
}

/// Log-probabilities of every next token of `samples`, `[tokens, V]`.
pub fn log_probabilities(model: &Decoder, samples: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let mut rows = Vec::new();
    for sample in samples {
        let hidden = model.forward(Tokens::one(sample), None, &mut |_, _, _| Ok(()));
        let logits = model.logits(&hidden.unwrap()).unwrap();
        for row in logits.to_vec2::<f32>().unwrap() {
            let whole: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            rows.push(row.iter().map(|&l| f64::from(l) - whole.ln()).collect());
        }
    }
    rows
}

/// The mean divergence of `now` from `original` over the tokens, in nats.
pub fn divergence(original: &[Vec<f64>], now: &[Vec<f64>]) -> f64 {
    let of = |(p, q): (&Vec<f64>, &Vec<f64>)| -> f64 {
        p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
    };
    original.iter().zip(now).map(of).sum::<f64>() / original.len() as f64
}

pub fn samples(seed: u64) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let sample = |_| (0..24).map(|_| rng.random_range(0..64)).collect();
    (0..40).map(sample).collect()
}

/// What errors cost, by `damage`, and no more.
pub fn with(damage: Sensitivity) -> Statistics {
    Statistics {
        damage: Some(damage),
        ..Statistics::default()
    }
}
