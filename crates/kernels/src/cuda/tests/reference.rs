//! A layer on the host, in double precision and the plainest way, and its copy on the GPU.

use super::super::block::{Adapted, Block, Frame, Shape, Weights};
use super::super::device::Gpu;
use super::super::held::Held;
use super::super::route::Scores;
use super::super::{Choice, ExpertGroups};
pub(super) use super::numbers::{Matrices, Number, random, seeded, values};
use super::numbers::{add, add_outer, logistic, product, swiglu, times, transposed};
use rand::Rng;
use rayon::prelude::*;
use std::f64::consts::E as EULER;

/// Projection `i`, with so many rows, of an input.
type Apply<'a> = dyn Fn(usize, usize, &[f64]) -> Vec<f64> + 'a;

/// What a token's expert does, step by step.
struct Steps {
    gate: Vec<f64>,
    up: Vec<f64>,
    h: Vec<f64>,
    y: Vec<f64>,
}

/// The gradients of a layer.
pub(super) struct HostGradients {
    pub(super) x: Vec<f64>,
    pub(super) gates: Vec<f64>,
    pub(super) dense: Matrices,
    pub(super) bases: Matrices,
    pub(super) a: Matrices,
    pub(super) b: Matrices,
}

/// A layer on the host.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) shape: Shape,
    pub(super) choice: Choice,
    /// Group of each adapted position.
    pub(super) group_of: Vec<Option<usize>>,
    /// Position of each expert, `None` for removed ones.
    pub(super) position: Vec<Option<usize>>,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) router: Vec<f64>,
    pub(super) dense: Matrices,
    pub(super) bases: Matrices,
    pub(super) a: Matrices,
    pub(super) b: Matrices,
    /// Whole experts of the adapted positions, kept or replaced.
    pub(super) originals: Matrices,
    /// Share of the originals.
    pub(super) beta: f64,
    /// What positions give beside, `[n, H]`, and which of them each has; the gradients know nothing of it.
    pub(super) vectors: Option<(Vec<f64>, Vec<Option<usize>>)>,
}

impl Layer {
    /// Slots are dealt to the groups in turn, the last `without` of them to none; experts stand in a
    /// random order, those that have no position are removed.
    pub(super) fn random<T: Number>(
        seed: u64,
        shape: Shape,
        without: usize,
        choice: Choice,
        biased: bool,
    ) -> Self {
        let mut rng = seeded(seed);
        let Shape {
            hidden: h,
            inner: f,
            rank: r,
            ..
        } = shape;
        let based = shape.adapted - shape.kept - without;
        let group = |i: usize| (i < based && shape.groups > 0).then(|| i * shape.groups / based);
        let kept = std::iter::repeat_n(None, shape.kept);
        let group_of = kept
            .chain((0..shape.adapted - shape.kept).map(group))
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
            router: values(&random::<T>(&mut rng, shape.experts * h, h)),
            dense: Matrices::random::<T>(&mut rng, shape.dense, [f, h], [h, f]),
            bases: Matrices::random::<T>(&mut rng, shape.groups, [f, h], [h, f]),
            a: Matrices::random::<T>(&mut rng, shape.adapted, [r, h], [r, f]),
            b: Matrices::random::<T>(&mut rng, shape.adapted, [f, r], [h, r]),
            originals: Matrices::random::<T>(&mut rng, shape.adapted, [f, h], [h, f]),
            beta: 0.0,
            vectors: None,
        }
    }

    /// What the layer is but for its weights.
    pub(super) fn frame(&self, gpu: &Gpu) -> Frame {
        let scores = Scores::new(gpu, self.choice, &self.position, self.bias.as_deref()).unwrap();
        Frame::new(gpu, self.shape, scores, &self.group_of).unwrap()
    }

    pub(super) fn upload<T: Number>(&self, gpu: &Gpu) -> Block<T> {
        let adapters = Adapted {
            a: self.a.upload(gpu),
            b: self.b.upload(gpu),
        };
        let weights = self.weights(gpu, adapters);
        let mut block = self.frame(gpu).with(weights).unwrap();
        block.anneal(self.beta as f32).unwrap();
        block
    }

    fn weights<T: Number>(&self, gpu: &Gpu, adapters: Adapted<Held<T>>) -> Weights<T> {
        let shape = self.shape;
        Weights {
            router: gpu
                .upload(
                    &self
                        .router
                        .iter()
                        .map(|&v| T::of(v as f32))
                        .collect::<Vec<_>>(),
                )
                .unwrap()
                .into(),
            dense: self.dense.upload(gpu),
            kept: self
                .originals
                .part(0..shape.kept, shape.adapted)
                .upload(gpu),
            bases: self.bases.upload(gpu),
            adapters,
            originals: (self.beta > 0.0).then(|| {
                let replaced = shape.kept..shape.adapted;
                self.originals.part(replaced, shape.adapted).upload(gpu)
            }),
        }
    }

    /// The same with adapters that lie one behind the other, each of the rank that it has of its own.
    pub(super) fn upload_ranked<T: Number>(&self, gpu: &Gpu, ranks: &[usize]) -> Block<T> {
        let mut starts = vec![0];
        ranks
            .iter()
            .for_each(|rank| starts.push(starts[starts.len() - 1] + rank));
        let layer = Self {
            shape: Shape {
                ranked: starts.last().copied(),
                ..self.shape
            },
            ..self.clone()
        };
        let s = self.shape;
        let of = |stack: &Vec<f64>, turned: bool| {
            let size = stack.len() / s.adapted;
            let width = size / s.rank;
            let slots = stack.chunks(size).zip(ranks);
            let numbers = slots.flat_map(|(slot, &own)| {
                (0..own * width).map(move |i| match turned {
                    true => slot[i % width * s.rank + i / width],
                    false => slot[i],
                })
            });
            numbers.collect::<Vec<f64>>()
        };
        let [a, b] = [(&self.a, false), (&self.b, true)].map(|(stacks, turned)| {
            let [gate, up, down] = stacks.each().map(|stack| of(stack, turned));
            Matrices { gate, up, down }.upload::<T>(gpu)
        });
        let weights = self.weights(gpu, Adapted { a, b });
        let frame = layer.frame(gpu).ranked(gpu, &starts).unwrap();
        frame.with(weights).unwrap()
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

    /// The share of an adapted slot's whole expert.
    fn own_share(&self, slot: usize) -> f64 {
        match slot < self.shape.kept {
            true => 1.0,
            false => self.beta,
        }
    }

    /// What the expert at `position` does with `x`.
    fn expert(&self, position: usize, x: &[f64]) -> Steps {
        let Shape {
            hidden,
            inner,
            rank,
            dense,
            ..
        } = self.shape;
        let steps = |apply: &Apply<'_>| {
            let (gate, up) = (apply(0, inner, x), apply(1, inner, x));
            let h = swiglu(&gate, &up);
            let y = apply(2, hidden, &h);
            Steps { gate, up, h, y }
        };
        if position < dense {
            let w = self.dense.each();
            return steps(&|i, rows, x| product(w[i], position, rows, x));
        }
        let slot = position - dense;
        let (a, b, base) = (self.a.each(), self.b.each(), self.bases.each());
        steps(&|i, rows, x| {
            let low = product(b[i], slot, rows, &product(a[i], slot, rank, x));
            let own = product(self.originals.each()[i], slot, rows, x);
            let y = add(low, &times(self.own_share(slot), &own));
            match self.group_of[slot] {
                Some(group) => {
                    let of_base = product(base[i], group, rows, x);
                    add(y, &times(1.0 - self.beta, &of_base))
                }
                None => y,
            }
        })
    }

    /// The outputs for `x: [T, H]`, of the given choices.
    pub(super) fn forward(&self, x: &[f64], choices: &[Vec<(usize, f64)>]) -> Vec<f64> {
        let of_token = |(x, choice): (&[f64], &Vec<(usize, f64)>)| {
            let mut out = vec![0.0; x.len()];
            for &(position, gate) in choice {
                out = add(out, &times(gate, &self.expert(position, x).y));
                let vectors = self.vectors.as_ref();
                let own = vectors.and_then(|(all, of)| {
                    let own = of[position]? * x.len();
                    Some(&all[own..own + x.len()])
                });
                out = own.map_or(out.clone(), |own| add(out, &times(gate, own)));
            }
            out
        };
        x.par_chunks(self.shape.hidden)
            .zip(choices)
            .flat_map_iter(of_token)
            .collect()
    }

    /// The gradients for `dout`, that of the outputs.
    pub(super) fn backward(
        &self,
        x: &[f64],
        choices: &[Vec<(usize, f64)>],
        dout: &[f64],
    ) -> HostGradients {
        let mut to = HostGradients {
            x: Vec::new(),
            gates: Vec::new(),
            dense: Matrices::zeros(&self.dense),
            bases: Matrices::zeros(&self.bases),
            a: Matrices::zeros(&self.a),
            b: Matrices::zeros(&self.b),
        };
        let hidden = self.shape.hidden;
        for ((x, choice), dout) in x.chunks(hidden).zip(choices).zip(dout.chunks(hidden)) {
            let mut dx = vec![0.0; hidden];
            for &(position, gate) in choice {
                let steps = self.expert(position, x);
                to.gates
                    .push(steps.y.iter().zip(dout).map(|(y, d)| y * d).sum());
                let dh = self.back(&mut to, 2, position, &steps.h, &times(gate, dout));
                let (mut da, mut db) = (Vec::new(), Vec::new());
                for ((a, b), dh) in steps.gate.iter().zip(&steps.up).zip(&dh) {
                    let s = logistic(*a);
                    da.push(dh * b * (s + a * s * (1.0 - s)));
                    db.push(dh * a * s);
                }
                dx = add(dx, &self.back(&mut to, 0, position, x, &da));
                dx = add(dx, &self.back(&mut to, 1, position, x, &db));
            }
            to.x.extend(dx);
        }
        to
    }

    /// Through projection `i` of the expert at `position`, which was given `x`: adds to the gradients of its
    /// parameters, gives that of `x`.
    fn back(
        &self,
        to: &mut HostGradients,
        i: usize,
        position: usize,
        x: &[f64],
        dy: &[f64],
    ) -> Vec<f64> {
        let Shape { rank, dense, .. } = self.shape;
        if position < dense {
            add_outer(to.dense.each_mut()[i], position, dy, x);
            return transposed(self.dense.each()[i], position, x.len(), dy);
        }
        let slot = position - dense;
        let (a, b) = (self.a.each()[i], self.b.each()[i]);
        let low = product(a, slot, rank, x);
        let dlow = transposed(b, slot, rank, dy);
        add_outer(to.b.each_mut()[i], slot, dy, &low);
        add_outer(to.a.each_mut()[i], slot, &dlow, x);
        let own = transposed(self.originals.each()[i], slot, x.len(), dy);
        let own = times(self.own_share(slot), &own);
        let dx = add(transposed(a, slot, x.len(), &dlow), &own);
        let Some(group) = self.group_of[slot] else {
            return dx;
        };
        let dy = times(1.0 - self.beta, dy);
        add_outer(to.bases.each_mut()[i], group, &dy, x);
        add(dx, &transposed(self.bases.each()[i], group, x.len(), &dy))
    }
}

/// Empties all that slots have above their ranks, and gives the ranks.
pub(super) fn cut(layer: &mut Layer, ranks: &[usize]) -> Vec<usize> {
    let (s, ranks) = (layer.shape, ranks.iter().copied().cycle());
    let ranks: Vec<usize> = ranks.take(s.adapted).map(|rank| rank.min(s.rank)).collect();
    let (a, b) = (layer.a.each_mut(), layer.b.each_mut());
    for (a, b) in a.into_iter().zip(b) {
        for (slot, &rank) in ranks.iter().enumerate() {
            let size = a.len() / s.adapted;
            a[slot * size..][..size][size / s.rank * rank..].fill(0.0);
            let size = b.len() / s.adapted;
            for row in b[slot * size..][..size].chunks_mut(s.rank) {
                row[rank..].fill(0.0);
            }
        }
    }
    ranks
}
