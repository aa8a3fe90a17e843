//! MC-SMoE (arXiv 2310.01334), merge, then compress: experts are merged as M-SMoE does, and what is left
//! becomes a product of low rank plus a few rows of a sparse matrix (section 3.3, after LoSparse, arXiv
//! 2306.11222). Which rows stay is decided while the model recovers.
//!
//! Merging makes half of the saving. Every expert that is left is the base of a group, that of a dominant
//! alone too, so that all of a layer have one form.

use lightmoe_models::FactoredBases;
use lightmoe_models::config::ModelConfig;

use super::{BaseInit, MethodName, PlanOptions, finish, msmoe, order, to_save};
use crate::observations::Observations;
use crate::plan::{Plan, PlanSettings};
use crate::size::{adapter_parameters, base_parameters};
use crate::{Error, Result};

/// What merging saves of the whole.
const MERGED_SHARE: f64 = 0.5;
/// The share of the rows that stay in the end (the official code has 0.01 to 0.25).
const KEPT_ROWS: f64 = 0.1;

/// What a ratio makes of a model.
pub(crate) struct Shape {
    /// Experts that are merged into others.
    merged: usize,
    /// Bases, of all layers.
    bases: usize,
    /// Ranks to share out, over all bases.
    ranks: usize,
    /// Rows that stay; of rank 1.
    rows: FactoredBases,
}

impl Shape {
    /// Meets the ratio as closely as it can be.
    ///
    /// # Errors
    /// [`Error::Invalid`] saying what can be reached, if this cannot.
    pub(crate) fn of(config: &ModelConfig, ratio: f64) -> Result<Self> {
        let slots = config.moe.num_experts * config.num_moe_layers();
        let rows = |of: usize| ((KEPT_ROWS * of as f64).round() as usize).max(1);
        let rows = FactoredBases {
            rank: 1,
            gate_up_rows: rows(config.moe.intermediate_size),
            down_rows: rows(config.hidden_size),
        };
        let whole = config.expert_parameters() as f64;
        let merged = (to_save(config, MERGED_SHARE * ratio) / whole) as usize;
        let bases = slots.saturating_sub(merged);
        let unit = adapter_parameters(config, 1) as f64;
        let smallest = base_parameters(config, Some(&rows)) as f64;
        // Beside what every base has with rank 1.
        let budget = slots as f64 * whole - to_save(config, ratio) - bases as f64 * smallest;
        if budget < 0.0 {
            // `saved` leaves `(slots − saved / 2 / whole)` bases, all of rank 1.
            let saved = slots as f64 * (whole - smallest) / (1.0 - MERGED_SHARE * smallest / whole);
            return Err(Error::Invalid(format!(
                "a ratio of {ratio} leaves no rank for the merged experts, one of up to {:.4} does; \
                 choose a lower ratio",
                saved.max(0.0) / config.parameters().total() as f64
            )));
        }
        Ok(Self {
            merged,
            bases,
            ranks: bases + (budget / unit).round() as usize,
            rows,
        })
    }

    /// What trains: factors, and all rows before they are pruned.
    pub(crate) fn trained(&self, config: &ModelConfig) -> u64 {
        self.bases as u64 * config.expert_parameters() + adapter_parameters(config, self.ranks)
    }

    /// The rank of each layer, whose bases are `counts`: equal, but for layers that get one more as long
    /// as that brings the whole closer.
    fn layer_ranks(&self, counts: &[usize]) -> Vec<usize> {
        let mut ranks = vec![self.ranks / self.bases.max(1); counts.len()];
        let mut left = self.ranks as i64 - (ranks.first().unwrap_or(&0) * self.bases) as i64;
        let sizes: Vec<f64> = counts.iter().map(|&count| count as f64).collect();
        for layer in order(&sizes) {
            let cost = counts[layer] as i64;
            if 2 * left >= cost {
                ranks[layer] += 1;
                left -= cost;
            }
        }
        ranks
    }
}

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    options: &PlanOptions,
) -> Result<Plan> {
    let shape = Shape::of(config, ratio)?;
    let clustered = msmoe::clustered(config, observations, shape.merged, ratio)?;
    let counts: Vec<usize> = clustered
        .iter()
        .map(|(_, clusters)| clusters.len())
        .collect();
    let ranks = shape.layer_ranks(&counts);
    let layers = clustered
        .into_iter()
        .zip(&ranks)
        .map(|((mut layer, clusters), &rank)| {
            layer.share(&clusters);
            layer.factored = Some(FactoredBases { rank, ..shape.rows });
            layer
        });
    let settings = PlanSettings {
        rank: ranks.iter().copied().max().unwrap_or(0),
        kept_rank: 0,
        groups: 0,
        base: BaseInit::Aligned,
        ..options.settings()
    };
    let mut plan = finish(config, MethodName::Mcsmoe, settings, layers.collect());
    plan.ratio.target = Some(ratio);
    Ok(plan)
}
