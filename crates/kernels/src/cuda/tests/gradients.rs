//! The gradients on a GPU against the host's, and the host's against finite differences.

use super::super::block::Shape;
use super::super::device::Gpu;
use super::super::gradients::{Gradients, Trained};
use super::super::grouped::Path;
use super::super::workspace::Workspace;
use super::reference::{Layer, Matrices, Number, random, seeded, values};
use super::{SHAPES, SOFTMAX, choices, gpu, layer, shape};
use cudarc::driver::CudaSlice;
use half::{bf16, f16};
use rand::Rng;
use std::collections::BTreeMap;

const ALL: Trained = Trained {
    dense: true,
    bases: true,
    adapters: true,
};

/// Below so many tokens gradients are a few numbers each, of which one that happens to be nearly nothing is off by as
/// much as the others, and by more of itself: then all matrices of a kind are taken together, over some draws.
const FEW: usize = 8;
const DRAWS: usize = 12;

/// What gradients are off by, and their size, by what they are of, over some draws.
#[derive(Default)]
struct Errors(BTreeMap<String, [f64; 2]>);

impl Errors {
    /// One draw of one of them.
    fn add(&mut self, what: String, given: &[f64], host: &[f64]) {
        if host.iter().all(|&v| v == 0.0) {
            assert!(given.iter().all(|&v| v == 0.0), "{what}: not zero");
            return;
        }
        let square = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|v| v * v).sum::<f64>();
        let apart = square(&mut given.iter().zip(host).map(|(a, b)| a - b));
        assert!(apart.is_finite(), "{what}: a number is missing");
        let sums = self.0.entry(what).or_default();
        sums[0] += apart;
        sums[1] += square(&mut host.iter().copied());
    }

    /// Matrices, each of `n` by itself, or `together`.
    fn matrices(
        &mut self,
        gpu: &Gpu,
        (what, together): (&str, bool),
        n: usize,
        given: &super::super::Projections<CudaSlice<f32>>,
        host: &Matrices,
    ) {
        let given = [&given.gate, &given.up, &given.down].map(|matrix| numbers(gpu, matrix));
        for ((name, given), host) in ["gate", "up", "down"].iter().zip(given).zip(host.each()) {
            let size = host.len() / n.max(1);
            for i in 0..n {
                let of = i * size..(i + 1) * size;
                let what = match together {
                    true => format!("{name} of {what}"),
                    false => format!("{name} of {what} {i}"),
                };
                self.add(what, &given[of.clone()], &host[of]);
            }
        }
    }

    fn check(&self, case: &str) {
        for (what, [apart, size]) in &self.0 {
            let off = (apart / size).sqrt();
            assert!(off < 1e-2, "{case}: {what} is off by {off:.1e}");
        }
    }
}

fn numbers(gpu: &Gpu, of: &CudaSlice<f32>) -> Vec<f64> {
    let numbers = gpu.download(of).unwrap();
    numbers.into_iter().map(f64::from).collect()
}

fn check<T: Number>(gpu: &Gpu, layer: &Layer, tokens: usize, path: Path, seed: u64) {
    let block = layer.upload::<T>(gpu);
    let shape = layer.shape;
    let mut rng = seeded(seed);
    let mut errors = Errors::default();
    let draws = if tokens < FEW { DRAWS } else { 1 };
    for _ in 0..draws {
        let [x, dout] = [1, 1].map(|inputs| random::<T>(&mut rng, tokens * shape.hidden, inputs));
        let [on_gpu, dout_on_gpu] = [&x, &dout].map(|values| gpu.upload(values).unwrap());
        let mut work = Workspace::annealed(gpu, shape, tokens).unwrap();
        work.path = path;
        let mut out = gpu.alloc::<T>(x.len()).unwrap();
        block
            .forward_grouped(gpu, &on_gpu, tokens, &mut work, &mut out)
            .unwrap();
        let choices = choices::<T>(gpu, layer, &work, tokens);
        let mut gradients = Gradients::new(gpu, shape, tokens, ALL).unwrap();
        block
            .backward(
                gpu,
                &on_gpu,
                &dout_on_gpu,
                tokens,
                ALL,
                &mut work,
                &mut gradients,
            )
            .unwrap();
        let host = layer.backward(&values(&x), &choices, &values(&dout));
        let dx = values(&gpu.download(&gradients.x).unwrap());
        errors.add("the inputs".to_owned(), &dx, &host.x);
        errors.add(
            "the gates".to_owned(),
            &numbers(gpu, &gradients.gates),
            &host.gates,
        );
        let (adapted, adapters) = (shape.adapted, &gradients.adapters);
        for (what, n, given, host) in [
            ("expert", shape.dense, &gradients.dense, &host.dense),
            ("base", shape.groups, &gradients.bases, &host.bases),
            ("a of slot", adapted, &adapters.a, &host.a),
            ("b of slot", adapted, &adapters.b, &host.b),
        ] {
            errors.matrices(gpu, (what, tokens < FEW), n, given, host);
        }
    }
    errors.check(&format!("{path:?}, {tokens} tokens of {shape:?}"));
}

fn all_shapes<T: Number>(tokens: &[usize], path: Path) {
    let Some(gpu) = gpu() else { return };
    if path == Path::Hopper && !gpu.is_hopper() {
        eprintln!("SKIPPED: no Hopper GPU");
        return;
    }
    for (i, &(shape, without)) in SHAPES.iter().enumerate() {
        let layer = layer::<T>(i as u64, shape, without, SOFTMAX);
        for &tokens in tokens {
            check::<T>(&gpu, &layer, tokens, path, (1000 * i + tokens) as u64);
        }
    }
}

/// Those that are small enough for what is slow.
fn small() -> impl Iterator<Item = (usize, (Shape, usize))> {
    let all = SHAPES.into_iter().enumerate();
    all.filter(|(_, (shape, _))| shape.hidden < 300)
}

#[test]
fn small_gradients_with_mma() {
    all_shapes::<bf16>(&[1, 7, 150], Path::Mma);
    all_shapes::<f16>(&[33], Path::Mma);
}

#[test]
fn small_gradients_on_hopper() {
    all_shapes::<bf16>(&[1, 7, 150], Path::Hopper);
    all_shapes::<f16>(&[33], Path::Hopper);
}

#[test]
fn quick_gradients_while_replaced_experts_have_a_share() {
    let Some(gpu) = gpu() else { return };
    for (i, (shape, without)) in small() {
        let mut layer = layer::<bf16>(i as u64, shape, without, SOFTMAX);
        layer.beta = 0.3;
        check::<bf16>(&gpu, &layer, 60, Path::best(&gpu), 9);
        check::<bf16>(&gpu, &layer, 60, Path::Mma, 10);
    }
}

#[test]
fn wide_gradients_agree_with_the_reference() {
    let Some(gpu) = gpu() else { return };
    let layer = layer::<bf16>(11, shape(1024, 768, 8, 4, [4, 4], 1, 32), 0, SOFTMAX);
    check::<bf16>(&gpu, &layer, 200, Path::best(&gpu), 1);
}

/// The reference itself, in every direction of a few random ones.
#[test]
fn the_reference_agrees_with_finite_differences() {
    for (i, (shape, without)) in small() {
        let mut layer = layer::<bf16>(i as u64, shape, without, SOFTMAX);
        layer.beta = (i % 5) as f64 / 4.0;
        let mut rng = seeded(i as u64);
        let tokens = 5;
        let mut draw = |n: usize| {
            (0..n)
                .map(|_| rng.random_range(-1.0..1.0))
                .collect::<Vec<f64>>()
        };
        let (x, dout) = (draw(tokens * shape.hidden), draw(tokens * shape.hidden));
        let choices: Vec<_> = x
            .chunks(shape.hidden)
            .map(|x| layer.choose(&layer.logits(x)))
            .collect();
        let loss = |layer: &Layer, x: &[f64], choices: &[Vec<(usize, f64)>]| -> f64 {
            layer
                .forward(x, choices)
                .iter()
                .zip(&dout)
                .map(|(y, d)| y * d)
                .sum()
        };
        let gradients = layer.backward(&x, &choices, &dout);
        let step = 1e-6;
        let agree = |what: &str, gradient: &[f64], direction: &[f64], difference: f64| {
            let expected: f64 = gradient.iter().zip(direction).map(|(g, d)| g * d).sum();
            assert!(
                (difference - expected).abs() < 1e-6 * (1.0 + expected.abs()),
                "{what} of {shape:?}: {difference} by differences, {expected} by the gradient"
            );
        };
        let moved = |values: &[f64], direction: &[f64], by: f64| -> Vec<f64> {
            values
                .iter()
                .zip(direction)
                .map(|(v, d)| v + by * d)
                .collect()
        };

        let direction = draw(x.len());
        let at = |by| loss(&layer, &moved(&x, &direction, by), &choices);
        agree(
            "inputs",
            &gradients.x,
            &direction,
            (at(step) - at(-step)) / (2.0 * step),
        );

        let direction = draw(gradients.gates.len());
        let at = |by: f64| {
            let mut place = 0..;
            let mut shift = |&(p, g): &(usize, f64)| (p, g + by * direction[place.next().unwrap()]);
            let moved: Vec<Vec<_>> = choices
                .iter()
                .map(|c| c.iter().map(&mut shift).collect())
                .collect();
            loss(&layer, &x, &moved)
        };
        agree(
            "gates",
            &gradients.gates,
            &direction,
            (at(step) - at(-step)) / (2.0 * step),
        );

        type Pick = fn(&mut Layer) -> &mut Matrices;
        let picks: [(&str, Pick, &Matrices); 4] = [
            ("dense experts", |l| &mut l.dense, &gradients.dense),
            ("bases", |l| &mut l.bases, &gradients.bases),
            ("a", |l| &mut l.a, &gradients.a),
            ("b", |l| &mut l.b, &gradients.b),
        ];
        for (what, pick, gradient) in picks {
            for (i, gradient) in gradient.each().into_iter().enumerate() {
                let direction = draw(gradient.len());
                let at = |by| {
                    let mut layer = layer.clone();
                    let matrix = pick(&mut layer).each_mut()[i].as_mut_slice();
                    let moved = moved(matrix, &direction, by);
                    matrix.copy_from_slice(&moved);
                    loss(&layer, &x, &choices)
                };
                agree(
                    what,
                    gradient,
                    &direction,
                    (at(step) - at(-step)) / (2.0 * step),
                );
            }
        }
    }
}
