//! Measures every case.

use super::shapes::{
    Batch, GROUPS, Least, MODELS, Model, OTHERS, RANK, REPLACED, Skew, TOKENS, write_case,
};
use candle_core::{DType, Device, Tensor};
use half::bf16;
use lightmoe_kernels::linear;
use lightmoe_models::{Bank, LayerLayout, Projections, RankedAdapters, SlotLayout};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::error::Error;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Numbers of the copy whose rate is the measure of rates.
const COPIED: usize = 1 << 27;
/// Sides of the dense product whose rate is the measure of rates.
const SIDE: usize = 4096;
/// Seconds that one measurement may take, the fewest repetitions for all that, and the most.
const BUDGET: f64 = 1.0;
const LEAST: usize = 3;
const MOST: usize = 30;
/// Seconds of what is not repeated.
const TOO_LONG: f64 = 6.0;
/// Up to how many tokens candle's loop is compared with our layer, and the most that they may differ.
const COMPARED: (usize, f32) = (128, 1e-4);
/// Tokens from which one kind of routing is enough.
const LONG: usize = 4096;
/// The most tokens, and the largest expert of which as many are measured: more takes minutes.
const LONGEST: (usize, usize) = (32768, 2048 * 1024);

/// Measures these models, or all, and `peers`: a program and its script.
pub fn run(folder: &Path, models: &[&str], peers: Option<(&str, &str)>) -> Outcome<Value> {
    let known = |name: &&&str| MODELS.iter().any(|model| model.name == **name);
    if let Some(name) = models.iter().find(|name| !known(name)) {
        let names = MODELS.map(|model| model.name).join(", ");
        return Err(format!("no model `{name}`; there are {names}").into());
    }
    lightmoe_kernels::tune_process();
    fs::create_dir_all(folder)?;
    let mut results = json!({
        "copy_bytes_per_second": copy_rate(),
        "threads": rayon::current_num_threads(),
    });
    for dtype in [DType::F32, DType::BF16] {
        results["dense"][dtype.as_str()] = dense_rates(dtype)?;
    }
    let (mut cases, mut others) = (Vec::new(), Vec::new());
    let asked = |model: &Model| models.is_empty() || models.contains(&model.name);
    for model in MODELS.into_iter().filter(asked) {
        for dtype in [DType::F32, DType::BF16] {
            let layer = Layer::random(&model, dtype)?;
            for tokens in TOKENS {
                if tokens >= LONGEST.0 && model.hidden * model.inner > LONGEST.1 {
                    continue;
                }
                for skew in Skew::ALL {
                    if tokens < LONG || skew == Skew::Uniform {
                        let batches = batches(&model, tokens, skew)?;
                        let beside = dtype == DType::F32
                            && skew == Skew::Uniform
                            && OTHERS.contains(&tokens);
                        if beside {
                            others.push(layer.write(folder, &model, &batches)?);
                        }
                        let mut case = layer.case(&model, &batches, beside)?;
                        case["tokens"] = json!(tokens);
                        case["routing"] = json!(skew.name());
                        cases.push(case);
                    }
                }
            }
            eprintln!("{} {}", model.name, dtype.as_str());
        }
    }
    results["cases"] = cases.into();
    let list = folder.join("cases.json");
    fs::write(&list, serde_json::to_string_pretty(&others)?)?;
    if let Some((program, script)) = peers {
        let found = folder.join("peers.json");
        let mut command = Command::new(program);
        command.arg(script).arg(&list).arg(&found);
        if !command.status()?.success() {
            return Err(format!("{script} failed; see the messages above").into());
        }
        results["peers"] = serde_json::from_str(&fs::read_to_string(found)?)?;
    }
    let text = serde_json::to_string_pretty(&results)?;
    fs::write(folder.join("layers.json"), text)?;
    Ok(results)
}

/// What is timed with a batch.
type Work<'a, T> = dyn FnMut(&T) -> Outcome<()> + 'a;

/// Seconds of each of `kinds` of work with `batches`, in turn so that a slow while of the machine meets all alike: the
/// mean over the batches, since those of few tokens differ in how much there is to do, of the median of some
/// repetitions after one beforehand; the seconds of that alone if it takes long, before which the first kind ran
/// once more, so that none is the first.
fn times<T>(kinds: &mut [Box<Work<'_, T>>], batches: &[T]) -> Outcome<Vec<f64>> {
    kinds[0](&batches[0])?;
    let nothing = vec![vec![Vec::new(); batches.len()]; kinds.len()];
    let mut once = |all: &mut [Vec<Vec<f64>>]| -> Outcome<()> {
        for (kind, all) in kinds.iter_mut().zip(&mut *all) {
            // No batch directly behind itself, whose experts may still be in the cache.
            for (batch, all) in batches.iter().zip(all) {
                let start = Instant::now();
                kind(batch)?;
                all.push(start.elapsed().as_secs_f64());
            }
        }
        Ok(())
    };
    let mut all = nothing.clone();
    once(&mut all)?;
    let first = all.iter().flatten().flatten().sum::<f64>() / nothing.len() as f64;
    if first < TOO_LONG {
        all = nothing;
        let count = (BUDGET / first.max(1e-9)) as usize;
        for _ in 0..count.clamp(LEAST, MOST) {
            once(&mut all)?;
        }
    }
    let median = |seconds: &mut Vec<f64>| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    let mean =
        |all: &mut Vec<Vec<f64>>| all.iter_mut().map(median).sum::<f64>() / batches.len() as f64;
    Ok(all.iter_mut().map(mean).collect())
}

/// Seconds of `work`; see [`times`].
fn time(mut work: impl FnMut() -> Outcome<()>) -> Outcome<f64> {
    Ok(times(&mut [Box::new(|()| work())], &[()])?[0])
}

/// Bytes read and written a second, by all threads.
fn copy_rate() -> f64 {
    let from = vec![1f32; COPIED];
    let mut to = vec![0f32; COPIED];
    let part = COPIED / rayon::current_num_threads();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        let parts = to.par_chunks_mut(part).zip(from.par_chunks(part));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
        best = best.min(start.elapsed().as_secs_f64());
        black_box(&to);
    }
    2.0 * size_of_val(&from[..]) as f64 / best
}

/// Operations a second of our own linear layer, of candle's product, and of the faster of them.
fn dense_rates(dtype: DType) -> Outcome<Value> {
    let x = random(&[SIDE, SIDE], DType::F32, 1)?;
    let w = random(&[SIDE, SIDE], dtype, 2)?;
    let narrow = x.to_dtype(dtype)?;
    let rate = |seconds: f64| 2.0 * (SIDE as f64).powi(3) / seconds;
    let ours = rate(time(|| {
        black_box(linear(&x, &w)?);
        Ok(())
    })?);
    let candle = rate(time(|| {
        black_box(narrow.matmul(&w.t()?)?);
        Ok(())
    })?);
    Ok(json!({ "ours": ours, "candle": candle, "faster": ours.max(candle) }))
}

/// Hashed numbers of variance `1 / in`: cheap to make in the amounts needed here, and the same wherever they are made.
fn random(shape: &[usize], dtype: DType, seed: u32) -> Outcome<Tensor> {
    let size = (3.0 / shape[shape.len() - 1] as f32).sqrt() / i32::MAX as f32;
    let number = |i: usize| {
        let mixed = (i as u32 ^ seed << 20).wrapping_mul(0x9e37_79b1);
        let mixed = (mixed ^ mixed >> 15).wrapping_mul(0x85eb_ca6b);
        (mixed ^ mixed >> 13) as i32 as f32 * size
    };
    let numbers = (0..shape.iter().product::<usize>()).into_par_iter();
    Ok(match dtype {
        DType::BF16 => {
            let numbers: Vec<bf16> = numbers.map(|i| bf16::from_f32(number(i))).collect();
            Tensor::from_vec(numbers, shape, &Device::Cpu)?
        }
        _ => Tensor::from_vec(numbers.map(number).collect(), shape, &Device::Cpu)?,
    })
}

/// The original layer and the compressed ones, which share its weights.
struct Layer {
    dtype: DType,
    original: Projections,
    banks: Vec<Bank>,
}

impl Layer {
    fn random(model: &Model, dtype: DType) -> Outcome<Self> {
        let Model {
            hidden: h,
            inner: f,
            experts: e,
            ..
        } = *model;
        let stacks = |shapes: [[usize; 3]; 2], seed: u32| -> Outcome<Projections> {
            let one = |shape: [usize; 3], i: u32| {
                // Without a first dimension of one matrix for each.
                let shape: Vec<usize> = shape.into_iter().filter(|&n| n > 0).collect();
                random(&shape, dtype, seed + i)
            };
            Ok(Projections {
                gate: one(shapes[0], 0)?,
                up: one(shapes[0], 1)?,
                down: one(shapes[1], 2)?,
            })
        };
        let original = stacks([[e, f, h], [e, h, f]], 1)?;
        let bases = stacks([[GROUPS, f, h], [GROUPS, h, f]], 4)?;
        let bank = |replaced: usize| -> Outcome<Bank> {
            let adapted = model.adapted(replaced);
            let slot = |expert: usize| match expert < e - adapted {
                true => SlotLayout::Dense,
                false => SlotLayout::adapted(Some(0), RANK),
            };
            let slots: Vec<SlotLayout> = (0..e).map(slot).collect();
            let dense = original.map(|w| Ok(w.narrow(0, 0, e - adapted)?))?;
            let mut bank = Bank::of_dense(&LayerLayout::from(slots), dense);
            if adapted > 0 {
                let all = adapted * RANK;
                bank.bases = Some(bases.clone());
                bank.adapters = Some(RankedAdapters {
                    a: stacks([[all, h, 0], [all, f, 0]], 7)?,
                    b: stacks([[all, f, 0], [all, h, 0]], 10)?,
                    starts: (0..=adapted).map(|slot| slot * RANK).collect(),
                });
            }
            Ok(bank)
        };
        let banks = REPLACED.into_iter().map(bank);
        Ok(Self {
            dtype,
            banks: banks.collect::<Outcome<_>>()?,
            original,
        })
    }

    /// Writes batches and results of the original layer for others, and holds candle's loop to them.
    fn write(&self, folder: &Path, model: &Model, batches: &[Given]) -> Outcome<Value> {
        let mut cases = Vec::new();
        for (batch, x, gates) in batches {
            let out = self.banks[0].forward(x, gates, &batch.chosen)?;
            if x.dim(0)? <= COMPARED.0 {
                let theirs = candle_loop(model, &self.original, x, gates, &batch.chosen)?;
                let size = |t: &Tensor| t.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
                let distance = size(&(&out - theirs)?)? / size(&out)?;
                // Not a number fails too.
                if !(0.0..COMPARED.1).contains(&distance) {
                    return Err(format!("candle's loop differs by {distance}").into());
                }
            }
            let out: Vec<f32> = out.flatten_all()?.to_vec1()?;
            cases.push(write_case(folder, model, batch, &out)?);
        }
        Ok(cases.into())
    }

    /// Times all kinds, and candle's loop `beside` them.
    fn case(&self, model: &Model, batches: &[Given], beside: bool) -> Outcome<Value> {
        let mut case = json!({ "model": model.name, "dtype": self.dtype.as_str() });
        let mut kinds: Vec<Box<Work<'_, Given>>> = Vec::new();
        for bank in &self.banks {
            kinds.push(Box::new(|(batch, x, gates)| {
                black_box(bank.forward(x, gates, &batch.chosen)?);
                Ok(())
            }));
        }
        if beside {
            kinds.push(Box::new(|(batch, x, gates)| {
                black_box(candle_loop(model, &self.original, x, gates, &batch.chosen)?);
                Ok(())
            }));
        }
        let seconds = times(&mut kinds, batches)?;
        for (seconds, replaced) in seconds.iter().zip(REPLACED) {
            let least = batches.iter();
            let least = least.map(|(b, ..)| Least::new(model, model.adapted(replaced), b));
            let least: Vec<Least> = least.collect();
            let mean = |f: fn(&Least) -> f64| least.iter().map(f).sum::<f64>() / least.len() as f64;
            case["layers"][replaced.to_string()] = json!({
                "seconds": seconds,
                "bytes": self.dtype.size_in_bytes() as f64 * mean(|l| l.numbers),
                "operations": mean(|l| l.operations),
            });
        }
        if let Some(seconds) = seconds.get(REPLACED.len()) {
            case["candle_loop"] = json!(seconds);
        }
        Ok(case)
    }
}

/// Of how many batches: of few tokens so many that their experts do not stay in the cache from one to the next.
fn turns(tokens: usize) -> u64 {
    match tokens {
        1 => 16,
        2..=32 => 4,
        _ => 1,
    }
}

/// A batch with its rows and gates.
type Given = (Batch, Tensor, Tensor);

fn batches(model: &Model, tokens: usize, skew: Skew) -> Outcome<Vec<Given>> {
    let one = |seed: u64| -> Outcome<_> {
        let batch = Batch::new(model, tokens, skew, seed);
        let x = batch.x.iter().map(|x| x.to_f32()).collect();
        let x = Tensor::from_vec(x, (tokens, model.hidden), &Device::Cpu)?;
        let gates = Tensor::new(&batch.gates[..], &Device::Cpu)?;
        Ok((batch, x, gates))
    };
    (0..turns(tokens)).map(one).collect()
}

/// A layer as candle's own models have it: expert by expert, with index_select and index_add.
fn candle_loop(
    model: &Model,
    w: &Projections,
    x: &Tensor,
    gates: &Tensor,
    chosen: &[u32],
) -> Outcome<Tensor> {
    let mut rows = vec![(Vec::new(), Vec::new()); model.experts];
    for (pair, &expert) in chosen.iter().enumerate() {
        rows[expert as usize].0.push((pair / model.top_k) as u32);
        rows[expert as usize].1.push(pair as u32);
    }
    let mut sum = x.zeros_like()?;
    for (expert, (tokens, pairs)) in rows.into_iter().enumerate() {
        if tokens.is_empty() {
            continue;
        }
        let tokens = Tensor::new(tokens, x.device())?;
        let gates = gates.index_select(&Tensor::new(pairs, x.device())?, 0)?;
        let of = |w: &Tensor, x: &Tensor| x.matmul(&w.get(expert)?.t()?);
        let x = x.index_select(&tokens, 0)?;
        let h = (of(&w.gate, &x)?.silu()? * of(&w.up, &x)?)?;
        let y = of(&w.down, &h)?.broadcast_mul(&gates.unsqueeze(1)?)?;
        sum = sum.index_add(&tokens, &y, 0)?;
    }
    Ok(sum)
}
