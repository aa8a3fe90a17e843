//! What a method computes beyond a pass over the weights, and what this machine makes of the same
//! arithmetic alone.

use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor};
use faer::{Mat, Side};
use lightmoe_compress::methods::{AdapterInit, BaseInit, MethodName, moei2};
use lightmoe_compress::plan::{Plan, SlotForm};
use lightmoe_compress::reception;
use lightmoe_models::ModelConfig;
use rayon::prelude::*;
use std::time::Instant;

/// Floating-point operations after which the rate of products is known.
const PRODUCTS: f64 = 5e11;

/// Arithmetic beyond what grows with the weights alone.
#[derive(Default)]
pub(super) struct Work {
    /// Floating-point operations of products, triangular solutions and fits, in f32 and in f64.
    pub(super) products: [f64; 2],
    /// Eigendecompositions in f64, of the smaller side of an expert's matrices.
    pub(super) decompositions: f64,
    /// The same of the hidden size, where several experts are decomposed as one matrix.
    pub(super) wide: f64,
    /// Assignments of the neurons of one expert to those of another.
    pub(super) assignments: f64,
}

impl Work {
    /// That of making and building a plan: the products, decompositions and solutions of factors, the
    /// comparison of neurons, the fit of mixed bases, the blocks of MoE-I².
    pub(super) fn of(config: &ModelConfig, plan: &Plan) -> Self {
        let (h, f) = (
            config.hidden_size as f64,
            config.moe.intermediate_size as f64,
        );
        let fits = plan.settings.fit_steps.unwrap_or(0);
        let mut work = Self::default();
        for layer in &plan.layers {
            if let Some(shape) = layer.factored {
                work.factorise(config, plan, layer.groups as f64, shape.rank);
            }
            if let Some((bases, rank)) = layer.mixture() {
                let mixed = layer.layout().mixed().count();
                work.mix([mixed, bases, rank, fits].map(|n| n as f64), [h, f]);
            }
            for slot in &layer.slots {
                match slot.form {
                    SlotForm::Adapted { rank, .. }
                        if plan.settings.adapters != AdapterInit::Fresh =>
                    {
                        work.factorise(config, plan, 1.0, rank);
                    }
                    // Three products of neurons with the dominant's.
                    SlotForm::Adapted {
                        dominant: false, ..
                    }
                    | SlotForm::Removed { into: Some(_) }
                        if plan.settings.base == BaseInit::Aligned =>
                    {
                        work.products[0] += 6.0 * f * f * h;
                        work.assignments += 1.0;
                    }
                    _ => {}
                }
            }
        }
        if plan.method == MethodName::Moei2 {
            // All choices up to each layer of a block, and the original.
            let layers = 1..=reception::BLOCK as i32;
            let choices = layers.map(|layer| (moei2::CANDIDATES as f64).powi(layer) + 1.0);
            let times = choices.sum::<f64>() / reception::BLOCK as f64;
            let head = config.vocab_size as u64 * config.hidden_size as u64;
            let working = config.active_parameters().saturating_sub(head) as f64;
            work.products[0] += times * 2.0 * working * reception::MOST_TOKENS as f64;
        }
        work
    }

    /// Whether there is none.
    pub(super) fn is_none(&self) -> bool {
        let all = self.products.iter().sum::<f64>() + self.decompositions + self.wide;
        all + self.assignments == 0.0
    }

    /// Adds the fit of gate and up of `mixed` experts over `bases` bases of `rank` rows.
    fn mix(&mut self, [mixed, bases, rank, steps]: [f64; 4], [h, f]: [f64; 2]) {
        // The mixes, the products, and the gradients of both sides of each.
        let step = 6.0 * rank * h * (f + bases);
        // Before and behind the steps: moments, the products with them, Cholesky and the solution.
        let solution = 2.0 * rank * rank * (h + f) + 2.0 * f * rank * h + rank.powi(3) / 3.0;
        // Each basis starts with singular vectors of the matrices of a group, as one.
        let rows = mixed * f;
        let side = h.min(rows / bases);
        let back = if side < h { rank } else { 0.0 };
        let start = 2.0 * rows * h * (side + back);
        self.products[0] += 2.0 * mixed * steps * step;
        self.products[1] += 2.0 * (2.0 * mixed * solution + start);
        match side < h {
            true => self.decompositions += 2.0 * bases,
            false => self.wide += 2.0 * bases,
        }
    }

    /// Adds the factors of the three matrices of `experts` experts.
    fn factorise(&mut self, config: &ModelConfig, plan: &Plan, experts: f64, rank: usize) {
        let (h, f) = (
            config.hidden_size as f64,
            config.moe.intermediate_size as f64,
        );
        let adapters = plan.settings.adapters;
        let whitened = matches!(adapters, AdapterInit::Whitened | AdapterInit::Fitted);
        let products = |out: f64, width: f64| {
            let rank = rank as f64;
            // Wide: `W·G`. Tall: Cholesky, `W·S`, and the solution.
            let moments = match (whitened, out <= width) {
                (false, _) => 0.0,
                (true, true) => 2.0 * out * width * width,
                (true, false) => {
                    width.powi(3) / 3.0 + 2.0 * out * width * width + rank * width * width
                }
            };
            2.0 * out * width * out.min(width) + 2.0 * rank * out * width + moments
        };
        self.products[1] += experts * (2.0 * products(f, h) + products(h, f));
        if adapters == AdapterInit::Fitted {
            // `Dᵀ·F·D`; the roots of what it makes of gate and up, and the products with them.
            let moved = f.powi(3) / 3.0 + 2.0 * f * f * h + rank as f64 * f * f;
            self.products[1] += experts * (2.0 * f * h * (f + h) + 2.0 * moved);
        }
        self.decompositions += 3.0 * experts;
    }
}

/// What this machine makes of arithmetic, with all its cores at work.
pub(super) struct Rates {
    /// Floating-point operations of products, a second, in f32 and in f64.
    pub(super) products: [f64; 2],
    /// Seconds of an eigendecomposition of the smaller side of an expert's matrices.
    pub(super) decomposition: f64,
    /// Of one of the hidden size.
    pub(super) wide: f64,
    /// Seconds of an assignment.
    pub(super) assignment: f64,
}

impl Rates {
    /// Measures them at the shapes of the experts of `config` under `plan`: products in f32 of transforms
    /// and mixed bases, where there are such, else of the matrices of two experts; in f64 of a matrix and a
    /// moment.
    pub(super) fn measure(config: &ModelConfig, plan: &Plan) -> Result<Self> {
        let (h, f) = (config.hidden_size, config.moe.intermediate_size);
        let mixed = plan.layers.iter().find_map(|layer| layer.mixture());
        let (rows, inner, columns) = match mixed {
            Some((_, rank)) => (f, rank, h),
            None => (f, h, f),
        };
        let random = |m, n| Tensor::rand(-1f32, 1f32, (m, n), &Device::Cpu);
        let (a, b) = (random(rows, inner)?, random(inner, columns)?);
        let number = |i: usize, j: usize| ((i * j + i + j) as f64 * 0.7).sin();
        let (w, gram) = (Mat::from_fn(f, h, number), Mat::from_fn(h, h, number));
        let products = [
            rate(rows * inner * columns, || Ok(a.matmul(&b)?))?,
            rate(f * h * h, || Ok(&w * &gram))?,
        ];
        let decomposition = |n: usize, seed: usize| {
            let number = |i: usize, j: usize| ((i * j + i + j + seed) as f64 * 0.7).sin();
            let done = Mat::from_fn(n, n, number).self_adjoint_eigen(Side::Lower);
            done.map(drop)
                .map_err(|e| anyhow!("an eigendecomposition failed: {e:?}"))
        };
        let assignment = |seed: usize| {
            let number = |i: usize| (((i + 1) * (i + seed)) as f64 * 0.7).sin();
            let alike: Vec<f64> = (0..f * f).map(number).collect();
            let done = lsap::solve(f, f, &alike, true);
            done.map(drop)
                .map_err(|e| anyhow!("an assignment failed: {e:?}"))
        };
        Ok(Self {
            products,
            decomposition: seconds_of_one(|seed| decomposition(h.min(f), seed))?,
            wide: seconds_of_one(|seed| decomposition(h, seed))?,
            assignment: seconds_of_one(assignment)?,
        })
    }

    /// The seconds of `work` at these rates.
    pub(super) fn seconds(&self, work: &Work) -> f64 {
        let products = work.products.iter().zip(self.products);
        products.map(|(flops, rate)| flops / rate).sum::<f64>()
            + work.decompositions * self.decomposition
            + work.wide * self.wide
            + work.assignments * self.assignment
    }
}

/// Floating-point operations a second of a product of so many multiplications, of which as many as there
/// are threads run at once.
fn rate<T>(multiplications: usize, product: impl Fn() -> Result<T> + Sync) -> Result<f64> {
    let flops = 2.0 * multiplications as f64;
    let threads = rayon::current_num_threads();
    let count = ((PRODUCTS / flops).ceil() as usize).next_multiple_of(threads);
    let begin = Instant::now();
    (0..count)
        .into_par_iter()
        .try_for_each(|_| product().map(drop))?;
    Ok(count as f64 * flops / begin.elapsed().as_secs_f64())
}

/// Seconds of one of several like problems, of which as many as there are threads run at once, as build
/// runs them.
fn seconds_of_one(problem: impl Fn(usize) -> Result<()> + Sync + Send) -> Result<f64> {
    let count = 4 * rayon::current_num_threads();
    let begin = Instant::now();
    (0..count).into_par_iter().try_for_each(problem)?;
    Ok(begin.elapsed().as_secs_f64() / count as f64)
}
