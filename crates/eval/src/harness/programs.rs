//! Programs that a model wrote, and whether they do what their tests say.

use crate::{Error, Progress, Result};
use rayon::prelude::*;
use std::collections::HashMap;

/// Runs programs that a model wrote, several at once.
pub trait Judge: Sync {
    /// Whether the program comes to its end without an error.
    ///
    /// # Errors
    /// Why it could not be run, which says nothing of the program.
    fn passes(&self, program: &str) -> std::result::Result<bool, String>;
}

/// What became of programs, by their text.
#[derive(Default)]
pub(super) struct Verdicts(HashMap<String, bool>);

impl Verdicts {
    /// Runs each program once. After an interruption some have no verdict.
    ///
    /// # Errors
    /// [`Error::Program`] if one could not be run.
    pub(super) fn run(
        mut programs: Vec<String>,
        judge: &dyn Judge,
        progress: &mut Progress<'_>,
    ) -> Result<Self> {
        programs.sort();
        programs.dedup();
        progress.total += programs.len();
        let mut verdicts = HashMap::new();
        for some in programs.chunks(rayon::current_num_threads()) {
            let judged: std::result::Result<Vec<bool>, String> = some
                .par_iter()
                .map(|program| judge.passes(program))
                .collect();
            let judged = judged.map_err(Error::Program)?;
            verdicts.extend(some.iter().cloned().zip(judged));
            match progress.advance(some.len()) {
                Err(Error::Interrupted) => break,
                other => other?,
            }
        }
        Ok(Self(verdicts))
    }

    /// Whether a program passed, if it was run.
    pub(super) fn of(&self, program: &str) -> Option<bool> {
        self.0.get(program).copied()
    }
}

/// An answer with the tests that are to pass.
pub(super) fn program(answer: &str, tests: &str) -> String {
    format!("{answer}\n{tests}")
}

/// An estimate without bias of how likely one of `k` answers passes, if `passed` of `answers` did. Chen
/// et al., "Evaluating large language models trained on code" (2021).
pub(super) fn pass_at_k(answers: usize, passed: usize, k: usize) -> f64 {
    let failed = answers - passed;
    let all_fail = (failed + 1..=answers).map(|n| 1.0 - k as f64 / n as f64);
    match failed < k {
        true => 1.0,
        false => 1.0 - all_fail.product::<f64>(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_counts_the_choices_of_k_answers() {
        let choose = |n: u64, k: u64| {
            (1..=k)
                .map(|i| (n - k + i) as f64 / i as f64)
                .product::<f64>()
        };
        for (n, c, k) in [
            (1, 0, 1),
            (1, 1, 1),
            (10, 3, 1),
            (10, 3, 5),
            (64, 2, 8),
            (5, 4, 2),
        ] {
            let want = match n - c < k {
                true => 1.0,
                false => 1.0 - choose(n - c, k) / choose(n, k),
            };
            let got = pass_at_k(n as usize, c as usize, k as usize);
            assert!((got - want).abs() < 1e-12, "{n} {c} {k}: {got} {want}");
        }
    }
}
