//! Products of rows in f32 with matrices in bf16, against the same matrices in f32.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use candle_core::{DType, Tensor, Var};
use lightmoe_kernels::{Segment, as_rows, grouped_linear, linear, low_rank, rms_norm};
use std::sync::Arc;

/// What rounding rows to bf16 may change, in the root mean square.
const WITHIN: f32 = 5e-3;

fn random(seed: u64, shape: &[usize]) -> Tensor {
    common::random(seed, shape).to_dtype(DType::F32).unwrap()
}

fn norm(t: &Tensor) -> f32 {
    let squares = t.to_dtype(DType::F32).unwrap().sqr().unwrap();
    squares
        .sum_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap()
        .sqrt()
}

#[track_caller]
fn close(ours: &Tensor, expected: &Tensor) {
    assert_eq!(ours.dims(), expected.dims());
    let ours = ours.to_dtype(DType::F32).unwrap();
    let error = norm(&(&ours - expected).unwrap());
    let whole = norm(expected);
    assert!(error <= WITHIN * whole, "{error} of {whole}");
}

/// Uneven runs, empty ones and single rows among them, and how many rows there are.
fn runs(groups: usize) -> (Arc<[Segment]>, usize) {
    let runs: Vec<_> = (0..groups).map(|g| (g, [0, 1, 40, 7, 13][g % 5])).collect();
    let rows = runs.iter().map(|&(_, len)| len).sum();
    (common::segments(&runs), rows)
}

/// What `f` makes of rows `x` and matrices in bf16, and their gradients, against the same in f32.
#[track_caller]
fn agree(x: &Tensor, matrices: &[Tensor], f: impl Fn(&Tensor, &[Tensor]) -> Tensor) {
    let narrow = |t: &Tensor| t.to_dtype(DType::BF16).unwrap();
    let wide = |t: &Tensor| narrow(t).to_dtype(DType::F32).unwrap();
    let mut dy = None;
    let mut run = |matrices: Vec<Tensor>| {
        let x = Var::from_tensor(x).unwrap();
        let vars = matrices.iter().map(|w| Var::from_tensor(w).unwrap());
        let vars: Vec<Var> = vars.collect();
        let matrices: Vec<Tensor> = vars.iter().map(|w| w.as_tensor().clone()).collect();
        let y = f(&x, &matrices);
        let dy = dy.get_or_insert_with(|| random(9, y.dims()));
        let grads = (&y * &*dy).unwrap().backward().unwrap();
        let mut all = vec![y];
        for var in [&x].into_iter().chain(&vars) {
            let grad = grads.get(var).unwrap();
            assert_eq!(grad.dtype(), var.dtype());
            all.push(grad.clone());
        }
        all
    };
    let ours = run(matrices.iter().map(narrow).collect());
    let expected = run(matrices.iter().map(wide).collect());
    for (ours, expected) in ours.iter().zip(&expected) {
        close(ours, expected);
    }
}

#[test]
fn grouped_products() {
    for (groups, n, k) in [(5, 96, 64), (7, 33, 70), (3, 600, 520)] {
        let (segments, rows) = runs(groups);
        agree(
            &random(1, &[rows, k]),
            &[random(2, &[groups, n, k])],
            |x, w| grouped_linear(x, &w[0], &segments).unwrap(),
        );
    }
}

#[test]
fn a_linear_layer() {
    for (rows, n, k) in [(1, 64, 32), (600, 20, 1100), (4, 1, 3)] {
        agree(&random(1, &[rows, k]), &[random(2, &[n, k])], |x, w| {
            linear(x, &w[0]).unwrap()
        });
    }
}

#[test]
fn adapters_of_different_ranks() {
    let (segments, rows) = runs(5);
    let starts: Arc<[usize]> = [0, 4, 12, 12, 15, 47].into();
    let (k, n) = (80, 48);
    let factors = [random(2, &[47, k]), random(3, &[47, n])];
    agree(&random(1, &[rows, k]), &factors, |x, factors| {
        low_rank(x, [&factors[0], &factors[1]], &segments, &starts).unwrap()
    });
}

#[test]
fn other_parameters_become_rows() {
    let x = random(1, &[5, 16]);
    let weight = random(2, &[16]).to_dtype(DType::BF16).unwrap();
    let wide = weight.to_dtype(DType::F32).unwrap();
    let expected = rms_norm(&x, &wide, 1e-5).unwrap();
    close(&rms_norm(&x, &weight, 1e-5).unwrap(), &expected);
    if linear(&weight.unsqueeze(0).unwrap(), &weight.unsqueeze(0).unwrap()).is_err() {
        assert_eq!(as_rows(&weight).unwrap().dtype(), DType::F32);
    }
}
