//! HC-SMoE (arXiv 2410.08589): experts whose mean outputs are close are merged, found by agglomerative
//! clustering (average linkage, Euclidean distance); a merged expert is their mean, weighted by how often
//! each was used. The outputs are those for all tokens, whether they chose the expert or not. The router
//! keeps its outputs.

use kodama::{Method, linkage};
use lightmoe_models::config::ModelConfig;

use super::drop::counts;
use super::{MethodName, PlanOptions, merged, order, usage};
use crate::observations::Observations;
use crate::plan::{LayerPlan, Plan};
use crate::{Error, Result};

/// Plans to save the share `ratio` of all parameters.
pub(super) fn plan(
    config: &ModelConfig,
    observations: &Observations,
    ratio: f64,
    options: &PlanOptions,
) -> Result<Plan> {
    let scores: Vec<Vec<f64>> = observations.layers.iter().map(usage).collect();
    let experts = config.moe.num_experts;
    let counts = counts(&scores, super::experts_to_save(config, ratio));
    let planned = observations.layers.iter().zip(&scores).zip(counts);
    let layers = planned.map(|((observed, scores), count)| {
        if count >= experts {
            return Err(Error::Invalid(format!(
                "a ratio of {ratio} leaves no expert in layer {}; choose a lower ratio",
                observed.layer
            )));
        }
        let features = observed.all_outputs.as_ref().ok_or_else(|| {
            Error::Invalid(format!(
                "`hcsmoe` needs the mean outputs for all tokens, and layer {} was observed without; \
                 observe with `--all-outputs`",
                observed.layer
            ))
        })?;
        let mut clusters = clusters(features, experts, experts - count);
        for members in &mut clusters {
            // The most used first, as the dominant.
            let used: Vec<f64> = members.iter().map(|&expert| scores[expert]).collect();
            *members = order(&used).into_iter().map(|i| members[i]).collect();
        }
        let mut layer = LayerPlan::dense(observed, scores);
        layer.merge(&clusters);
        Ok(layer)
    });
    let layers = layers.collect::<Result<_>>()?;
    Ok(merged(config, MethodName::Hcsmoe, options, layers, ratio))
}

/// Clusters `points` rows of `features` (row-major) until `left` are left: the members of each, in
/// ascending order, clusters by their first member.
pub fn clusters(features: &[f64], points: usize, left: usize) -> Vec<Vec<usize>> {
    let width = features.len() / points.max(1);
    let row = |i: usize| &features[i * width..(i + 1) * width];
    let distance = |a: usize, b: usize| -> f64 {
        let differences = row(a).iter().zip(row(b)).map(|(x, y)| (x - y).powi(2));
        differences.sum::<f64>().sqrt()
    };
    let mut distances: Vec<f64> = (0..points)
        .flat_map(|a| (a + 1..points).map(move |b| (a, b)))
        .map(|(a, b)| distance(a, b))
        .collect();
    let tree = linkage(&mut distances, points, Method::Average);
    // The `i`-th step makes the cluster `points + i`.
    let mut members: Vec<Vec<usize>> = (0..points).map(|i| vec![i]).collect();
    for step in tree.steps().iter().take(points - left.clamp(1, points)) {
        let mut both = std::mem::take(&mut members[step.cluster1]);
        both.append(&mut members[step.cluster2]);
        members.push(both);
    }
    members.retain(|cluster| !cluster.is_empty());
    members
        .iter_mut()
        .for_each(|cluster| cluster.sort_unstable());
    members.sort_unstable();
    members
}
