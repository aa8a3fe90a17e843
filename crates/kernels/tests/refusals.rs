//! The errors of every operation for inputs that do not fit.

#![allow(clippy::unwrap_used)] // in the helpers, too

mod common;

use candle_core::{DType, Result, Tensor};
use common::{random, segments};
use lightmoe_kernels::{
    Rope, Seen, Segment, add_rows, apply_rope, attention, causal_attention, cross_entropy,
    grouped_linear, linear, low_rank, rms_norm, spread_columns, swiglu, top_k, weighted_scatter,
};
use std::sync::Arc;

#[test]
fn low_rank_refuses_what_does_not_fit() {
    let [x, a, b] = [random(1, &[2, 3]), random(2, &[4, 3]), random(3, &[4, 5])];
    let refuse = |a: &Tensor, runs: &[(usize, usize)], starts: &[usize]| {
        let refused = low_rank(&x, [a, &b], &segments(runs), &starts.into());
        refused.unwrap_err().to_string()
    };
    for (message, word) in [
        (refuse(&a, &[(0, 2)], &[0, 3]), "do not divide 4 rows"),
        (refuse(&a, &[(0, 2)], &[0, 5, 4]), "do not divide 4 rows"),
        (refuse(&a, &[(1, 2)], &[0, 4]), "groups"),
        (refuse(&a, &[(0, 1)], &[0, 4]), "cover 1 of 2 rows"),
        (refuse(&random(2, &[4, 2]), &[(0, 2)], &[0, 4]), "[2, 3]"),
    ] {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let r = |shape: &[usize]| random(1, shape);
    let fails = |y: Result<Tensor>| assert!(y.is_err());
    let one = segments(&[(0, 4)]);
    let grouped =
        |x: &[usize], w: &[usize], s: &Arc<[Segment]>| fails(grouped_linear(&r(x), &r(w), s));
    grouped(&[4, 3], &[1, 2, 5], &one);
    grouped(&[5, 3], &[1, 2, 3], &one);
    grouped(&[4], &[1, 2, 3], &one);
    grouped(&[4, 3], &[2, 3], &one);
    grouped(&[4, 3], &[1, 2, 3], &segments(&[(1, 4)]));
    let mut gap = segments(&[(0, 2), (0, 2)]).to_vec();
    gap[1].start = 1;
    grouped(&[4, 3], &[1, 2, 3], &gap.into());
    fails(linear(&r(&[]), &r(&[2, 3])));
    fails(linear(&r(&[4, 3]), &r(&[2, 4])));
    fails(linear(&r(&[4, 3]), &r(&[3])));
    fails(swiglu(&r(&[4, 3]), &r(&[3, 4])));
    fails(rms_norm(&r(&[4, 3]), &r(&[4]), 1.0));
    fails(rms_norm(&r(&[4, 3]), &r(&[1, 3]), 1.0));
    fails(rms_norm(&r(&[]), &r(&[1]), 1.0));
    let causal = |q: &[usize], k: &[usize], v: &[usize]| {
        fails(causal_attention(&r(q), &r(k), &r(v), 1.0));
    };
    causal(&[1, 2, 2, 4], &[1, 2, 2, 4], &[1, 3, 2, 4]);
    causal(&[1, 2, 3, 4], &[1, 2, 2, 4], &[1, 2, 2, 4]);
    causal(&[1, 3, 2, 4], &[1, 2, 2, 4], &[1, 2, 2, 4]);
    causal(&[1, 2, 2, 4], &[2, 2, 2, 4], &[2, 2, 2, 4]);
    causal(&[1, 2, 2, 4], &[1, 2, 2, 5], &[1, 2, 2, 5]);
    causal(&[1, 2, 2, 4], &[1, 2, 0, 4], &[1, 2, 0, 4]);
    causal(&[2, 2, 4], &[1, 2, 2, 4], &[1, 2, 2, 4]);
    let rope = Rope::new(4, 10_000.0, 8);
    fails(apply_rope(&r(&[1, 9, 2, 4]), &rope, &[0]));
    fails(apply_rope(&r(&[1, 2, 2, 4]), &rope, &[7]));
    fails(apply_rope(&r(&[1, 2, 2, 6]), &rope, &[0]));
    fails(apply_rope(&r(&[2, 2, 4]), &rope, &[0]));
    fails(apply_rope(
        &r(&[1, 2, 2, 0]),
        &Rope::new(0, 10_000.0, 8),
        &[0],
    ));
    fails(apply_rope(&r(&[3, 2, 2, 4]), &rope, &[0, 1]));
    fails(apply_rope(&r(&[2, 2, 2, 4]), &rope, &[0, 7]));
    let (q, k) = (r(&[2, 2, 1, 4]), r(&[2, 5, 1, 4]));
    let none = &[][..];
    for (starts, lengths) in [
        (&[0][..], none),
        (&[3, 4], none),
        (&[0, 0, 0], none),
        (none, &[2]),
        (none, &[2, 3]),
        (none, &[2, 2, 2]),
    ] {
        let seen = Seen {
            window: None,
            starts: starts.into(),
            lengths: lengths.into(),
        };
        fails(attention(&q, &k, &k, 1.0, seen));
    }
    fails(cross_entropy(&r(&[2, 3]), &[0, 3]));
    fails(cross_entropy(&r(&[2, 3]), &[0]));
    fails(cross_entropy(&r(&[2]), &[0, 1]));
    let scatter = |rows: &[usize], weights: &[usize], targets: &[u32]| {
        fails(weighted_scatter(&r(rows), &r(weights), &targets.into(), 2));
    };
    scatter(&[2, 3], &[2], &[0, 2]);
    scatter(&[2, 3], &[3], &[0, 1]);
    scatter(&[2, 3], &[2], &[0]);
    scatter(&[2], &[2], &[0, 1]);
    for (x, index) in [([2, 5], [0, 2]), ([2, 4], [0, 1])] {
        let error = add_rows(&r(&[2, 5]), &r(&x), &index.into(), 1.0).unwrap_err();
        assert!(error.to_string().contains("add_rows"), "{error}");
    }
    let spread = |x: &[usize], places: &[u32], runs: &[(usize, usize)]| {
        fails(spread_columns(&r(x), &places.into(), &segments(runs), 3));
    };
    spread(&[2, 2], &[0, 3], &[(0, 2)]);
    spread(&[2, 2], &[0, 1], &[(0, 3)]);
    spread(&[2, 2], &[0, 1], &[(1, 2)]);
    spread(&[2], &[0, 1], &[(0, 2)]);
    assert!(top_k(&r(&[2, 3]), 0).is_err());
    assert!(top_k(&r(&[2, 3]), 4).is_err());
    assert!(top_k(&r(&[3]), 1).is_err());
}

#[test]
#[cfg_attr(feature = "composed", ignore = "of the fused operations alone")]
fn element_types_that_do_not_fit_are_errors() {
    let r = |shape: &[usize]| random(1, shape);
    let single = |shape: &[usize]| r(shape).to_dtype(DType::F32).unwrap();
    let half = |shape: &[usize]| r(shape).to_dtype(DType::F16).unwrap();
    assert!(linear(&r(&[2, 3]), &single(&[2, 3])).is_err());
    assert!(swiglu(&r(&[2, 3]), &single(&[2, 3])).is_err());
    assert!(rms_norm(&r(&[2, 3]), &single(&[3]), 1.0).is_err());
    let (q, k) = (r(&[1, 2, 2, 4]), single(&[1, 2, 2, 4]));
    assert!(causal_attention(&q, &k, &q, 1.0).is_err());
    let none = Seen {
        window: Some(0),
        ..Seen::default()
    };
    assert!(attention(&q, &q, &q, 1.0, none).is_err());
    assert!(causal_attention(&q, &q, &k, 1.0).is_err());
    assert!(weighted_scatter(&r(&[2, 3]), &single(&[2]), &[0, 1].into(), 2).is_err());
    assert!(linear(&half(&[2, 3]), &half(&[2, 3])).is_err());
    assert!(cross_entropy(&half(&[2, 3]), &[0, 1]).is_err());
    assert!(top_k(&half(&[2, 3]), 1).is_err());
}
