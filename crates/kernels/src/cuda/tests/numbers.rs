//! Numbers and matrices of a reference on the host, in double precision.

use super::super::block::Projections;
use super::super::device::{Element, Gpu};
use super::super::held::Held;
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::f64::consts::E as EULER;
use std::ops::Range;

/// A number that makes the inputs of all cases others.
const SEED: &str = "LIGHTMOE_SEED";

/// What a case draws its numbers from: the same in every run, unless [`SEED`] is set.
pub(super) fn seeded(case: u64) -> ChaCha8Rng {
    let run = std::env::var(SEED).map_or(0, |text| {
        text.parse::<u64>()
            .unwrap_or_else(|_| panic!("{SEED} is `{text}`, expected a whole number"))
    });
    // An odd factor, so that cases of two runs fall on each other by chance alone.
    ChaCha8Rng::seed_from_u64(case.wrapping_add(run.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// A 16-bit float that tests can make.
pub(super) trait Number: Element {
    fn of(value: f32) -> Self;
    fn value(self) -> f64;
}

impl Number for bf16 {
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn value(self) -> f64 {
        self.to_f64()
    }
}

impl Number for half::f16 {
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn value(self) -> f64 {
        self.to_f64()
    }
}

/// Random numbers with unit variance divided by the root of `inputs`, as rounded.
pub(super) fn random<T: Number>(rng: &mut ChaCha8Rng, n: usize, inputs: usize) -> Vec<T> {
    let scale = (3.0 / inputs as f32).sqrt();
    (0..n)
        .map(|_| T::of(rng.random_range(-scale..scale)))
        .collect()
}

/// The three matrices of some experts, or their gradients.
#[derive(Debug, Clone)]
pub(super) struct Matrices {
    pub(super) gate: Vec<f64>,
    pub(super) up: Vec<f64>,
    pub(super) down: Vec<f64>,
}

impl Matrices {
    /// `n` of each: gate and up `[rows, columns]`, down `[down_rows, down_columns]`; rounded to `T`.
    pub(super) fn random<T: Number>(
        rng: &mut ChaCha8Rng,
        n: usize,
        gate: [usize; 2],
        down: [usize; 2],
    ) -> Self {
        let mut draw =
            |[rows, columns]: [usize; 2]| values(&random::<T>(rng, n * rows * columns, columns));
        Self {
            gate: draw(gate),
            up: draw(gate),
            down: draw(down),
        }
    }

    pub(super) fn zeros(like: &Self) -> Self {
        let zeros = |of: &Vec<f64>| vec![0.0; of.len()];
        Self {
            gate: zeros(&like.gate),
            up: zeros(&like.up),
            down: zeros(&like.down),
        }
    }

    /// Some of `n`.
    pub(super) fn part(&self, of: Range<usize>, n: usize) -> Self {
        let [gate, up, down] = self.each().map(|matrices| {
            let size = matrices.len() / n.max(1);
            matrices[of.start * size..of.end * size].to_vec()
        });
        Self { gate, up, down }
    }

    pub(super) fn each(&self) -> [&Vec<f64>; 3] {
        [&self.gate, &self.up, &self.down]
    }

    pub(super) fn each_mut(&mut self) -> [&mut Vec<f64>; 3] {
        [&mut self.gate, &mut self.up, &mut self.down]
    }

    pub(super) fn upload<T: Number>(&self, gpu: &Gpu) -> Projections<Held<T>> {
        let [gate, up, down] = self.each().map(|matrix| {
            let numbers: Vec<T> = matrix.iter().map(|&v| T::of(v as f32)).collect();
            gpu.upload(&numbers).unwrap().into()
        });
        Projections { gate, up, down }
    }
}

pub(super) fn values<T: Number>(numbers: &[T]) -> Vec<f64> {
    numbers.iter().map(|v| v.value()).collect()
}

/// Matrix `n` of a stack of `[rows, columns]`, times `x`.
pub(super) fn product(stack: &[f64], n: usize, rows: usize, x: &[f64]) -> Vec<f64> {
    let matrix = &stack[n * rows * x.len()..][..rows * x.len()];
    let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum();
    matrix.chunks(x.len()).map(dot).collect()
}

/// Its transpose, `[columns]`, times `y`.
pub(super) fn transposed(stack: &[f64], n: usize, columns: usize, y: &[f64]) -> Vec<f64> {
    let matrix = &stack[n * y.len() * columns..][..y.len() * columns];
    let mut x = vec![0.0; columns];
    for (row, y) in matrix.chunks(columns).zip(y) {
        x.iter_mut().zip(row).for_each(|(x, w)| *x += w * y);
    }
    x
}

/// Adds `y ⊗ x` to matrix `n` of a stack.
pub(super) fn add_outer(stack: &mut [f64], n: usize, y: &[f64], x: &[f64]) {
    let matrix = &mut stack[n * y.len() * x.len()..][..y.len() * x.len()];
    for (row, y) in matrix.chunks_mut(x.len()).zip(y) {
        row.iter_mut().zip(x).for_each(|(w, x)| *w += y * x);
    }
}

pub(super) fn add(a: Vec<f64>, b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

pub(super) fn times(a: f64, b: &[f64]) -> Vec<f64> {
    b.iter().map(|b| a * b).collect()
}

pub(super) fn logistic(v: f64) -> f64 {
    1.0 / (1.0 + EULER.powf(-v))
}

pub(super) fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    let h = |(g, u): (&f64, &f64)| g * logistic(*g) * u;
    gate.iter().zip(up).map(h).collect()
}
