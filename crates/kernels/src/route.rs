//! Routing on the host: the choice of experts, and the permutation that sorts (token, expert)
//! pairs by the place of the expert in the bank.

use crate::grouped::Segment;
use crate::real::{dispatch, view};
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// The `k` largest entries of every row of `scores: [T, E]`, in descending order, ties to the
/// lower index and NaN last: `[T · k]` expert numbers. No gradient flows through a choice.
pub fn top_k(scores: &Tensor, k: usize) -> Result<Vec<u32>> {
    let (tokens, experts) = scores.dims2()?;
    if k == 0 || k > experts {
        candle_core::bail!("top_k: cannot choose {k} of {experts} experts")
    }
    // The host sorts the rows by what was chosen.
    let scores = scores.to_device(&Device::Cpu)?.contiguous()?;
    let view = view(&scores);
    dispatch!(scores.dtype(), "top_k", T => {
        let scores = view.slice::<T>()?;
        let mut chosen = vec![0u32; tokens * k];
        chosen.par_chunks_mut(k).zip(scores.par_chunks(experts)).for_each(|(chosen, row)| {
            let mut order: Vec<u32> = (0..experts as u32).collect();
            let rank = |a: &u32, b: &u32| {
                let (x, y) = (row[*a as usize], row[*b as usize]);
                y.partial_cmp(&x)
                    .unwrap_or_else(|| x.is_nan().cmp(&y.is_nan()))
                    .then(a.cmp(b))
            };
            if k < experts {
                order.select_nth_unstable_by(k, rank);
            }
            order.truncate(k);
            order.sort_unstable_by(rank);
            chosen.copy_from_slice(&order);
        });
        Ok(chosen)
    })
}

/// (token, expert) pairs sorted by the expert's position in a bank.
#[derive(Debug, Clone)]
pub struct Dispatch {
    /// Token of each sorted row: `[S]`.
    pub tokens: Arc<[u32]>,
    /// Index into the flat `[T · K]` gates of each sorted row: `[S]`.
    pub pairs: Arc<[u32]>,
    /// First sorted row of each position, and the end: `[positions + 1]`.
    pub starts: Vec<usize>,
}

impl Dispatch {
    /// Sorts the choices `chosen: [T · k]` by `position[expert]`, keeping token order within a
    /// position. `positions` is the number of positions in the bank.
    ///
    /// # Panics
    /// If an expert has no position below `positions`, or if `k` is zero and there are choices.
    pub fn new(chosen: &[u32], k: usize, position: &[usize], positions: usize) -> Self {
        let mut starts = vec![0usize; positions + 1];
        for &expert in chosen {
            starts[position[expert as usize] + 1] += 1;
        }
        for i in 0..positions {
            starts[i + 1] += starts[i];
        }
        let mut next = starts.clone();
        let (mut tokens, mut pairs) = (vec![0; chosen.len()], vec![0; chosen.len()]);
        for (pair, &expert) in chosen.iter().enumerate() {
            let row = &mut next[position[expert as usize]];
            tokens[*row] = (pair / k) as u32;
            pairs[*row] = pair as u32;
            *row += 1;
        }
        Self {
            tokens: tokens.into(),
            pairs: pairs.into(),
            starts,
        }
    }

    /// The rows of positions `first..last` as segments of consecutive groups `0..last - first`,
    /// numbered from the first of these rows.
    pub fn segments(&self, first: usize, last: usize) -> Arc<[Segment]> {
        let base = self.starts[first];
        (first..last)
            .map(|p| Segment {
                group: p - first,
                start: self.starts[p] - base,
                len: self.starts[p + 1] - self.starts[p],
            })
            .collect()
    }

    /// The distinct (token, group) pairs of positions `first..last`, where `group[p - first]` is the
    /// group of a position and groups are contiguous and ascending: the token of each pair, the pair
    /// of each row, and the pairs as one segment a group.
    pub fn token_groups(&self, first: usize, last: usize, group: &[usize]) -> TokenGroups {
        let groups = group.last().map_or(0, |g| g + 1);
        let rows = self.starts[first]..self.starts[last];
        let tokens = self.tokens[rows.clone()]
            .iter()
            .max()
            .map_or(0, |&t| t as usize + 1);
        let mut pair_tokens = Vec::new();
        let mut pair_of_row = vec![0u32; rows.len()];
        let mut segments = Vec::with_capacity(groups);
        let mut seen = vec![u32::MAX; tokens];
        let mut p = first;
        for g in 0..groups {
            let begin = p;
            while p < last && group[p - first] == g {
                p += 1;
            }
            let start = pair_tokens.len();
            let run = self.starts[begin]..self.starts[p];
            for row in run.clone() {
                let token = self.tokens[row];
                let pair = &mut seen[token as usize];
                if *pair == u32::MAX {
                    *pair = pair_tokens.len() as u32;
                    pair_tokens.push(token);
                }
                pair_of_row[row - rows.start] = *pair;
            }
            for row in run {
                seen[self.tokens[row] as usize] = u32::MAX;
            }
            segments.push(Segment {
                group: g,
                start,
                len: pair_tokens.len() - start,
            });
        }
        TokenGroups {
            tokens: pair_tokens.into(),
            pair_of_row: pair_of_row.into(),
            segments: segments.into(),
        }
    }
}

/// The rows on which the shared bases work: one per token and hit group.
#[derive(Debug, Clone)]
pub struct TokenGroups {
    /// Token of each pair: `[P]`.
    pub tokens: Arc<[u32]>,
    /// Pair of each sorted row: `[S]`.
    pub pair_of_row: Arc<[u32]>,
    /// One run of pairs a group.
    pub segments: Arc<[Segment]>,
}
