//! Seeded inputs and comparisons shared by the test files.

#![allow(dead_code)] // no test file uses all of them

use candle_core::{DType, Device, Tensor};
use lightmoe_kernels::Segment;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// A seeded generator.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// An f64 tensor of uniform values in `-1..1`; the shape is part of the seed.
pub fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = rng(shape.iter().fold(seed, |s, &d| s * 31 + d as u64));
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Segments of consecutive rows from (group, length) pairs.
pub fn segments(runs: &[(usize, usize)]) -> Arc<[Segment]> {
    let mut start = 0;
    runs.iter()
        .map(|&(group, len)| {
            start += len;
            Segment {
                group,
                start: start - len,
                len,
            }
        })
        .collect()
}

/// All elements as f64, in order.
pub fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// Every element within `tolerance`, absolute below one and relative above.
#[track_caller]
pub fn close(actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (a - e).abs() <= tolerance * (1.0 + e.abs()),
            "element {i}: {a} is not {e}"
        );
    }
}
