//! The backward of every operation against central differences in f64.

#![allow(clippy::unwrap_used)] // in the helpers, too

mod common;

use candle_core::{Result, Tensor, Var};
use common::{random, segments, values};
use lightmoe_kernels::{
    Rope, Seen, add_rows, apply_rope, causal_attention, cross_entropy, grouped_linear, linear,
    low_rank, rms_norm, spread_columns, swiglu, weighted_scatter,
};
use std::sync::Arc;

/// Compares the gradient of `Σ c · f(inputs)`, `c` fixed and random, with central differences, for
/// every element of every input.
#[track_caller]
fn check(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    const STEP: f64 = 1e-5;
    let loss = |inputs: &[Tensor]| -> Tensor {
        let y = f(inputs).unwrap();
        let weights = random(99, y.dims());
        (y * weights).unwrap().sum_all().unwrap()
    };
    let vars: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(t).unwrap())
        .collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let grads = loss(&tracked).backward().unwrap();
    for (i, var) in vars.iter().enumerate() {
        let analytic = values(grads.get(var).expect("a gradient for every input"));
        let base = values(&inputs[i]);
        for (j, &gradient) in analytic.iter().enumerate() {
            let at = |delta: f64| {
                let mut moved = base.clone();
                moved[j] += delta;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(moved, var.shape(), var.device()).unwrap();
                loss(&inputs).to_scalar::<f64>().unwrap()
            };
            let numeric = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            assert!(
                (numeric - gradient).abs() <= 1e-7 * (1.0 + numeric.abs()),
                "input {i}, element {j}: backward says {gradient}, differences say {numeric}"
            );
        }
    }
}

/// `f` of the inputs with only those tracked that `track` names; which of them got a gradient.
fn received(inputs: &[Tensor], track: &[bool], f: impl Fn(&[Tensor]) -> Tensor) -> Vec<bool> {
    let inputs: Vec<Tensor> = inputs
        .iter()
        .zip(track)
        .map(|(t, &track)| match track {
            true => Var::from_tensor(t).unwrap().as_tensor().clone(),
            false => t.clone(),
        })
        .collect();
    let grads = f(&inputs).sum_all().unwrap().backward().unwrap();
    inputs.iter().map(|t| grads.get(t).is_some()).collect()
}

#[test]
fn grouped_linear_ragged_and_empty_groups() {
    let s = segments(&[(0, 3), (1, 0), (2, 1), (3, 4)]);
    check(&[random(1, &[8, 5]), random(2, &[4, 3, 5])], |v| {
        grouped_linear(&v[0], &v[1], &s)
    });
}

#[test]
fn grouped_linear_several_segments_of_one_group() {
    let s = segments(&[(1, 2), (0, 3), (1, 1), (0, 0), (1, 2)]);
    check(&[random(1, &[8, 3]), random(2, &[2, 4, 3])], |v| {
        grouped_linear(&v[0], &v[1], &s)
    });
}

/// Slots of several ranks, one of none, one without rows, and one met twice.
#[test]
fn low_rank_of_different_ranks() {
    let s = segments(&[(0, 2), (1, 2), (2, 0), (3, 1), (0, 3)]);
    let starts: Arc<[usize]> = Arc::new([0, 3, 3, 4, 6]);
    let inputs = [random(1, &[8, 5]), random(2, &[6, 5]), random(3, &[6, 4])];
    check(&inputs, |v| low_rank(&v[0], [&v[1], &v[2]], &s, &starts));
    let none: Arc<[usize]> = Arc::new([0, 0]);
    let inputs = [random(1, &[2, 5]), random(2, &[0, 5]), random(3, &[0, 4])];
    check(&inputs, |v| {
        low_rank(&v[0], [&v[1], &v[2]], &segments(&[(0, 2)]), &none)
    });
}

#[test]
fn grouped_linear_one_row_and_no_rows() {
    for (rows, runs) in [(1, vec![(1, 1)]), (0, vec![(0, 0)]), (0, vec![])] {
        let s = segments(&runs);
        check(&[random(1, &[rows, 3]), random(2, &[2, 4, 3])], |v| {
            grouped_linear(&v[0], &v[1], &s)
        });
    }
}

#[test]
fn grouped_linear_gradient_chunk_straddles_groups() {
    // More output columns than a gradient tile, and not a multiple of it.
    let s = segments(&[(0, 2), (1, 0), (2, 3)]);
    check(&[random(1, &[5, 2]), random(2, &[3, 70, 2])], |v| {
        grouped_linear(&v[0], &v[1], &s)
    });
}

#[test]
fn grouped_linear_strided() {
    let s = segments(&[(0, 2), (1, 3)]);
    check(&[random(1, &[4, 7]), random(2, &[2, 4, 5])], |v| {
        let x = v[0].t()?.narrow(0, 1, 5)?;
        grouped_linear(&x, &v[1].transpose(1, 2)?.narrow(1, 1, 3)?, &s)
    });
}

#[test]
fn linear_of_three_dimensions() {
    check(&[random(1, &[2, 3, 4]), random(2, &[5, 4])], |v| {
        linear(&v[0], &v[1])
    });
    check(&[random(1, &[4, 3]), random(2, &[4, 6])], |v| {
        linear(&v[0].t()?, &v[1].t()?.narrow(0, 2, 3)?)
    });
}

#[test]
fn swiglu_plain_and_strided() {
    check(&[random(1, &[3, 4]), random(2, &[3, 4])], |v| {
        swiglu(&v[0], &v[1])
    });
    check(&[random(1, &[3, 8])], |v| {
        swiglu(&v[0].narrow(1, 0, 4)?, &v[0].narrow(1, 4, 4)?)
    });
}

#[test]
fn rms_norm_over_chunks_and_strided() {
    check(&[random(1, &[67, 3]), random(2, &[3])], |v| {
        rms_norm(&v[0], &v[1], 1e-5)
    });
    check(&[random(1, &[2, 5, 3]), random(2, &[8])], |v| {
        rms_norm(&v[0].transpose(1, 2)?, &v[1].narrow(0, 2, 5)?, 1e-2)
    });
}

#[test]
fn rope_with_offset_and_strided() {
    let rope = Rope::new(4, 10_000.0, 16);
    for offsets in [&[0][..], &[7], &[9, 2]] {
        check(&[random(1, &[2, 3, 2, 4])], |v| {
            apply_rope(&v[0], &rope, offsets)
        });
    }
    check(&[random(1, &[2, 2, 3, 4])], |v| {
        apply_rope(&v[0].transpose(1, 2)?, &rope, &[2])
    });
}

/// Gradients of attention for `[batch, T, heads, D]` queries and `[batch, S, kv_heads, D]` keys.
fn attention(batch: usize, (t, s): (usize, usize), (heads, kv): (usize, usize), dim: usize) {
    let (q, k) = ([batch, t, heads, dim], [batch, s, kv, dim]);
    let inputs = [random(1, &q), random(2, &k), random(3, &k)];
    check(&inputs, |v| causal_attention(&v[0], &v[1], &v[2], 0.7));
    // Rows with padding before them, as much as leaves the queries, and behind them.
    let starts: Vec<usize> = (0..batch).map(|row| (s - t).saturating_sub(row)).collect();
    let lengths: Vec<usize> = (0..batch).map(|row| t - row % t).collect();
    for (window, starts, lengths) in [
        (Some(3), Vec::new(), Vec::new()),
        (None, starts.clone(), lengths),
        (Some(3), starts, Vec::new()),
    ] {
        let seen = Seen {
            window,
            starts: starts.into(),
            lengths: lengths.into(),
        };
        check(&inputs, |v| {
            lightmoe_kernels::attention(&v[0], &v[1], &v[2], 0.7, seen.clone())
        });
    }
}

#[test]
fn attention_grouped_query() {
    attention(2, (5, 5), (4, 2), 3);
    attention(1, (3, 3), (2, 2), 2);
    attention(1, (1, 1), (1, 1), 4);
}

#[test]
fn attention_with_a_prefix() {
    attention(2, (3, 7), (2, 1), 2);
    attention(1, (1, 6), (4, 2), 3);
}

#[test]
fn attention_over_several_strips() {
    attention(1, (67, 67), (1, 1), 2);
    attention(1, (66, 70), (2, 1), 1);
}

#[test]
fn attention_strided() {
    let shape = [1, 2, 4, 3];
    let inputs = [random(1, &shape), random(2, &shape), random(3, &shape)];
    check(&inputs, |v| {
        let [q, k, w] = [0, 1, 2].map(|i| v[i].transpose(1, 2));
        causal_attention(&q?, &k?.narrow(1, 0, 4)?, &w?, 1.0)
    });
}

#[test]
fn cross_entropy_plain_and_strided() {
    check(&[random(1, &[4, 6])], |v| {
        cross_entropy(&v[0], &[5, 0, 3, 3])
    });
    check(&[random(1, &[6, 3])], |v| {
        cross_entropy(&v[0].t()?.narrow(1, 1, 4)?, &[3, 0, 1])
    });
}

#[test]
fn weighted_scatter_plain_and_strided() {
    // Target 1 gets no row, target 2 gets three.
    let targets: Arc<[u32]> = [2, 0, 2, 3, 2].into();
    check(&[random(1, &[5, 3]), random(2, &[5])], |v| {
        weighted_scatter(&v[0], &v[1], &targets, 4)
    });
    check(&[random(1, &[3, 5]), random(2, &[5, 2])], |v| {
        weighted_scatter(&v[0].t()?, &v[1].narrow(1, 1, 1)?.squeeze(1)?, &targets, 4)
    });
    check(&[random(1, &[0, 3]), random(2, &[0])], |v| {
        weighted_scatter(&v[0], &v[1], &[].into(), 2)
    });
}

#[test]
fn add_rows_plain_and_strided() {
    // Row 1 is chosen by none, row 2 by three.
    let index: Arc<[u32]> = [2, 0, 2, 3, 2].into();
    check(&[random(1, &[5, 3]), random(2, &[4, 3])], |v| {
        add_rows(&v[0], &v[1], &index, 0.3)
    });
    check(&[random(1, &[3, 5]), random(2, &[3, 4])], |v| {
        add_rows(&v[0].t()?, &v[1].t()?, &index, 0.3)
    });
}

#[test]
fn spread_columns_plain_and_strided() {
    // Rows of group 1 between those of group 0; column 2 of five gets nothing from group 0.
    let s = segments(&[(0, 2), (1, 1), (0, 1)]);
    let places: Arc<[u32]> = [4, 0, 1, 3, 2, 0].into();
    check(&[random(1, &[4, 3])], |v| {
        spread_columns(&v[0], &places, &s, 5)
    });
    check(&[random(1, &[3, 4])], |v| {
        spread_columns(&v[0].t()?, &places, &s, 5)
    });
    check(&[random(1, &[0, 3])], |v| {
        spread_columns(&v[0], &places, &segments(&[]), 5)
    });
}

#[test]
fn one_input_used_twice_gets_the_sum() {
    check(&[random(1, &[3, 3])], |v| linear(&v[0], &v[0]));
    check(&[random(1, &[3, 4])], |v| swiglu(&v[0], &v[0]));
    check(&[random(1, &[1, 3, 1, 2])], |v| {
        causal_attention(&v[0], &v[0], &v[0], 0.5)
    });
}

#[test]
#[cfg_attr(feature = "composed", ignore = "of the fused operations alone")]
fn no_gradient_for_what_is_not_tracked() {
    let s = segments(&[(0, 2), (1, 2)]);
    let targets: Arc<[u32]> = [0, 1, 0, 1].into();
    let matrix = random(1, &[4, 3]);
    for track in [[true, false], [false, true]] {
        let weights = random(2, &[2, 5, 3]);
        let got = received(&[matrix.clone(), weights], &track, |v| {
            grouped_linear(&v[0], &v[1], &s).unwrap()
        });
        assert_eq!(got, track, "grouped_linear");
        let got = received(&[matrix.clone(), random(2, &[3])], &track, |v| {
            rms_norm(&v[0], &v[1], 1e-5).unwrap()
        });
        assert_eq!(got, track, "rms_norm");
        let got = received(&[matrix.clone(), random(2, &[4, 3])], &track, |v| {
            swiglu(&v[0], &v[1]).unwrap()
        });
        assert_eq!(got, track, "swiglu");
        let got = received(&[matrix.clone(), random(2, &[4])], &track, |v| {
            weighted_scatter(&v[0], &v[1], &targets, 2).unwrap()
        });
        assert_eq!(got, track, "weighted_scatter");
        let got = received(&[matrix.clone(), random(2, &[2, 3])], &track, |v| {
            add_rows(&v[0], &v[1], &targets, 0.3).unwrap()
        });
        assert_eq!(got, track, "add_rows");
    }
    for track in [
        [true, false, false],
        [false, true, false],
        [false, false, true],
    ] {
        let inputs = [1, 2, 3].map(|seed| random(seed, &[1, 3, 1, 2]));
        let got = received(&inputs, &track, |v| {
            causal_attention(&v[0], &v[1], &v[2], 1.0).unwrap()
        });
        assert_eq!(got, track, "causal_attention");
    }
}
