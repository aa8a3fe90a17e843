//! What is measured, on GPUs and on the CPU: the layers of published models, and batches whose routing is given.

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::fs;
use std::io;
use std::path::Path;

/// The routed experts of a published model.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    pub name: &'static str,
    pub hidden: usize,
    pub inner: usize,
    pub experts: usize,
    pub top_k: usize,
}

pub const MODELS: [Model; 4] = [
    Model {
        name: "OLMoE-1B-7B",
        hidden: 2048,
        inner: 1024,
        experts: 64,
        top_k: 8,
    },
    Model {
        name: "Qwen3-30B-A3B",
        hidden: 2048,
        inner: 768,
        experts: 128,
        top_k: 8,
    },
    Model {
        name: "DeepSeek-V2-Lite",
        hidden: 2048,
        inner: 1408,
        experts: 64,
        top_k: 6,
    },
    Model {
        name: "Mixtral-8x7B",
        hidden: 4096,
        inner: 14336,
        experts: 8,
        top_k: 2,
    },
];

pub const TOKENS: [usize; 7] = [1, 8, 32, 128, 1024, 4096, 32768];
/// What others are asked to do too.
pub const OTHERS: [usize; 6] = [1, 8, 32, 128, 1024, 4096];
/// Percent of the experts that are replaced.
pub const REPLACED: [usize; 4] = [0, 30, 50, 75];
pub const RANK: usize = 32;
/// Shared bases of a layer with replaced experts.
pub const GROUPS: usize = 1;

impl Model {
    /// How many experts so many percent are.
    pub fn adapted(&self, replaced: usize) -> usize {
        (self.experts * replaced + 50) / 100
    }
}

/// How often experts are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skew {
    /// All as often.
    Uniform,
    /// The expert of rank `i` in proportion to `1 / i`.
    Zipf,
}

impl Skew {
    pub const ALL: [Self; 2] = [Self::Uniform, Self::Zipf];

    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "Zipf",
        }
    }
}

/// Tokens and what their router will choose. The router's matrix is the identity on the first hidden
/// numbers, which are the logits: drawing from a distribution without putting back is choosing the
/// largest of its logarithms after Gumbel noise was added.
#[derive(Debug)]
pub struct Batch {
    pub x: Vec<bf16>,
    /// Chosen experts of each token, `[T · K]`.
    pub chosen: Vec<u32>,
    /// `[T · K]`
    pub gates: Vec<f32>,
    /// What it was drawn with.
    pub seed: u64,
}

impl Batch {
    pub fn new(model: &Model, tokens: usize, skew: Skew, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Which experts are chosen often has nothing to do with their place.
        let mut ranks: Vec<usize> = (1..=model.experts).collect();
        let mut order = ChaCha8Rng::seed_from_u64(17);
        for i in (1..ranks.len()).rev() {
            ranks.swap(i, order.random_range(0..=i));
        }
        let (mut x, mut chosen, mut gates) = (Vec::new(), Vec::new(), Vec::new());
        // Normal enough, and quick to draw in these amounts.
        let noise: Vec<bf16> = (0..1 << 16)
            .map(|_| {
                bf16::from_f32((0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.87)
            })
            .collect();
        for _ in 0..tokens {
            let logit = |rank: &usize| {
                let popularity = if skew == Skew::Zipf {
                    -(*rank as f32).ln()
                } else {
                    0.0
                };
                let uniform: f32 = rng.random_range(1e-6..1.0);
                bf16::from_f32(popularity - (-uniform.ln()).ln())
            };
            let logits: Vec<bf16> = ranks.iter().map(logit).collect();
            let mut best: Vec<usize> = (0..model.experts).collect();
            best.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            best.truncate(model.top_k);
            let total: f32 = logits.iter().map(|l| l.to_f32().exp()).sum();
            gates.extend(best.iter().map(|&e| logits[e].to_f32().exp() / total));
            chosen.extend(best.iter().map(|&e| e as u32));
            let first = rng.random_range(0..noise.len() - model.hidden);
            x.extend_from_slice(&logits);
            x.extend_from_slice(&noise[first..first + model.hidden - model.experts]);
        }
        Self {
            x,
            chosen,
            gates,
            seed,
        }
    }

    /// Rows of each expert.
    pub fn counts(&self, experts: usize) -> Vec<usize> {
        let mut counts = vec![0; experts];
        self.chosen.iter().for_each(|&e| counts[e as usize] += 1);
        counts
    }
}

/// The least that a layer must do for a batch.
#[derive(Debug, Clone, Copy)]
pub struct Least {
    /// Weights of what was hit, tokens in and out.
    pub numbers: f64,
    /// Multiplications and additions, a base once for each token.
    pub operations: f64,
}

impl Least {
    /// Expert `e` stands at position `e`: the last ones, `adapted` of them, are replaced.
    pub fn new(model: &Model, adapted: usize, batch: &Batch) -> Self {
        let counts = batch.counts(model.experts);
        let kept = model.experts - adapted;
        let (h, f, r) = (model.hidden as f64, model.inner as f64, RANK as f64);
        let hit = |part: &[usize]| {
            let hits = part.iter().filter(|&&n| n > 0).count() as f64;
            (hits, part.iter().sum::<usize>() as f64)
        };
        let (dense, dense_rows) = hit(&counts[..kept]);
        let (slots, slot_rows) = hit(&counts[kept..]);
        let tokens = batch.chosen.len() / model.top_k;
        let of_base = |choice: &&[u32]| choice.iter().any(|&e| e as usize >= kept);
        let pairs = batch.chosen.chunks(model.top_k).filter(of_base).count() as f64;
        let (expert, adapter) = (3.0 * h * f, 3.0 * r * (h + f));
        let bases = if pairs > 0.0 { 1.0 } else { 0.0 };
        let weights = dense * expert + bases * expert + slots * adapter + model.experts as f64 * h;
        Self {
            numbers: weights + 2.0 * tokens as f64 * h,
            operations: 2.0 * ((dense_rows + pairs) * expert + slot_rows * adapter),
        }
    }
}

/// Of how many tokens others have to come to the same as we.
const COMPARED: usize = 64;

/// Writes a batch to a file in `folder`, and of its first tokens what our original layer makes of them, `out: [tokens,
/// hidden]`; describes it for those who compute the same.
pub fn write_case(folder: &Path, model: &Model, batch: &Batch, out: &[f32]) -> io::Result<Value> {
    let tokens = batch.chosen.len() / model.top_k;
    let compared = tokens.min(COMPARED);
    let file = format!("case-{}-{tokens}-{}.bin", model.name, batch.seed);
    let chosen = batch.chosen.iter().flat_map(|v| v.to_le_bytes());
    let gates = batch.gates.iter().flat_map(|v| v.to_le_bytes());
    let x = batch.x.iter().flat_map(|v| v.to_le_bytes());
    let out = out[..compared * model.hidden].iter();
    let out = out.flat_map(|v| v.to_le_bytes());
    let all = chosen.chain(gates).chain(x).chain(out);
    fs::write(folder.join(&file), all.collect::<Vec<u8>>())?;
    Ok(json!({
        "name": format!("{} {tokens}", model.name),
        "hidden": model.hidden,
        "inner": model.inner,
        "experts": model.experts,
        "top_k": model.top_k,
        "tokens": tokens,
        "compared": compared,
        "file": file,
    }))
}
