//! From a vector `tau` to its signs: which entries are kept, and how large they all become. The
//! vector is gone through several times, piece by piece, and never held.

use super::golomb::{Signs, SignsWriter, rice_parameter};
use crate::{Error, Result};

/// Goes once through `tau`, in order, and shows its pieces.
pub(crate) type Pass<'a> = dyn FnMut(&mut dyn FnMut(&[f32])) -> Result<()> + 'a;

/// Bits of a magnitude that a first pass sorts by, and those that a second one does.
const UPPER: u32 = 15;
const LOWER: u32 = 16;

/// What one pass tells of `tau`.
#[derive(Debug)]
pub(crate) struct Statistics {
    n: u64,
    zeros: u64,
    mean: f64,
    /// Sum of the squared distances from the mean.
    squares: f64,
    /// How many magnitudes begin with each pattern of the upper bits.
    upper: Counts,
}

/// What |τ| is ordered by: its bits, which as a number grow with it.
fn magnitude(tau: f32) -> u32 {
    tau.abs().to_bits()
}

impl Statistics {
    pub(crate) fn of(pass: &mut Pass<'_>) -> Result<Self> {
        let mut all = Self {
            n: 0,
            zeros: 0,
            mean: 0.0,
            squares: 0.0,
            upper: Counts::new(UPPER),
        };
        pass(&mut |tau| all.push(tau))?;
        Ok(all)
    }

    fn push(&mut self, tau: &[f32]) {
        if tau.is_empty() {
            return;
        }
        // Moments of the piece, joined to those before it: no difference of large sums.
        let n = tau.len() as f64;
        let mean = tau.iter().map(|&t| f64::from(t)).sum::<f64>() / n;
        let squares: f64 = tau.iter().map(|&t| (f64::from(t) - mean).powi(2)).sum();
        let (before, distance) = (self.n as f64, mean - self.mean);
        let total = before + n;
        self.mean += distance * n / total;
        self.squares += squares + distance * distance * before * n / total;
        self.n += tau.len() as u64;
        for &t in tau {
            let magnitude = magnitude(t);
            self.zeros += u64::from(magnitude == 0);
            self.upper.add(magnitude >> LOWER);
        }
    }

    /// Entries of the vector.
    pub(crate) fn n(&self) -> u64 {
        self.n
    }

    /// The population standard deviation of the whole vector.
    pub(crate) fn deviation(&self) -> f64 {
        (self.squares / self.n as f64).sqrt()
    }
}

/// The signs of the `round(density · n)` entries of largest magnitude; of equal ones the first in the
/// vector are taken, and zeros never.
///
/// # Errors
/// If nothing would be kept; what the passes bring.
pub(crate) fn signs(pass: &mut Pass<'_>, statistics: &Statistics, density: f64) -> Result<Signs> {
    let wanted = (density * statistics.n as f64).round_ties_even() as u64;
    let kept = wanted.min(statistics.n - statistics.zeros);
    if kept == 0 {
        return Err(Error::Invalid(format!(
            "a density of {density} keeps none of {} numbers; give a larger one",
            statistics.n
        )));
    }
    let (upper, rank) = statistics.upper.largest(kept);
    let mut lower = Counts::new(LOWER);
    pass(&mut |tau| {
        let magnitudes = tau.iter().map(|&t| magnitude(t));
        let alike = magnitudes.filter(|m| m >> LOWER == upper);
        alike.for_each(|m| lower.add(m & ((1 << LOWER) - 1)));
    })?;
    let (lower, mut ties) = lower.largest(rank);
    let threshold = upper << LOWER | lower;

    let rice = rice_parameter(kept, statistics.n);
    let (mut writer, mut index) = (SignsWriter::new(rice), 0);
    pass(&mut |tau| {
        for &t in tau {
            let magnitude = magnitude(t);
            let tied = magnitude == threshold && ties > 0;
            if tied || magnitude > threshold {
                writer.push(index, t < 0.0);
                ties -= u64::from(tied);
            }
            index += 1;
        }
    })?;
    // Only files that change between the passes could give other than the counted entries.
    Signs::decode(statistics.n, kept, rice, writer.finish()).map_err(|message| {
        Error::Invalid(format!(
            "the update has {message}; the checkpoints changed while they were read, pack again"
        ))
    })
}

/// How often each number of some bits occurs.
#[derive(Debug)]
struct Counts(Vec<u64>);

impl Counts {
    fn new(bits: u32) -> Self {
        Self(vec![0; 1 << bits])
    }

    fn add(&mut self, number: u32) {
        self.0[number as usize] += 1;
    }

    /// The `rank`-th largest number, from 1, and which it is among its equals.
    fn largest(&self, rank: u64) -> (u32, u64) {
        let mut left = rank;
        for (number, &count) in self.0.iter().enumerate().rev() {
            if left <= count {
                return (number as u32, left);
            }
            left -= count;
        }
        (0, 0)
    }
}
