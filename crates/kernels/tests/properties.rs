//! Products and sums of rows against plain loops, for sizes that are multiples of nothing and runs of any length.

#![allow(clippy::unwrap_used)] // in the helpers, too

mod common;

use candle_core::{DType, Result, Tensor};
use common::{close, random, segments, values};
use lightmoe_kernels::{add_rows, grouped_linear, low_rank, weighted_scatter};
use proptest::prelude::*;
use std::sync::Arc;

/// Holds `op` to what it should give, in both element types.
fn hold(inputs: &[Tensor], expected: &[f64], op: impl Fn(&[Tensor]) -> Result<Tensor>) {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
        let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        close(&values(&op(&inputs).unwrap()), expected, tolerance);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Runs of rows of some of `groups` groups: without any, of one, of a few, and of more than a step takes. There is
/// a row at least.
fn runs(groups: usize) -> impl Strategy<Value = Vec<(usize, usize)>> {
    let len = prop_oneof![Just(0usize), Just(1), 2usize..20, 20usize..70];
    let run = (0..groups, len);
    let last = (0..groups, 1usize..4);
    (prop::collection::vec(run, 0..6), last).prop_map(|(mut runs, last)| {
        runs.push(last);
        runs
    })
}

/// The group of each row.
fn group_of_rows(runs: &[(usize, usize)]) -> Vec<usize> {
    let each = runs.iter().flat_map(|&(group, len)| vec![group; len]);
    each.collect()
}

/// A number of rows to choose from, and which are chosen.
fn chosen() -> impl Strategy<Value = (usize, Arc<[u32]>)> {
    (1usize..12).prop_flat_map(|count| {
        let all = prop::collection::vec(0..count as u32, 1..70);
        (Just(count), all.prop_map(Arc::from))
    })
}

proptest! {
    #[test]
    fn grouped_linear_is_a_product_of_each_row(
        (groups, runs) in (1usize..5).prop_flat_map(|groups| (Just(groups), runs(groups))),
        (n, k) in (1usize..50, 1usize..50),
        seed in 0u64..1000,
    ) {
        let of_rows = group_of_rows(&runs);
        let inputs = [random(seed, &[of_rows.len(), k]), random(seed + 1, &[groups, n, k])];
        let [x, w] = [&inputs[0], &inputs[1]].map(values);
        let expected: Vec<f64> = x
            .chunks(k)
            .zip(of_rows)
            .flat_map(|(x, group)| w.chunks(k).skip(group * n).take(n).map(move |w| dot(x, w)))
            .collect();
        let segments = segments(&runs);
        hold(&inputs, &expected, |v| grouped_linear(&v[0], &v[1], &segments));
    }

    #[test]
    fn low_rank_is_a_sum_over_the_components_of_each_row(
        (ranks, runs) in (prop::collection::vec(0usize..40, 0..4), 1usize..40).prop_flat_map(
            |(mut ranks, last)| {
                ranks.push(last);
                let slots = ranks.len();
                (Just(ranks), runs(slots))
            },
        ),
        (n, k) in (1usize..30, 1usize..30),
        seed in 0u64..1000,
    ) {
        let mut starts = vec![0];
        starts.extend(ranks.iter().scan(0, |end, rank| {
            *end += rank;
            Some(*end)
        }));
        let (of_rows, all) = (group_of_rows(&runs), starts[ranks.len()]);
        let inputs = [
            random(seed, &[of_rows.len(), k]),
            random(seed + 1, &[all, k]),
            random(seed + 2, &[all, n]),
        ];
        let [x, a, b] = [&inputs[0], &inputs[1], &inputs[2]].map(values);
        let mut expected = vec![0.0; of_rows.len() * n];
        for ((x, slot), y) in x.chunks(k).zip(of_rows).zip(expected.chunks_mut(n)) {
            for c in starts[slot]..starts[slot + 1] {
                let low = dot(x, &a[c * k..][..k]);
                y.iter_mut().zip(&b[c * n..]).for_each(|(y, b)| *y += low * b);
            }
        }
        let (segments, starts): (_, Arc<[usize]>) = (segments(&runs), starts.into());
        hold(&inputs, &expected, |v| low_rank(&v[0], [&v[1], &v[2]], &segments, &starts));
    }

    #[test]
    fn weighted_scatter_adds_each_row_to_its_target(
        (outputs, targets) in chosen(),
        width in 1usize..50,
        seed in 0u64..1000,
    ) {
        let inputs = [random(seed, &[targets.len(), width]), random(seed + 1, &[targets.len()])];
        let [rows, weights] = [&inputs[0], &inputs[1]].map(values);
        let mut expected = vec![0.0; outputs * width];
        for ((row, weight), &target) in rows.chunks(width).zip(weights).zip(targets.iter()) {
            let to = &mut expected[target as usize * width..];
            to.iter_mut().zip(row).for_each(|(y, x)| *y += weight * x);
        }
        hold(&inputs, &expected, |v| weighted_scatter(&v[0], &v[1], &targets, outputs));
    }

    #[test]
    fn add_rows_adds_a_share_of_the_chosen_row(
        (count, index) in chosen(),
        width in 1usize..50,
        share in -2.0..2.0,
        seed in 0u64..1000,
    ) {
        let inputs = [random(seed, &[index.len(), width]), random(seed + 1, &[count, width])];
        let [mut expected, x] = [&inputs[0], &inputs[1]].map(values);
        for (y, &from) in expected.chunks_mut(width).zip(index.iter()) {
            let x = &x[from as usize * width..];
            y.iter_mut().zip(x).for_each(|(y, x)| *y += share * x);
        }
        hold(&inputs, &expected, |v| add_rows(&v[0], &v[1], &index, share));
    }
}
