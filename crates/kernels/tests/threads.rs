//! The same bits from thread pools of one and of two threads, forward and backward.

#![allow(clippy::unwrap_used)] // in the helpers, too

mod common;

use candle_core::{DType, Tensor, Var};
use common::{random, segments};
use lightmoe_kernels::{
    add_rows, causal_attention, cross_entropy, grouped_linear, linear, low_rank, rms_norm,
    spread_columns, swiglu, weighted_scatter,
};
use std::sync::Arc;

/// The bits of the result and of every gradient.
fn bits(inputs: &[Tensor], f: &(impl Fn(&[Tensor]) -> Tensor + Sync), threads: usize) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    pool.install(|| {
        let vars: Vec<Tensor> = inputs
            .iter()
            .map(|t| Var::from_tensor(t).unwrap().as_tensor().clone())
            .collect();
        let y = f(&vars);
        let weights = random(9, y.dims()).to_dtype(DType::F32).unwrap();
        let grads = (&y * weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let mut all = vec![y];
        all.extend(vars.iter().map(|v| grads.get(v).unwrap().clone()));
        all.iter()
            .flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .map(f32::to_bits)
            .collect()
    })
}

#[track_caller]
fn check(shapes: &[&[usize]], f: impl Fn(&[Tensor]) -> Tensor + Sync) {
    let inputs: Vec<Tensor> = (1..)
        .zip(shapes)
        .map(|(seed, shape)| random(seed, shape).to_dtype(DType::F32).unwrap())
        .collect();
    let one = bits(&inputs, &f, 1);
    for _ in 0..3 {
        assert!(one == bits(&inputs, &f, 2));
    }
}

#[test]
fn products() {
    let s = segments(&[(0, 300), (1, 0), (2, 17), (3, 600), (2, 1)]);
    check(&[&[918, 33], &[4, 70, 33]], |v| {
        grouped_linear(&v[0], &v[1], &s).unwrap()
    });
    let starts: Arc<[usize]> = Arc::new([0, 20, 20, 22, 60]);
    check(&[&[918, 33], &[60, 33], &[60, 17]], |v| {
        low_rank(&v[0], [&v[1], &v[2]], &s, &starts).unwrap()
    });
    check(&[&[700, 65], &[130, 65]], |v| linear(&v[0], &v[1]).unwrap());
}

#[test]
fn attention() {
    let (q, k): (&[usize], &[usize]) = (&[3, 70, 4, 8], &[3, 90, 2, 8]);
    check(&[q, k, k], |v| {
        causal_attention(&v[0], &v[1], &v[2], 0.5).unwrap()
    });
}

#[test]
fn scatter() {
    let targets: Arc<[u32]> = (0..2000u32).map(|i| i * i % 97).collect();
    check(&[&[2000, 40], &[2000]], |v| {
        weighted_scatter(&v[0], &v[1], &targets, 100).unwrap()
    });
}

#[test]
fn added_rows() {
    let index: Arc<[u32]> = (0..701u32).map(|i| i * 7 % 100).collect();
    check(&[&[701, 6], &[100, 6]], |v| {
        add_rows(&v[0], &v[1], &index, 0.3).unwrap()
    });
}

#[test]
fn spread() {
    let s = segments(&[(0, 300), (1, 401)]);
    let places: Arc<[u32]> = [9, 3, 0, 1, 2, 8].into();
    check(&[&[701, 3]], |v| {
        spread_columns(&v[0], &places, &s, 10).unwrap()
    });
}

#[test]
fn elementwise_and_rows() {
    check(&[&[1000, 48], &[48]], |v| {
        rms_norm(&v[0], &v[1], 1e-5).unwrap()
    });
    check(&[&[1000, 48], &[1000, 48]], |v| {
        swiglu(&v[0], &v[1]).unwrap()
    });
    let targets: Vec<u32> = (0..500).map(|i| i * 13 % 101).collect();
    check(&[&[500, 101]], |v| cross_entropy(&v[0], &targets).unwrap());
}
