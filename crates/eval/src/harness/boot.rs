//! Standard errors by resampling, from the random numbers that lm-evaluation-harness takes.

use lightmoe_data::harness::python::Random;
use rayon::prelude::*;

/// Most resamples from one seed.
const OF_ONE_SEED: u32 = 1000;

/// The standard deviation of `statistic` over resamples of `values`, of which there are `resamples`: up
/// to 1000, or a multiple of it.
pub(super) fn bootstrap<T: Clone + Sync>(
    values: &[T],
    resamples: u32,
    statistic: &(impl Fn(&[T]) -> f64 + Sync),
) -> f64 {
    let of_one_seed = resamples.min(OF_ONE_SEED);
    let of_seed = |seed: u32| -> Vec<f64> {
        let mut random = Random::new(seed);
        (0..of_one_seed)
            .map(|_| {
                let drawn = random.resample(values.len()).into_iter();
                statistic(&drawn.map(|i| values[i].clone()).collect::<Vec<_>>())
            })
            .collect()
    };
    let all: Vec<Vec<f64>> = (0..resamples / of_one_seed)
        .into_par_iter()
        .map(of_seed)
        .collect();
    crate::score::deviation(&all.concat())
}
