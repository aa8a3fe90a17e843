//! The global threshold `p_hat` for a wanted size (LightMoE section 4.1).
//!
//! The paper bisects. A threshold matters only where it makes some layer's prefix grow by one
//! expert, so the plans in reach are few (at most `E` per layer): all are visited in order and
//! the closest is exact, even where a dissolved group makes the size not quite monotone.

use crate::select::cumulative;
use crate::{Error, Result};

/// A target outside the reachable range still counts as reached within this distance.
const TOLERANCE: f64 = 0.003;

/// Intervals of `p_hat` narrower than this, relative to it, are rounding and no choice.
const NARROW: f64 = 1e-12;

/// What each prefix of one layer would save.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerChoices {
    /// `[E]` scores of the layer, summing to one.
    pub scores: Vec<f64>,
    /// The layer's factor on `p_hat`; see [`crate::select::threshold_factors`].
    pub factor: f64,
    /// `[E + 1]` parameters saved when the `0, 1, ..., E` lowest experts are selected.
    pub saved: Vec<u64>,
}

/// One visited interval of `p_hat`.
#[derive(Clone, Copy)]
struct Candidate {
    p_hat: f64,
    saved: u64,
}

/// Finds the `p_hat` above 0 whose plan's saving is closest to the share `target` of `before`
/// parameters; of equals, the smaller. It lies in the middle of the interval of thresholds that
/// give the same plan.
///
/// # Errors
/// [`Error::Invalid`] naming the reachable range, if `target` is outside of it by more than 0.3
/// points.
pub fn search(before: u64, layers: &[LayerChoices], target: f64) -> Result<f64> {
    let candidates = candidates(layers);
    let share = |saved: u64| saved as f64 / before as f64;
    let useful = || candidates.iter().filter(|candidate| candidate.saved > 0);
    let closest = useful().min_by(|a, b| {
        let distance = |c: &Candidate| (share(c.saved) - target).abs();
        distance(a).total_cmp(&distance(b))
    });
    let Some(closest) = closest else {
        return Err(Error::Invalid(
            "no threshold makes the model smaller: the bases and adapters of a layer cost as \
             much as the experts they replace; lower `rank` or `groups`"
                .to_owned(),
        ));
    };
    let least = useful().map(|c| c.saved).min().map_or(0.0, share);
    let most = useful().map(|c| c.saved).max().map_or(0.0, share);
    if target < least - TOLERANCE || target > most + TOLERANCE {
        return Err(Error::Invalid(format!(
            "a ratio of {target} cannot be reached, only {least:.4} to {most:.4} of all \
             parameters; choose a ratio in between, or lower `rank` or `groups`"
        )));
    }
    Ok(closest.p_hat)
}

/// One candidate for each interval of `p_hat` that gives another plan, ascending.
fn candidates(layers: &[LayerChoices]) -> Vec<Candidate> {
    // From p_hat = C_n / c_j on, layer j selects n + 1 experts (C_n: sum of its n lowest scores).
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    let mut selected = Vec::with_capacity(layers.len());
    for (index, layer) in layers.iter().enumerate() {
        let sums = cumulative(&layer.scores);
        let first = sums.partition_point(|sum| *sum <= 0.0) + 1;
        let first = first.min(sums.len());
        selected.push(first);
        for count in first + 1..=sums.len() {
            steps.push((sums[count - 2] / layer.factor, index, count));
        }
    }
    steps.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut saved: u64 = layers.iter().zip(&selected).map(|(l, &n)| l.saved[n]).sum();
    let mut found = Vec::new();
    let mut low = 0.0;
    // From here on every layer selects all its experts; above 1 where a factor is below 1.
    let ends = layers.iter().map(|l| 1.0 / l.factor);
    let end = ends.filter(|e| e.is_finite()).fold(1.0, f64::max);
    for (high, step) in steps
        .iter()
        .map(|step| (step.0.min(end), Some(step)))
        .chain([(end, None)])
    {
        if high - low > NARROW * high {
            let p_hat = low + (high - low) / 2.0;
            found.push(Candidate { p_hat, saved });
        }
        let Some(&(_, index, count)) = step else {
            break;
        };
        saved = saved + layers[index].saved[count] - layers[index].saved[selected[index]];
        selected[index] = count;
        low = high;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::prefix;

    fn layer(scores: &[f64], factor: f64) -> LayerChoices {
        LayerChoices {
            scores: scores.to_vec(),
            factor,
            saved: (0..=scores.len() as u64).map(|n| 10 * n).collect(),
        }
    }

    /// Every interval's saving is that of the prefixes that the selection really takes there.
    #[test]
    fn candidates_agree_with_the_selection() {
        let layers = [
            layer(&[0.1, 0.4, 0.2, 0.3], 1.2),
            layer(&[0.0, 0.25, 0.5, 0.25], 0.8),
            layer(&[0.25; 4], 1.0),
        ];
        let found = candidates(&layers);
        assert!(found.len() > 6);
        for candidate in found {
            let selected: usize = layers
                .iter()
                .map(|l| prefix(&l.scores, candidate.p_hat * l.factor).len())
                .sum();
            assert_eq!(candidate.saved, 10 * selected as u64, "{}", candidate.p_hat);
        }
    }

    #[test]
    fn the_closest_is_found_even_if_savings_are_not_monotone() {
        let mut bumpy = layer(&[0.1, 0.2, 0.3, 0.4], 1.0);
        bumpy.saved = vec![0, 0, 50, 40, 90];
        let p_hat = search(100, &[bumpy.clone()], 0.42).unwrap();
        assert_eq!(prefix(&bumpy.scores, p_hat).len(), 3);
        let p_hat = search(100, &[bumpy.clone()], 0.49).unwrap();
        assert_eq!(prefix(&bumpy.scores, p_hat).len(), 2);
    }

    #[test]
    fn what_is_out_of_reach_is_refused_with_the_range() {
        let mut choices = layer(&[0.1, 0.2, 0.3, 0.4], 1.0);
        choices.saved = vec![0, 0, 10, 20, 40];
        for target in [0.5, 0.05] {
            let error = search(100, &[choices.clone()], target).unwrap_err();
            let message = error.to_string();
            assert!(message.contains("0.1000 to 0.4000"), "{message}");
        }
        assert!(search(100, &[choices.clone()], 0.402).is_ok());
        choices.saved = vec![0; 5];
        let message = search(100, &[choices], 0.2).unwrap_err().to_string();
        assert!(message.contains("rank"), "{message}");
    }
}
