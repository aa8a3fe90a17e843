//! The bias of an adapted slot: what it misses of its expert on average.

use super::layer::{Layer, Named};
use crate::Result;
use crate::plan::LayerPlan;
use candle_core::{DType, Device, Tensor};
use lightmoe_kernels::{linear, swiglu};
use lightmoe_models::names;

impl Layer<'_> {
    /// The bias of `expert`, replaced by `base`, if it has one, and the tensors `adapters`: where it is known
    /// what errors cost, what the down matrix misses of the mean hidden activations, else the mean of what the
    /// slot misses on [inputs](crate::inputs) of the expert, both as the output of the layer has it, by the
    /// squares of the gates. Zero without a token.
    pub(super) fn bias(
        &self,
        plan: &LayerPlan,
        expert: usize,
        base: Option<&[Tensor; 3]>,
        adapters: &Named,
    ) -> Result<Tensor> {
        let own = self.expert(plan.layer, expert)?;
        let slot = |i: usize| -> Result<Tensor> {
            let part = |side: &str| {
                let name = format!("{}.{side}", names::PROJECTIONS[i]);
                let name = names::expert(plan.layer, expert, &name);
                let found = adapters.iter().find(|(found, _)| *found == name);
                found.map(|(_, tensor)| tensor)
            };
            let product = match (part("lora_A"), part("lora_B")) {
                (Some(a), Some(b)) => b.matmul(a)?,
                _ => own[i].zeros_like()?,
            };
            Ok(match base {
                Some(base) => (product + &base[i])?,
                None => product,
            })
        };
        if let Some(damage) = self.damage.as_ref().filter(|_| self.inputs.is_none()) {
            return damage.constant(expert, &(&own[2] - slot(2)?)?);
        }
        let width = own[2].dim(0)?;
        let found = self.inputs.as_ref().map(|inputs| inputs.of(expert));
        let Some((x, gates)) = found.transpose()?.flatten() else {
            return Ok(Tensor::zeros(width, DType::F32, &Device::Cpu)?);
        };
        let gives = |[gate, up, down]: [&Tensor; 3]| -> Result<Tensor> {
            let hidden = swiglu(&linear(&x, gate)?, &linear(&x, up)?)?;
            Ok(linear(&hidden, down)?)
        };
        let instead = [slot(0)?, slot(1)?, slot(2)?];
        let missed = (gives(own.each_ref())? - gives(instead.each_ref())?)?;
        shrunk_mean(&missed, &gates)
    }
}

/// The mean of the rows of `missed: [n, H]`, weighted by the squares of `gates: [n]`, less the share of it that
/// is expected of chance alone (James and Stein's): few rows, far apart, tell nothing.
fn shrunk_mean(missed: &Tensor, gates: &[f32]) -> Result<Tensor> {
    let weights: Vec<f64> = gates.iter().map(|&g| f64::from(g).powi(2)).collect();
    let (rows, width) = missed.dims2()?;
    let whole = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let values = missed.to_vec2::<f32>()?;
    let mut mean = vec![0.0; width];
    for (row, weight) in values.iter().zip(&weights) {
        let share = weight / whole;
        mean.iter_mut()
            .zip(row)
            .for_each(|(mean, &v)| *mean += share * f64::from(v));
    }
    // The variance of the mean, each row as far from it as all are.
    let squares = weights.iter().map(|w| (w / whole).powi(2)).sum::<f64>();
    let apart = |row: &Vec<f32>| -> f64 {
        let of = row.iter().zip(&mean);
        of.map(|(&v, mean)| (f64::from(v) - mean).powi(2)).sum()
    };
    let spread = values.iter().map(apart).zip(&weights);
    let spread = spread
        .map(|(square, weight)| weight / whole * square)
        .sum::<f64>();
    let chance = spread * squares / (1.0 - squares).max(f64::MIN_POSITIVE);
    let square: f64 = mean.iter().map(|v| v * v).sum();
    let kept = match rows {
        0 | 1 => 0.0,
        _ => (1.0 - chance / square.max(f64::MIN_POSITIVE)).max(0.0),
    };
    let mean: Vec<f32> = mean.into_iter().map(|v| (kept * v) as f32).collect();
    Ok(Tensor::from_vec(mean, width, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    /// Rows that agree are believed, a single one and rows without a common part are not.
    #[test]
    fn a_mean_counts_as_far_as_rows_agree() {
        let mean = |rows: &[[f32; 2]], gates: &[f32]| {
            let flat = rows.concat();
            let rows = Tensor::from_vec(flat, (rows.len(), 2), &Device::Cpu).unwrap();
            shrunk_mean(&rows, gates).unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(mean(&[[2.0, -1.0]; 3], &[0.5, 0.2, 0.9]), [2.0, -1.0]);
        assert_eq!(mean(&[[2.0, -1.0]], &[0.5]), [0.0, 0.0]);
        assert_eq!(mean(&[[1.0, 0.0], [-1.0, 0.0]], &[0.3, 0.3]), [0.0, 0.0]);
        // Mean 2, variance of the mean (1 + 1)/2: three quarters are left.
        assert_eq!(mean(&[[3.0, 0.0], [1.0, 0.0]], &[0.3, 0.3]), [1.5, 0.0]);
        // By squares of gates, .8 and .2: of 3 and 1 the mean is 2.6, and its variance .64 · .68 / .32.
        let found = mean(&[[3.0, 0.0], [1.0, 0.0]], &[0.8, 0.4])[0];
        let expected = 2.6 * (1.0 - 1.36 / 6.76);
        assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
    }
}
