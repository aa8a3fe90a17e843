//! The formula of a layer's bank, token by token and slot by slot.

use super::support::{PROJECTIONS, Random, annealing, assert_close, mixtures, stacks, values};
use super::{F32, F64};
use candle_core::{DType, Device, Tensor};
use lightmoe_models::{Checkpoint, SlotLayout, names};

/// A matrix, row by row.
pub struct Matrix {
    rows: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn zero(rows: usize, columns: usize) -> Self {
        let values = vec![0.0; rows * columns];
        Self { rows, values }
    }

    fn read(checkpoint: &Checkpoint, name: &str, shape: [usize; 2]) -> Self {
        let values = values(&checkpoint.tensor(name, &shape).unwrap());
        Self {
            rows: shape[0],
            values,
        }
    }

    fn add(&mut self, factor: f64, other: &Self) {
        for (a, b) in self.values.iter_mut().zip(&other.values) {
            *a += factor * b;
        }
    }

    pub fn times(&self, x: &[f64]) -> Vec<f64> {
        let row = |r: &[f64]| r.iter().zip(x).map(|(a, b)| a * b).sum();
        self.values.chunks(x.len()).map(row).collect()
    }

    fn product(&self, other: &Self) -> Self {
        let (n, k) = (self.rows, other.rows);
        let columns = other.values.len() / k;
        let mut out = Self::zero(n, columns);
        for i in 0..n {
            for j in 0..columns {
                out.values[i * columns + j] = (0..k)
                    .map(|l| self.values[i * k + l] * other.values[l * columns + j])
                    .sum();
            }
        }
        out
    }
}

/// A matrix of a base: as it is, or `L·R` and the rows that are kept.
fn base(
    compressed: &Checkpoint,
    (layer, group): (usize, usize),
    p: &str,
    shape: [usize; 2],
) -> Matrix {
    let Some(factored) = compressed.layout().layers[&layer].factored else {
        return Matrix::read(compressed, &names::base(layer, group, p), shape);
    };
    let [out, width] = shape;
    let name = |part: &str| names::base(layer, group, &format!("{p}.{part}"));
    let r = Matrix::read(compressed, &name("lora_A"), [factored.rank, width]);
    let l = Matrix::read(compressed, &name("lora_B"), [out, factored.rank]);
    let kept = factored.rows(p);
    let rows = Matrix::read(compressed, &name("rows"), [kept, width]);
    let places = values(&compressed.tensor(&name("index"), &[kept]).unwrap());
    let mut whole = l.product(&r);
    for (place, row) in places.iter().zip(rows.values.chunks(width)) {
        let at = *place as usize * width;
        for (w, s) in whole.values[at..at + width].iter_mut().zip(row) {
            *w += s;
        }
    }
    whole
}

/// Gate, up and down of one slot: `W` if dense, `β·W + (1−β)·B + U·V` if adapted, otherwise zero.
pub fn slot(
    compressed: &Checkpoint,
    original: &Checkpoint,
    (layer, expert): (usize, usize),
    beta: f64,
) -> [Matrix; 3] {
    let (h, f) = (16, 12);
    PROJECTIONS.map(|p| {
        let shape = if p == "down_proj" { [h, f] } else { [f, h] };
        match compressed.layout().layers[&layer].slots[expert] {
            SlotLayout::Dense => Matrix::read(compressed, &names::expert(layer, expert, p), shape),
            SlotLayout::Constant | SlotLayout::Removed => Matrix::zero(shape[0], shape[1]),
            SlotLayout::Mixed { .. } if p == "down_proj" => {
                Matrix::read(compressed, &names::expert(layer, expert, p), shape)
            }
            SlotLayout::Mixed { bases, rank } => {
                let own = |part: &str| names::expert(layer, expert, &format!("{p}.{part}"));
                let weights = values(&compressed.tensor(&own("mixing"), &[bases]).unwrap());
                let sum: f64 = weights.iter().map(|w| w.exp()).sum();
                let mut inner = Matrix::zero(rank, shape[1]);
                for (b, w) in weights.iter().enumerate() {
                    let name = names::basis(layer, b, p);
                    let basis = Matrix::read(compressed, &name, [rank, shape[1]]);
                    inner.add(w.exp() / sum, &basis);
                }
                for v in &mut inner.values {
                    *v /= 1.0 + (-*v).exp();
                }
                Matrix::read(compressed, &own("transform"), [shape[0], rank]).product(&inner)
            }
            SlotLayout::Adapted { group, rank, .. } => {
                let mut whole = Matrix::zero(shape[0], shape[1]);
                if beta > 0.0 {
                    let name = names::expert(layer, expert, p);
                    whole.add(beta, &Matrix::read(original, &name, shape));
                }
                if let Some(g) = group {
                    whole.add(1.0 - beta, &base(compressed, (layer, g), p, shape));
                }
                if rank > 0 {
                    let name = |ab| names::expert(layer, expert, &format!("{p}.lora_{ab}"));
                    let v = Matrix::read(compressed, &name("A"), [rank, shape[1]]);
                    let u = Matrix::read(compressed, &name("B"), [shape[0], rank]);
                    whole.add(1.0, &u.product(&v));
                }
                whole
            }
        }
    })
}

/// Compares the bank of a layer with the formula, in both element types.
#[track_caller]
pub fn check(
    (compressed, original): (&Checkpoint, &Checkpoint),
    (layer, beta): (usize, f64),
    chosen: &[u32],
    k: usize,
) {
    let tokens = chosen.len() / k;
    let mut random = Random::new(11);
    let x = random.tensor(&[tokens, 16], 0.0, 1.0);
    let gates = random.tensor(&[tokens * k], 0.5, 0.4);
    let (xs, gs) = (values(&x), values(&gates));
    let slots: Vec<_> = (0..8)
        .map(|e| slot(compressed, original, (layer, e), beta))
        .collect();
    let mut expected = vec![0.0; tokens * 16];
    for (pair, &expert) in chosen.iter().enumerate() {
        let token = pair / k * 16..(pair / k + 1) * 16;
        let [gate, up, down] = &slots[expert as usize];
        let (gate, up) = (gate.times(&xs[token.clone()]), up.times(&xs[token.clone()]));
        let inner: Vec<f64> = gate
            .iter()
            .zip(up)
            .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
            .collect();
        for (y, d) in expected[token].iter_mut().zip(down.times(&inner)) {
            *y += gs[pair] * d;
        }
    }
    for (pair, &expert) in chosen.iter().enumerate() {
        let expert = expert as usize;
        let (name, share) = match compressed.layout().layers[&layer].slots[expert] {
            SlotLayout::Constant => (names::constant(layer, expert), 1.0),
            SlotLayout::Adapted { bias: true, .. } => (names::bias(layer, expert), 1.0 - beta),
            _ => continue,
        };
        let vector = values(&compressed.tensor(&name, &[16]).unwrap());
        let token = pair / k * 16..(pair / k + 1) * 16;
        for (y, v) in expected[token].iter_mut().zip(vector) {
            *y += gs[pair] * share * v;
        }
    }
    let expected = Tensor::from_vec(expected, (tokens, 16), &Device::Cpu).unwrap();
    let mut model = annealing(compressed, original, beta);
    let bank = model.layers[layer].bank_mut().unwrap();
    assert_close(&bank.forward(&x, &gates, chosen).unwrap(), &expected, F32);
    for stack in stacks(bank) {
        *stack = stack.map(|t| Ok(t.to_dtype(DType::F64)?)).unwrap();
    }
    for tensor in mixtures(bank) {
        *tensor = tensor.to_dtype(DType::F64).unwrap();
    }
    for vectors in bank.constants.iter_mut().chain(&mut bank.biases) {
        *vectors = vectors.to_dtype(DType::F64).unwrap();
    }
    let (x, gates) = (x.to_dtype(DType::F64), gates.to_dtype(DType::F64));
    let ours = bank.forward(&x.unwrap(), &gates.unwrap(), chosen).unwrap();
    assert_close(&ours, &expected, F64);
}
