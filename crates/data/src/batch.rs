//! Batches as pure functions of seed and step, so that a resumed run needs no state.

use rand::seq::SliceRandom;

use crate::pretrain::Mix;
use crate::rng::stream;
use crate::tokenizer::Table;
use crate::{Encoded, Error, Result, tokenizer};

/// Token sequences, right-padded to a common length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// `[rows, len]`, row-major.
    pub tokens: Vec<u32>,
    /// Number of sequences.
    pub rows: usize,
    /// Length of the longest sequence.
    pub len: usize,
    /// Length of each sequence without padding: `[rows]`.
    pub lengths: Vec<usize>,
    /// `[rows, len]`: whether this token is to be predicted from those before it.
    pub loss_mask: Vec<bool>,
}

impl Batch {
    /// Pads `items` on the right with `pad`; the loss is on each one's answer.
    pub fn new<'a>(items: impl IntoIterator<Item = &'a Encoded>, pad: u32) -> Self {
        let items: Vec<&Encoded> = items.into_iter().collect();
        let lengths: Vec<usize> = items.iter().map(|item| item.tokens.len()).collect();
        let len = lengths.iter().copied().max().unwrap_or(0);
        let mut tokens = Vec::with_capacity(items.len() * len);
        let mut loss_mask = Vec::with_capacity(items.len() * len);
        for item in &items {
            let end = tokens.len() + len;
            loss_mask.extend((0..item.tokens.len()).map(|at| at >= item.answer_start));
            tokens.extend_from_slice(&item.tokens);
            tokens.resize(end, pad);
            loss_mask.resize(end, false);
        }
        Self {
            tokens,
            rows: items.len(),
            len,
            lengths,
            loss_mask,
        }
    }
}

/// Shuffled batches of a fixed set of examples: each epoch visits every example
/// once, in an order of its own, and a batch may end one epoch and begin the next.
#[derive(Debug, Clone)]
pub struct Sampler {
    items: Vec<Encoded>,
    batch_size: usize,
    seed: u64,
    pad: u32,
}

impl Sampler {
    /// Batches of `batch_size` sequences, padded with [`tokenizer::PAD_ID`].
    ///
    /// # Errors
    /// [`Error::Batch`] if there are no items or `batch_size` is 0.
    pub fn new(items: Vec<Encoded>, batch_size: usize, seed: u64) -> Result<Self> {
        if items.is_empty() {
            return Err(Error::Batch("there are no examples; check the data"));
        }
        if batch_size == 0 {
            return Err(Error::Batch("the batch size is 0; use 1 or more"));
        }
        Ok(Self {
            items,
            batch_size,
            seed,
            pad: tokenizer::PAD_ID,
        })
    }

    /// Pads with `pad` instead.
    #[must_use]
    pub fn with_pad(mut self, pad: u32) -> Self {
        self.pad = pad;
        self
    }

    /// The batch of `step`, counted from 0.
    pub fn batch(&self, step: usize) -> Batch {
        let first = step * self.batch_size;
        let mut order = (usize::MAX, Vec::new());
        let items: Vec<&Encoded> = (first..first + self.batch_size)
            .map(|at| {
                let epoch = at / self.items.len();
                if order.0 != epoch {
                    order = (epoch, self.order(epoch));
                }
                &self.items[order.1[at % self.items.len()]]
            })
            .collect();
        Batch::new(items, self.pad)
    }

    fn order(&self, epoch: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.items.len()).collect();
        order.shuffle(&mut stream(self.seed, "epoch", epoch as u64, 0));
        order
    }
}

/// Pre-training documents, each followed by an end token, packed into windows of
/// equal length. Each window begins with a document and cuts off its last one.
#[derive(Debug, Clone)]
pub struct PackedStream {
    table: Table,
    rows: usize,
    len: usize,
    seed: u64,
    mix: Mix,
}

impl PackedStream {
    /// Batches of `rows` windows of `len` tokens of [`tokenizer::build`]'s tokenizer.
    ///
    /// # Errors
    /// [`Error::Batch`] if `rows` or `len` is 0.
    pub fn new(rows: usize, len: usize, seed: u64) -> Result<Self> {
        if rows == 0 || len == 0 {
            return Err(Error::Batch("rows and length must be 1 or more"));
        }
        Ok(Self {
            table: Table::new()?,
            rows,
            len,
            seed,
            mix: Mix::default(),
        })
    }

    /// The batch of `step`, counted from 0. Every token is a target.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails.
    pub fn batch(&self, step: usize) -> Result<Batch> {
        let mut tokens = Vec::with_capacity(self.rows * self.len);
        for row in 0..self.rows {
            let mut rng = stream(self.seed, "packed", step as u64, row as u64);
            let end = (row + 1) * self.len;
            while tokens.len() < end {
                let (_, document) = self.mix.document(&mut rng);
                self.table.encode(&document, &mut tokens)?;
                tokens.push(tokenizer::EOS_ID);
            }
            tokens.truncate(end);
        }
        Ok(Batch {
            loss_mask: vec![true; tokens.len()],
            tokens,
            rows: self.rows,
            len: self.len,
            lengths: vec![self.len; self.rows],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(count: u32) -> Vec<Encoded> {
        (0..count)
            .map(|i| Encoded {
                tokens: vec![10 + i; 2 + i as usize % 3],
                answer_start: 1,
            })
            .collect()
    }

    #[test]
    fn rows_are_padded_and_masked() {
        let batch = Batch::new(&items(3), 7);
        assert_eq!((batch.rows, batch.len), (3, 4));
        assert_eq!(batch.lengths, [2, 3, 4]);
        assert_eq!(batch.tokens, [10, 10, 7, 7, 11, 11, 11, 7, 12, 12, 12, 12]);
        let mask: Vec<u8> = batch.loss_mask.iter().map(|&bit| u8::from(bit)).collect();
        assert_eq!(mask, [0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn each_epoch_visits_everything_in_another_order() {
        let sampler = Sampler::new(items(12), 5, 3).unwrap();
        let firsts: Vec<u32> = (0..12)
            .flat_map(|step| {
                let batch = sampler.batch(step);
                batch
                    .tokens
                    .chunks(batch.len)
                    .map(|row| row[0])
                    .collect::<Vec<_>>()
            })
            .collect();
        let mut orders = Vec::new();
        for epoch in firsts.chunks(12) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (10..22).collect::<Vec<_>>());
            assert!(!orders.contains(&epoch));
            orders.push(epoch);
        }
        assert_eq!(sampler.batch(7), sampler.batch(7));
        let other = Sampler::new(items(12), 5, 4).unwrap();
        assert_ne!(sampler.batch(0), other.batch(0));
    }

    #[test]
    fn nothing_makes_no_batches() {
        assert!(Sampler::new(Vec::new(), 1, 0).is_err());
        assert!(Sampler::new(items(1), 0, 0).is_err());
        assert!(PackedStream::new(1, 0, 0).is_err());
    }

    #[test]
    fn packed_windows_are_full_and_pure() {
        let packed = PackedStream::new(4, 96, 5).unwrap();
        let batch = packed.batch(3).unwrap();
        assert_eq!((batch.rows, batch.len, batch.tokens.len()), (4, 96, 384));
        assert!(batch.loss_mask.iter().all(|&bit| bit));
        assert_eq!(batch, packed.batch(3).unwrap());
        assert_ne!(batch, packed.batch(4).unwrap());
        assert_ne!(batch.tokens[..96], batch.tokens[96..192]);
        // A window of another length is a prefix: rows do not depend on each other.
        let shorter = PackedStream::new(2, 40, 5).unwrap().batch(3).unwrap();
        assert_eq!(shorter.tokens[40..], batch.tokens[96..136]);
    }
}
