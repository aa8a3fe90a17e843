//! Which rows the model reads together.
//!
//! Rows of one length are padded least, so they go together. Rows that begin alike (the choices of one
//! item, questions behind the same few-shot examples) go together where it pays, and what they have in
//! common is read once. Rows of which the model reads the same count once.

use crate::likelihood::input;
use lightmoe_data::Encoded;
use std::cmp::Reverse;
use std::ops::Range;

/// Shared beginnings are cut to a multiple of this, so that those of about one length go together.
const STEP: usize = 8;
/// Reading in two passes costs something, so at least this part of the tokens must be saved.
const LEAST_SAVED: usize = 4;

/// Rows that are read together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Numbers of the rows; those with the same input are together, and those that begin alike.
    pub(crate) rows: Vec<usize>,
    /// Tokens at the beginning of each row that are read before the rest, once for all rows that
    /// begin so.
    pub(crate) shared: usize,
}

/// All rows in batches, a function of the rows alone. A batch has at most `batch_tokens` tokens with
/// padding, what is shared counted for every row, or one row.
pub(crate) fn batches(rows: &[Encoded], batch_tokens: usize) -> Vec<Batch> {
    batches_of(rows, (0..rows.len()).collect(), batch_tokens)
}

/// The same of some rows.
pub(crate) fn batches_of(
    rows: &[Encoded],
    mut order: Vec<usize>,
    batch_tokens: usize,
) -> Vec<Batch> {
    order.sort_by_key(|&row| input(&rows[row]));
    let mut inputs: Vec<Vec<usize>> = Vec::new();
    for row in order {
        match inputs.last_mut() {
            Some(same) if input(&rows[same[0]]) == input(&rows[row]) => same.push(row),
            _ => inputs.push(vec![row]),
        }
    }
    let plan = Plan::new(rows, &inputs);
    let mut units = Vec::new();
    plan.share(0..inputs.len(), &mut units);
    // Within a unit the order stays, so that rows that begin alike are together.
    units.sort_by_key(|unit| (Reverse(unit.shared), Reverse(plan.longest(&unit.inputs))));
    let mut batches: Vec<Batch> = Vec::new();
    let (mut width, mut count) = (0, 0);
    for unit in units {
        for number in unit.inputs {
            let length = plan.lengths[number];
            let fits = (count + 1) * width.max(length) <= batch_tokens;
            match batches.last_mut() {
                Some(batch) if batch.shared == unit.shared && fits => {
                    batch.rows.extend(&inputs[number]);
                    (width, count) = (width.max(length), count + 1);
                }
                _ => {
                    batches.push(Batch {
                        rows: inputs[number].clone(),
                        shared: unit.shared,
                    });
                    (width, count) = (length, 1);
                }
            }
        }
    }
    batches
}

/// Inputs that share a beginning, or one.
struct Unit {
    inputs: Range<usize>,
    shared: usize,
}

/// Inputs in order of their tokens, and what neighbours have in common.
struct Plan {
    lengths: Vec<usize>,
    /// Tokens that input `i` has in common with the one before it, none of which predicts an answer.
    common: Vec<usize>,
}

impl Plan {
    fn new(rows: &[Encoded], inputs: &[Vec<usize>]) -> Self {
        // The last token before an answer predicts it, so it is not among what is only read.
        let before_answer = |same: &Vec<usize>| {
            let starts = same.iter().map(|&row| rows[row].answer_start - 1);
            starts.min().unwrap_or(0)
        };
        let common = |pair: &[Vec<usize>]| {
            let (a, b) = (input(&rows[pair[0][0]]), input(&rows[pair[1][0]]));
            let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            same.min(before_answer(&pair[0]))
                .min(before_answer(&pair[1]))
        };
        Self {
            lengths: inputs
                .iter()
                .map(|same| input(&rows[same[0]]).len())
                .collect(),
            common: std::iter::once(0)
                .chain(inputs.windows(2).map(common))
                .collect(),
        }
    }

    fn longest(&self, inputs: &Range<usize>) -> usize {
        self.lengths[inputs.clone()]
            .iter()
            .copied()
            .max()
            .unwrap_or(0)
    }

    /// Divides inputs into units so that the most tokens are saved; how many that are.
    fn share(&self, inputs: Range<usize>, units: &mut Vec<Unit>) -> usize {
        let inner = inputs.start + 1..inputs.end;
        let Some(least) = inner.clone().map(|i| self.common[i]).min() else {
            units.push(Unit { inputs, shared: 0 });
            return 0;
        };
        let shared = least / STEP * STEP;
        let saved = shared * inner.len();
        let (begin, mut apart, mut start) = (units.len(), 0, inputs.start);
        for cut in inner
            .filter(|&i| self.common[i] == least)
            .chain([inputs.end])
        {
            apart += self.share(start..cut, units);
            start = cut;
        }
        let all: usize = self.lengths[inputs.clone()].iter().sum();
        if saved <= apart || saved * LEAST_SAVED < all {
            return apart;
        }
        units.truncate(begin);
        units.push(Unit { inputs, shared });
        saved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    fn row(tokens: &[u32], answer: usize) -> Encoded {
        Encoded {
            tokens: tokens.to_vec(),
            answer_start: tokens.len() - answer,
        }
    }

    #[test]
    fn batches_hold_every_row_once_and_keep_to_their_size() {
        let mut rng = lightmoe_models::random::stream(4, "rows");
        let rows: Vec<Encoded> = (0..80)
            .map(|i| {
                // Beginnings of several lengths, in common to some.
                let mut tokens: Vec<u32> = (0..i % 4 * 9).map(|at| (i % 3 + at) as u32).collect();
                tokens.extend((0..2 + i % 9).map(|_| rng.random_range(0..9)));
                row(&tokens, 1 + i % 2)
            })
            .collect();
        for limit in [1, 24, 200, 4000] {
            let all = batches(&rows, limit);
            for batch in &all {
                let mut inputs: Vec<&[u32]> = batch.rows.iter().map(|&r| input(&rows[r])).collect();
                inputs.dedup();
                let width = inputs.iter().map(|input| input.len()).max().unwrap();
                assert!(inputs.len() == 1 || inputs.len() * width <= limit);
                let starts = batch.rows.iter().map(|&r| rows[r].answer_start);
                assert!(starts.min().unwrap() > batch.shared);
                let different = inputs.len();
                inputs.sort_unstable();
                inputs.dedup();
                assert_eq!(inputs.len(), different, "the same input twice in a batch");
            }
            let mut seen: Vec<usize> = all.into_iter().flat_map(|batch| batch.rows).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..80).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_longer_beginning_is_shared_where_it_saves_more() {
        // Two items of three choices behind the same eight tokens.
        let items: Vec<Encoded> = [5, 6]
            .iter()
            .flat_map(|&item| {
                (1..4).map(move |choice| {
                    let tokens: Vec<u32> = (0..8).chain([item; 16]).chain([choice; 4]).collect();
                    row(&tokens, 4)
                })
            })
            .collect();
        let all = batches(&items, 1000);
        assert_eq!((all.len(), all[0].shared, all[0].rows.len()), (1, 16, 6));
        // Eight questions behind the same sixteen examples.
        let questions: Vec<Encoded> = (20..28)
            .map(|question| row(&(0..16).chain([question; 3]).collect::<Vec<_>>(), 1))
            .collect();
        let all = batches(&questions, 1000);
        assert_eq!((all.len(), all[0].shared, all[0].rows.len()), (1, 16, 8));
    }
}
