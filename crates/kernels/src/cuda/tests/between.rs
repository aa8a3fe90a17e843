//! What lies between products: attention, norms, rotations, activations and sums, on a GPU as 16-bit floats,
//! against f32 on the CPU.

use super::distance;
use super::tensors::{TYPES, check_of, device, random, rounded, values};
use crate::composed::kernels_for;
use crate::cuda::Attention;
use crate::{
    Rope, Seen, apply_rope, attention, cross_entropy, rms_norm, select_rows, swiglu,
    weighted_scatter,
};
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// Batch, queries, keys, heads, heads of keys, head size.
type Sizes = [usize; 6];

/// Inputs with the spread that norms give to queries and keys.
fn inputs([batch, queries, keys, heads, kv_heads, dim]: Sizes) -> [Tensor; 3] {
    let spread = (dim as f64).sqrt();
    let of = |seed, len, heads| (random(seed, &[batch, len, heads, dim]) * spread).unwrap();
    [
        of(1, queries, heads),
        of(2, keys, kv_heads),
        of(3, keys, kv_heads),
    ]
}

fn seen(window: Option<usize>, starts: &[usize], lengths: &[usize]) -> Seen {
    Seen {
        window,
        starts: starts.into(),
        lengths: lengths.into(),
    }
}

fn scale(sizes: Sizes) -> f64 {
    (sizes[5] as f64).powf(-0.5)
}

/// Whether our own kernels compute it.
fn is_taken(device: &Device, [q, k, v]: &[Tensor; 3]) -> bool {
    let put = |t: &Tensor| rounded(t, TYPES[0].0).to_dtype(TYPES[0].0).unwrap();
    let [q, k, v] = [q, k, v].map(|t| put(t).to_device(device).unwrap());
    Attention::new(&q, [&k, &v], 1.0, &Seen::default())
        .unwrap()
        .is_some()
}

/// Attention and its gradients.
fn trained(device: &Device, sizes: Sizes, seen: &Seen) {
    let inputs = inputs(sizes);
    assert!(is_taken(device, &inputs));
    check_of(device, &inputs, false, &|v| {
        attention(&v[0], &v[1], &v[2], scale(sizes), seen.clone())
    });
}

#[test]
fn quick_attention_of_tensors() {
    let Some(device) = device() else { return };
    trained(&device, [1, 70, 70, 2, 1, 64], &Seen::default());
    trained(&device, [2, 33, 97, 4, 2, 128], &Seen::default());
    trained(&device, [2, 100, 100, 2, 2, 64], &seen(Some(17), &[], &[]));
    trained(&device, [2, 65, 65, 2, 2, 128], &seen(None, &[], &[65, 40]));
    trained(&device, [1, 70, 90, 2, 2, 192], &seen(Some(33), &[], &[]));
}

#[test]
fn larger_attention_of_tensors() {
    let Some(device) = device() else { return };
    trained(&device, [2, 515, 515, 4, 2, 128], &Seen::default());
    trained(
        &device,
        [1, 1030, 1030, 2, 2, 64],
        &seen(Some(300), &[], &[]),
    );
}

#[test]
fn heads_that_kernels_do_not_take() {
    let Some(device) = device() else { return };
    let sizes = [2, 20, 20, 2, 1, 32];
    let inputs = inputs(sizes);
    assert!(!is_taken(&device, &inputs));
    check_of(&device, &inputs, false, &|v| {
        attention(&v[0], &v[1], &v[2], scale(sizes), Seen::default())
    });
}

/// Rows of a cache with room behind the keys and padding before them, one query or several.
#[test]
fn quick_attention_to_a_cache_of_tensors() {
    let Some(device) = device() else { return };
    for (sizes, seen) in [
        ([3, 1, 77, 4, 2, 64], seen(None, &[0, 5, 76], &[])),
        ([1, 1, 700, 2, 1, 128], seen(Some(40), &[], &[])),
        ([2, 1, 1, 2, 1, 128], seen(None, &[], &[1, 0])),
        ([2, 7, 90, 2, 1, 128], seen(Some(30), &[0, 80], &[7, 1])),
        ([2, 1, 90, 2, 2, 192], seen(None, &[0, 80], &[])),
    ] {
        let keys = sizes[2];
        let mut room = sizes;
        room[2] += 13;
        let inputs = inputs(room);
        let run = |of: [Tensor; 3]| {
            let [q, k, v] = of;
            let first = |t: Tensor| t.narrow(1, 0, keys).unwrap();
            let y = attention(&q, &first(k), &first(v), scale(sizes), seen.clone());
            values(&y.unwrap())
        };
        for (dtype, within) in TYPES {
            let inputs = inputs.each_ref().map(|t| rounded(t, dtype));
            let on_gpu = inputs.each_ref().map(|t| {
                let t = t.to_device(&device).unwrap();
                t.to_dtype(dtype).unwrap()
            });
            let expected = run(inputs.clone());
            let given = run(on_gpu);
            let distance = distance(&given, &expected);
            assert!(
                distance < within,
                "{dtype:?}, {sizes:?}: off by {distance:.1e}"
            );
        }
    }
}

/// Whether our own kernels work on rows of this width.
fn are_rows_taken(device: &Device, width: usize) -> bool {
    let rows = Tensor::zeros((2, width), TYPES[0].0, device).unwrap();
    kernels_for(&rows).unwrap().is_some()
}

#[test]
fn quick_sums_of_tensors() {
    let Some(device) = device() else { return };
    let targets: Arc<[u32]> = (0..75).map(|i| i * 7 % 20).collect();
    for width in [8, 72, 2056, 12] {
        assert_eq!(are_rows_taken(&device, width), width != 12);
        let rows = random(1, &[75, width]);
        check_of(&device, &[rows, random(2, &[75])], true, &|v| {
            weighted_scatter(&v[0], &v[1], &targets, 23)
        });
        check_of(&device, &[random(3, &[23, width])], false, &|v| {
            select_rows(&v[0], &targets)
        });
    }
}

#[test]
fn quick_activations_and_norms_of_tensors() {
    let Some(device) = device() else { return };
    for width in [8, 264, 2048, 12] {
        assert_eq!(are_rows_taken(&device, width), width != 12);
        let [a, b] = [1, 2].map(|seed| (random(seed, &[37, width]) * 3.0).unwrap());
        check_of(&device, &[a.clone(), b.clone()], false, &|v| {
            swiglu(&v[0], &v[1])
        });
        let weight = random(3, &[width]);
        check_of(&device, &[a], false, &|v| {
            let weight = weight.to_device(v[0].device())?.to_dtype(v[0].dtype())?;
            rms_norm(&v[0], &weight, 1e-5)
        });
    }
}

#[test]
fn quick_losses_of_tensors() {
    let Some(device) = device() else { return };
    let targets: Vec<u32> = (0..19).map(|i| i * 13 % 50).collect();
    for width in [50, 1000, 50_304] {
        let logits = (random(1, &[19, width]) * (4.0 * (width as f64).sqrt())).unwrap();
        check_of(&device, &[logits], false, &|v| {
            cross_entropy(&v[0], &targets)?.to_dtype(v[0].dtype())
        });
    }
}

#[test]
fn quick_rotations_of_tensors() {
    let Some(device) = device() else { return };
    let rope = Rope::new(64, 1e4, 100);
    let x = random(1, &[2, 9, 3, 64]);
    for offsets in [&[5][..], &[0, 80]] {
        check_of(&device, std::slice::from_ref(&x), false, &|v| {
            apply_rope(&v[0], &rope, offsets)
        });
    }
}
