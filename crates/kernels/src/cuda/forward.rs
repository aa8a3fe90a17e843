//! The forward pass of a layer of experts.

use super::adapters::{add_vectors, combine, expand, join, sum_pairs};
use super::block::{Block, Shape};
use super::decode::{self, DECODE_TOKENS};
use super::device::{Address, Element, Gpu};
#[cfg(any(test, feature = "linked"))]
use super::ensure;
use super::grouped::{Grouped, Kind, Segments};
use super::products::{Out, Rows, Transposed};
use super::route::{Routed, route, router_logits};
use super::workspace::{Own, Workspace};
use super::{CudaError, Result};
use cudarc::driver::{DevicePtr, DevicePtrMut};

/// The parts of a layer's work by sorted rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Router outputs, choice, and tables.
    Route,
    /// The products of dense experts.
    Dense,
    /// The products of shared bases.
    Bases,
    /// The products of adapters, and what joins them with the bases.
    Adapters,
    /// The sum of each token's rows.
    Combine,
}

impl<T: Element> Block<T> {
    /// `out[t] = Σ g·y` over the experts that the router chooses for `x[t]`: `x` and `out` are `[T, H]`.
    /// Everything is queued, nothing waited for. Few tokens take three launches, and one for vectors.
    ///
    /// # Errors
    /// If `x` or `out` has another size, or the workspace holds fewer tokens.
    pub fn forward(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        out: &mut impl DevicePtrMut<T>,
    ) -> Result<()> {
        self.check(x, tokens, work, out)?;
        // No tables are there until all is queued.
        work.routed = 0;
        if tokens <= DECODE_TOKENS && !self.needs_own() {
            decode::forward(gpu, self, x, tokens, work, out)?;
            work.routed = tokens;
            return add_vectors(gpu, self, tokens, work, out);
        }
        self.forward_grouped(gpu, x, tokens, work, out)
    }

    /// The same by sorted rows, whatever the number of tokens.
    ///
    /// # Errors
    /// As [`Block::forward`].
    pub fn forward_grouped(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        out: &mut impl DevicePtrMut<T>,
    ) -> Result<()> {
        self.forward_observed(gpu, x, tokens, work, out, &mut |_| Ok(()))
    }

    /// The same, while `queued` learns which part of the work was queued last.
    ///
    /// # Errors
    /// As [`Block::forward`], and those of `queued`.
    pub fn forward_observed(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        out: &mut impl DevicePtrMut<T>,
        queued: &mut dyn FnMut(Stage) -> Result<()>,
    ) -> Result<()> {
        self.check(x, tokens, work, out)?;
        work.routed = 0;
        router_logits(gpu, self, x, tokens, &mut work.logits)?;
        route(gpu, self, tokens, Routed::Logits, work)?;
        work.routed = tokens;
        queued(Stage::Route)?;
        self.forward_routed(gpu, x, tokens, work, out, queued)
    }

    /// Makes the tables of choices that were made before: positions, for which [`super::route::choose`] is, and
    /// their gates, `[T · K]` each.
    ///
    /// # Errors
    /// If their numbers are others, or the workspace holds fewer tokens.
    #[cfg(any(test, feature = "linked"))]
    pub(super) fn route_given(
        &self,
        gpu: &Gpu,
        chosen: &impl DevicePtr<u32>,
        gates: &impl DevicePtr<f32>,
        tokens: usize,
        work: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_room(tokens, work)?;
        let rows = self.frame.shape.rows(tokens);
        ensure!(
            chosen.len() == rows && gates.len() == rows,
            "{} choices and {} gates; [{tokens}, {}] were expected",
            chosen.len(),
            gates.len(),
            self.frame.shape.top_k
        );
        work.routed = 0;
        let from = Routed::Chosen(gpu.address(chosen), gpu.address(gates));
        route(gpu, self, tokens, from, work)?;
        work.routed = tokens;
        Ok(())
    }

    /// The forward pass behind the routing: the tables of `work` are those of these tokens.
    ///
    /// # Errors
    /// If they are not, or as [`Block::forward`].
    pub(super) fn forward_routed(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        out: &mut impl DevicePtrMut<T>,
        queued: &mut dyn FnMut(Stage) -> Result<()>,
    ) -> Result<()> {
        self.check(x, tokens, work, out)?;
        self.check_routed(tokens, work)?;
        if self.frame.shape.dense > 0 {
            self.dense(gpu, x, tokens, work)?;
            queued(Stage::Dense)?;
        }
        if self.frame.shape.adapted > 0 {
            self.adapted(gpu, x, tokens, work, queued)?;
        }
        combine(gpu, self, tokens, work, out)?;
        add_vectors(gpu, self, tokens, work, out)?;
        queued(Stage::Combine)
    }

    /// The rows of dense positions: `work.y`.
    fn dense(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        work: &mut Workspace<T>,
    ) -> Result<()> {
        let Shape {
            hidden,
            inner,
            dense,
            ..
        } = self.frame.shape;
        let all = self.frame.shape.rows(tokens);
        let share = all * dense / self.frame.shape.positions();
        let rows = work.tables.rows(gpu, 0, all);
        let w = &self.weights.dense;
        Grouped::new(work.path, dense, [inner, hidden], share).run(
            gpu,
            Kind::Swiglu(&w.gate, &w.up, &mut work.h),
            x,
            &rows.gathered(),
        )?;
        Grouped::new(work.path, dense, [hidden, inner], share).run(
            gpu,
            Kind::Plain(&w.down, &mut work.y),
            &work.h,
            &rows.scaled(),
        )
    }

    /// What the bases make of their pairs: `work.pre_gate` and `work.pre_up`.
    pub(super) fn bases_on_pairs(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        work: &mut Workspace<T>,
    ) -> Result<()> {
        let Shape {
            hidden,
            inner,
            groups,
            ..
        } = self.frame.shape;
        let pairs = work.tables.pairs(gpu, self.frame.shape.pairs(tokens));
        let w = &self.weights.bases;
        Grouped::new(work.path, groups, [inner, hidden], pairs.rows).run(
            gpu,
            Kind::Dual(&w.gate, &w.up, &mut work.pre_gate, &mut work.pre_up),
            x,
            &pairs.gathered(),
        )
    }

    /// What adapted rows have of their own: `V·x` in `work.low`, and in `work.own` what whole experts make of
    /// them while they have a share.
    pub(super) fn parts_of_slots(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        work: &mut Workspace<T>,
    ) -> Result<()> {
        let Shape {
            hidden,
            inner,
            dense,
            adapted,
            rank,
            ..
        } = self.frame.shape;
        let all = self.frame.shape.rows(tokens);
        let share = all * adapted / self.frame.shape.positions();
        let rows = work.tables.rows(gpu, dense, all).gathered();
        let a = &self.weights.adapters.a;
        Grouped::new(work.path, adapted, [rank, hidden], share).run(
            gpu,
            Kind::SideBySide(&a.gate, &a.up, &mut work.low),
            x,
            &rows,
        )?;
        for (w, first, count) in self.own() {
            let Some(own) = &mut work.own else { continue };
            let rows = work.tables.rows(gpu, dense + first, all).gathered();
            Grouped::new(work.path, count, [inner, hidden], share * count / adapted).run(
                gpu,
                Kind::Dual(&w.gate, &w.up, &mut own.gate, &mut own.up),
                x,
                &rows,
            )?;
        }
        Ok(())
    }

    /// The rows of adapted positions, and their pairs: `work.y` and `work.pair_y`.
    fn adapted(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        queued: &mut dyn FnMut(Stage) -> Result<()>,
    ) -> Result<()> {
        let Shape {
            hidden,
            inner,
            dense,
            groups,
            ..
        } = self.frame.shape;
        let rows = work.tables.rows(gpu, dense, self.frame.shape.rows(tokens));
        let pairs = work.tables.pairs(gpu, self.frame.shape.pairs(tokens));
        if groups > 0 {
            self.bases_on_pairs(gpu, x, tokens, work)?;
            queued(Stage::Bases)?;
        }
        if let Some(ranks) = &self.frame.ranks {
            self.ranked(gpu, x, gpu.address(&**ranks), &rows, work)?;
        } else {
            self.alike(gpu, x, tokens, &rows, work)?;
        }
        if groups == 0 {
            return queued(Stage::Adapters);
        }
        sum_pairs(gpu, self, tokens, work)?;
        queued(Stage::Adapters)?;
        Grouped::new(work.path, groups, [hidden, inner], pairs.rows).run(
            gpu,
            Kind::Plain(&self.weights.bases.down, &mut work.pair_y),
            &work.pair_h,
            &pairs,
        )?;
        queued(Stage::Bases)
    }

    /// What adapters of one rank, and whole experts beside them, make of their `rows`: `work.h` and `work.y`.
    fn alike(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        tokens: usize,
        rows: &Segments,
        work: &mut Workspace<T>,
    ) -> Result<()> {
        let Shape {
            hidden,
            inner,
            dense,
            adapted,
            rank,
            ..
        } = self.frame.shape;
        let all = self.frame.shape.rows(tokens);
        let share = all * adapted / self.frame.shape.positions();
        let (a, b) = (&self.weights.adapters.a, &self.weights.adapters.b);
        self.parts_of_slots(gpu, x, tokens, work)?;
        expand(gpu, self, work)?;
        for (w, first, count) in self.own() {
            let Some(Own { y, .. }) = &mut work.own else {
                continue;
            };
            let rows = work.tables.rows(gpu, dense + first, all).scaled();
            Grouped::new(work.path, count, [hidden, inner], share * count / adapted).run(
                gpu,
                Kind::Plain(&w.down, y),
                &work.h,
                &rows,
            )?;
        }
        Grouped::new(work.path, adapted, [rank, inner], share).run(
            gpu,
            Kind::Plain(&a.down, &mut work.low_down),
            &work.h,
            &rows.scaled(),
        )?;
        Grouped::new(work.path, adapted, [hidden, rank], share).run(
            gpu,
            Kind::Plain(&b.down, &mut work.y),
            &work.low_down,
            rows,
        )
    }

    /// The same of adapters of ranks of their own, which begin at `ranks`.
    fn ranked(
        &self,
        gpu: &Gpu,
        x: &impl DevicePtr<T>,
        ranks: Address,
        rows: &Segments,
        work: &mut Workspace<T>,
    ) -> Result<()> {
        let Shape {
            hidden,
            inner,
            adapted,
            rank,
            ..
        } = self.frame.shape;
        let path = work.path;
        let own = work.own.as_mut();
        let own = own.ok_or_else(|| CudaError::Shape("no memory for wide adapters".into()))?;
        let (a, b) = (&self.weights.adapters.a, &self.weights.adapters.b);
        let shrink = |inputs| Grouped::new(path, adapted, [rank, inputs], rows.rows).ranked(ranks);
        let expand = |outputs| Transposed::new(path, adapted, [outputs, rank]).ranked(ranks);
        let low = Kind::SideBySide(&a.gate, &a.up, &mut work.low);
        shrink(hidden).run(gpu, low, x, &rows.gathered())?;
        let low = Rows::sorted(gpu, &work.low, 2 * rank);
        for (low, w, to) in [
            (low, &b.gate, &mut own.gate),
            (low.right::<T>(), &b.up, &mut own.up),
        ] {
            expand(inner).one(gpu, (low, w), Out::rows(gpu, to, inner), rows)?;
        }
        join(gpu, self, work)?;
        let low = Kind::Plain(&a.down, &mut work.low_down);
        shrink(inner).run(gpu, low, &work.h, &rows.scaled())?;
        let low = Rows::sorted(gpu, &work.low_down, rank);
        let y = Out::rows(gpu, &mut work.y, hidden);
        expand(hidden).one(gpu, (low, &b.down), y, rows)
    }
}
