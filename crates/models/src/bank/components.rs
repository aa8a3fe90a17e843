//! The components of adapters of different ranks, and which of them train: a slot that was factorised trains
//! the last few of its components alone, so that it trains no more parameters than an adapter of that rank
//! would.

use super::{Bank, Pick, Projections, RankedAdapters, index};
use crate::Result;
use candle_core::Tensor;
use lightmoe_kernels::{Segment, low_rank};
use std::ops::Range;
use std::sync::Arc;

impl Bank {
    /// Lets the last `trained` components of each adapted or mixed slot train, and no others.
    pub fn freeze_components(&mut self, trained: usize) -> Result<()> {
        if let Some(mixed) = &mut self.mixed {
            mixed.freeze_components(trained)?;
        }
        let ranks = &self.order.ranks;
        let Some(all) = self.adapters.take() else {
            return Ok(());
        };
        let first = ranks.iter().map(|&r| 0..r.saturating_sub(trained));
        let last = ranks.iter().map(|&r| r.saturating_sub(trained)..r);
        self.frozen = all.select(&first.collect::<Vec<_>>())?;
        self.adapters = all.select(&last.collect::<Vec<_>>())?;
        Ok(())
    }

    /// Puts the components together again that [`Bank::freeze_components`] took apart.
    pub fn join_components(&mut self) -> Result<()> {
        if let Some(mixed) = &mut self.mixed {
            mixed.join_components()?;
        }
        let Some(frozen) = self.frozen.take() else {
            return Ok(());
        };
        self.adapters = Some(match self.adapters.take() {
            None => frozen,
            Some(last) => frozen.join(&last)?,
        });
        Ok(())
    }
}

/// Where the components of slots of these ranks begin, and the last end.
pub(crate) fn starts(ranks: impl IntoIterator<Item = usize>) -> Arc<[usize]> {
    let mut end = 0;
    let ends = ranks.into_iter().map(|rank| {
        end += rank;
        end
    });
    std::iter::once(0).chain(ends).collect()
}

impl RankedAdapters {
    /// The components of `slot`.
    pub fn of(&self, slot: usize) -> Range<usize> {
        self.starts[slot]..self.starts[slot + 1]
    }

    /// The components `ranges[i]` of slot `i`; `None` if no slot has any.
    fn select(&self, ranges: &[Range<usize>]) -> Result<Option<Self>> {
        let places = ranges.iter().zip(self.starts.iter());
        let places = places.flat_map(|(range, &first)| first + range.start..first + range.end);
        let places: Vec<u32> = places.map(|place| place as u32).collect();
        if places.is_empty() {
            return Ok(None);
        }
        let places = index(&places, &self.a.gate)?;
        let rows = |w: &Tensor| Ok(w.index_select(&places, 0)?);
        Ok(Some(Self {
            a: self.a.map(rows)?,
            b: self.b.map(rows)?,
            starts: starts(ranges.iter().map(Range::len)),
        }))
    }

    /// The components of each slot, then those that `other` has of it.
    fn join(&self, other: &Self) -> Result<Self> {
        let slots = self.starts.len() - 1;
        let whole = self.starts[slots];
        // Of both, one after the other.
        let places = (0..slots).flat_map(|slot| {
            let last = other.of(slot);
            self.of(slot).chain(whole + last.start..whole + last.end)
        });
        let places: Vec<u32> = places.map(|place| place as u32).collect();
        let places = index(&places, &self.a.gate)?;
        let joined = |of: fn(&Self) -> &Projections| -> Result<Projections> {
            let one = |pick: Pick| -> Result<Tensor> {
                let last = pick(of(other));
                let both = Tensor::cat(&[&pick(of(self)).to_dtype(last.dtype())?, last], 0)?;
                Ok(both.index_select(&places, 0)?)
            };
            Ok(Projections {
                gate: one(|p| &p.gate)?,
                up: one(|p| &p.up)?,
                down: one(|p| &p.down)?,
            })
        };
        let ranks = (0..slots).map(|slot| self.of(slot).len() + other.of(slot).len());
        Ok(Self {
            a: joined(|adapters| &adapters.a)?,
            b: joined(|adapters| &adapters.b)?,
            starts: starts(ranks),
        })
    }

    /// The adapters of consecutive slots.
    pub(super) fn part(&self, slots: Range<usize>) -> Result<Self> {
        let (first, end) = (self.starts[slots.start], self.starts[slots.end]);
        let rows = |w: &Tensor| Ok(w.narrow(0, first, end - first)?);
        let starts = self.starts[slots.start..=slots.end].iter();
        Ok(Self {
            a: self.a.map(rows)?,
            b: self.b.map(rows)?,
            starts: starts.map(|start| start - first).collect(),
        })
    }

    /// `U·(V·x)` of sorted rows.
    pub(super) fn apply(
        &self,
        x: &Tensor,
        pick: Pick,
        segments: &Arc<[Segment]>,
    ) -> Result<Tensor> {
        let factors = [pick(&self.a), pick(&self.b)];
        Ok(low_rank(x, factors, segments, &self.starts)?)
    }
}
