//! A layer on the host, in double precision and the plainest way, and its copy on the GPU.

use super::super::block::{Adapted, Block, Projections, Shape, Weights};
use super::super::device::{Element, Gpu};
use super::super::route::{Choice, ExpertGroups, Scores};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::f64::consts::E as EULER;

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

struct Matrices<T> {
    gate: Vec<T>,
    up: Vec<T>,
    down: Vec<T>,
}

impl<T: Number> Matrices<T> {
    /// `n` of each: gate and up `[rows, columns]`, down `[down_rows, down_columns]`.
    fn random(rng: &mut ChaCha8Rng, n: usize, gate: [usize; 2], down: [usize; 2]) -> Self {
        Self {
            gate: random(rng, n * gate[0] * gate[1], gate[1]),
            up: random(rng, n * gate[0] * gate[1], gate[1]),
            down: random(rng, n * down[0] * down[1], down[1]),
        }
    }

    fn upload(&self, gpu: &Gpu) -> Projections<T> {
        Projections {
            gate: gpu.upload(&self.gate).unwrap(),
            up: gpu.upload(&self.up).unwrap(),
            down: gpu.upload(&self.down).unwrap(),
        }
    }
}

/// Matrix `n` of a stack of `[rows, columns]`, times `x`.
fn product<T: Number>(stack: &[T], n: usize, rows: usize, x: &[f64]) -> Vec<f64> {
    let matrix = &stack[n * rows * x.len()..][..rows * x.len()];
    let dot = |row: &[T]| row.iter().zip(x).map(|(w, x)| w.value() * x).sum();
    matrix.chunks(x.len()).map(dot).collect()
}

fn add(a: Vec<f64>, b: Vec<f64>) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    let h = |(g, u): (&f64, &f64)| g / (1.0 + EULER.powf(-g)) * u;
    gate.iter().zip(up).map(h).collect()
}

/// A layer on the host.
pub(super) struct Layer<T> {
    pub(super) shape: Shape,
    pub(super) choice: Choice,
    /// Group of each adapted position.
    pub(super) group_of: Vec<Option<usize>>,
    /// Position of each expert, `None` for removed ones.
    pub(super) position: Vec<Option<usize>>,
    bias: Option<Vec<f32>>,
    router: Vec<T>,
    dense: Matrices<T>,
    bases: Matrices<T>,
    a: Matrices<T>,
    b: Matrices<T>,
}

impl<T: Number> Layer<T> {
    /// Slots are dealt to the groups in turn, the last `without` of them to none; experts stand in a
    /// random order, those that have no position are removed.
    pub(super) fn random(
        seed: u64,
        shape: Shape,
        without: usize,
        choice: Choice,
        biased: bool,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let Shape {
            hidden: h,
            inner: f,
            rank: r,
            ..
        } = shape;
        let based = shape.adapted - without;
        let group_of = (0..shape.adapted)
            .map(|i| (i < based).then(|| i * shape.groups / based.max(1)))
            .collect();
        let mut position: Vec<Option<usize>> = (0..shape.experts)
            .map(|i| (i < shape.positions()).then_some(i))
            .collect();
        for i in (1..position.len()).rev() {
            position.swap(i, rng.random_range(0..=i));
        }
        Self {
            shape,
            choice,
            group_of,
            position,
            bias: biased.then(|| {
                (0..shape.experts)
                    .map(|_| rng.random_range(-0.1..0.1))
                    .collect()
            }),
            router: random(&mut rng, shape.experts * h, h),
            dense: Matrices::random(&mut rng, shape.dense, [f, h], [h, f]),
            bases: Matrices::random(&mut rng, shape.groups, [f, h], [h, f]),
            a: Matrices::random(&mut rng, shape.adapted, [r, h], [r, f]),
            b: Matrices::random(&mut rng, shape.adapted, [f, r], [h, r]),
        }
    }

    pub(super) fn upload(&self, gpu: &Gpu) -> Block<T> {
        let weights = Weights {
            router: gpu.upload(&self.router).unwrap(),
            dense: self.dense.upload(gpu),
            bases: self.bases.upload(gpu),
            adapters: Adapted {
                a: self.a.upload(gpu),
                b: self.b.upload(gpu),
            },
        };
        let scores = Scores::new(gpu, self.choice, &self.position, self.bias.as_deref()).unwrap();
        Block::new(gpu, self.shape, weights, scores, &self.group_of).unwrap()
    }

    pub(super) fn logits(&self, x: &[f64]) -> Vec<f64> {
        product(&self.router, 0, self.shape.experts, x)
    }

    /// Positions and gates, best first.
    pub(super) fn choose(&self, logits: &[f64]) -> Vec<(usize, f64)> {
        let present: Vec<usize> = (0..logits.len())
            .filter(|&e| self.position[e].is_some())
            .collect();
        let sum: f64 = present.iter().map(|&e| logits[e].exp()).sum();
        let probability = |e: usize| match self.choice.sigmoid {
            true => 1.0 / (1.0 + EULER.powf(-logits[e])),
            false => logits[e].exp() / sum,
        };
        let bias = |e: usize| self.bias.as_ref().map_or(0.0, |b| f64::from(b[e]));
        let score = |e: usize| probability(e) + bias(e);
        let allowed = self.allowed(&present, score);
        let mut order: Vec<usize> = present.iter().copied().filter(|&e| allowed(e)).collect();
        order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
        order.truncate(self.shape.top_k);
        let sum: f64 = order.iter().map(|&e| probability(e)).sum();
        let factor = self.choice.scaling as f64
            / if self.choice.renormalize {
                sum + 1e-20
            } else {
                1.0
            };
        let gate = |e: usize| (self.position[e].unwrap(), probability(e) * factor);
        order.into_iter().map(gate).collect()
    }

    /// Which experts the limit to the best groups of experts leaves.
    fn allowed(&self, present: &[usize], score: impl Fn(usize) -> f64) -> impl Fn(usize) -> bool {
        let ExpertGroups {
            count,
            kept,
            two_best,
        } = self.choice.groups.unwrap_or(ExpertGroups {
            count: 1,
            kept: 1,
            two_best: false,
        });
        let size = self.shape.experts / count;
        let of_group = |g: usize| -> f64 {
            let mut scores: Vec<f64> = present
                .iter()
                .filter(|&&e| e / size == g)
                .map(|&e| score(e))
                .collect();
            scores.sort_by(|a, b| b.total_cmp(a));
            scores.iter().take(if two_best { 2 } else { 1 }).sum()
        };
        let mut groups: Vec<usize> = (0..count).collect();
        groups.sort_by(|&a, &b| of_group(b).total_cmp(&of_group(a)).then(a.cmp(&b)));
        groups.truncate(kept);
        move |e| groups.contains(&(e / size))
    }

    /// What the expert at `position` gives for `x`.
    fn expert(&self, position: usize, x: &[f64]) -> Vec<f64> {
        let Shape {
            hidden,
            inner,
            rank,
            dense,
            ..
        } = self.shape;
        if position < dense {
            let gate = product(&self.dense.gate, position, inner, x);
            let up = product(&self.dense.up, position, inner, x);
            return product(&self.dense.down, position, hidden, &swiglu(&gate, &up));
        }
        let slot = position - dense;
        let part = |a: &[T], b: &[T], base: &[T], rows: usize, x: &[f64]| {
            let own = product(b, slot, rows, &product(a, slot, rank, x));
            match self.group_of[slot] {
                Some(group) => add(own, product(base, group, rows, x)),
                None => own,
            }
        };
        let (a, b, base) = (&self.a, &self.b, &self.bases);
        let gate = part(&a.gate, &b.gate, &base.gate, inner, x);
        let up = part(&a.up, &b.up, &base.up, inner, x);
        part(&a.down, &b.down, &base.down, hidden, &swiglu(&gate, &up))
    }

    /// The outputs for `x: [T, H]`, of the given choices.
    pub(super) fn forward(&self, x: &[T], choices: &[Vec<(usize, f64)>]) -> Vec<f64> {
        let of_token = |(x, choice): (&[T], &Vec<(usize, f64)>)| {
            let x: Vec<f64> = x.iter().map(|v| v.value()).collect();
            let mut out = vec![0.0; x.len()];
            for &(position, gate) in choice {
                out = add(
                    out,
                    self.expert(position, &x).iter().map(|y| gate * y).collect(),
                );
            }
            out
        };
        x.par_chunks(self.shape.hidden)
            .zip(choices)
            .flat_map_iter(of_token)
            .collect()
    }
}
