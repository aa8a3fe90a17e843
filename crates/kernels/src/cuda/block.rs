//! A whole layer of experts, from hidden states to their weighted outputs.

use super::adapters::{combine, expand, sum_pairs};
use super::decode::{self, DECODE_TOKENS, SPLITS};
use super::device::{Element, Gpu};
use super::grouped::{Grouped, Kind, Path};
use super::route::{Scores, Tables, route, router_logits};
use super::{Result, ensure};
use cudarc::driver::CudaSlice;

/// The sizes of a layer. Its positions hold dense experts first, then adapted slots that share a base,
/// by ascending group, then adapted slots without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Hidden size `H`, a multiple of 8.
    pub hidden: usize,
    /// Expert intermediate size `F`, a multiple of 8.
    pub inner: usize,
    /// Router outputs `E`, removed experts among them.
    pub experts: usize,
    /// Experts of a token, `K`.
    pub top_k: usize,
    /// Dense positions.
    pub dense: usize,
    /// Adapted positions.
    pub adapted: usize,
    /// Shared bases.
    pub groups: usize,
    /// Adapter rank `R`, a multiple of 8; narrower adapters are filled up with zeros.
    pub rank: usize,
}

impl Shape {
    /// How many positions there are.
    pub fn positions(&self) -> usize {
        self.dense + self.adapted
    }

    /// Rows of `tokens`: their (token, expert) pairs.
    pub fn rows(&self, tokens: usize) -> usize {
        tokens * self.top_k
    }

    /// The most (token, group) pairs that `tokens` can have.
    pub fn pairs(&self, tokens: usize) -> usize {
        tokens * self.top_k.min(self.groups)
    }

    fn check(&self) -> Result<()> {
        for (name, size) in [("hidden size", self.hidden), ("inner size", self.inner)] {
            ensure!(
                size > 0 && size % 8 == 0,
                "the {name} is {size}; the kernels need a multiple of 8"
            );
        }
        ensure!(
            self.adapted == 0 || (self.rank > 0 && self.rank <= 128 && self.rank % 8 == 0),
            "the adapters' rank is {}; the kernels need a multiple of 8 up to 128",
            self.rank
        );
        ensure!(
            (1..=512).contains(&self.experts) && (1..=512).contains(&self.positions()),
            "{} experts at {} positions; the kernels take 1 to 512",
            self.experts,
            self.positions()
        );
        ensure!(
            (1..=16).contains(&self.top_k) && self.top_k <= self.experts,
            "{} of {} experts a token; the kernels take 1 to 16",
            self.top_k,
            self.experts
        );
        ensure!(
            self.groups <= self.adapted,
            "{} bases for {} slots",
            self.groups,
            self.adapted
        );
        Ok(())
    }
}

/// The three matrices of `n` experts, as `torch.nn.Linear` keeps them; empty for none.
#[derive(Debug)]
pub struct Projections<T> {
    /// `[n, F, H]`, of adapters `[n, R, H]` or `[n, F, R]`
    pub gate: CudaSlice<T>,
    /// As `gate`.
    pub up: CudaSlice<T>,
    /// `[n, H, F]`, of adapters `[n, R, F]` or `[n, H, R]`
    pub down: CudaSlice<T>,
}

impl<T> Projections<T> {
    /// `n` times matrices of these numbers of entries.
    fn check(&self, what: &str, n: usize, gate: usize, down: usize) -> Result<()> {
        for (name, matrix, size) in [
            ("gate_proj", &self.gate, gate),
            ("up_proj", &self.up, gate),
            ("down_proj", &self.down, down),
        ] {
            // Nothing is held in memory for one number.
            ensure!(
                matrix.len() == (n * size).max(1),
                "{name} of the {what} has {} entries; {n} matrices of {size} were expected",
                matrix.len()
            );
        }
        Ok(())
    }
}

/// Low-rank adapters of `n` slots: `U·V`.
#[derive(Debug)]
pub struct Adapted<T> {
    /// `V`: gate and up `[n, R, H]`, down `[n, R, F]`.
    pub a: Projections<T>,
    /// `U`: gate and up `[n, F, R]`, down `[n, H, R]`.
    pub b: Projections<T>,
}

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

/// The parameters of a layer.
#[derive(Debug)]
pub struct Weights<T> {
    /// `[E, H]`
    pub router: CudaSlice<T>,
    /// Of the dense positions.
    pub dense: Projections<T>,
    /// Of the groups.
    pub bases: Projections<T>,
    /// Of the adapted positions.
    pub adapters: Adapted<T>,
}

/// A layer on the GPU.
#[derive(Debug)]
pub struct Block<T> {
    pub(super) shape: Shape,
    pub(super) weights: Weights<T>,
    pub(super) scores: Scores,
    /// Group of each position; [`super::route::NONE`] for none.
    pub(super) group_of: CudaSlice<u32>,
}

impl<T: Element> Block<T> {
    /// `group_of` has the group of every adapted position, `None` for those without a base.
    ///
    /// # Errors
    /// If sizes do not fit each other or the kernels.
    pub fn new(
        gpu: &Gpu,
        shape: Shape,
        weights: Weights<T>,
        scores: Scores,
        group_of: &[Option<usize>],
    ) -> Result<Self> {
        shape.check()?;
        let Shape {
            hidden: h,
            inner: f,
            rank: r,
            ..
        } = shape;
        ensure!(
            weights.router.len() == shape.experts * h,
            "the router has {} entries; [{}, {h}] was expected",
            weights.router.len(),
            shape.experts
        );
        weights
            .dense
            .check("dense experts", shape.dense, f * h, h * f)?;
        weights.bases.check("bases", shape.groups, f * h, h * f)?;
        weights
            .adapters
            .a
            .check("adapters' a", shape.adapted, r * h, r * f)?;
        weights
            .adapters
            .b
            .check("adapters' b", shape.adapted, f * r, h * r)?;
        scores.check(&shape)?;
        ensure!(
            group_of.len() == shape.adapted,
            "{} groups for {} adapted slots",
            group_of.len(),
            shape.adapted
        );
        // Slots without a group come last, as a group beyond all.
        let order = group_of.iter().map(|g| g.unwrap_or(shape.groups));
        ensure!(
            order.clone().is_sorted() && order.clone().all(|g| g <= shape.groups),
            "the groups {group_of:?} do not ascend below {}",
            shape.groups
        );
        let dense = std::iter::repeat_n(super::route::NONE, shape.dense);
        let adapted = group_of
            .iter()
            .map(|g| g.map_or(super::route::NONE, |g| g as u32));
        let group_of = gpu.upload(&dense.chain(adapted).collect::<Vec<_>>())?;
        Ok(Self {
            shape,
            weights,
            scores,
            group_of,
        })
    }

    /// Its sizes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// `out[t] = Σ g·y` over the experts that the router chooses for `x[t]`: `x` and `out` are `[T, H]`.
    /// Everything is queued, nothing waited for. Few tokens take three launches.
    ///
    /// # Errors
    /// If `x` or `out` has another size, or the workspace holds fewer tokens.
    pub fn forward(
        &self,
        gpu: &Gpu,
        x: &CudaSlice<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        out: &mut CudaSlice<T>,
    ) -> Result<()> {
        self.check(x, tokens, work, out)?;
        if tokens <= DECODE_TOKENS {
            return decode::forward(gpu, self, x, tokens, work, out);
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
        x: &CudaSlice<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        out: &mut CudaSlice<T>,
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
        x: &CudaSlice<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        out: &mut CudaSlice<T>,
        queued: &mut dyn FnMut(Stage) -> Result<()>,
    ) -> Result<()> {
        self.check(x, tokens, work, out)?;
        router_logits(gpu, self, x, tokens, &mut work.logits)?;
        route(gpu, self, tokens, work)?;
        queued(Stage::Route)?;
        if self.shape.dense > 0 {
            self.dense(gpu, x, tokens, work)?;
            queued(Stage::Dense)?;
        }
        if self.shape.adapted > 0 {
            self.adapted(gpu, x, tokens, work, queued)?;
        }
        combine(gpu, self, tokens, work, out)?;
        queued(Stage::Combine)
    }

    pub(super) fn check(
        &self,
        x: &CudaSlice<T>,
        tokens: usize,
        work: &Workspace<T>,
        out: &CudaSlice<T>,
    ) -> Result<()> {
        let size = tokens * self.shape.hidden;
        ensure!(
            tokens > 0 && x.len() == size && out.len() == size,
            "x has {} and out {} entries; [{tokens}, {}] was expected",
            x.len(),
            out.len(),
            self.shape.hidden
        );
        ensure!(
            work.shape == self.shape && tokens <= work.tokens,
            "the workspace is for {} tokens of {:?}, the layer takes {tokens} of {:?}",
            work.tokens,
            work.shape,
            self.shape
        );
        Ok(())
    }

    /// A grouped product of this layer; as many rows fall to every group, as far as the host knows.
    fn product(
        &self,
        work: &Workspace<T>,
        groups: usize,
        [n, k]: [usize; 2],
        rows: usize,
    ) -> Grouped {
        Grouped {
            path: work.path,
            groups,
            n,
            k,
            depth: rows / groups,
        }
    }

    /// The rows of dense positions: `work.y`.
    fn dense(
        &self,
        gpu: &Gpu,
        x: &CudaSlice<T>,
        tokens: usize,
        work: &mut Workspace<T>,
    ) -> Result<()> {
        let Shape {
            hidden,
            inner,
            dense,
            ..
        } = self.shape;
        let all = self.shape.rows(tokens);
        let share = all * dense / self.shape.positions();
        let rows = work.tables.rows(gpu, 0, all);
        let w = &self.weights.dense;
        self.product(work, dense, [inner, hidden], share).run(
            gpu,
            Kind::Swiglu(&w.gate, &w.up, &mut work.h),
            x,
            &rows.gathered(),
        )?;
        self.product(work, dense, [hidden, inner], share).run(
            gpu,
            Kind::Plain(&w.down, &mut work.y),
            &work.h,
            &rows.scaled(),
        )
    }

    /// The rows of adapted positions, and their pairs: `work.y` and `work.pair_y`.
    fn adapted(
        &self,
        gpu: &Gpu,
        x: &CudaSlice<T>,
        tokens: usize,
        work: &mut Workspace<T>,
        queued: &mut dyn FnMut(Stage) -> Result<()>,
    ) -> Result<()> {
        let Shape {
            hidden,
            inner,
            dense,
            adapted,
            groups,
            rank,
            ..
        } = self.shape;
        let all = self.shape.rows(tokens);
        let share = all * adapted / self.shape.positions();
        let rows = work.tables.rows(gpu, dense, all);
        let pairs = work.tables.pairs(gpu, self.shape.pairs(tokens));
        let (bases, a, b) = (
            &self.weights.bases,
            &self.weights.adapters.a,
            &self.weights.adapters.b,
        );
        if groups > 0 {
            self.product(work, groups, [inner, hidden], pairs.rows)
                .run(
                    gpu,
                    Kind::Dual(&bases.gate, &bases.up, &mut work.pre_gate, &mut work.pre_up),
                    x,
                    &pairs.gathered(),
                )?;
            queued(Stage::Bases)?;
        }
        self.product(work, adapted, [rank, hidden], share).run(
            gpu,
            Kind::SideBySide(&a.gate, &a.up, &mut work.low),
            x,
            &rows.gathered(),
        )?;
        expand(gpu, self, work)?;
        self.product(work, adapted, [rank, inner], share).run(
            gpu,
            Kind::Plain(&a.down, &mut work.low_down),
            &work.h,
            &rows.scaled(),
        )?;
        self.product(work, adapted, [hidden, rank], share).run(
            gpu,
            Kind::Plain(&b.down, &mut work.y),
            &work.low_down,
            &rows,
        )?;
        if groups == 0 {
            return queued(Stage::Adapters);
        }
        sum_pairs(gpu, self, tokens, work)?;
        queued(Stage::Adapters)?;
        self.product(work, groups, [hidden, inner], pairs.rows)
            .run(
                gpu,
                Kind::Plain(&bases.down, &mut work.pair_y),
                &work.pair_h,
                &pairs,
            )?;
        queued(Stage::Bases)
    }
}

/// Memory between the kernels of a layer, for any layer of one shape.
#[derive(Debug)]
pub struct Workspace<T> {
    pub(super) shape: Shape,
    pub(super) tokens: usize,
    /// Which of the grouped products is used.
    pub path: Path,
    /// Router outputs, `[T, E]`; of few tokens, parts of their sums.
    pub(super) logits: CudaSlice<f32>,
    /// Where the blocks of a launch wait for each other.
    pub(super) barrier: CudaSlice<u32>,
    pub(super) tables: Tables,
    /// What the down projections are given, `[S, F]`.
    pub(super) h: CudaSlice<T>,
    /// What the bases make of their pairs, `[pairs, F]`.
    pub(super) pre_gate: CudaSlice<T>,
    pub(super) pre_up: CudaSlice<T>,
    /// `V·x` of gate and up, side by side, `[S, 2R]`.
    pub(super) low: CudaSlice<T>,
    /// `g·V·h` of down, `[S, R]`.
    pub(super) low_down: CudaSlice<T>,
    /// `Σ g·h` of each pair, `[pairs, F]`.
    pub(super) pair_h: CudaSlice<T>,
    /// What the base makes of it, `[pairs, H]`.
    pub(super) pair_y: CudaSlice<T>,
    /// Weighted outputs of rows, `[S, H]`.
    pub(super) y: CudaSlice<T>,
}

impl<T: Element> Workspace<T> {
    /// Memory for up to `tokens` at once.
    ///
    /// # Errors
    /// If there is not enough.
    pub fn new(gpu: &Gpu, shape: Shape, tokens: usize) -> Result<Self> {
        shape.check()?;
        let (rows, pairs) = (shape.rows(tokens), shape.pairs(tokens));
        // Rows of slots and pairs are only there where there are slots.
        let low = if shape.adapted > 0 {
            rows * shape.rank
        } else {
            0
        };
        Ok(Self {
            shape,
            tokens,
            path: Path::best(gpu),
            logits: gpu.alloc(tokens.max(DECODE_TOKENS.min(tokens) * SPLITS) * shape.experts)?,
            barrier: gpu.upload(&[0, 0])?,
            tables: Tables::new(gpu, &shape, tokens)?,
            h: gpu.alloc(rows * shape.inner)?,
            pre_gate: gpu.alloc(pairs * shape.inner)?,
            pre_up: gpu.alloc(pairs * shape.inner)?,
            low: gpu.alloc(2 * low)?,
            low_down: gpu.alloc(low)?,
            pair_h: gpu.alloc(pairs * shape.inner)?,
            pair_y: gpu.alloc(pairs * shape.hidden)?,
            y: gpu.alloc(rows * shape.hidden)?,
        })
    }
}
