//! Seeds, hashes and splits: everything random or held out in this crate
//! derives from the three functions below, so that a run is repeatable on any
//! machine.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Split;

/// FNV-1a of `bytes` with a final avalanche (the 64-bit finaliser of MurmurHash3),
/// so that the low bits are as good as the high ones.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    let mut h = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// An independent generator for `(seed, label, a, b)`.
pub(crate) fn stream(seed: u64, label: &str, a: u64, b: u64) -> ChaCha8Rng {
    let mut bytes = [0_u8; 32];
    for (chunk, word) in bytes
        .chunks_exact_mut(8)
        .zip([seed, hash(label.as_bytes()), a, b])
    {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(bytes)
}

/// The split that owns the canonical content `key`: 80% train, 10% validation,
/// 10% test, a function of the content alone.
pub(crate) fn split_of(key: &str) -> Split {
    match hash(key.as_bytes()) % 10 {
        0..=7 => Split::Train,
        8 => Split::Validation,
        _ => Split::Test,
    }
}

/// A uniformly drawn element; `from` must not be empty.
pub(crate) fn pick<'a, T>(rng: &mut ChaCha8Rng, from: &'a [T]) -> &'a T {
    &from[rng.random_range(0..from.len())]
}

/// A drawn index, with probability proportional to `weights`.
pub(crate) fn weighted(rng: &mut ChaCha8Rng, weights: &[u32]) -> usize {
    let mut at = rng.random_range(0..weights.iter().sum::<u32>());
    for (index, &weight) in weights.iter().enumerate() {
        if at < weight {
            return index;
        }
        at -= weight;
    }
    weights.len() - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_have_their_shares() {
        let count = |want| {
            (0..10_000)
                .filter(|i| split_of(&format!("item {i}")) == want)
                .count()
        };
        assert!((7_800..8_200).contains(&count(Split::Train)));
        assert!((850..1_150).contains(&count(Split::Validation)));
        assert!((850..1_150).contains(&count(Split::Test)));
    }

    #[test]
    fn streams_differ_in_every_part() {
        let first = |seed, label, a, b| stream(seed, label, a, b).random::<u64>();
        let base = first(1, "x", 2, 3);
        assert_eq!(base, first(1, "x", 2, 3));
        for other in [
            first(2, "x", 2, 3),
            first(1, "y", 2, 3),
            first(1, "x", 3, 3),
            first(1, "x", 2, 4),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn weights_are_respected() {
        let mut rng = stream(0, "weights", 0, 0);
        let hits = (0..1_000)
            .filter(|_| weighted(&mut rng, &[3, 0, 1]) == 0)
            .count();
        assert!((690..810).contains(&hits), "{hits}");
    }
}
