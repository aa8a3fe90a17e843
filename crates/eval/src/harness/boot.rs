//! Standard errors by resampling, from the random numbers that lm-evaluation-harness takes.

use lightmoe_data::harness::python::Random;
use rayon::prelude::*;

/// Resamples in all, and from one seed.
const RESAMPLES: u32 = 100_000;
const OF_ONE_SEED: u32 = 1000;

/// The standard deviation of `statistic` over resamples of `values`.
pub(super) fn bootstrap(values: &[f64], statistic: &(impl Fn(&[f64]) -> f64 + Sync)) -> f64 {
    let of_seed = |seed: u32| -> Vec<f64> {
        let mut random = Random::new(seed);
        (0..OF_ONE_SEED)
            .map(|_| {
                let drawn = random.resample(values.len());
                statistic(&drawn.into_iter().map(|i| values[i]).collect::<Vec<_>>())
            })
            .collect()
    };
    let all: Vec<Vec<f64>> = (0..RESAMPLES / OF_ONE_SEED)
        .into_par_iter()
        .map(of_seed)
        .collect();
    crate::score::deviation(&all.concat())
}
