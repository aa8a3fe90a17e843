//! The expert products and attention, against one dense product of the same number of operations
//! and against a loop over experts. Throughput is counted in floating-point operations.

#![allow(missing_docs)] // criterion's macros write undocumented functions

use candle_core::{DType, Device, Tensor, Var};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use criterion::{measurement::WallTime, SamplingMode};
use lightmoe_kernels::{Segment, causal_attention, grouped_linear, linear, swiglu};
use std::hint::black_box;
use std::sync::Arc;

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

const SHAPES: [Shape; 3] = [
    Shape { name: "nano", experts: 32, hidden: 128, inner: 64, rows: 8192, backward: true },
    Shape { name: "olmoe", experts: 64, hidden: 2048, inner: 1024, rows: 4096, backward: true },
    Shape { name: "olmoe-decode", experts: 64, hidden: 2048, inner: 1024, rows: 8, backward: false },
];

impl Shape {
    /// Uneven runs, as a router makes them: expert `e` gets a share that grows with `e`.
    fn segments(self) -> Arc<[Segment]> {
        let share = |e: usize| self.rows * e * (e + self.experts) / (2 * self.experts * self.experts);
        (0..self.experts)
            .map(|e| Segment { group: e, start: share(e), len: share(e + 1) - share(e) })
            .collect()
    }

    fn flops(self) -> u64 {
        2 * (self.rows * self.hidden * self.inner) as u64
    }
}

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn bench(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, flops: u64, f: impl Fn() -> Tensor) {
    group.throughput(Throughput::Elements(flops));
    group.bench_function(name, |b| b.iter(|| black_box(f())));
}

/// The gradient of every variable behind `y`, for a gradient of ones.
fn backward(y: &Tensor) -> Tensor {
    let grads = y.sum_all().unwrap().backward().unwrap();
    black_box(&grads);
    y.clone()
}

fn experts(c: &mut Criterion) {
    for s in SHAPES {
        let segments = s.segments();
        let (x, w) = (random(&[s.rows, s.hidden]), random(&[s.experts, s.inner, s.hidden]));
        let dense = w.get(0).unwrap().contiguous().unwrap();
        let mut group = c.benchmark_group(s.name);
        group.sample_size(20).sampling_mode(SamplingMode::Flat);
        bench(&mut group, "grouped", s.flops(), || grouped_linear(&x, &w, &segments).unwrap());
        bench(&mut group, "loop", s.flops(), || {
            let parts: Vec<Tensor> = segments
                .iter()
                .filter(|g| g.len > 0)
                .map(|g| {
                    let w = w.get(g.group).unwrap().t().unwrap();
                    x.narrow(0, g.start, g.len).unwrap().matmul(&w).unwrap()
                })
                .collect();
            Tensor::cat(&parts, 0).unwrap()
        });
        bench(&mut group, "dense", s.flops(), || linear(&x, &dense).unwrap());
        bench(&mut group, "candle-dense", s.flops(), || x.matmul(&dense.t().unwrap()).unwrap());
        if s.backward {
            let (x, w) = (Var::from_tensor(&x).unwrap(), Var::from_tensor(&w).unwrap());
            let dense = Var::from_tensor(&dense).unwrap();
            let flops = 3 * s.flops();
            bench(&mut group, "grouped+backward", flops, || {
                backward(&grouped_linear(&x, &w, &segments).unwrap())
            });
            bench(&mut group, "dense+backward", flops, || backward(&linear(&x, &dense).unwrap()));
            bench(&mut group, "candle-dense+backward", flops, || {
                backward(&x.matmul(&dense.t().unwrap()).unwrap())
            });
        }
        group.finish();
    }
}

fn attention(c: &mut Criterion) {
    let (batch, len, heads, dim) = (16, 128, 4, 32);
    let [q, k, v] = [0; 3].map(|_| Var::from_tensor(&random(&[batch, len, heads, dim])).unwrap());
    let run = || causal_attention(&q, &k, &v, 1.0 / (dim as f64).sqrt()).unwrap();
    // Two products over the causal half of the scores; the backward recomputes one and adds four.
    let product = (batch * heads * len * (len + 1) * dim) as u64;
    let mut group = c.benchmark_group("attention");
    bench(&mut group, "forward", 2 * product, || run().detach());
    bench(&mut group, "forward+backward", 7 * product, || backward(&run()));
    group.finish();
}

fn activation(c: &mut Criterion) {
    let [gate, up] = [0; 2].map(|_| Var::from_tensor(&random(&[8192, 64])).unwrap());
    let mut group = c.benchmark_group("swiglu");
    bench(&mut group, "forward", 8192 * 64, || swiglu(&gate, &up).unwrap().detach());
    bench(&mut group, "forward+backward", 8192 * 64, || backward(&swiglu(&gate, &up).unwrap()));
    group.finish();
    debug_assert_eq!(gate.dtype(), DType::F32);
}

criterion_group!(benches, experts, attention, activation);
criterion_main!(benches);
