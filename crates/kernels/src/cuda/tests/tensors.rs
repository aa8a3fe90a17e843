//! Operations on candle's tensors on a GPU, as 16-bit floats, against f32 on the CPU: what they give, and all
//! gradients. The kernels' results hold NaN before they are written.

use super::numbers::seeded;
use super::{REQUIRED, distance};
use crate::composed::{AtOnce, Between};
use crate::{Segment, grouped_linear, low_rank};
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::Rng;
use std::sync::Arc;

pub(super) fn device() -> Option<Device> {
    match crate::cuda::device(0) {
        Ok(device) => Some(device),
        Err(error) => {
            assert!(std::env::var_os(REQUIRED).is_none(), "{error}");
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// The 16-bit types, and how far results may be from f32.
pub(super) const TYPES: [(DType, f64); 2] = [(DType::BF16, 1e-2), (DType::F16, 2e-3)];

/// The same seed gives the same numbers, of unit variance over the last dimension.
pub(super) fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = seeded(seed);
    let scale = (3.0 / shape[shape.len() - 1].max(1) as f32).sqrt();
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| rng.random_range(-scale..scale))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn segments(runs: &[(usize, usize)]) -> Arc<[Segment]> {
    let mut start = 0;
    let segment = |&(group, len): &(usize, usize)| {
        start += len;
        Segment {
            group,
            start: start - len,
            len,
        }
    };
    runs.iter().map(segment).collect()
}

pub(super) fn values(t: &Tensor) -> Vec<f64> {
    let flat = t.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    flat.to_vec1().unwrap()
}

pub(super) type Operation<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

/// What `op` gives of the inputs and the gradients of `Σ c · op`, `c` fixed and random.
fn run(inputs: &[Tensor], dtype: DType, op: &Operation<'_>) -> Vec<Tensor> {
    let variables: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(t).unwrap())
        .collect();
    let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let c = rounded(&random(99, y.dims()), dtype);
    let wide = y.to_dtype(DType::F32).unwrap();
    let sum = (wide * c.to_device(y.device()).unwrap()).unwrap();
    let gradients = sum.sum_all().unwrap().backward().unwrap();
    let gradient = |v: &Var| gradients.get(v).unwrap().clone();
    let all = std::iter::once(y.clone()).chain(variables.iter().map(gradient));
    all.collect()
}

/// The same numbers with as few digits as the type has.
pub(super) fn rounded(t: &Tensor, dtype: DType) -> Tensor {
    t.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap()
}

/// Holds `op` on the GPU against the CPU, its rows, the first input, of 16 bits, the others of these and, as
/// they train, of f32; twice, to the same bits.
fn check(device: &Device, inputs: &[Tensor], op: &Operation<'_>) {
    check_of(device, inputs, true, op);
}

/// The same where all inputs are of 16 bits, or the others `may_be_wide`.
pub(super) fn check_of(device: &Device, inputs: &[Tensor], may_be_wide: bool, op: &Operation<'_>) {
    for (dtype, within) in TYPES {
        let inputs: Vec<Tensor> = inputs.iter().map(|t| rounded(t, dtype)).collect();
        let expected = run(&inputs, dtype, op);
        let wide = may_be_wide.then_some(DType::F32);
        for weights in [dtype].into_iter().chain(wide) {
            let on_gpu = |(i, t): (usize, &Tensor)| {
                let dtype = if i == 0 { dtype } else { weights };
                t.to_device(device).unwrap().to_dtype(dtype).unwrap()
            };
            let inputs: Vec<Tensor> = inputs.iter().enumerate().map(on_gpu).collect();
            let given = run(&inputs, dtype, op);
            assert_eq!(given[0].dtype(), dtype);
            for (i, (given, expected)) in given.iter().zip(&expected).enumerate() {
                let what = [
                    "the result",
                    "the rows' gradient",
                    "a gradient",
                    "a gradient",
                ][i];
                let what = format!("{dtype:?} with {weights:?}: {what}");
                assert_eq!(given.dims(), expected.dims(), "{what}");
                if i > 0 {
                    assert_eq!(given.dtype(), inputs[i - 1].dtype(), "{what}");
                }
                // Groups one by one, so that none hides behind another.
                for (group, (given, expected)) in
                    parts(given).iter().zip(parts(expected)).enumerate()
                {
                    if expected.iter().all(|&v| v == 0.0) {
                        assert!(
                            given.iter().all(|&v| v == 0.0),
                            "{what}: {group} is not zero"
                        );
                    } else {
                        let distance = distance(given, &expected);
                        assert!(
                            distance < within,
                            "{what}: {group} is off by {distance:.1e}"
                        );
                    }
                }
            }
            let again = run(&inputs, dtype, op);
            let bits = |all: &[Tensor]| all.iter().map(values).collect::<Vec<_>>();
            assert!(bits(&given) == bits(&again), "two runs differ");
        }
    }
}

/// The matrices of a stack; all of what is none.
fn parts(t: &Tensor) -> Vec<Vec<f64>> {
    match t.dims() {
        [groups, ..] if t.rank() == 3 => (0..*groups).map(|i| values(&t.get(i).unwrap())).collect(),
        _ => vec![values(t)],
    }
}

/// Whether our own kernels compute `x` with such stacks.
fn at_once(x: &Tensor, stacks: &[&Tensor], segments: &[Segment], starts: &[usize]) -> bool {
    let between = match stacks.len() {
        1 => Between::Seen,
        _ => Between::Unseen,
    };
    let products = AtOnce::new(x, stacks, segments, &starts.into(), between);
    products.unwrap().is_some()
}

/// `grouped_linear` of `groups` matrices `[n, k]`, and whether it takes one launch.
fn grouped(device: &Device, runs: &[(usize, usize)], [groups, n, k]: [usize; 3], launched: bool) {
    let s = segments(runs);
    let rows = runs.iter().map(|run| run.1).sum();
    let starts: Vec<usize> = (0..=groups).map(|group| group * n).collect();
    for (dtype, _) in TYPES {
        let zeros = |shape: [usize; 2]| Tensor::zeros(&shape[..], dtype, device).unwrap();
        let (x, w) = (zeros([rows, k]), zeros([groups * n, k]));
        assert_eq!(
            at_once(&x, &[&w], &s, &starts),
            launched,
            "{runs:?}, {n} by {k}"
        );
    }
    let inputs = [random(1, &[rows, k]), random(2, &[groups, n, k])];
    check(device, &inputs, &|v| grouped_linear(&v[0], &v[1], &s));
}

#[test]
fn quick_grouped_products_of_tensors() {
    let Some(device) = device() else { return };
    // Groups without rows and with one; least sizes; one row; all rows of one group, in two segments.
    grouped(
        &device,
        &[(0, 3), (1, 0), (2, 1), (3, 130)],
        [4, 72, 40],
        true,
    );
    grouped(&device, &[(1, 2), (4, 5)], [6, 8, 8], true);
    grouped(&device, &[(2, 1)], [4, 64, 16], true);
    grouped(&device, &[(1, 100), (1, 57)], [3, 24, 136], true);
}

/// As deep as the tall tiles take, and deeper; as wide as several tiles; more groups than lanes of a warp.
#[test]
fn larger_grouped_products_of_tensors() {
    let Some(device) = device() else { return };
    let many: Vec<(usize, usize)> = (0..70).map(|g| (g, g * 7 % 40)).collect();
    grouped(&device, &many, [70, 264, 520], true);
    grouped(
        &device,
        &[(0, 150), (1, 131), (2, 120)],
        [3, 520, 264],
        true,
    );
    grouped(&device, &[(0, 700), (1, 333)], [2, 1024, 512], true);
}

#[test]
fn products_of_tensors_that_kernels_do_not_take() {
    let Some(device) = device() else { return };
    grouped(&device, &[(0, 3), (1, 5)], [2, 12, 16], false);
    grouped(&device, &[(0, 3), (1, 5)], [2, 16, 12], false);
    grouped(&device, &[(1, 3), (0, 5)], [2, 16, 16], false);
    grouped(&device, &[(512, 3)], [513, 8, 8], false);
    // As f32, which is what the CPU computes with.
    let s = segments(&[(0, 3), (1, 0), (2, 5)]);
    let inputs = [random(1, &[8, 16]), random(2, &[3, 24, 16])];
    let on_gpu = inputs.each_ref().map(|t| t.to_device(&device).unwrap());
    assert!(!at_once(&on_gpu[0], &[&on_gpu[1]], &s, &[0, 24, 48, 72]));
    let op = |v: &[Tensor]| grouped_linear(&v[0], &v[1], &s);
    let (given, expected) = (run(&on_gpu, DType::F32, &op), run(&inputs, DType::F32, &op));
    for (given, expected) in given.iter().zip(&expected) {
        assert!(distance(&values(given), &values(expected)) < 1e-4);
    }
    // Without rows.
    let none = segments(&[(0, 0)]);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::BF16, &device).unwrap();
    let y = grouped_linear(&zeros(&[0, 16]), &zeros(&[1, 8, 16]), &none).unwrap();
    assert_eq!(y.dims(), [0, 8]);
}

/// Parts of larger tensors, that begin at multiples of 16 bytes and elsewhere, and ones that are turned.
#[test]
fn products_of_parts_of_tensors() {
    let Some(device) = device() else { return };
    let s = segments(&[(0, 4), (1, 0), (2, 33)]);
    let (rows, n, k) = (37, 24, 40);
    let inputs = [random(1, &[rows + 5, k]), random(2, &[5, n, k])];
    check(&device, &inputs, &|v| {
        grouped_linear(&v[0].narrow(0, 3, rows)?, &v[1].narrow(0, 2, 3)?, &s)
    });
    let inputs = [random(1, &[rows * k + 3]), random(2, &[3 * n * k + 9])];
    check(&device, &inputs, &|v| {
        let x = v[0].narrow(0, 3, rows * k)?.reshape((rows, k))?;
        let w = v[1].narrow(0, 9, 3 * n * k)?.reshape((3, n, k))?;
        grouped_linear(&x, &w, &s)
    });
    let inputs = [random(1, &[k, rows]), random(2, &[3, k, n])];
    check(&device, &inputs, &|v| {
        grouped_linear(&v[0].t()?, &v[1].transpose(1, 2)?, &s)
    });
}

/// `low_rank` of slots of these ranks, and whether it takes a launch for each factor.
fn ranked(
    device: &Device,
    runs: &[(usize, usize)],
    ranks: &[usize],
    [n, k]: [usize; 2],
    launched: bool,
) {
    let s = segments(runs);
    let rows = runs.iter().map(|run| run.1).sum();
    let mut starts = vec![0];
    starts.extend(ranks.iter().scan(0, |end, rank| {
        *end += rank;
        Some(*end)
    }));
    let starts: Arc<[usize]> = starts.into();
    let all = starts[ranks.len()];
    for (dtype, _) in TYPES {
        let zeros = |shape: [usize; 2]| Tensor::zeros(&shape[..], dtype, device).unwrap();
        let (x, a, b) = (zeros([rows, k]), zeros([all, k]), zeros([all, n]));
        assert_eq!(
            at_once(&x, &[&a, &b], &s, &starts),
            launched,
            "{runs:?}, {ranks:?}"
        );
    }
    let inputs = [
        random(1, &[rows, k]),
        random(2, &[all, k]),
        random(3, &[all, n]),
    ];
    check(device, &inputs, &|v| {
        low_rank(&v[0], [&v[1], &v[2]], &s, &starts)
    });
}

#[test]
fn quick_adapters_of_tensors() {
    let Some(device) = device() else { return };
    let runs = [(0, 3), (1, 0), (2, 1), (3, 140)];
    ranked(&device, &runs, &[8; 4], [40, 72], true);
    ranked(&device, &runs, &[32; 4], [264, 136], true);
    ranked(&device, &[(1, 1)], &[16; 3], [64, 64], true);
    ranked(&device, &runs, &[136; 4], [24, 16], true);
    // Filled up with zeros.
    ranked(&device, &runs, &[4; 4], [40, 72], true);
    ranked(&device, &runs, &[8, 16, 0, 24], [40, 72], true);
    ranked(&device, &runs, &[5, 0, 1, 9], [40, 72], false);
    ranked(&device, &runs, &[8, 3, 1, 9], [40, 72], true);
    ranked(&device, &runs, &[8; 4], [36, 72], false);
}
