//! Rows of a batch that begin at positions of their own.

#![allow(clippy::unwrap_used)] // in the helpers, too

mod common;

use candle_core::Tensor;
use common::{random, values};
use lightmoe_kernels::{Rope, Seen, apply_rope, attention};

/// A row with padding before it gives the bits of the row alone, whatever the padding is.
#[test]
#[cfg_attr(feature = "composed", ignore = "of the fused operations alone")]
fn padding_before_a_row_is_not_seen() {
    let (t, s, rope) = (3, 90, Rope::new(4, 10_000.0, 100));
    let starts = [5, 0, 87, 40];
    let tensor = |seed, len, heads| random(seed, &[4, len, heads, 4]);
    let (q, k, v) = (tensor(1, t, 4), tensor(2, s, 2), tensor(3, s, 2));
    let offsets = starts.map(|start| s - t - start);
    let rotated = apply_rope(&q, &rope, &offsets).unwrap();
    for window in [None, Some(7)] {
        let seen = Seen {
            window,
            starts: starts.into(),
            ..Seen::default()
        };
        let all = attention(&rotated, &k, &v, 0.5, seen).unwrap();
        for (row, start) in starts.into_iter().enumerate() {
            let of = |x: &Tensor| x.narrow(0, row, 1).unwrap();
            let own = |x: &Tensor| of(x).narrow(1, start, s - start).unwrap();
            let q = apply_rope(&of(&q), &rope, &[s - t - start]).unwrap();
            let seen = Seen {
                window,
                ..Seen::default()
            };
            let alone = attention(&q, &own(&k), &own(&v), 0.5, seen).unwrap();
            assert_eq!(values(&of(&all)), values(&alone), "row {row}");
        }
    }
}

/// The first positions of a longer tensor are read where they are.
#[test]
fn room_behind_the_keys_changes_nothing() {
    let long = [random(1, &[3, 20, 2, 4]), random(2, &[3, 13, 2, 4])];
    let [k, v] = long.map(|x| x.narrow(1, 0, 12).unwrap());
    for queries in [1, 12] {
        let q = random(3, &[3, queries, 4, 4]);
        let read = attention(&q, &k, &v, 0.5, Seen::default()).unwrap();
        let (k, v) = (k.contiguous().unwrap(), v.contiguous().unwrap());
        let copied = attention(&q, &k, &v, 0.5, Seen::default()).unwrap();
        assert_eq!(values(&read), values(&copied));
    }
}
