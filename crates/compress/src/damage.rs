//! What an error of an expert costs the model: the statistics behind the method `budget`.
//!
//! To second order, errors `δ_t` of what a layer gives for the tokens `t` raise the model's loss by
//! `½ Σ δ_tᵀ·F_t·δ_t`, where `F_t` is the Fisher matrix of the layer's output. We take it as a
//! number a token times a matrix a layer, `w_t·F`, as K-FAC does (arXiv 1503.05671): both come from the
//! gradients `G_t` of the loss on labels drawn from the model (at a temperature of 2, which counts what the
//! model is sure of for more than the Fisher matrix does), `w_t = ½‖G_t‖²/N` for `N` predicted tokens
//! and `F = Σ G·Gᵀ / Σ‖G‖²`. An expert whose gate for the token is `g` counts with `w_t·g²`; its errors
//! are then measured
//!
//! - in the down matrix `D` by `F` on the outside, and the moment of the hidden activations inside;
//! - in gate and up by `(Dᵀ·F·D) ∘ E[j·jᵀ]` outside, where `j` is how the hidden activations move with
//!   the projection, and the moment of the expert's inputs inside. Of `E[j·jᵀ]` we keep means and
//!   variances.
//!
//! So the raw inputs are never held: sums over tokens are. Experts of which little was seen are kept
//! defined by some tokens of the whole layer, which count as [`BORROWED_MASS`] tokens that chose them.
//!
//! A file a layer lies beside the observations, `damage-<l>.safetensors`, all f32: `output` `[H, H]`, the
//! matrix `F`; and for every expert `mass.<e>` `[1]`, the sum of weights, `input.<e>` `[H, H]` and
//! `hidden.<e>` `[F, F]`, of which the upper half is there, row by row, `mean.<e>` `[F]` (sums of weighted
//! hidden activations) and `slopes.<e>` `[4, F]` (sums of `j` and `j²` for gate, then for up).

mod sums;

use crate::Result;
use crate::beside;
use crate::factor::{DAMPING, Gram, Metric, matrix, singular_values, symmetric, tiled};
use crate::observations::Biased;
use candle_core::{Device, Tensor};
use faer::Mat;
use lightmoe_kernels::linear;
use lightmoe_models::{ModelConfig, TensorFile};
use std::path::{Path, PathBuf};
pub(crate) use sums::{DamageSums, WeightedTokens};

/// As how many tokens that chose an expert those count together that it borrows from the whole layer.
pub const BORROWED_MASS: f64 = 16.0;
/// What is added to the diagonal of `F`, as a share of its mean.
const OUTPUT_DAMPING: f64 = 0.05;
/// The same of the metric of the hidden activations.
const HIDDEN_DAMPING: f64 = 0.01;

/// The three matrices of an expert: gate `[F, H]`, up `[F, H]`, down `[H, F]`.
type Expert<'a> = [&'a Tensor; 3];

/// Hidden and intermediate size.
fn widths(config: &ModelConfig) -> [usize; 2] {
    [config.hidden_size, config.moe.intermediate_size]
}

fn file(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("damage-{layer}.safetensors"))
}

/// What leaving something of one expert out costs.
struct ExpertCosts {
    /// Component by component of gate, up and down.
    own: [Vec<f64>; 3],
    /// The same of what they differ by from the mean of the layer's experts, if that was asked for.
    difference: Option<[Vec<f64>; 3]>,
    /// Of down, and of what it differs by, beside a bias, if that was asked for.
    biased: Option<Biased>,
    /// All but the mean of the outputs.
    drop: f64,
}

/// What errors cost in one layer, read expert by expert.
pub struct LayerDamage {
    file: TensorFile,
    /// `F`, damped.
    output: Gram,
    widths: [usize; 2],
}

impl LayerDamage {
    /// Opens the file of layer `layer` in the folder beside the observations of this fingerprint.
    ///
    /// # Errors
    /// If it is missing or damaged, or belongs to other observations.
    pub(crate) fn open(
        config: &ModelConfig,
        folder: &Path,
        layer: usize,
        fingerprint: &str,
    ) -> Result<Self> {
        let file = beside::open(file(folder, layer), fingerprint)?;
        let widths = widths(config);
        let values = file.values("output", &[widths[0]; 2])?;
        Ok(Self {
            output: Gram::damped(symmetric(widths[0], &values), OUTPUT_DAMPING),
            file,
            widths,
        })
    }

    /// The metrics of gate, up and down of `expert`, whose matrices are `own`; with `bias` of a down whose errors
    /// count without their mean, which a vector beside it holds.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn metrics(&self, expert: usize, own: Expert<'_>, bias: bool) -> Result<[Metric; 3]> {
        let parts = self.parts(expert, own[2])?;
        Ok(parts.metrics(&self.output, bias))
    }

    /// What stands best for all that `expert` gives by the matrix `down`: the weighted mean of its outputs, `[H]`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn constant(&self, expert: usize, down: &Tensor) -> Result<Tensor> {
        let [_, f] = self.widths;
        let mass = self.mass(expert)?.max(f64::MIN_POSITIVE);
        let sums = self.file.values(&format!("mean.{expert}"), &[f])?;
        let mean: Vec<f32> = sums.iter().map(|s| (f64::from(*s) / mass) as f32).collect();
        let mean = Tensor::from_vec(mean, (1, f), &Device::Cpu)?;
        Ok(linear(&mean, down)?.flatten_all()?)
    }

    /// What all that chose the expert count together.
    pub(crate) fn mass(&self, expert: usize) -> Result<f64> {
        Ok(f64::from(
            self.file.values(&format!("mass.{expert}"), &[1])?[0],
        ))
    }

    /// What the components of the three matrices cost, and those of what they differ by from `mean`; with `bias`
    /// those of down beside a bias, too.
    fn costs(
        &self,
        expert: usize,
        own: Expert<'_>,
        mean: Option<&[Tensor; 3]>,
        bias: bool,
    ) -> Result<ExpertCosts> {
        let parts = self.parts(expert, own[2])?;
        let [h, f] = self.widths;
        let one = || vec![0.0; h.min(f)];
        let none = || [(); 3].map(|()| one());
        let mut costs = ExpertCosts {
            own: none(),
            difference: mean.map(|_| none()),
            biased: bias.then(|| Biased {
                own: one(),
                difference: mean.map(|_| one()),
            }),
            drop: 0.0,
        };
        if parts.mass <= 0.0 {
            // No token of the layer counts, so no error does.
            return Ok(costs);
        }
        costs.drop = parts.drop();
        let squares = |w: &Tensor, metric: &Metric| -> Result<Vec<f64>> {
            let values = singular_values(w, metric)?;
            Ok(values.into_iter().map(|s| s * s).collect())
        };
        for (i, (w, metric)) in own
            .iter()
            .zip(parts.metrics(&self.output, false))
            .enumerate()
        {
            costs.own[i] = squares(w, &metric)?;
            if let (Some(costs), Some(mean)) = (&mut costs.difference, mean) {
                costs[i] = squares(&(*w - &mean[i])?, &metric)?;
            }
        }
        if bias {
            let (down, metric) = (own[2], parts.down(&self.output, true));
            let difference = mean.map(|mean| squares(&(down - &mean[2])?, &metric));
            costs.biased = Some(Biased {
                own: squares(down, &metric)?,
                difference: difference.transpose()?,
            });
        }
        Ok(costs)
    }

    fn parts(&self, expert: usize, down: &Tensor) -> Result<Parts> {
        let [h, f] = self.widths;
        let read =
            |what: &str, shape: &[usize]| self.file.values(&format!("{what}.{expert}"), shape);
        let mass = self.mass(expert)?;
        let mean = |sums: &[f32]| -> Vec<f64> {
            let whole = mass.max(f64::MIN_POSITIVE);
            sums.iter().map(|&s| f64::from(s) / whole).collect()
        };
        let slopes = mean(&read("slopes", &[4, f])?);
        let d = matrix(down)?;
        Ok(Parts {
            mass,
            outer: self.output.between(d.transpose()),
            input: unpacked(h, &read("input", &[triangle(h)])?),
            hidden: unpacked(f, &read("hidden", &[triangle(f)])?),
            mean: mean(&read("mean", &[f])?),
            slopes: slopes.chunks_exact(f).map(<[f64]>::to_vec).collect(),
        })
    }
}

/// What the metrics of an expert are made of.
struct Parts {
    mass: f64,
    /// The lower half of `Dᵀ·F·D`: `[F, F]`
    outer: Mat<f64>,
    input: Mat<f64>,
    hidden: Mat<f64>,
    mean: Vec<f64>,
    /// Means of `j` and `j²`, of gate and of up.
    slopes: Vec<Vec<f64>>,
}

impl Parts {
    /// Of gate, up and down.
    fn metrics(&self, output: &Gram, bias: bool) -> [Metric; 3] {
        let f = self.mean.len();
        let moved = |slopes: &[Vec<f64>]| {
            let (mean, square) = (&slopes[0], &slopes[1]);
            let metric = tiled(f, f, |i, j| {
                let product = match i == j {
                    true => square[i],
                    false => mean[i] * mean[j],
                };
                self.outer[(i.max(j), i.min(j))] * product
            });
            Metric {
                out: Gram::damped(metric, HIDDEN_DAMPING),
                input: Gram::damped(self.input.clone(), DAMPING),
            }
        };
        [
            moved(&self.slopes[..2]),
            moved(&self.slopes[2..]),
            self.down(output, bias),
        ]
    }

    /// Of down; beside a bias the mean of an error counts nothing.
    fn down(&self, output: &Gram, bias: bool) -> Metric {
        let f = self.mean.len();
        let input = match bias {
            true => tiled(f, f, |i, j| self.covariance(i, j)),
            false => self.hidden.clone(),
        };
        Metric {
            out: output.clone(),
            input: Gram::damped(input, DAMPING),
        }
    }

    /// Of two hidden activations, times the mass.
    fn covariance(&self, i: usize, j: usize) -> f64 {
        self.hidden[(i, j)] - self.mass * self.mean[i] * self.mean[j]
    }

    /// `tr(F·D·C·Dᵀ)` of the covariance `C` of the hidden activations.
    fn drop(&self) -> f64 {
        let f = self.mean.len();
        let of = |i: usize, j: usize| self.outer[(i.max(j), i.min(j))] * self.covariance(i, j);
        let columns = (0..f).map(|j| (0..f).map(|i| of(i, j)).sum::<f64>());
        columns.sum::<f64>().max(0.0)
    }
}

/// How many numbers the upper half of a symmetric matrix has, the diagonal included.
fn triangle(n: usize) -> usize {
    n * (n + 1) / 2
}

/// A symmetric matrix from its upper half, row by row.
fn unpacked(n: usize, values: &[f32]) -> Mat<f64> {
    let place = |i: usize, j: usize| i * (2 * n + 1 - i) / 2 + j - i;
    tiled(n, n, |i, j| f64::from(values[place(i.min(j), i.max(j))]))
}
