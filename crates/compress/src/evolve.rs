//! The sets of experts whose loss hurts least, by a genetic search (MoE-I², arXiv 2411.01016, section
//! 3.1): where experts stand in for each other, the best set is not that of the least important ones.

use crate::Result;
use rand::Rng;
use rand::seq::{IndexedRandom, IteratorRandom};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Sets of a generation.
const POPULATION: usize = 100;
/// Generations.
const GENERATIONS: usize = 50;
/// Sets of a generation that live on and have children: a fifth.
const PARENTS: usize = POPULATION / 5;
/// How likely a child changes one member more.
const MUTATION: f64 = 0.3;

/// A set of experts, ascending.
type Set = Vec<usize>;

/// The sets of `count` of the numbers below `experts` with the smallest `loss` that were found, the best
/// first, `sets` of them or as many as there are; each ascending.
///
/// The first generation is drawn at random. The best fifth of each lives on, and fills the next one up
/// with children: each a random part of the union of two parents, in which with probability
/// [`MUTATION`] a member gives way to one that is not in it, with the same probability another, and so
/// on. No set's loss is computed twice, and of equals the set that comes first in order wins, so the
/// result is a function of `rng`.
///
/// # Errors
/// Those of `loss`.
pub fn least_lossy_sets(
    experts: usize,
    count: usize,
    sets: usize,
    rng: &mut impl Rng,
    loss: impl Fn(&[usize]) -> Result<f64> + Sync,
) -> Result<Vec<Set>> {
    if count == 0 || count >= experts {
        return Ok(vec![(0..count.min(experts)).collect()]);
    }
    let mut losses: BTreeMap<Set, f64> = BTreeMap::new();
    let mut population: Vec<Set> = (0..POPULATION)
        .map(|_| draw(0..experts, count, rng))
        .collect();
    for _ in 0..GENERATIONS {
        let new: BTreeSet<&Set> = population
            .iter()
            .filter(|set| !losses.contains_key(*set))
            .collect();
        let found: Vec<(Set, f64)> = new
            .into_par_iter()
            .map(|set| Ok((set.clone(), loss(set)?)))
            .collect::<Result<_>>()?;
        losses.extend(found);
        population.sort_by(|a, b| losses[a].total_cmp(&losses[b]).then_with(|| a.cmp(b)));
        population.dedup();
        population.truncate(PARENTS);
        let missing = POPULATION - population.len();
        let children: Vec<Set> = (0..missing)
            .map(|_| child(&population, experts, count, rng))
            .collect();
        population.extend(children);
    }
    let mut found: Vec<(Set, f64)> = losses.into_iter().collect();
    found.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(found.into_iter().take(sets).map(|(set, _)| set).collect())
}

/// `count` of `from`, ascending.
fn draw(from: impl Iterator<Item = usize>, count: usize, rng: &mut impl Rng) -> Set {
    let mut set = from.choose_multiple(rng, count);
    set.sort_unstable();
    set
}

fn child(parents: &[Set], experts: usize, count: usize, rng: &mut impl Rng) -> Set {
    let both: Vec<&Set> = parents.choose_multiple(rng, 2).collect();
    let union: BTreeSet<usize> = both.into_iter().flatten().copied().collect();
    let mut set = draw(union.into_iter(), count, rng);
    while rng.random_bool(MUTATION) {
        let outside = (0..experts).filter(|expert| !set.contains(expert));
        if let Some(expert) = outside.choose(rng) {
            let place = rng.random_range(0..count);
            set[place] = expert;
        }
    }
    set.sort_unstable();
    set
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// A loss in which experts stand in for each other: the square of a sum of vectors.
    fn loss(vectors: &[[f64; 3]]) -> impl Fn(&[usize]) -> Result<f64> + Sync {
        move |set| {
            let sum = |axis: usize| set.iter().map(|&e| vectors[e][axis]).sum::<f64>();
            Ok((0..3).map(|axis| sum(axis).powi(2)).sum())
        }
    }

    /// All sets, one by one.
    fn least(vectors: &[[f64; 3]], count: usize) -> f64 {
        let of = loss(vectors);
        let sets = (0u32..1 << vectors.len()).filter(|bits| bits.count_ones() as usize == count);
        let sets = sets
            .map(|bits| -> Set { (0..vectors.len()).filter(|&e| bits >> e & 1 == 1).collect() });
        sets.map(|set| of(&set).unwrap())
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn it_finds_the_best_of_few_sets_and_always_the_same(
            seed: u64,
            vectors in prop::collection::vec(prop::array::uniform3(-1.0f64..1.0), 1..10),
            count in 0usize..10,
        ) {
            let count = count.min(vectors.len());
            let search = || {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                least_lossy_sets(vectors.len(), count, 3, &mut rng, loss(&vectors)).unwrap()
            };
            let sets = search();
            let of = |set: &Set| loss(&vectors)(set).unwrap();
            prop_assert_eq!(of(&sets[0]), least(&vectors, count));
            prop_assert!(sets.len() <= 3 && sets.is_sorted_by(|a, b| a != b && of(a) <= of(b)));
            for set in &sets {
                prop_assert_eq!(set.len(), count);
                prop_assert!(set.is_sorted_by(|a, b| a < b));
            }
            prop_assert_eq!(sets, search());
        }
    }
}
