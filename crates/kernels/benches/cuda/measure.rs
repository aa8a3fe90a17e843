//! Measures every case and writes `bench.json`; for others, what they need to compute the same, in `inputs`.

use super::shapes::{
    Batch, GROUPS, Least, MODELS, Model, OTHERS, RANK, REPLACED, Skew, TOKENS, write_case,
};
use cudarc::cublas::{CudaBlas, Gemm, GemmConfig, sys::cublasOperation_t as Operation};
use cudarc::driver::{CudaEvent, CudaSlice, sys::CUevent_flags};
use half::bf16;
use lightmoe_kernels::cuda::{
    Adapted, Block, Choice, CudaError, Gpu, Gradients, Graph, Held, Projections, Scores, Shape,
    Stage, Trained, Weights, Workspace,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::error::Error;
use std::fs;
use std::path::Path;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Bytes of the copy whose rate is the measure of rates.
const COPIED: usize = 2 << 30;
/// Side of the dense product whose rate is the measure of rates.
const SIDE: usize = 8192;
/// Microseconds that one measurement may take.
const BUDGET: f64 = 40_000.0;
/// Tokens from which the time of each stage is taken.
const STAGED_FROM: usize = 1024;

pub fn run(folder: &Path) -> Outcome<()> {
    let gpu = Gpu::new(0)?;
    let bench = Bench::new(&gpu)?;
    let inputs = folder.join("inputs");
    fs::create_dir_all(&inputs)?;
    let noise = gpu.download(&bench.noise)?;
    let noise: Vec<u8> = noise.iter().flat_map(|v| v.to_le_bytes()).collect();
    fs::write(inputs.join("noise.bin"), noise)?;
    let (copy, dense) = (bench.copy_rate()?, bench.dense_rate()?);
    eprintln!(
        "{}: copy {:.2} TB/s, dense product {:.0} TFLOP/s",
        gpu.name()?,
        copy / 1e12,
        dense / 1e12
    );
    let (mut cases, mut others) = (Vec::new(), Vec::new());
    for model in MODELS {
        for replaced in REPLACED {
            let shape = shape(&model, replaced);
            let block = bench.block(shape)?;
            for tokens in TOKENS {
                for skew in Skew::ALL {
                    let batches = batches(&model, tokens, skew);
                    let mut case = bench.case(&block, (&model, tokens), &batches)?;
                    for (key, value) in [
                        ("model", json!(model.name)),
                        ("tokens", json!(tokens)),
                        ("routing", json!(skew.name())),
                        ("replaced", json!(replaced)),
                    ] {
                        case[key] = value;
                    }
                    if replaced == 0 && skew == Skew::Uniform && OTHERS.contains(&tokens) {
                        case["cublas_us"] = json!(bench.cublas(&shape, tokens, &batches[0])?);
                        let out = bench.once(&block, &batches[0].x, tokens)?;
                        others.push(write_case(&inputs, &model, &batches[0], &out)?);
                    }
                    cases.push(case);
                }
            }
            eprintln!("{} {replaced}%", model.name);
        }
    }
    let all = json!({
        "gpu": gpu.name()?,
        "driver": gpu.driver(),
        "copy_bytes_per_second": copy,
        "dense_operations_per_second": dense,
        "rank": RANK,
        "cases": cases,
    });
    fs::write(
        folder.join("bench.json"),
        serde_json::to_string_pretty(&all)?,
    )?;
    fs::write(
        inputs.join("cases.json"),
        serde_json::to_string_pretty(&others)?,
    )?;
    Ok(())
}

pub fn once(case: &[&str]) -> Outcome<()> {
    let [model, tokens, replaced] = case else {
        return Err("a model, a number of tokens, and a percentage".into());
    };
    let model = MODELS
        .iter()
        .find(|m| m.name == *model)
        .ok_or("no such model")?;
    let tokens: usize = tokens.parse()?;
    let gpu = Gpu::new(0)?;
    let bench = Bench::new(&gpu)?;
    let block = bench.block(shape(model, replaced.parse()?))?;
    bench.once(
        &block,
        &Batch::new(model, tokens, Skew::Uniform, 0).x,
        tokens,
    )?;
    Ok(())
}

/// A layer with so many percent of the experts replaced.
fn shape(model: &Model, replaced: usize) -> Shape {
    let adapted = model.adapted(replaced);
    Shape {
        hidden: model.hidden,
        inner: model.inner,
        experts: model.experts,
        top_k: model.top_k,
        dense: model.experts - adapted,
        adapted,
        kept: 0,
        groups: if adapted > 0 { GROUPS } else { 0 },
        rank: RANK,
        ranked: None,
    }
}

/// So many that their experts do not stay in the cache from one to the next.
fn batches(model: &Model, tokens: usize, skew: Skew) -> Vec<Batch> {
    let count = match tokens {
        1 => 16,
        2..32 => 4,
        _ => 2,
    };
    (0..count)
        .map(|seed| Batch::new(model, tokens, skew, seed))
        .collect()
}

struct Bench<'a> {
    gpu: &'a Gpu,
    /// Random numbers that matrices are filled with, again and again.
    noise: CudaSlice<bf16>,
    blas: CudaBlas,
}

impl<'a> Bench<'a> {
    fn new(gpu: &'a Gpu) -> Outcome<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let noise: Vec<bf16> = (0..1 << 24)
            .map(|_| bf16::from_f32(rng.random_range(-0.05..0.05)))
            .collect();
        Ok(Self {
            gpu,
            noise: gpu.upload(&noise)?,
            blas: CudaBlas::new(gpu.stream().clone())?,
        })
    }

    fn random(&self, n: usize) -> Outcome<CudaSlice<bf16>> {
        let mut values = self.gpu.alloc::<bf16>(n)?;
        let mut start = 0;
        while start < n {
            let part = self.noise.len().min(n - start);
            let mut to = values.slice_mut(start..start + part);
            self.gpu
                .stream()
                .memcpy_dtod(&self.noise.slice(0..part), &mut to)?;
            start += part;
        }
        Ok(values)
    }

    fn projections(&self, n: usize, gate: usize, down: usize) -> Outcome<Projections<Held<bf16>>> {
        Ok(Projections {
            gate: self.random(n * gate)?.into(),
            up: self.random(n * gate)?.into(),
            down: self.random(n * down)?.into(),
        })
    }

    fn block(&self, shape: Shape) -> Outcome<Block<bf16>> {
        let Shape {
            hidden: h,
            inner: f,
            rank: r,
            experts,
            adapted,
            ..
        } = shape;
        let mut router = vec![bf16::ZERO; experts * h];
        (0..experts).for_each(|e| router[e * h + e] = bf16::ONE);
        let weights = Weights {
            router: self.gpu.upload(&router)?.into(),
            dense: self.projections(shape.dense, f * h, h * f)?,
            kept: self.projections(shape.kept, f * h, h * f)?,
            bases: self.projections(shape.groups, f * h, h * f)?,
            adapters: Adapted {
                a: self.projections(adapted, r * h, r * f)?,
                b: self.projections(adapted, f * r, h * r)?,
            },
            originals: None,
        };
        let choice = Choice {
            sigmoid: false,
            groups: None,
            renormalize: false,
            scaling: 1.0,
        };
        let position: Vec<_> = (0..experts).map(Some).collect();
        let scores = Scores::new(self.gpu, choice, &position, None)?;
        let groups: Vec<_> = (0..adapted)
            .map(|i| Some(i * shape.groups / adapted))
            .collect();
        Ok(Block::new(self.gpu, shape, weights, scores, &groups)?)
    }

    /// What a layer makes of `x: [tokens, hidden]`.
    fn once(&self, block: &Block<bf16>, x: &[bf16], tokens: usize) -> Outcome<Vec<f32>> {
        let x = self.gpu.upload(x)?;
        let mut work = Workspace::new(self.gpu, *block.shape(), tokens)?;
        let mut out = self.gpu.alloc(x.len())?;
        block.forward(self.gpu, &x, tokens, &mut work, &mut out)?;
        let out = self.gpu.download(&out)?;
        Ok(out.into_iter().map(bf16::to_f32).collect())
    }

    fn case(
        &self,
        block: &Block<bf16>,
        (model, tokens): (&Model, usize),
        batches: &[Batch],
    ) -> Outcome<Value> {
        let shape = *block.shape();
        let inputs: Vec<_> = batches
            .iter()
            .map(|b| self.gpu.upload(&b.x))
            .collect::<Result<_, _>>()?;
        let mut work = Workspace::new(self.gpu, shape, tokens)?;
        let mut out = self.gpu.alloc(tokens * shape.hidden)?;
        // Compiles and loads what is not yet.
        block.forward(self.gpu, &inputs[0], tokens, &mut work, &mut out)?;
        self.gpu.synchronize()?;
        let graph = self.gpu.capture(|| {
            inputs
                .iter()
                .try_for_each(|x| block.forward(self.gpu, x, tokens, &mut work, &mut out))
        })?;
        let micros = self.graph_time(&graph)? / batches.len() as f64;
        drop(graph);
        let least = batches.iter();
        let least: Vec<Least> = least.map(|b| Least::new(model, shape.adapted, b)).collect();
        let mean = |f: fn(&Least) -> f64| least.iter().map(f).sum::<f64>() / least.len() as f64;
        let mut case = json!({
            "us": micros,
            "bytes": size_of::<bf16>() as f64 * mean(|l| l.numbers),
            "operations": mean(|l| l.operations),
        });
        if tokens >= STAGED_FROM && shape.adapted > 0 {
            case["backward_us"] =
                json!(self.backward(block, &inputs[inputs.len() - 1], tokens, &mut work)?);
        }
        if tokens >= STAGED_FROM {
            case["stages"] = self.stages(block, &inputs[0], tokens, &mut work, &mut out)?;
        }
        Ok(case)
    }

    /// Median microseconds of one replay.
    fn graph_time(&self, graph: &Graph<'_>) -> Outcome<f64> {
        // SAFETY: the graph holds on to all that it uses, and nothing else was queued meanwhile.
        let replay = || Ok(unsafe { graph.launch() }?);
        let once = self.time(1, &replay)?;
        let times = (BUDGET / once.max(1.0)).clamp(3.0, 50.0) as usize;
        let mut all = (0..times)
            .map(|_| self.time(1, &replay))
            .collect::<Outcome<Vec<f64>>>()?;
        Ok(median(&mut all))
    }

    /// Microseconds of `work` between two events, divided by `times`.
    fn time(&self, times: usize, work: &dyn Fn() -> Outcome<()>) -> Outcome<f64> {
        let start = self.event()?;
        for _ in 0..times {
            work()?;
        }
        let end = self.event()?;
        Ok(f64::from(start.elapsed_ms(&end)?) * 1e3 / times as f64)
    }

    fn event(&self) -> Outcome<CudaEvent> {
        Ok(self
            .gpu
            .stream()
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
    }

    /// Median microseconds of a backward pass that trains adapters and bases.
    fn backward(
        &self,
        block: &Block<bf16>,
        x: &CudaSlice<bf16>,
        tokens: usize,
        work: &mut Workspace<bf16>,
    ) -> Outcome<f64> {
        let trained = Trained {
            dense: false,
            bases: true,
            adapters: true,
        };
        let dout = self.random(x.len())?;
        let mut gradients = Gradients::new(self.gpu, *block.shape(), tokens, trained)?;
        let mut all = Vec::new();
        for _ in 0..5 {
            let start = self.event()?;
            block.backward(self.gpu, x, &dout, tokens, trained, work, &mut gradients)?;
            all.push(f64::from(start.elapsed_ms(&self.event()?)?) * 1e3);
        }
        Ok(median(&mut all))
    }

    /// Median microseconds of each stage.
    fn stages(
        &self,
        block: &Block<bf16>,
        x: &CudaSlice<bf16>,
        tokens: usize,
        work: &mut Workspace<bf16>,
        out: &mut CudaSlice<bf16>,
    ) -> Outcome<Value> {
        const NAMES: [(Stage, &str); 5] = [
            (Stage::Route, "route"),
            (Stage::Dense, "dense"),
            (Stage::Bases, "bases"),
            (Stage::Adapters, "adapters"),
            (Stage::Combine, "combine"),
        ];
        let mut all: Vec<Vec<f64>> = vec![Vec::new(); NAMES.len()];
        for _ in 0..7 {
            let mut marks = Vec::new();
            let before = self.event()?;
            let mut mark = |stage| {
                marks.push((stage, self.event().map_err(|e| e.to_string())));
                Ok(())
            };
            block.forward_observed(self.gpu, x, tokens, work, out, &mut mark)?;
            let mut sums = [0.0; NAMES.len()];
            let mut last = before;
            for (stage, event) in marks {
                let event = event?;
                let place = NAMES
                    .iter()
                    .position(|(s, _)| *s == stage)
                    .unwrap_or_default();
                sums[place] += f64::from(last.elapsed_ms(&event)?) * 1e3;
                last = event;
            }
            all.iter_mut()
                .zip(sums)
                .for_each(|(all, sum)| all.push(sum));
        }
        let pairs = NAMES
            .iter()
            .zip(&mut all)
            .map(|((_, name), all)| ((*name).to_owned(), json!(median(all))));
        Ok(Value::Object(pairs.collect()))
    }

    /// Bytes read and written in a second.
    fn copy_rate(&self) -> Outcome<f64> {
        let from = self.random(COPIED / 2)?;
        let to = std::cell::RefCell::new(self.gpu.alloc::<bf16>(COPIED / 2)?);
        let copy = || {
            Ok(self
                .gpu
                .stream()
                .memcpy_dtod(&from, &mut *to.borrow_mut())?)
        };
        let mut all = (0..10)
            .map(|_| self.time(1, &copy))
            .collect::<Outcome<Vec<f64>>>()?;
        Ok(2.0 * COPIED as f64 / median(&mut all) * 1e6)
    }

    /// Operations in a second.
    fn dense_rate(&self) -> Outcome<f64> {
        let (a, b) = (self.random(SIDE * SIDE)?, self.random(SIDE * SIDE)?);
        let c = std::cell::RefCell::new(self.gpu.alloc::<bf16>(SIDE * SIDE)?);
        let product = || self.gemm(&a, 0, &b, 0, &mut c.borrow_mut(), 0, [SIDE; 3]);
        self.time(3, &product)?;
        let mut all = (0..10)
            .map(|_| self.time(1, &product))
            .collect::<Outcome<Vec<f64>>>()?;
        Ok(2.0 * (SIDE as f64).powi(3) / median(&mut all) * 1e6)
    }

    /// `y = x·wᵀ` by cuBLAS, each from an offset on: `x` `[m, k]`, `w` `[n, k]`.
    #[allow(clippy::too_many_arguments)]
    fn gemm(
        &self,
        x: &CudaSlice<bf16>,
        from_x: usize,
        w: &CudaSlice<bf16>,
        from_w: usize,
        y: &mut CudaSlice<bf16>,
        from_y: usize,
        [m, n, k]: [usize; 3],
    ) -> Outcome<()> {
        let config = GemmConfig {
            transa: Operation::CUBLAS_OP_T,
            transb: Operation::CUBLAS_OP_N,
            m: n as i32,
            n: m as i32,
            k: k as i32,
            alpha: bf16::ONE,
            lda: k as i32,
            ldb: k as i32,
            beta: bf16::ZERO,
            ldc: n as i32,
        };
        let mut y = y.slice_mut(from_y..from_y + m * n);
        let (w, x) = (
            w.slice(from_w..from_w + n * k),
            x.slice(from_x..from_x + m * k),
        );
        // SAFETY: the slices have the sizes of the product.
        unsafe { self.blas.gemm(config, &w, &x, &mut y)? };
        Ok(())
    }

    /// Median microseconds of the products alone, one expert after the other, in a graph: what cuBLAS needs
    /// if gather, activation and sum cost nothing and the host knows the routing.
    fn cublas(&self, shape: &Shape, tokens: usize, batch: &Batch) -> Outcome<f64> {
        let Shape {
            hidden,
            inner,
            experts,
            ..
        } = *shape;
        let rows = shape.rows(tokens);
        let x = self.random(rows * hidden)?;
        let h = self.random(rows * inner)?;
        let (up, down) = (
            self.random(experts * 2 * inner * hidden)?,
            self.random(experts * hidden * inner)?,
        );
        let mut wide = self.gpu.alloc::<bf16>(rows * 2 * inner)?;
        let mut y = self.gpu.alloc::<bf16>(rows * hidden)?;
        let mut all = || -> Outcome<()> {
            let mut row = 0;
            for (e, &n) in batch
                .counts(experts)
                .iter()
                .enumerate()
                .filter(|(_, n)| **n > 0)
            {
                let gate_up = [n, 2 * inner, hidden];
                self.gemm(
                    &x,
                    row * hidden,
                    &up,
                    e * 2 * inner * hidden,
                    &mut wide,
                    row * 2 * inner,
                    gate_up,
                )?;
                self.gemm(
                    &h,
                    row * inner,
                    &down,
                    e * hidden * inner,
                    &mut y,
                    row * hidden,
                    [n, hidden, inner],
                )?;
                row += n;
            }
            Ok(())
        };
        all()?;
        self.gpu.synchronize()?;
        let graph = self
            .gpu
            .capture(|| all().map_err(|error| CudaError::Shape(error.to_string())))?;
        self.graph_time(&graph)
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
