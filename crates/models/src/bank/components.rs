//! Which components of the adapters train: a slot that was factorised trains the last few of its
//! components alone, so that it trains no more parameters than an adapter of that rank would.

use super::{Adapters, Bank, Projections};
use crate::Result;
use candle_core::Tensor;
use std::ops::Range;

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
        self.trained_components = trained;
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
        let trained = self.trained_components;
        self.adapters = Some(match self.adapters.take() {
            None => frozen,
            Some(last) => {
                let counts = self.order.ranks.iter();
                let counts = counts.map(|&r| (r.saturating_sub(trained), r.min(trained)));
                frozen.join(&last, &counts.collect::<Vec<_>>())?
            }
        });
        Ok(())
    }
}

/// The components of every slot, for one stack of matrices: a tensor a slot.
type Slots<'a> = dyn Fn(&[&Tensor], usize, usize) -> Result<Tensor> + 'a;

impl Adapters {
    /// The components `ranges[i]` of slot `i`, narrow slots filled up with zeros; `None` if no slot
    /// has any.
    fn select(&self, ranges: &[Range<usize>]) -> Result<Option<Self>> {
        let widest = ranges.iter().map(Range::len).max().unwrap_or(0);
        if widest == 0 {
            return Ok(None);
        }
        let of_slot = |stacks: &[&Tensor], slot: usize, dim: usize| {
            let Range { start, end } = ranges[slot];
            Ok(stacks[0].get(slot)?.narrow(dim, start, end - start)?)
        };
        Self::restack(&[self], ranges.len(), widest, &of_slot).map(Some)
    }

    /// The first `counts[i].0` components of slot `i` of this, then the first `counts[i].1` of `other`.
    fn join(&self, other: &Self, counts: &[(usize, usize)]) -> Result<Self> {
        let widest = counts.iter().map(|(a, b)| a + b).max().unwrap_or(0);
        let of_slot = |stacks: &[&Tensor], slot: usize, dim: usize| {
            let (a, b) = counts[slot];
            let part = |stack: &Tensor, n| stack.get(slot)?.narrow(dim, 0, n);
            Ok(Tensor::cat(
                &[part(stacks[0], a)?, part(stacks[1], b)?],
                dim,
            )?)
        };
        Self::restack(&[self, other], counts.len(), widest, &of_slot)
    }

    /// A stack of what `of_slot` takes from `parts`, each filled up to `widest` components.
    fn restack(parts: &[&Self], slots: usize, widest: usize, of_slot: &Slots<'_>) -> Result<Self> {
        let side = |pick: fn(&Self) -> &Projections, dim: usize| -> Result<Projections> {
            let stack = |of: fn(&Projections) -> &Tensor| -> Result<Tensor> {
                let stacks: Vec<&Tensor> = parts.iter().map(|part| of(pick(part))).collect();
                let each = (0..slots).map(|slot| {
                    let own = of_slot(&stacks, slot, dim)?;
                    let missing = widest - own.dim(dim)?;
                    Ok(own.pad_with_zeros(dim, 0, missing)?.contiguous()?)
                });
                Ok(Tensor::stack(&each.collect::<Result<Vec<_>>>()?, 0)?)
            };
            Ok(Projections {
                gate: stack(|p| &p.gate)?,
                up: stack(|p| &p.up)?,
                down: stack(|p| &p.down)?,
            })
        };
        Ok(Self {
            a: side(|adapters| &adapters.a, 0)?,
            b: side(|adapters| &adapters.b, 1)?,
        })
    }
}
