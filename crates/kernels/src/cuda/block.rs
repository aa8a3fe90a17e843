//! A whole layer of experts, from hidden states to their weighted outputs.

use super::device::{Element, Gpu};
use super::held::Held;
use super::route::Scores;
use super::workspace::Workspace;
use super::{Result, ensure};
use cudarc::driver::{CudaSlice, DeviceSlice};
use std::sync::Arc;

/// The largest size of a matrix: offsets within a tile's rows fit 32 bits.
const MOST: usize = 1 << 20;

/// The sizes of a layer. Its positions hold dense experts first, then adapted slots: those that keep their
/// expert, then those that share a base, by ascending group, then those without one.
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
    /// How many of them, the first ones, keep their expert beside the adapter, as while it trains.
    pub kept: usize,
    /// Shared bases.
    pub groups: usize,
    /// Adapter rank `R`, a multiple of 8; narrower adapters are filled up with zeros, unless they are
    /// [`Shape::ranked`].
    pub rank: usize,
    /// How many components all adapters have together where each has a rank of its own, a multiple of 8, of which `rank`
    /// is the most.
    pub ranked: Option<usize>,
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

    /// Stops where rows cannot be numbered in 32 bits.
    pub(super) fn check_rows(&self, tokens: usize) -> Result<()> {
        let rows = tokens.checked_mul(self.top_k);
        ensure!(
            rows.is_some_and(|rows| rows < 1 << 31),
            "{tokens} tokens with {} experts each are too many at once",
            self.top_k
        );
        Ok(())
    }

    /// The most (token, group) pairs that `tokens` can have.
    pub fn pairs(&self, tokens: usize) -> usize {
        tokens * self.top_k.min(self.groups)
    }

    /// What of it memory between kernels depends on, whatever the ranks are.
    pub(super) fn room(&self) -> Self {
        Self {
            kept: 0,
            ranked: Some(0),
            ..*self
        }
    }

    /// Whether nothing of `other` is larger.
    pub(super) fn covers(&self, other: &Self) -> bool {
        self.widest(other) == *self
    }

    /// The larger of every size.
    pub(super) fn widest(&self, other: &Self) -> Self {
        Self {
            hidden: self.hidden.max(other.hidden),
            inner: self.inner.max(other.inner),
            experts: self.experts.max(other.experts),
            top_k: self.top_k.max(other.top_k),
            dense: self.dense.max(other.dense),
            adapted: self.adapted.max(other.adapted),
            kept: self.kept,
            groups: self.groups.max(other.groups),
            rank: self.rank.max(other.rank),
            ranked: self.ranked,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        for (name, size) in [("hidden size", self.hidden), ("inner size", self.inner)] {
            ensure!(
                size > 0 && size.is_multiple_of(8),
                "the {name} is {size}; the kernels need a multiple of 8"
            );
        }
        ensure!(
            self.hidden <= MOST && self.inner <= MOST && self.rank <= MOST,
            "sizes of {}, {} and {}; the kernels take up to {MOST}",
            self.hidden,
            self.inner,
            self.rank
        );
        ensure!(
            self.adapted == 0 || (self.rank > 0 && self.rank.is_multiple_of(8)),
            "the adapters' rank is {}; the kernels need a multiple of 8",
            self.rank
        );
        ensure!(
            self.ranked.is_some() || self.rank <= 128,
            "all adapters have rank {}; the kernels take up to 128 where they are alike",
            self.rank
        );
        ensure!(
            self.ranked.is_none() || self.kept == 0,
            "adapters of ranks of their own beside kept experts"
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
            self.groups + self.kept <= self.adapted,
            "{} bases and {} kept experts for {} slots",
            self.groups,
            self.kept,
            self.adapted
        );
        Ok(())
    }
}

/// The three matrices of `n` experts, as `torch.nn.Linear` keeps them; empty for none.
#[derive(Debug, Clone)]
pub struct Projections<M> {
    /// `[n, F, H]`, of adapters `[n, R, H]` or `[n, F, R]`
    pub gate: M,
    /// As `gate`.
    pub up: M,
    /// `[n, H, F]`, of adapters `[n, R, F]` or `[n, H, R]`
    pub down: M,
}

impl<M> Projections<M> {
    /// `n` times matrices of these numbers of entries.
    pub(super) fn check<T>(&self, what: &str, n: usize, gate: usize, down: usize) -> Result<()>
    where
        M: DeviceSlice<T>,
    {
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
#[derive(Debug, Clone)]
pub struct Adapted<M> {
    /// `V`: gate and up `[n, R, H]`, down `[n, R, F]`; of ranks of their own `[ΣR, H]` and `[ΣR, F]`.
    pub a: Projections<M>,
    /// `U`: gate and up `[n, F, R]`, down `[n, H, R]`; of ranks of their own `Uᵀ`: `[ΣR, F]` and `[ΣR, H]`.
    pub b: Projections<M>,
}

/// The parameters of a layer.
#[derive(Debug, Clone)]
pub struct Weights<T> {
    /// `[E, H]`
    pub router: Held<T>,
    /// Of the dense positions.
    pub dense: Projections<Held<T>>,
    /// Of the adapted positions that keep their expert.
    pub kept: Projections<Held<T>>,
    /// Of the groups.
    pub bases: Projections<Held<T>>,
    /// Of the adapted positions.
    pub adapters: Adapted<Held<T>>,
    /// The experts that the other adapted positions replace, while they have a share.
    pub originals: Option<Projections<Held<T>>>,
}

impl<T: Element> Weights<T> {
    fn check(&self, shape: &Shape) -> Result<()> {
        let Shape {
            hidden: h,
            inner: f,
            rank: r,
            ..
        } = *shape;
        ensure!(
            self.router.len() == shape.experts * h,
            "the router has {} entries; [{}, {h}] was expected",
            self.router.len(),
            shape.experts
        );
        self.dense
            .check::<T>("dense experts", shape.dense, f * h, h * f)?;
        self.kept
            .check::<T>("kept experts", shape.kept, f * h, h * f)?;
        self.bases.check::<T>("bases", shape.groups, f * h, h * f)?;
        let (n, r) = match shape.ranked {
            None => (shape.adapted, r),
            Some(components) => (components, 1),
        };
        self.adapters.a.check::<T>("adapters' a", n, r * h, r * f)?;
        self.adapters.b.check::<T>("adapters' b", n, f * r, h * r)?;
        if let Some(originals) = &self.originals {
            let replaced = shape.adapted - shape.kept;
            originals.check::<T>("replaced experts", replaced, f * h, h * f)?;
        }
        Ok(())
    }
}

/// What a layer is but for its weights.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) shape: Shape,
    pub(super) scores: Arc<Scores>,
    /// Group of each position; [`super::route::NONE`] for none.
    pub(super) group_of: Arc<CudaSlice<u32>>,
    /// Where the components of each adapter begin, and the last end, where they have ranks of their own.
    pub(super) ranks: Option<Arc<CudaSlice<u32>>>,
}

impl Frame {
    /// As [`Block::new`].
    pub(super) fn new(
        gpu: &Gpu,
        shape: Shape,
        scores: Scores,
        group_of: &[Option<usize>],
    ) -> Result<Self> {
        shape.check()?;
        scores.check(&shape)?;
        ensure!(
            group_of.len() == shape.adapted,
            "{} groups for {} adapted slots",
            group_of.len(),
            shape.adapted
        );
        // Slots without a group come last, but for those that keep their expert.
        let (kept, others) = group_of.split_at(shape.kept);
        ensure!(
            kept.iter().all(Option::is_none)
                && others.iter().map(|g| g.unwrap_or(usize::MAX)).is_sorted()
                && others.iter().flatten().all(|&g| g < shape.groups),
            "the groups {group_of:?} do not ascend below {} behind {} kept experts",
            shape.groups,
            shape.kept
        );
        let dense = std::iter::repeat_n(super::route::NONE, shape.dense);
        let adapted = group_of
            .iter()
            .map(|g| g.map_or(super::route::NONE, |g| g as u32));
        let group_of = gpu.upload(&dense.chain(adapted).collect::<Vec<_>>())?;
        Ok(Self {
            shape,
            scores: Arc::new(scores),
            group_of: Arc::new(group_of),
            ranks: None,
        })
    }

    /// The same with adapters of ranks of their own (`Shape::ranked`): where those of each slot begin, and the last end.
    #[cfg(any(test, feature = "linked"))]
    pub(super) fn ranked(self, gpu: &Gpu, starts: &[usize]) -> Result<Self> {
        let Shape {
            adapted,
            rank,
            ranked,
            ..
        } = self.shape;
        let mut ranks = starts
            .windows(2)
            .map(|bounds| bounds[1].wrapping_sub(bounds[0]));
        ensure!(
            starts.len() == adapted + 1
                && starts[0] == 0
                && starts.last().copied() == ranked
                && ranks.all(|own| own <= rank && own.is_multiple_of(8)),
            "adapters begin at {starts:?}; {ranked:?} components of {adapted} slots of up to {rank} each were expected"
        );
        let starts: Vec<u32> = starts.iter().map(|&at| at as u32).collect();
        Ok(Self {
            ranks: Some(Arc::new(gpu.upload(&starts)?)),
            ..self
        })
    }

    /// The layer with these weights.
    pub(super) fn with<T: Element>(&self, weights: Weights<T>) -> Result<Block<T>> {
        weights.check(&self.shape)?;
        ensure!(
            self.shape.ranked.is_some() == self.ranks.is_some(),
            "where adapters begin is to be said where they have ranks of their own"
        );
        Ok(Block {
            frame: self.clone(),
            weights,
            beta: 0.0,
            vectors: None,
        })
    }
}

/// A layer on the GPU.
#[derive(Debug)]
pub struct Block<T> {
    pub(super) frame: Frame,
    pub(super) weights: Weights<T>,
    /// The share of the originals; that of the bases is what is left.
    pub(super) beta: f32,
    pub(super) vectors: Option<Vectors<T>>,
}

/// What positions give beside what they compute, whatever their input.
#[derive(Debug)]
pub(super) struct Vectors<T> {
    /// `[n, H]`
    pub(super) numbers: Held<T>,
    /// Which of them each position has; [`super::route::NONE`] for none.
    pub(super) of_position: CudaSlice<u32>,
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
        Frame::new(gpu, shape, scores, group_of)?.with(weights)
    }

    /// The same with vectors `[n, H]`, of which each position may have one: it is added to what the position gives,
    /// before the gate multiplies it, at the price of one launch more. A position that gives nothing else is an adapted
    /// one without a base, whose adapter is zero.
    ///
    /// # Errors
    /// If a position has one that is not there, or their size is another.
    pub fn with_vectors(
        self,
        gpu: &Gpu,
        vectors: Held<T>,
        of_position: &[Option<usize>],
    ) -> Result<Self> {
        let Shape { hidden, .. } = self.frame.shape;
        let count = vectors.len() / hidden;
        ensure!(
            vectors.len() == count * hidden
                && of_position.len() == self.frame.shape.positions()
                && of_position.iter().flatten().all(|&vector| vector < count),
            "{} numbers of vectors for positions that have those of {of_position:?}; whole ones of {hidden} were \
             expected, and one or none for each of {} positions",
            vectors.len(),
            self.frame.shape.positions()
        );
        let of_position = of_position.iter();
        let of_position: Vec<u32> = of_position
            .map(|vector| vector.map_or(super::route::NONE, |vector| vector as u32))
            .collect();
        Ok(Self {
            vectors: Some(Vectors {
                numbers: vectors,
                of_position: gpu.upload(&of_position)?,
            }),
            ..self
        })
    }

    /// Sets the share `β` of the experts that adapted slots replace: `β·W + (1−β)·B + U·V` (LightMoE,
    /// eq. 6).
    ///
    /// # Errors
    /// If it is not between 0 and 1, or above 0 without those experts.
    pub fn anneal(&mut self, beta: f32) -> Result<()> {
        ensure!(
            (0.0..=1.0).contains(&beta),
            "a share of {beta}; 0 to 1 was expected"
        );
        ensure!(
            beta == 0.0 || self.weights.originals.is_some(),
            "a share of {beta} for replaced experts that the layer does not hold"
        );
        ensure!(
            beta == 0.0 || self.frame.ranks.is_none(),
            "a share of {beta} for replaced experts beside adapters of ranks of their own"
        );
        self.beta = beta;
        Ok(())
    }

    /// The whole experts of adapted slots that have a share: the kept ones, and the replaced ones while they have
    /// one; the first of these slots among the adapted ones, and how many they are.
    pub(super) fn own(&self) -> impl Iterator<Item = (&Projections<Held<T>>, usize, usize)> {
        let Shape { adapted, kept, .. } = self.frame.shape;
        let replaced = self.weights.originals.as_ref();
        let replaced = replaced.filter(|_| self.beta > 0.0 && kept < adapted);
        let replaced = replaced.map(|of| (of, kept, adapted - kept));
        let kept = (kept > 0).then_some((&self.weights.kept, 0, kept));
        kept.into_iter().chain(replaced)
    }

    /// Whether rows of slots need memory of [`super::workspace::Own`].
    pub(super) fn needs_own(&self) -> bool {
        self.has_own() || self.frame.ranks.is_some()
    }

    /// Whether whole experts have a share in adapted slots.
    pub(super) fn has_own(&self) -> bool {
        self.own().next().is_some()
    }

    /// Its sizes.
    pub fn shape(&self) -> &Shape {
        &self.frame.shape
    }

    pub(super) fn check(
        &self,
        x: &impl DeviceSlice<T>,
        tokens: usize,
        work: &Workspace<T>,
        out: &impl DeviceSlice<T>,
    ) -> Result<()> {
        let size = tokens * self.frame.shape.hidden;
        ensure!(
            tokens > 0 && x.len() == size && out.len() == size,
            "x has {} and out {} entries; [{tokens}, {}] was expected",
            x.len(),
            out.len(),
            self.frame.shape.hidden
        );
        self.check_room(tokens, work)
    }

    /// Stops where the workspace has no tables of these tokens.
    pub(super) fn check_routed(&self, tokens: usize, work: &Workspace<T>) -> Result<()> {
        ensure!(
            work.routed == tokens,
            "the workspace holds the tables of {} tokens, not of {tokens}",
            work.routed
        );
        Ok(())
    }

    /// Stops where the workspace has no room for these tokens.
    pub(super) fn check_room(&self, tokens: usize, work: &Workspace<T>) -> Result<()> {
        ensure!(
            !self.needs_own() || work.own.is_some(),
            "adapted slots have whole experts or wide adapters; the workspace has no memory for them: make it with \
             `Workspace::annealed`"
        );
        ensure!(
            work.fits(&self.frame.shape, tokens),
            "the workspace is for {} tokens of {:?}, the layer takes {tokens} of {:?}",
            work.tokens,
            work.shape,
            self.frame.shape
        );
        Ok(())
    }
}
