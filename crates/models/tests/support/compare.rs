//! Tensors held against each other.

use candle_core::{DType, Tensor};

pub fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.to_dtype(DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, which must be within `tolerance` of the largest expected value.
#[track_caller]
pub fn assert_close(ours: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(ours.dims(), expected.dims());
    let (ours, expected) = (values(ours), values(expected));
    let scale = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    assert!(scale > 1e-3, "nothing to compare: all zero");
    for (i, (a, b)) in ours.iter().zip(&expected).enumerate() {
        let error = (a - b).abs();
        // Negated, so that NaN fails.
        assert!(
            !error.is_nan() && error <= tolerance * scale,
            "element {i}: {a} is not {b}, off by {error}, largest {scale}"
        );
    }
}
