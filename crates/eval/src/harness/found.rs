//! What came of requests, as far as it is known.

use crate::likelihood::Answer;
use crate::{Error, Result};
use std::ops::Range;

/// Where the results of a request are.
pub(super) enum Place {
    /// Rows whose likelihoods are added up.
    Rows(Range<usize>),
    /// Prompts, one for each answer to a request.
    Prompts(Range<usize>),
}

/// What is known so far, by row and by prompt.
pub(super) struct Found {
    pub(super) rows: Vec<Option<RowScore>>,
    pub(super) answers: Vec<Option<String>>,
    /// Rows and prompts that the cache knew, ascending: they are in no batch and no queue.
    pub(super) cached: [Vec<usize>; 2],
}

/// The score of a row.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct RowScore {
    /// Log-likelihood of the answer in nats.
    pub(super) log_likelihood: f64,
    /// Whether greedy decoding gives it.
    pub(super) greedy: bool,
    /// Its tokens.
    pub(super) tokens: usize,
}

impl RowScore {
    pub(super) fn of(answer: &Answer) -> Result<Self> {
        let log_likelihood = -answer.nll.iter().sum::<f64>();
        match log_likelihood.is_finite() {
            true => Ok(Self {
                log_likelihood,
                greedy: answer.greedy,
                tokens: answer.nll.len(),
            }),
            false => Err(Error::NoNumbers),
        }
    }
}

impl Found {
    /// The log-likelihood at a place, if all of it is known.
    pub(super) fn score(&self, place: &Place) -> Option<RowScore> {
        let Place::Rows(range) = place else {
            return None;
        };
        let start = RowScore {
            log_likelihood: 0.0,
            greedy: true,
            tokens: 0,
        };
        self.rows[range.clone()].iter().try_fold(start, |sum, row| {
            let row = (*row)?;
            Some(RowScore {
                log_likelihood: sum.log_likelihood + row.log_likelihood,
                greedy: sum.greedy && row.greedy,
                tokens: sum.tokens + row.tokens,
            })
        })
    }

    /// The answers at a place, if all are known.
    pub(super) fn answers(&self, place: &Place) -> Option<Vec<&str>> {
        match place {
            Place::Prompts(prompts) => {
                let answers = self.answers[prompts.clone()].iter();
                answers.map(Option::as_deref).collect()
            }
            Place::Rows(_) => None,
        }
    }

    /// Whether nothing is missing.
    pub(super) fn is_whole(&self) -> bool {
        self.rows.iter().all(Option::is_some) && self.answers.iter().all(Option::is_some)
    }
}
