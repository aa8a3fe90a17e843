//! Every operation against a plain loop or candle's composed operations, in f64 and f32.

#![allow(clippy::unwrap_used)] // in the helpers, too

mod common;

use candle_core::{D, DType, Device, Result, Tensor};
use common::{close, random, segments, values};
use lightmoe_kernels::{
    AdamW, Moments, Rope, Seen, add_rows, apply_rope, attention, causal_attention, cross_entropy,
    grouped_linear, linear, low_rank, rms_norm, spread_columns, swiglu, top_k, weighted_scatter,
};
use std::sync::Arc;

/// Compares `op` in both element types with `reference` in f64.
#[track_caller]
fn compare(
    inputs: &[Tensor],
    op: impl Fn(&[Tensor]) -> Result<Tensor>,
    reference: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let expected = reference(inputs).unwrap();
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
        let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        let y = op(&inputs).unwrap();
        assert_eq!((y.dims(), y.dtype()), (expected.dims(), dtype));
        assert!(y.is_contiguous());
        close(&values(&y), &values(&expected), tolerance);
    }
}

/// Row by row: `w[g] · x[s]`.
fn grouped_reference(x: &Tensor, w: &Tensor, runs: &[(usize, usize)]) -> Result<Tensor> {
    let groups = runs.iter().flat_map(|&(g, len)| vec![g; len]);
    let rows: Vec<Tensor> = groups
        .enumerate()
        .map(|(s, g)| x.narrow(0, s, 1)?.matmul(&w.get(g)?.t()?))
        .collect::<Result<_>>()?;
    Tensor::cat(&rows, 0)
}

#[test]
fn grouped_linear_is_one_product_a_row() {
    // (runs, N, K): small ragged; a run over several row tiles; more columns than a column tile.
    let ragged = vec![(0, 3), (1, 0), (2, 1), (0, 2)];
    for (runs, n, k) in [
        (ragged, 5, 7),
        (vec![(1, 1), (0, 530)], 3, 9),
        (vec![(0, 2)], 1030, 2),
    ] {
        let s = segments(&runs);
        let rows = s.iter().map(|s| s.len).sum();
        compare(
            &[random(1, &[rows, k]), random(2, &[3, n, k])],
            |v| grouped_linear(&v[0], &v[1], &s),
            |v| grouped_reference(&v[0], &v[1], &runs),
        );
    }
}

/// Each slot's components as one matrix; ranks over a tile, of one, and of none.
#[test]
fn low_rank_is_the_product_of_each_slots_factors() {
    let ranks = [530usize, 0, 1, 7];
    let mut starts = vec![0];
    starts.extend(ranks.iter().scan(0, |end, rank| {
        *end += rank;
        Some(*end)
    }));
    let runs = [(0, 3), (1, 2), (2, 1), (3, 515)];
    let (s, starts): (_, Arc<[usize]>) = (segments(&runs), starts.into());
    compare(
        &[
            random(1, &[521, 9]),
            random(2, &[538, 9]),
            random(3, &[538, 6]),
        ],
        |v| low_rank(&v[0], [&v[1], &v[2]], &s, &starts),
        |v| {
            let mut rows = Vec::new();
            for s in s.iter() {
                let own = |t: &Tensor| t.narrow(0, starts[s.group], ranks[s.group]);
                let x = v[0].narrow(0, s.start, s.len)?;
                rows.push(match ranks[s.group] {
                    0 => Tensor::zeros((s.len, 6), x.dtype(), x.device())?,
                    _ => x.matmul(&own(&v[1])?.t()?)?.matmul(&own(&v[2])?)?,
                });
            }
            Tensor::cat(&rows, 0)
        },
    );
}

#[test]
fn linear_is_a_product_with_the_transposed_weight() {
    let inputs = [random(1, &[2, 3, 4]), random(2, &[5, 4])];
    compare(
        &inputs,
        |v| linear(&v[0], &v[1]),
        |v| v[0].broadcast_matmul(&v[1].t()?),
    );
}

#[test]
#[cfg_attr(feature = "composed", ignore = "of the fused operations alone")]
fn empty_dimensions_give_empty_or_zero_results() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let none = segments(&[(0, 0)]);
    let y = grouped_linear(&zeros(&[0, 3]), &zeros(&[1, 2, 3]), &none).unwrap();
    assert_eq!(y.dims(), [0, 2]);
    let y = linear(&zeros(&[2, 0]), &zeros(&[3, 0])).unwrap();
    assert_eq!(values(&y), [0.0; 6]);
    assert_eq!(
        linear(&zeros(&[2, 3]), &zeros(&[0, 3])).unwrap().dims(),
        [2, 0]
    );
    let y = weighted_scatter(&zeros(&[0, 3]), &zeros(&[0]), &[].into(), 2).unwrap();
    assert_eq!(values(&y), [0.0; 6]);
    let y = add_rows(&zeros(&[0, 3]), &zeros(&[2, 3]), &[].into(), 0.5).unwrap();
    assert_eq!(y.dims(), [0, 3]);
    let y = weighted_scatter(&zeros(&[2, 0]), &zeros(&[2]), &[0, 1].into(), 2).unwrap();
    assert_eq!(y.dims(), [2, 0]);
    assert_eq!(
        rms_norm(&zeros(&[2, 0]), &zeros(&[0]), 1.0).unwrap().dims(),
        [2, 0]
    );
    assert_eq!(cross_entropy(&zeros(&[0, 0]), &[]).unwrap().dims(), [0]);
    let (q, k) = (zeros(&[1, 0, 2, 3]), zeros(&[1, 0, 2, 3]));
    assert_eq!(causal_attention(&q, &k, &k, 1.0).unwrap().dims(), q.dims());
    assert_eq!(top_k(&zeros(&[0, 4]), 2).unwrap(), [0; 0]);
}

#[test]
fn swiglu_is_silu_times_up() {
    // Values far outside the usual range must saturate, not overflow.
    let wide = (random(1, &[9, 11]).affine(300.0, 0.0)).unwrap();
    for gate in [random(1, &[9, 11]), wide] {
        compare(
            &[gate, random(2, &[9, 11])],
            |v| swiglu(&v[0], &v[1]),
            |v| v[0].silu()? * &v[1],
        );
    }
}

#[test]
fn rms_norm_is_the_composed_form() {
    compare(
        &[random(1, &[3, 50, 24]), random(2, &[24])],
        |v| rms_norm(&v[0], &v[1], 1e-5),
        |v| {
            let mean = v[0].sqr()?.mean_keepdim(D::Minus1)?;
            v[0].broadcast_div(&(mean + 1e-5)?.sqrt()?)?
                .broadcast_mul(&v[1])
        },
    );
}

#[test]
fn rope_rotates_pairs_half_a_head_apart() {
    let (len, heads, dim, offset, theta) = (5, 2, 6, 3, 10_000f64);
    let rope = Rope::new(dim, theta, 8);
    compare(
        &[random(1, &[2, len, heads, dim])],
        |v| apply_rope(&v[0], &rope, &[offset]),
        |v| {
            let (x, half) = (values(&v[0]), dim / 2);
            let mut y = x.clone();
            for i in 0..x.len() / dim {
                let position = offset + i / heads % len;
                for j in 0..half {
                    let inv = theta.powf(-2.0 * j as f64 / dim as f64) as f32;
                    let angle = position as f32 * inv;
                    let (cos, sin) = (f64::from(angle.cos()), f64::from(angle.sin()));
                    let (a, b) = (x[i * dim + j], x[i * dim + j + half]);
                    y[i * dim + j] = a * cos - b * sin;
                    y[i * dim + j + half] = b * cos + a * sin;
                }
            }
            Tensor::from_vec(y, v[0].dims(), &Device::Cpu)
        },
    );
}

/// Attention with the whole masked score matrix; a query sees `window` keys.
fn attention_reference(v: &[Tensor], scale: f64, window: usize) -> Result<Tensor> {
    let ((_, t, heads, _), (_, s, kv, _)) = (v[0].dims4()?, v[1].dims4()?);
    let spread = |x: &Tensor| {
        let head = |h| x.narrow(2, h / (heads / kv), 1);
        let parts: Vec<Tensor> = (0..heads).map(head).collect::<Result<_>>()?;
        Tensor::cat(&parts, 2)?.transpose(1, 2)?.contiguous()
    };
    let q = v[0].transpose(1, 2)?.contiguous()?;
    let scores = (q.matmul(&spread(&v[1])?.t()?)? * scale)?;
    let mask: Vec<f64> = (0..t * s)
        .map(|i| {
            let (query, key) = (s - t + i / s, i % s);
            match key <= query && query - key < window {
                true => 0.0,
                false => f64::NEG_INFINITY,
            }
        })
        .collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (t, s), &Device::Cpu)?)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(3)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(3)?)?;
    weights
        .matmul(&spread(&v[2])?)?
        .transpose(1, 2)?
        .contiguous()
}

fn within(window: usize) -> Seen {
    Seen {
        window: Some(window),
        ..Seen::default()
    }
}

#[test]
fn attention_is_the_masked_softmax() {
    for (b, t, s, heads, kv, dim) in [
        (1, 1, 1, 1, 1, 1),
        (2, 9, 9, 4, 2, 8),
        (1, 128, 128, 2, 1, 4),
        (2, 70, 100, 2, 2, 5),
        (1, 1, 33, 4, 1, 8),
    ] {
        let (q, k) = ([b, t, heads, dim], [b, s, kv, dim]);
        let inputs = [random(1, &q), random(2, &k), random(3, &k)];
        compare(
            &inputs,
            |v| causal_attention(&v[0], &v[1], &v[2], 3.0),
            |v| attention_reference(v, 3.0, s),
        );
        for window in [1, 2, 7, 65, s + 3] {
            compare(
                &inputs,
                |v| attention(&v[0], &v[1], &v[2], 3.0, within(window)),
                |v| attention_reference(v, 3.0, window),
            );
        }
    }
}

#[test]
fn cross_entropy_is_minus_the_log_softmax() {
    let targets: Vec<u32> = (0..20).map(|i| i * 7 % 33).collect();
    // Scaled far beyond the range of `exp` in f32: the row maximum must come off first.
    let logits = random(1, &[20, 33]).affine(400.0, 0.0).unwrap();
    for logits in [random(1, &[20, 33]), logits] {
        compare(
            &[logits],
            |v| cross_entropy(&v[0], &targets),
            |v| {
                let top = v[0].max_keepdim(1)?;
                let sum = v[0].broadcast_sub(&top)?.exp()?.sum_keepdim(1)?.log()?;
                let index = Tensor::new(targets.as_slice(), &Device::Cpu)?.unsqueeze(1)?;
                ((sum + top)? - v[0].gather(&index, 1)?)?.squeeze(1)
            },
        );
    }
}

#[test]
fn weighted_scatter_is_a_sum_of_rows() {
    let targets: Arc<[u32]> = (0..40u32).map(|i| i * i % 9).collect();
    compare(
        &[random(1, &[40, 5]), random(2, &[40])],
        |v| weighted_scatter(&v[0], &v[1], &targets, 11),
        |v| {
            let index = Tensor::new(&targets[..], &Device::Cpu)?;
            let rows = v[0].broadcast_mul(&v[1].unsqueeze(1)?)?;
            Tensor::zeros((11, 5), DType::F64, &Device::Cpu)?.index_add(&index, &rows, 0)
        },
    );
}

#[test]
fn add_rows_is_a_sum_with_chosen_rows() {
    let index: Arc<[u32]> = (0..40u32).map(|i| i * i % 9).collect();
    compare(
        &[random(1, &[40, 5]), random(2, &[11, 5])],
        |v| add_rows(&v[0], &v[1], &index, 0.3),
        |v| {
            let index = Tensor::new(&index[..], &Device::Cpu)?;
            &v[0] + (v[1].index_select(&index, 0)? * 0.3)?
        },
    );
}

#[test]
fn adamw_follows_the_scalar_update() {
    let base = AdamW {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
        grad_scale: 0.5,
    };
    let parameter = random(1, &[3, 7]).to_dtype(DType::F32).unwrap();
    let (mut p, mut moments) = (values(&parameter), Moments::default());
    let (mut m, mut v) = (vec![0.0; p.len()], vec![0.0; p.len()]);
    for step in 1..=6 {
        let s = AdamW { step, ..base };
        // A strided gradient.
        let grad = random(step as u64, &[7, 3])
            .t()
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        s.update(&parameter, &grad, &mut moments).unwrap();
        for (i, g) in values(&grad).into_iter().enumerate() {
            let g = g * s.grad_scale;
            m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
            v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
            let m = m[i] / (1.0 - s.beta1.powi(step as i32));
            let v: f64 = v[i] / (1.0 - s.beta2.powi(step as i32));
            p[i] -= s.lr * (s.weight_decay * p[i] + m / (v.sqrt() + s.eps));
        }
        close(&values(&parameter), &p, 1e-6);
    }
    let bad = |s: AdamW, p: &Tensor, g: &Tensor, m: &mut Moments| s.update(p, g, m).is_err();
    let grad = parameter.zeros_like().unwrap();
    assert!(
        bad(base, &parameter, &grad.t().unwrap(), &mut moments),
        "shape"
    );
    assert!(
        bad(
            base,
            &parameter.t().unwrap(),
            &grad.t().unwrap(),
            &mut moments
        ),
        "strided"
    );
    assert!(
        bad(
            base,
            &grad.get(0).unwrap(),
            &grad.get(1).unwrap(),
            &mut moments
        ),
        "moments"
    );
    assert!(
        bad(AdamW { step: 0, ..base }, &parameter, &grad, &mut moments),
        "step 0"
    );
    let wide = parameter.to_dtype(DType::F64).unwrap();
    assert!(
        bad(base, &wide, &wide.zeros_like().unwrap(), &mut moments),
        "element type"
    );
    // What was known before an update that fails is known after it.
    let known = [vec![1.0; 21], vec![2.0; 21]];
    let [first, second] = known.clone();
    let mut moments = Moments::new(first, second);
    assert!(bad(base, &wide, &wide.zeros_like().unwrap(), &mut moments));
    assert_eq!(moments.values(21).unwrap(), known);
}

/// Spread columns are a product with ones at their places.
#[test]
fn spread_columns_are_a_product_with_ones() {
    let (runs, width) = ([(1, 3), (0, 40), (1, 1)], 6);
    let places: Arc<[u32]> = [5, 2, 0, 3].into();
    let ones = |group: usize| {
        let mut ones = vec![0f64; 2 * width];
        for i in 0..2 {
            ones[i * width + places[2 * group + i] as usize] = 1.0;
        }
        Tensor::from_vec(ones, (width, 2), &Device::Cpu).unwrap()
    };
    // `grouped_reference` wants `[G, N, K]`.
    let w = |columns: [Tensor; 2]| {
        let turned = columns.map(|t| t.reshape((2, width)).unwrap().t().unwrap());
        Tensor::stack(&turned, 0)
    };
    compare(
        &[random(1, &[44, 2])],
        |v| spread_columns(&v[0], &places, &segments(&runs), width),
        |v| grouped_reference(&v[0], &w([ones(0), ones(1)])?, &runs),
    );
}
