//! The expert products against one dense product of the same number of operations and against a
//! loop over experts, adapters of mixed ranks, then every other operation, at the size of the nano model where
//! nothing else is said.
//! Throughput is counted in floating-point operations, for row-wise operations in elements.
//!
//! A "backward" is measured with its forward, which alone is measured above it.

#![allow(clippy::unwrap_used)]
#![allow(missing_docs)] // criterion's macros write undocumented functions

use candle_core::{DType, Device, Tensor, Var};
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput, measurement::WallTime};
use criterion::{criterion_group, criterion_main};
use lightmoe_kernels::{
    AdamW, Dispatch, Moments, Rope, Segment, apply_rope, causal_attention, cross_entropy,
    grouped_linear, keep_freed_memory, linear, low_rank, rms_norm, select_rows, spread_columns,
    swiglu, top_k, weighted_scatter,
};
use std::{cell::LazyCell, hint::black_box, sync::Arc};

/// One expert layer: `experts` matrices `[inner, hidden]`, `rows` sorted (token, expert) pairs.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    experts: usize,
    hidden: usize,
    inner: usize,
    rows: usize,
    backward: bool,
}

impl Shape {
    /// Uneven runs, as a router makes them: the share of expert `e` grows with `e`.
    fn segments(self) -> Arc<[Segment]> {
        let e = self.experts;
        let start = |i: usize| self.rows * i * (i + e) / (2 * e * e);
        (0..e)
            .map(|i| Segment {
                group: i,
                start: start(i),
                len: start(i + 1) - start(i),
            })
            .collect()
    }
}

/// Hashed numbers in `-1..1`: cheap to make in the amounts needed here.
fn random(shape: &[usize]) -> Var {
    let hash = |i: u32| i.wrapping_mul(0x9e37_79b1) as i32 as f32 / i32::MAX as f32;
    let count = shape.iter().product::<usize>() as u32;
    let tensor = Tensor::from_vec((0..count).map(hash).collect(), shape, &Device::Cpu).unwrap();
    Var::from_tensor(&tensor).unwrap()
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, ops: usize, f: impl Fn() -> Tensor) {
    group.throughput(Throughput::Elements(ops as u64));
    group.bench_function(name, |b| b.iter(|| black_box(f())));
}

/// As [`bench`], with the gradient of every variable behind the result for a gradient of ones.
fn train(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, ops: usize, f: impl Fn() -> Tensor) {
    group.throughput(Throughput::Elements(ops as u64));
    group.bench_function(name, |b| b.iter(|| black_box(f().backward().unwrap())));
}

/// `[S, H] × [H, F]` one expert after the other, with candle's own operations.
fn expert_loop(x: &Tensor, w: &Tensor, segments: &[Segment]) -> Tensor {
    let parts: Vec<Tensor> = segments
        .iter()
        .filter(|s| s.len > 0)
        .map(|s| {
            let w = w.get(s.group).unwrap().t().unwrap();
            x.narrow(0, s.start, s.len).unwrap().matmul(&w).unwrap()
        })
        .collect();
    Tensor::cat(&parts, 0).unwrap()
}

fn experts(c: &mut Criterion) {
    let (nano, olmoe) = ((32, 128, 64), (64, 2048, 1024));
    let shapes = [
        ("nano", nano, 8192, true),
        ("olmoe", olmoe, 4096, true),
        // At least 64 rows of each expert.
        ("olmoe-long", olmoe, 8192, false),
        ("olmoe-decode", olmoe, 8, false),
        ("olmoe-few", olmoe, 160, false),
    ];
    for (name, (experts, hidden, inner), rows, backward) in shapes {
        let s = Shape {
            name,
            experts,
            hidden,
            inner,
            rows,
            backward,
        };
        expert_layer(c, s);
    }
}

fn expert_layer(c: &mut Criterion, s: Shape) {
    let segments = s.segments();
    // Made on first use, so that a filter on the command line spares the large ones.
    let x = LazyCell::new(|| random(&[s.rows, s.hidden]));
    let w = LazyCell::new(|| random(&[s.experts, s.inner, s.hidden]));
    let dense = LazyCell::new(|| random(&[s.inner, s.hidden]));
    let ops = 2 * s.rows * s.hidden * s.inner;
    let grouped = || grouped_linear(&x, &w, &segments).unwrap();
    let each = || expert_loop(&x, &w, &segments);
    let ours = || linear(&x, &dense).unwrap();
    let candle = || x.matmul(&dense.t().unwrap()).unwrap();
    let mut group = c.benchmark_group(s.name);
    group.sample_size(20).sampling_mode(SamplingMode::Flat);
    bench(&mut group, "grouped", ops, grouped);
    bench(&mut group, "loop", ops, each);
    bench(&mut group, "dense", ops, ours);
    bench(&mut group, "dense-candle", ops, candle);
    let narrow = |t: &Var| t.to_dtype(DType::BF16).unwrap();
    let (w16, dense16) = (
        LazyCell::new(|| narrow(&w)),
        LazyCell::new(|| narrow(&dense)),
    );
    let grouped16 = || grouped_linear(&x, &w16, &segments).unwrap();
    let dense16 = || linear(&x, &dense16).unwrap();
    bench(&mut group, "grouped-bf16", ops, grouped16);
    bench(&mut group, "dense-bf16", ops, dense16);
    if s.backward {
        train(&mut group, "grouped+backward", 3 * ops, grouped);
        train(&mut group, "dense+backward", 3 * ops, ours);
        train(&mut group, "dense-candle+backward", 3 * ops, candle);
    }
    group.finish();
}

/// Adapters of ranks that differ, as the byte-budget planner gives them, each at its own, and all filled up
/// to the widest.
fn ranks(c: &mut Criterion) {
    for (name, (experts, hidden, inner), rows) in [
        ("nano-ranks", (32, 128, 64), 8192),
        ("olmoe-ranks", (64, 2048, 1024), 4096),
        ("olmoe-ranks-decode", (64, 2048, 1024), 8),
    ] {
        let backward = rows > experts;
        let shape = Shape {
            name,
            experts,
            hidden,
            inner,
            rows,
            backward,
        };
        let segments = shape.segments();
        // From a sixty-fourth of the smaller side to five eighths of it.
        let rank = |e: usize| (inner / 64).max(1) * (1 + e * 39 / (experts - 1));
        let mut starts = vec![0];
        starts.extend((0..experts).scan(0, |end, e| {
            *end += rank(e * 37 % experts);
            Some(*end)
        }));
        let (all, widest) = (starts[experts], rank(experts - 1));
        let starts: Arc<[usize]> = starts.into();
        let x = LazyCell::new(|| random(&[rows, hidden]));
        let own = LazyCell::new(|| [random(&[all, hidden]), random(&[all, inner])]);
        let a = LazyCell::new(|| random(&[experts, widest, hidden]));
        let b = LazyCell::new(|| random(&[experts, inner, widest]));
        let of_rows = |s: &Segment| s.len * (starts[s.group + 1] - starts[s.group]);
        let ops = 2 * (hidden + inner) * segments.iter().map(of_rows).sum::<usize>();
        let ranked = || low_rank(&x, [&own[0], &own[1]], &segments, &starts).unwrap();
        let padded = || {
            let low = grouped_linear(&x, &a, &segments).unwrap();
            grouped_linear(&low, &b, &segments).unwrap()
        };
        let mut group = c.benchmark_group(name);
        group.sample_size(20).sampling_mode(SamplingMode::Flat);
        bench(&mut group, "ranked", ops, ranked);
        bench(&mut group, "padded", ops, padded);
        if backward {
            train(&mut group, "ranked+backward", 3 * ops, ranked);
            train(&mut group, "padded+backward", 3 * ops, padded);
        }
        group.finish();
    }
}

fn attention(c: &mut Criterion) {
    let (batch, len, heads, dim) = (16, 128, 4, 32);
    let [q, k, v] = [0; 3].map(|_| random(&[batch, len, heads, dim]));
    let run = || causal_attention(&q, &k, &v, 1.0 / (dim as f64).sqrt()).unwrap();
    // Two products over the causal half of the scores; the backward repeats one and adds four.
    let product = batch * heads * len * (len + 1) * dim;
    let mut group = c.benchmark_group("attention");
    bench(&mut group, "forward", 2 * product, run);
    train(&mut group, "forward+backward", 7 * product, run);
    group.finish();
}

fn rows(c: &mut Criterion) {
    let (tokens, hidden, rows, inner, vocab) = (2048, 128, 8192, 64, 1024);
    let [gate, up] = [0; 2].map(|_| random(&[rows, inner]));
    let (x, weight) = (random(&[tokens, hidden]), random(&[hidden]));
    let (y, gates) = (random(&[rows, hidden]), random(&[rows]));
    let logits = random(&[tokens, vocab]);
    let targets: Vec<u32> = (0..tokens as u32).map(|t| t * 31 % vocab as u32).collect();
    let back: Arc<[u32]> = (0..rows as u32).map(|r| r * 37 % tokens as u32).collect();
    let mut group = c.benchmark_group("rows");
    train(&mut group, "swiglu", rows * inner, || {
        swiglu(&gate, &up).unwrap()
    });
    train(&mut group, "rms_norm", tokens * hidden, || {
        rms_norm(&x, &weight, 1e-5).unwrap()
    });
    train(&mut group, "cross_entropy", tokens * vocab, || {
        cross_entropy(&logits, &targets).unwrap()
    });
    train(&mut group, "weighted_scatter", rows * hidden, || {
        weighted_scatter(&y, &gates, &back, tokens).unwrap()
    });
    train(&mut group, "select_rows", rows * hidden, || {
        select_rows(&x, &back).unwrap()
    });
    let places: Arc<[u32]> = (0..inner as u32).map(|i| 2 * i).collect();
    let whole = [Segment {
        group: 0,
        start: 0,
        len: rows,
    }];
    train(&mut group, "spread_columns", rows * hidden, || {
        spread_columns(&gate, &places, &whole, hidden).unwrap()
    });
    let heads = random(&[16, tokens / 16, 4, hidden / 4]);
    let rope = Rope::new(hidden / 4, 10_000.0, tokens);
    train(&mut group, "apply_rope", tokens * hidden, || {
        apply_rope(&heads, &rope, &[0]).unwrap()
    });
    group.finish();
}

/// The choice of experts and the order of rows, at OLMoE's numbers, and a step of the optimiser.
fn choices_and_steps(c: &mut Criterion) {
    let (tokens, experts, k) = (4096, 64, 8);
    let scores = random(&[tokens, experts]);
    let chosen = top_k(&scores, k).unwrap();
    let position: Vec<usize> = (0..experts).rev().collect();
    let mut group = c.benchmark_group("choices");
    group.throughput(Throughput::Elements((tokens * experts) as u64));
    group.bench_function("top_k", |b| {
        b.iter(|| black_box(top_k(&scores, k).unwrap()))
    });
    group.throughput(Throughput::Elements((tokens * k) as u64));
    group.bench_function("dispatch", |b| {
        b.iter(|| black_box(Dispatch::new(&chosen, k, &position, experts)))
    });
    group.finish();

    let (parameter, grad) = (random(&[1 << 20]), random(&[1 << 20]));
    let step = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        step: 1,
        grad_scale: 1.0,
    };
    let mut moments = Moments::default();
    let mut group = c.benchmark_group("optimiser");
    group.throughput(Throughput::Elements(1 << 20));
    group.bench_function("adamw", |b| {
        b.iter(|| step.update(&parameter, &grad, &mut moments).unwrap())
    });
    group.finish();
}

fn setup(_: &mut Criterion) {
    keep_freed_memory();
}

criterion_group!(
    benches,
    setup,
    experts,
    ranks,
    attention,
    rows,
    choices_and_steps
);
criterion_main!(benches);
