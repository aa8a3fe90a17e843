//! What a row gives has the same bits whatever is computed beside it, on processors with AVX2 and FMA: others
//! have no code of their own for a few rows, and `gemm` adds those in another order.
#![cfg(all(target_arch = "x86_64", not(feature = "composed")))]
#![allow(clippy::unwrap_used)] // in the helpers, too

mod common;

use candle_core::{DType, Tensor};
use common::{random, segments};
use lightmoe_kernels::{Seen, attention, grouped_linear, linear, low_rank};
use std::sync::Arc;

fn numbers(seed: u64, shape: &[usize]) -> Tensor {
    random(seed, shape).to_dtype(DType::F32).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    let numbers = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    numbers.into_iter().map(f32::to_bits).collect()
}

/// So many rows from 7 on, as part of all and alone.
fn check(rows: usize, f: impl Fn(&Tensor) -> Tensor, x: &Tensor) {
    let all = f(x);
    for count in (1..=20).chain([33, 64, 100, 511, 512, 513, 520]) {
        if 7 + count <= rows {
            let alone = f(&x.narrow(0, 7, count).unwrap());
            let part = all.narrow(0, 7, count).unwrap();
            assert!(
                bits(&alone) == bits(&part),
                "{count} of {rows} rows of {:?}",
                x.dims()
            );
        }
    }
}

#[test]
fn linear_layers() {
    // Ragged sizes, a single column, fewer inputs than a register has numbers.
    for (inner, columns) in [
        (64, 48),
        (256, 512),
        (300, 130),
        (1030, 1),
        (2048, 513),
        (3, 5),
        (2, 9),
        (257, 20),
        (258, 40),
        (514, 33),
        (1, 20),
        (33, 7),
    ] {
        let w = numbers(1, &[columns, inner]);
        check(
            1000,
            |x| linear(x, &w).unwrap(),
            &numbers(2, &[1000, inner]),
        );
    }
}

#[test]
fn adapters() {
    for (inner, rank, columns) in [
        (64, 3, 48),
        (128, 40, 32),
        (40, 700, 60),
        (33, 2, 40),
        (30, 514, 60),
        (20, 512, 9),
        (70, 1, 9),
        (30, 600, 513),
        (9, 30, 1025),
    ] {
        let a = numbers(1, &[rank, inner]);
        let b = numbers(2, &[rank, columns]);
        let starts: Arc<[usize]> = Arc::new([0, rank]);
        let adapted = |x: &Tensor| {
            let segments = segments(&[(0, x.dim(0).unwrap())]);
            low_rank(x, [&a, &b], &segments, &starts).unwrap()
        };
        check(600, adapted, &numbers(3, &[600, inner]));
    }
}

#[test]
fn groups() {
    let w = numbers(1, &[3, 70, 90]);
    let x = numbers(2, &[40, 90]);
    let all = segments(&[(0, 1), (1, 30), (2, 9)]);
    let all = grouped_linear(&x, &w, &all).unwrap();
    let (middle, some) = (x.narrow(0, 4, 3).unwrap(), segments(&[(1, 3)]));
    let alone = grouped_linear(&middle, &w, &some).unwrap();
    assert_eq!(bits(&alone), bits(&all.narrow(0, 4, 3).unwrap()));
}

#[test]
fn sequences_with_padding_behind() {
    let (heads, kv_heads, dim, keys) = (4, 2, 24, 700);
    let batch = 5;
    let (q, k, v) = (
        numbers(1, &[batch, keys, heads, dim]),
        numbers(2, &[batch, keys, kv_heads, dim]),
        numbers(3, &[batch, keys, kv_heads, dim]),
    );
    let row = |x: &Tensor, row: usize, first: usize, len: usize| {
        let row = x.narrow(0, row, 1).unwrap().narrow(1, first, len).unwrap();
        row.contiguous().unwrap()
    };
    for window in [None, Some(50)] {
        // Of each row the first so many, and padding behind them.
        let lengths = [700, 1, 64, 65, 530];
        let seen = Seen {
            window,
            lengths: Arc::new(lengths),
            ..Seen::default()
        };
        let together = attention(&q, &k, &v, 0.3, seen).unwrap();
        for (number, len) in lengths.into_iter().enumerate() {
            let [q, k, v] = [&q, &k, &v].map(|x| row(x, number, 0, len));
            let seen = Seen {
                window,
                ..Seen::default()
            };
            let alone = attention(&q, &k, &v, 0.3, seen).unwrap();
            assert!(
                bits(&alone) == bits(&row(&together, number, 0, len)),
                "{len} tokens"
            );
            let padding = row(&together, number, len, keys - len);
            assert!(bits(&padding).iter().all(|bits| *bits == 0));
        }
    }
}
