//! Which experts of a layer are replaced (LightMoE section 3.1, eq. 3 and 8).

/// The factor `c_j` on `p_hat` of each layer: `clip(exp(-alpha (norm_j - 1)), 1 - d, 1 + d)`,
/// where `norm_j` is the layer's router norm over the mean of all and `d` is `max_delta`.
///
/// `router_norms` has one entry per layer. Without norms, or where they are all zero, every
/// factor is one: a uniform threshold.
pub fn threshold_factors(
    router_norms: Option<&[f64]>,
    layers: usize,
    alpha: f64,
    max_delta: f64,
) -> Vec<f64> {
    let mean = router_norms.map_or(0.0, |norms| norms.iter().sum::<f64>() / norms.len() as f64);
    match router_norms {
        Some(norms) if mean > 0.0 => norms
            .iter()
            .map(|norm| (-alpha * (norm / mean - 1.0)).exp())
            .map(|factor| factor.clamp((1.0 - max_delta).max(0.0), 1.0 + max_delta))
            .collect(),
        _ => vec![1.0; layers],
    }
}

/// The threshold `p_j = p_hat c_j` of each layer (eq. 8).
pub fn layer_thresholds(p_hat: f64, factors: &[f64]) -> Vec<f64> {
    factors.iter().map(|factor| p_hat * factor).collect()
}

/// The experts by ascending score; ties by ascending number.
pub fn ascending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(a.cmp(&b)));
    order
}

/// The sums of the `1, 2, ..., E` smallest scores.
pub(crate) fn cumulative(scores: &[f64]) -> Vec<f64> {
    ascending(scores)
        .into_iter()
        .scan(0.0, |sum, expert| {
            *sum += scores[expert];
            Some(*sum)
        })
        .collect()
}

/// The smallest prefix of the ascending order whose summed score exceeds `threshold`, the expert
/// that crosses it included; all experts if no prefix does. In ascending order of score.
///
/// `scores` are the `[E]` shares `Gbar` of a layer.
pub fn prefix(scores: &[f64], threshold: f64) -> Vec<usize> {
    let sums = cumulative(scores);
    let length = sums.partition_point(|sum| *sum <= threshold) + 1;
    let mut order = ascending(scores);
    order.truncate(length);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_includes_the_expert_that_crosses() {
        let scores = [0.4, 0.1, 0.3, 0.2];
        assert_eq!(prefix(&scores, 0.05), [1]);
        assert_eq!(prefix(&scores, 0.25), [1, 3]);
        assert_eq!(prefix(&scores, 0.59), [1, 3, 2]);
        assert_eq!(prefix(&scores, 2.0), [1, 3, 2, 0]);
    }

    /// "Just exceeds": a sum equal to the threshold is not enough.
    #[test]
    fn a_prefix_that_equals_the_threshold_grows_by_one() {
        let scores = [0.25, 0.25, 0.5];
        assert_eq!(prefix(&scores, 0.25), [0, 1]);
        assert_eq!(prefix(&scores, 0.249), [0]);
    }

    #[test]
    fn ties_go_by_number_and_unused_experts_first() {
        assert_eq!(ascending(&[0.5, 0.0, 0.5, 0.0]), [1, 3, 0, 2]);
        assert_eq!(prefix(&[0.5, 0.0, 0.5, 0.0], 0.1), [1, 3, 0]);
    }

    #[test]
    fn thresholds_fall_with_the_norm_and_are_clipped() {
        let factors = threshold_factors(Some(&[100.0, 300.0, 350.0, 450.0]), 4, 0.3, 0.2);
        // Mean 300: exp(-0.3 (1/3 - 1)) = 1.2214, clipped; exp(0); exp(-0.05); exp(-0.15).
        let expected = [1.2, 1.0, (-0.05_f64).exp(), (-0.15_f64).exp()];
        for (factor, expected) in factors.iter().zip(expected) {
            assert!((factor - expected).abs() < 1e-12, "{factors:?}");
        }
        let wide = threshold_factors(Some(&[1.0, 5.0]), 2, 0.3, 10.0);
        assert!((wide[0] - (0.2_f64).exp()).abs() < 1e-12);
        assert!((wide[1] - (-0.2_f64).exp()).abs() < 1e-12);
        let low = threshold_factors(Some(&[0.0, 1.0, 8.0]), 3, 0.3, 0.2);
        assert_eq!((low[0], low[2]), (1.2, 0.8));
        assert_eq!(layer_thresholds(0.5, &[1.2, 0.8]), [0.6, 0.4]);
    }

    #[test]
    fn without_norms_or_delta_the_threshold_is_uniform() {
        assert_eq!(threshold_factors(None, 3, 0.3, 0.2), [1.0; 3]);
        assert_eq!(threshold_factors(Some(&[0.0; 2]), 2, 0.3, 0.2), [1.0; 2]);
        let flat = threshold_factors(Some(&[1.0, 2.0]), 2, 0.3, 0.0);
        assert_eq!(flat, [1.0; 2]);
    }
}
