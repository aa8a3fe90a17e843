//! The sums over tokens, while a layer is observed.

use super::{BORROWED_MASS, Expert, ExpertCosts, LayerDamage, file, triangle, widths};
use crate::Result;
use crate::beside::{self, Block};
use crate::merge::{merge, shares};
use crate::observations::{Biased, Components, Damage};
use candle_core::{DType, Device, Tensor};
use lightmoe_kernels::linear;
use lightmoe_models::{Bank, ModelConfig, Routing, to_be_read};
use rayon::prelude::*;
use std::path::Path;

/// At most so many tokens of the layer every expert is given beside those that chose it.
const BORROWED: usize = 128;

/// The weighted sums of one expert.
#[derive(Clone)]
struct ExpertSums {
    mass: f64,
    /// `[H, H]`, packed; added to in place, since gaps of this size would take much memory
    input: Vec<f32>,
    /// `[F, F]`, packed
    hidden: Vec<f32>,
    /// `[F]`
    mean: Tensor,
    /// `[4, F]`
    slopes: Tensor,
}

impl ExpertSums {
    /// Over the rows of `x: [n, H]`, which count as `weights: [n]`.
    fn of([gate, up, _]: Expert<'_>, x: &Tensor, weights: Vec<f32>) -> candle_core::Result<Self> {
        let mass = weights.iter().map(|&w| f64::from(w)).sum();
        let weights = Tensor::from_vec(weights, (x.dim(0)?, 1), x.device())?;
        let roots = weights.sqrt()?;
        let gram = |t: &Tensor| {
            let t = t.broadcast_mul(&roots)?;
            packed(&t.t()?.matmul(&t)?)
        };
        let sum = |t: &Tensor| t.broadcast_mul(&weights)?.sum(0);
        let (a, u) = (linear(x, gate)?, linear(x, up)?);
        // silu' = σ + silu · (1 − σ)
        let sigmoid = ((a.neg()?.exp()? + 1.0)?).recip()?;
        let silu = (&a * &sigmoid)?;
        let slope = ((&sigmoid + (&silu * (1.0 - &sigmoid)?)?)? * &u)?;
        let hidden = (&silu * &u)?;
        Ok(Self {
            mass,
            input: gram(x)?,
            mean: sum(&hidden)?,
            slopes: Tensor::stack(
                &[
                    sum(&slope)?,
                    sum(&slope.sqr()?)?,
                    sum(&silu)?,
                    sum(&silu.sqr()?)?,
                ],
                0,
            )?,
            hidden: gram(&hidden)?,
        })
    }

    fn add(&mut self, other: &Self) -> candle_core::Result<()> {
        let add = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
        self.mass += other.mass;
        add(&mut self.input, &other.input);
        add(&mut self.hidden, &other.hidden);
        self.mean = (&self.mean + &other.mean)?;
        self.slopes = (&self.slopes + &other.slopes)?;
        Ok(())
    }
}

/// The sums of one layer while it is observed.
pub(crate) struct DamageSums {
    config: ModelConfig,
    experts: Vec<Option<ExpertSums>>,
    /// `Σ G·Gᵀ`: `[H, H]`; `None` without gradients.
    output: Option<Tensor>,
    /// `Σ ‖G‖²`
    gradient: f64,
    /// How many choices of experts were seen.
    choices: u64,
    /// Whether slots may have biases.
    bias: bool,
    /// Tokens for experts that see few, and how many tokens lie between two of them.
    borrowed: Vec<Tensor>,
    stride: usize,
    seen: usize,
}

/// Some tokens of a layer, padding left out.
pub(crate) struct WeightedTokens<'a> {
    /// Places among the rows that the layer is given.
    pub(crate) tokens: &'a [u32],
    /// `w_t` of each.
    pub(crate) weights: &'a [f32],
    /// `G_t` of each, `[tokens, H]`; `None`: every direction of the output alike.
    pub(crate) gradients: Option<&'a Tensor>,
}

impl DamageSums {
    /// For a layer that `tokens` tokens will pass; with `bias` ranks are reckoned beside biases, too.
    pub(crate) fn new(config: &ModelConfig, tokens: usize, bias: bool) -> Self {
        Self {
            config: config.clone(),
            experts: vec![None; config.moe.num_experts],
            output: None,
            gradient: 0.0,
            choices: 0,
            bias,
            borrowed: Vec::new(),
            stride: tokens.div_ceil(BORROWED).max(1),
            seen: 0,
        }
    }

    /// Adds tokens of `x: [T, H]`, which the experts are given.
    pub(crate) fn add(
        &mut self,
        bank: &Bank,
        x: &Tensor,
        routing: &Routing,
        some: &WeightedTokens<'_>,
    ) -> lightmoe_models::Result<()> {
        let x = x.detach();
        if let Some(g) = some.gradients {
            let more = g.t()?.matmul(g)?;
            self.output = Some(match self.output.take() {
                Some(output) => (output + more)?,
                None => more,
            });
            self.gradient += f64::from(g.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        let picked = some.tokens.iter().enumerate();
        let picked = picked.filter(|(i, _)| (self.seen + i).is_multiple_of(self.stride));
        let picked: Vec<u32> = picked.map(|(_, &token)| token).collect();
        self.seen += some.tokens.len();
        if !picked.is_empty() {
            // Copied: a part of a tensor would keep all of it.
            let rows = x.index_select(&Tensor::new(picked, x.device())?, 0)?;
            self.borrowed.push(rows);
        }
        let k = routing.chosen.len() / x.dim(0)?;
        let gates = routing.gates.detach().to_vec1::<f32>()?;
        let mut rows: Vec<(Vec<u32>, Vec<f32>)> = vec![Default::default(); self.experts.len()];
        for (&token, weight) in some.tokens.iter().zip(some.weights) {
            for pair in token as usize * k..(token as usize + 1) * k {
                let (tokens, weights) = &mut rows[routing.chosen[pair] as usize];
                tokens.push(token);
                weights.push(weight * gates[pair] * gates[pair]);
                self.choices += 1;
            }
        }
        self.each(bank, |expert, own| {
            let (tokens, weights) = &rows[expert];
            if tokens.is_empty() {
                return Ok(None);
            }
            let x = x.index_select(&Tensor::new(&tokens[..], x.device())?, 0)?;
            ExpertSums::of(own, &x, weights.clone()).map(Some)
        })
    }

    /// Adds what `of` gives for each dense expert, as many at a time as there are threads.
    fn each(
        &mut self,
        bank: &Bank,
        of: impl Fn(usize, Expert<'_>) -> candle_core::Result<Option<ExpertSums>> + Sync,
    ) -> lightmoe_models::Result<()> {
        let experts = dense(bank)?;
        for some in experts.chunks(rayon::current_num_threads()) {
            let more: Vec<Option<ExpertSums>> = some
                .par_iter()
                .map(|(expert, [gate, up, down])| of(*expert, [gate, up, down]))
                .collect::<candle_core::Result<_>>()?;
            for ((expert, _), more) in some.iter().zip(more) {
                match (&mut self.experts[*expert], more) {
                    (Some(sums), Some(more)) => sums.add(&more)?,
                    (_, None) => {}
                    (sums, more) => *sums = more,
                }
            }
        }
        Ok(())
    }

    /// Ends the sums of layer `number`: its file goes into `folder`.
    pub(crate) fn finish(
        mut self,
        bank: &Bank,
        folder: &Path,
        number: usize,
        fingerprint: &str,
    ) -> Result<Damage> {
        let mass: f64 = self.experts.iter().flatten().map(|sums| sums.mass).sum();
        if self.choices > 0 && mass > 0.0 {
            let borrowed = Tensor::cat(&self.borrowed, 0)?;
            let count = borrowed.dim(0)?;
            let weight = BORROWED_MASS * mass / self.choices as f64 / count as f64;
            self.each(bank, |_, own| {
                ExpertSums::of(own, &borrowed, vec![weight as f32; count]).map(Some)
            })?;
        }
        let output = match &self.output {
            Some(output) => (output * self.gradient.max(f64::MIN_POSITIVE).recip())?,
            None => {
                let h = self.config.hidden_size;
                (Tensor::eye(h, DType::F32, &Device::Cpu)? / h as f64)?
            }
        };
        // They are read expert by expert from here on.
        self.save(&output, folder, number, fingerprint)?;
        let layer = LayerDamage::open(&self.config, folder, number, fingerprint)?;
        let experts = dense(bank)?;
        let mut mass = vec![0.0; bank.len()];
        for (expert, _) in &experts {
            mass[*expert] = layer.mass(*expert)?;
        }
        let mean = telling_mean(&experts, &mass)?;
        let found: Vec<ExpertCosts> = experts
            .par_iter()
            .map(|(expert, own)| layer.costs(*expert, own.each_ref(), mean.as_ref(), self.bias))
            .collect::<Result<_>>()?;
        let width = found.first().map_or(0, |costs| costs.own[0].len());
        let table = || Components::none(bank.len(), width);
        let mut damage = Damage {
            own: table(),
            biased: self.bias.then(|| Biased {
                own: vec![0.0; bank.len() * width],
                difference: mean.as_ref().map(|_| vec![0.0; bank.len() * width]),
            }),
            difference: mean.map(|_| table()),
            drop: vec![0.0; bank.len()],
            mass,
        };
        for ((expert, _), costs) in experts.iter().zip(found) {
            damage.own.set(*expert, &costs.own);
            if let (Some(all), Some(costs)) = (&mut damage.difference, &costs.difference) {
                all.set(*expert, costs);
            }
            if let (Some(all), Some(costs)) = (&mut damage.biased, &costs.biased) {
                all.set(*expert, costs);
            }
            damage.drop[*expert] = costs.drop;
        }
        Ok(damage)
    }

    /// Writes the sums, which are gone then.
    fn save(
        &mut self,
        output: &Tensor,
        folder: &Path,
        number: usize,
        fingerprint: &str,
    ) -> Result<()> {
        let [h, f] = widths(&self.config);
        let mut tensors = vec![block("output".to_owned(), Some(output.clone()), &[h, h])];
        for (expert, sums) in std::mem::take(&mut self.experts).into_iter().enumerate() {
            let mut push = |what: &str, values: Option<Tensor>, shape: &[usize]| {
                tensors.push(block(format!("{what}.{expert}"), values, shape));
            };
            let [mut input, mut hidden, mut mean, mut slopes, mut mass] = [const { None }; 5];
            if let Some(sums) = sums {
                let all = |values: Vec<f32>| {
                    let len = values.len();
                    Tensor::from_vec(values, len, &Device::Cpu).map(Some)
                };
                (input, hidden) = (all(sums.input)?, all(sums.hidden)?);
                (mean, slopes) = (Some(sums.mean), Some(sums.slopes));
                mass = all(vec![sums.mass as f32])?;
            }
            push("input", input, &[triangle(h)]);
            push("hidden", hidden, &[triangle(f)]);
            push("mean", mean, &[f]);
            push("slopes", slopes, &[4, f]);
            push("mass", mass, &[1]);
        }
        beside::save(file(folder, number), tensors, fingerprint)
    }
}

/// The mean of the experts by what errors of them count for, where it tells enough of them: twice as much
/// of their weights as it would of experts that have nothing in common.
fn telling_mean(experts: &[(usize, [Tensor; 3])], mass: &[f64]) -> Result<Option<[Tensor; 3]>> {
    let masses: Vec<f64> = experts.iter().map(|(expert, _)| mass[*expert]).collect();
    let shares = shares(&masses);
    let all: Vec<usize> = (0..experts.len()).collect();
    let weights = |place: usize| Ok(experts[place].1.clone());
    let mean = merge(&weights, &all, &masses, false)?;
    let energy = |of: &[Tensor; 3]| -> candle_core::Result<f64> {
        let of = of.iter().map(|w| w.sqr()?.sum_all()?.to_scalar::<f32>());
        of.map(|sum| sum.map(f64::from)).sum()
    };
    let own: Vec<f64> = experts
        .iter()
        .map(|(_, own)| energy(own))
        .collect::<candle_core::Result<_>>()?;
    // What the mean of orthogonal experts has of them.
    let apart: f64 = own
        .iter()
        .zip(&shares)
        .map(|(e, share)| e * share * share)
        .sum();
    let common = energy(&mean)?;
    Ok((common > 2.0 * apart).then_some(mean))
}

/// The upper half of a symmetric matrix `[n, n]`, row by row, `[n · (n + 1) / 2]`: these matrices are most
/// of what is held of a layer.
fn packed(m: &Tensor) -> candle_core::Result<Vec<f32>> {
    let n = m.dim(0)?;
    let values = m.flatten_all()?.to_vec1::<f32>()?;
    let mut all = Vec::with_capacity(triangle(n));
    (0..n).for_each(|i| all.extend_from_slice(&values[i * n + i..(i + 1) * n]));
    Ok(all)
}

fn block(name: String, values: Option<Tensor>, shape: &[usize]) -> (String, Block) {
    let shape = shape.to_vec();
    (name, Block { values, shape })
}

/// The dense experts of a bank with their matrices.
fn dense(bank: &Bank) -> lightmoe_models::Result<Vec<(usize, [Tensor; 3])>> {
    let weights = bank.dense.as_ref().ok_or_else(|| {
        lightmoe_models::Error::Invalid(
            "a layer without dense experts has no damage to plan by; observe the original model"
                .to_owned(),
        )
    })?;
    let of = |(i, &expert): (usize, &usize)| {
        let own = [
            to_be_read(&weights.gate.get(i)?)?,
            to_be_read(&weights.up.get(i)?)?,
            to_be_read(&weights.down.get(i)?)?,
        ];
        Ok((expert, own))
    };
    bank.dense_experts().iter().enumerate().map(of).collect()
}
