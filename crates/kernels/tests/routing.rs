//! The choice of experts and the permutation that sorts the pairs.

#![allow(clippy::unwrap_used)] // in the helpers, too

mod common;

use candle_core::{DType, Device, Tensor};
use common::{random, values};
use lightmoe_kernels::{Dispatch, top_k};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// A random choice of `k` distinct experts a token, an order of the experts, and a group for every
/// position.
#[derive(Debug, Clone)]
struct Routing {
    chosen: Vec<u32>,
    tokens: usize,
    k: usize,
    position: Vec<usize>,
    group: Vec<usize>,
}

fn routing() -> impl Strategy<Value = Routing> {
    (1usize..8, 0usize..12)
        .prop_flat_map(|(experts, tokens)| (Just(experts), Just(tokens), 1..=experts))
        .prop_flat_map(|(experts, tokens, k)| {
            let order = Just((0..experts).collect::<Vec<_>>()).prop_shuffle();
            let experts_of = Just((0..experts as u32).collect::<Vec<_>>()).prop_shuffle();
            let chosen = prop::collection::vec(experts_of, tokens);
            let steps = prop::collection::vec(any::<bool>(), experts);
            (Just((tokens, k)), order, chosen, steps)
        })
        .prop_map(|((tokens, k), position, chosen, steps)| {
            let mut last = 0;
            let group = steps
                .iter()
                .enumerate()
                .map(|(p, &step)| {
                    last += usize::from(step && p > 0);
                    last
                })
                .collect();
            Routing {
                chosen: chosen.iter().flat_map(|c| c[..k].to_vec()).collect(),
                tokens,
                k,
                position,
                group,
            }
        })
}

impl Routing {
    fn dispatch(&self) -> Dispatch {
        Dispatch::new(&self.chosen, self.k, &self.position, self.position.len())
    }
}

proptest! {
    #[test]
    fn rows_are_a_permutation_of_the_pairs(r in routing()) {
        let d = r.dispatch();
        prop_assert_eq!(d.starts.len(), r.position.len() + 1);
        prop_assert_eq!((d.starts[0], d.starts[r.position.len()]), (0, r.tokens * r.k));
        let mut back = vec![None; r.chosen.len()];
        for p in 0..r.position.len() {
            let run = d.starts[p]..d.starts[p + 1];
            prop_assert!(d.pairs[run.clone()].is_sorted(), "token order within a position");
            for row in run {
                let pair = d.pairs[row] as usize;
                prop_assert_eq!(d.tokens[row] as usize, pair / r.k);
                prop_assert_eq!(r.position[r.chosen[pair] as usize], p);
                prop_assert!(back[pair].replace(row).is_none(), "each pair once");
            }
        }
        prop_assert!(back.iter().all(Option::is_some), "every pair");
    }

    #[test]
    fn segments_cover_the_rows(r in routing(), a in 0usize..9, b in 0usize..9) {
        let d = r.dispatch();
        let (a, b) = (a.min(r.position.len()), b.min(r.position.len()));
        let (first, last) = (a.min(b), a.max(b));
        let segments = d.segments(first, last);
        prop_assert_eq!(segments.len(), last - first);
        let mut next = 0;
        for (i, s) in segments.iter().enumerate() {
            prop_assert_eq!((s.group, s.start), (i, next));
            next += s.len;
        }
        prop_assert_eq!(next, d.starts[last] - d.starts[first]);
    }

    #[test]
    fn token_groups_hold_each_pair_once(r in routing(), a in 0usize..8, b in 0usize..9) {
        let d = r.dispatch();
        let (a, b) = (a.min(r.position.len() - 1), b.min(r.position.len()));
        let (first, last) = (a.min(b), a.max(b));
        // Groups of a range are numbered from its first.
        let base = r.group[first];
        let group: Vec<usize> = r.group[first..last].iter().map(|g| g - base).collect();
        let t = d.token_groups(first, last, &group);
        let mut expected = BTreeMap::new();
        for p in first..last {
            for row in d.starts[p]..d.starts[p + 1] {
                *expected.entry((group[p - first], d.tokens[row])).or_insert(0) += 1;
            }
        }
        let mut next = 0;
        let mut listed = Vec::new();
        for (g, s) in t.segments.iter().enumerate() {
            prop_assert_eq!((s.group, s.start), (g, next));
            next += s.len;
            listed.extend(t.tokens[s.start..next].iter().map(|&token| (g, token)));
        }
        prop_assert_eq!((next, t.segments.len()), (t.tokens.len(), group.last().map_or(0, |g| g + 1)));
        let mut sorted = listed.clone();
        sorted.sort_unstable();
        prop_assert_eq!(sorted, expected.into_keys().collect::<Vec<_>>());
        prop_assert_eq!(t.pair_of_row.len(), d.starts[last] - d.starts[first]);
        for p in first..last {
            for row in d.starts[p]..d.starts[p + 1] {
                let pair = t.pair_of_row[row - d.starts[first]] as usize;
                prop_assert_eq!(listed[pair], (group[p - first], d.tokens[row]));
            }
        }
    }

    #[test]
    fn top_k_is_the_head_of_a_stable_sort(
        (experts, k, rows) in (1usize..40).prop_flat_map(|experts| (
            Just(experts),
            1..=experts,
            // Few distinct values make ties; NaN and infinities must not panic.
            prop::collection::vec(prop::sample::select(vec![
                -1.0f32, -0.0, 0.0, 0.5, 0.25, 2.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY,
            ]), experts * 3),
        )),
    ) {
        let scores = Tensor::from_slice(&rows, (3, experts), &Device::Cpu).unwrap();
        let chosen = top_k(&scores, k).unwrap();
        for (row, chosen) in rows.chunks(experts).zip(chosen.chunks(k)) {
            let mut order: Vec<u32> = (0..experts as u32).collect();
            // NaN comes last; a stable sort leaves ties in index order.
            order.sort_by(|&a, &b| {
                let (a, b) = (row[a as usize], row[b as usize]);
                a.is_nan().cmp(&b.is_nan()).then(b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal))
            });
            prop_assert_eq!(chosen, &order[..k]);
        }
    }
}

#[test]
fn top_k_of_strided_scores_in_both_types() {
    let scores = random(5, &[16, 9]);
    for dtype in [DType::F32, DType::F64] {
        let strided = scores.to_dtype(dtype).unwrap().t().unwrap();
        let rows = values(&strided);
        for (token, chosen) in top_k(&strided, 4).unwrap().chunks(4).enumerate() {
            let picked: Vec<f64> = chosen
                .iter()
                .map(|&e| rows[token * 16 + e as usize])
                .collect();
            assert!(picked.is_sorted_by(|a, b| a >= b));
            let larger = rows[token * 16..][..16]
                .iter()
                .filter(|&&v| v > picked[3])
                .count();
            assert_eq!(larger, 3);
        }
    }
}

#[test]
fn one_token_and_experts_without_rows() {
    let d = Dispatch::new(&[4, 1], 2, &[0, 1, 2, 3, 4, 5], 6);
    assert_eq!(d.starts, [0, 0, 1, 1, 1, 2, 2]);
    assert_eq!((&d.tokens[..], &d.pairs[..]), (&[0, 0][..], &[1, 0][..]));
    let lens: Vec<usize> = d.segments(0, 6).iter().map(|s| s.len).collect();
    assert_eq!(lens, [0, 1, 0, 0, 1, 0]);
    let t = d.token_groups(0, 6, &[0, 0, 1, 1, 1, 2]);
    assert_eq!(
        (&t.tokens[..], &t.pair_of_row[..]),
        (&[0, 0][..], &[0, 1][..])
    );
    assert_eq!(
        t.segments.iter().map(|s| s.len).collect::<Vec<_>>(),
        [1, 1, 0]
    );
}

#[test]
fn several_experts_may_share_a_position() {
    // Merged experts: a token that chose both has two rows in one position.
    let d = Dispatch::new(&[0, 1, 2, 0], 2, &[0, 0, 1], 2);
    assert_eq!(d.starts, [0, 3, 4]);
    assert_eq!(d.tokens[..], [0, 0, 1, 1]);
    assert_eq!(d.pairs[..], [0, 1, 3, 2]);
}
