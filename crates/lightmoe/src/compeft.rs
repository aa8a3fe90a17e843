//! The search of ComPEFT (arXiv 2311.13171) for how much of an update to keep.

use crate::progress::{Progress, stopped};
use anyhow::{Context, Result};
use lightmoe_export::compeft::{Delta, Update};
use lightmoe_models::Checkpoint;

/// Shares of the changed numbers that are tried.
const DENSITIES: [f64; 5] = [0.05, 0.1, 0.2, 0.3, 0.5];
/// Sizes of a kept number that are tried, in standard deviations of all changes.
const ALPHAS: [f64; 9] = [0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];

/// The update of the grid whose model has the lowest `score`, the first of equal ones, and that score.
///
/// # Errors
/// What packing and scoring bring.
pub fn search(
    delta: &Delta<'_>,
    score: &dyn Fn(&Checkpoint) -> Result<f64>,
) -> Result<(Update, f64)> {
    let bar = Progress::new("search", DENSITIES.len() * ALPHAS.len());
    let (mut best, mut done): (Option<(Update, f64)>, _) = (None, 0);
    for density in DENSITIES {
        // Alpha changes nothing in what is kept.
        let kept = delta.pack(density, ALPHAS[0], &mut |_, _| !stopped())?;
        for alpha in ALPHAS {
            let update = kept.with_alpha(alpha)?;
            let found = score(&delta.preview(&update)?)?;
            if best.as_ref().is_none_or(|(_, lowest)| found < *lowest) {
                bar.note(format!("{found:.4} at density {density}, alpha {alpha}"));
                best = Some((update, found));
            }
            done += 1;
            bar.at(done);
        }
    }
    best.context("the search tried nothing; report it")
}
