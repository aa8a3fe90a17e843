//! Routing on the GPU: router outputs, the choice of experts, and the tables that sort it. The host
//! never learns how many rows an expert has.

#[cfg(any(test, feature = "linked"))]
use super::block::Frame;
use super::block::{Block, Shape};
use super::compile::{ROUTE, ROUTER};
use super::device::{Address, Element, Gpu, Launch, arguments};
use super::grouped::Segments;
use super::workspace::Workspace;
use super::{Result, ensure};
use crate::choice::{Choice, ExpertGroups};
use cudarc::driver::{CudaSlice, DevicePtr};

/// No position, group or pair.
pub(super) const NONE: u32 = u32::MAX;

/// The least tokens of a block, and the most blocks.
const CHUNK: usize = 32;
const MOST_BLOCKS: usize = 1024;

/// A [`Choice`] with what it needs on the GPU.
#[derive(Debug)]
pub struct Scores {
    choice: Choice,
    experts: usize,
    present: usize,
    position: CudaSlice<u32>,
    bias: Option<CudaSlice<f32>>,
}

impl Scores {
    /// `position` has the position of every expert, `None` for removed ones; `bias` is added to the
    /// scores that choose, in families that have one.
    ///
    /// # Errors
    /// If lengths do not fit, or groups do not divide the experts.
    pub fn new(
        gpu: &Gpu,
        choice: Choice,
        position: &[Option<usize>],
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        let experts = position.len();
        ensure!(
            bias.is_none_or(|bias| bias.len() == experts),
            "a correction of {:?} scores for {experts} experts",
            bias.map(<[f32]>::len)
        );
        if let Some(ExpertGroups { count, kept, .. }) = choice.groups {
            ensure!(
                (1..=32).contains(&count)
                    && experts.is_multiple_of(count)
                    && (1..=count).contains(&kept),
                "{kept} of {count} groups of {experts} experts"
            );
        }
        let mut used: Vec<usize> = position.iter().flatten().copied().collect();
        used.sort_unstable();
        ensure!(
            used.iter().copied().eq(0..used.len()),
            "experts stand at {used:?}, not at one position each"
        );
        let on_gpu: Vec<u32> = position
            .iter()
            .map(|p| p.map_or(NONE, |p| p as u32))
            .collect();
        Ok(Self {
            choice,
            experts,
            present: used.len(),
            position: gpu.upload(&on_gpu)?,
            bias: bias.map(|bias| gpu.upload(bias)).transpose()?,
        })
    }

    pub(super) fn check(&self, shape: &Shape) -> Result<()> {
        ensure!(
            self.experts == shape.experts && self.present == shape.positions(),
            "scores of {} experts at {} positions for a layer of {} at {}",
            self.experts,
            self.present,
            shape.experts,
            shape.positions()
        );
        let groups = self.choice.groups;
        let open = groups.map_or(self.present, |g| self.experts / g.count * g.kept);
        ensure!(
            shape.top_k <= self.present.min(open),
            "{} experts a token of {} that can be chosen",
            shape.top_k,
            self.present.min(open)
        );
        Ok(())
    }

    pub(super) fn arguments(&self, gpu: &Gpu, top_k: usize) -> ScoresArgument {
        let groups = self.choice.groups;
        ScoresArgument {
            bias: self
                .bias
                .as_ref()
                .map_or(Address::NULL, |bias| gpu.address(bias)),
            position: gpu.address(&self.position),
            experts: self.experts as u32,
            top_k: top_k as u32,
            sigmoid: self.choice.sigmoid.into(),
            expert_groups: groups.map_or(0, |g| g.count as u32),
            groups_kept: groups.map_or(0, |g| g.kept as u32),
            two_best: groups.is_some_and(|g| g.two_best).into(),
            renormalize: self.choice.renormalize.into(),
            scaling: self.choice.scaling,
        }
    }
}

/// `Scores` of choose.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct ScoresArgument {
    bias: Address,
    position: Address,
    experts: u32,
    top_k: u32,
    sigmoid: u32,
    expert_groups: u32,
    groups_kept: u32,
    two_best: u32,
    renormalize: u32,
    scaling: f32,
}

/// `Routing` of common.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct TablesArgument {
    chosen: Address,
    gates: Address,
    starts: Address,
    row_tokens: Address,
    row_gates: Address,
    row_of: Address,
    pair_starts: Address,
    pair_tokens: Address,
    pair_of_row: Address,
    pair_of: Address,
}

/// What routing writes, for up to so many tokens.
#[derive(Debug)]
pub(super) struct Tables {
    /// Position of each choice, best first, `[T · K]`.
    pub(super) chosen: CudaSlice<u32>,
    /// `[T · K]`
    pub(super) gates: CudaSlice<f32>,
    /// First row of each position, and the end.
    pub(super) starts: CudaSlice<u32>,
    /// Token of each row, `[S]`.
    pub(super) row_tokens: CudaSlice<u32>,
    /// `[S]`
    pub(super) row_gates: CudaSlice<f32>,
    /// Row of each choice, `[T · K]`.
    pub(super) row_of: CudaSlice<u32>,
    /// First pair of each group, and the end.
    pub(super) pair_starts: CudaSlice<u32>,
    /// Token of each pair.
    pub(super) pair_tokens: CudaSlice<u32>,
    /// Pair of each row, [`NONE`] without a base, `[S]`.
    pub(super) pair_of_row: CudaSlice<u32>,
    /// The pair that a choice is the first of, `[T · K]`.
    pub(super) pair_of: CudaSlice<u32>,
    counts: CudaSlice<u32>,
    totals: CudaSlice<u32>,
}

impl Tables {
    pub(super) fn new(gpu: &Gpu, shape: &Shape, tokens: usize) -> Result<Self> {
        let rows = shape.rows(tokens);
        let bins = shape.positions() + shape.groups;
        Ok(Self {
            chosen: gpu.alloc(rows)?,
            gates: gpu.alloc(rows)?,
            starts: gpu.alloc(shape.positions() + 1)?,
            row_tokens: gpu.alloc(rows)?,
            row_gates: gpu.alloc(rows)?,
            row_of: gpu.alloc(rows)?,
            pair_starts: gpu.alloc(shape.groups + 1)?,
            pair_tokens: gpu.alloc(shape.pairs(tokens))?,
            pair_of_row: gpu.alloc(rows)?,
            pair_of: gpu.alloc(rows)?,
            // Fewer tokens can need more blocks.
            counts: gpu.alloc(bins * tokens.div_ceil(CHUNK).min(MOST_BLOCKS))?,
            totals: gpu.alloc(bins)?,
        })
    }

    pub(super) fn arguments(&mut self, gpu: &Gpu) -> TablesArgument {
        TablesArgument {
            chosen: gpu.address_mut(&mut self.chosen),
            gates: gpu.address_mut(&mut self.gates),
            starts: gpu.address_mut(&mut self.starts),
            row_tokens: gpu.address_mut(&mut self.row_tokens),
            row_gates: gpu.address_mut(&mut self.row_gates),
            row_of: gpu.address_mut(&mut self.row_of),
            pair_starts: gpu.address_mut(&mut self.pair_starts),
            pair_tokens: gpu.address_mut(&mut self.pair_tokens),
            pair_of_row: gpu.address_mut(&mut self.pair_of_row),
            pair_of: gpu.address_mut(&mut self.pair_of),
        }
    }

    /// The rows from position `first` on; there are `rows` in all.
    pub(super) fn rows(&self, gpu: &Gpu, first: usize, rows: usize) -> Segments {
        Segments {
            tokens: gpu.address(&self.row_tokens),
            gates: gpu.address(&self.row_gates),
            ..Segments::sorted(gpu.address(&self.starts).skip::<u32>(first), rows)
        }
    }

    /// The pairs, at most `pairs`.
    pub(super) fn pairs(&self, gpu: &Gpu, pairs: usize) -> Segments {
        Segments {
            tokens: gpu.address(&self.pair_tokens),
            ..Segments::sorted(gpu.address(&self.pair_starts), pairs)
        }
    }
}

/// Tokens of a block, and the blocks.
fn blocks(tokens: usize) -> (usize, usize) {
    let chunk = CHUNK.max(tokens.div_ceil(MOST_BLOCKS));
    (chunk, tokens.div_ceil(chunk))
}

/// Arguments of the kernels of route.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Route {
    logits: Address,
    chosen: Address,
    gates: Address,
    scores: ScoresArgument,
    group_of: Address,
    out: TablesArgument,
    counts: Address,
    totals: Address,
    tokens: u32,
    positions: u32,
    groups: u32,
    chunk: u32,
    blocks: u32,
}

/// Arguments of `router_logits`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Router {
    x: Address,
    weight: Address,
    logits: Address,
    tokens: u32,
    experts: u32,
    hidden: u32,
}

/// Arguments of `route_only`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[cfg(any(test, feature = "linked"))]
struct RouteOnly {
    logits: Address,
    scores: ScoresArgument,
    chosen: Address,
    gates: Address,
    tokens: u32,
}

arguments!(ScoresArgument: 48, TablesArgument: 80, Route: 200, Router: 40);
#[cfg(any(test, feature = "linked"))]
arguments!(RouteOnly: 80);

/// `logits[t, e] = weight[e] · x[t]`
pub(super) fn router_logits<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    x: &impl DevicePtr<T>,
    tokens: usize,
    logits: &mut CudaSlice<f32>,
) -> Result<()> {
    const TOKENS: usize = 32;
    const EXPERTS: usize = 64;
    let shape = &block.frame.shape;
    let arguments = Router {
        x: gpu.address(x),
        weight: gpu.address(&block.weights.router),
        logits: gpu.address_mut(logits),
        tokens: tokens as u32,
        experts: shape.experts as u32,
        hidden: shape.hidden as u32,
    };
    let kernel = gpu.kernel(&ROUTER, T::KIND, "router_logits", 0)?;
    let launch = Launch {
        grid: tokens.div_ceil(TOKENS) * shape.experts.div_ceil(EXPERTS),
        block: 256,
        shared: 0,
    };
    // SAFETY: the block has these sizes, the workspace room for the tokens.
    unsafe { gpu.launch(&kernel, launch, &arguments, &[]) }
}

/// What tables are made of.
#[derive(Debug, Clone, Copy)]
pub(super) enum Routed {
    /// The router's outputs in the workspace.
    Logits,
    /// Positions `[T · K]`, each of a token others, and their gates `[T · K]`.
    #[cfg(any(test, feature = "linked"))]
    Chosen(Address, Address),
}

/// Fills the tables.
pub(super) fn route<T: Element>(
    gpu: &Gpu,
    block: &Block<T>,
    tokens: usize,
    from: Routed,
    work: &mut Workspace<T>,
) -> Result<()> {
    let shape = &block.frame.shape;
    let bins = shape.positions() + shape.groups;
    let (chunk, blocks) = blocks(tokens);
    let (chosen, gates) = match from {
        Routed::Logits => (Address::NULL, Address::NULL),
        #[cfg(any(test, feature = "linked"))]
        Routed::Chosen(chosen, gates) => (chosen, gates),
    };
    let arguments = Route {
        logits: gpu.address(&work.logits),
        chosen,
        gates,
        scores: block.frame.scores.arguments(gpu, shape.top_k),
        group_of: gpu.address(&*block.frame.group_of),
        out: work.tables.arguments(gpu),
        counts: gpu.address(&work.tables.counts),
        totals: gpu.address(&work.tables.totals),
        tokens: tokens as u32,
        positions: shape.positions() as u32,
        groups: shape.groups as u32,
        chunk: chunk as u32,
        blocks: blocks as u32,
    };
    let queue = |name, grid, warps: usize, shared| {
        let kernel = gpu.kernel(&ROUTE, T::KIND, name, shared)?;
        let launch = Launch {
            grid,
            block: warps * 32,
            shared,
        };
        // SAFETY: the tables have room for the tokens, the shared memory for the bins.
        unsafe { gpu.launch(&kernel, launch, &arguments, &[]) }
    };
    queue("route_choose", blocks, 32, 4 * bins)?;
    queue("route_scan", bins.div_ceil(8), 8, 0)?;
    queue("route_place", blocks, 8, 4 * bins * 8)
}

/// The positions that are chosen for tokens, best first, from the router's outputs `logits: [T, E]`, and their
/// gates: `[T · K]` each.
#[cfg(any(test, feature = "linked"))]
pub(super) fn choose<T: Element>(
    gpu: &Gpu,
    frame: &Frame,
    logits: &impl DevicePtr<f32>,
    tokens: usize,
) -> Result<(CudaSlice<u32>, CudaSlice<f32>)> {
    let shape = &frame.shape;
    ensure!(
        logits.len() == tokens * shape.experts,
        "{} outputs of the router; [{tokens}, {}] was expected",
        logits.len(),
        shape.experts
    );
    let mut chosen = gpu.alloc(shape.rows(tokens))?;
    let mut gates = gpu.alloc(shape.rows(tokens))?;
    let arguments = RouteOnly {
        logits: gpu.address(logits),
        scores: frame.scores.arguments(gpu, shape.top_k),
        chosen: gpu.address_mut(&mut chosen),
        gates: gpu.address_mut(&mut gates),
        tokens: tokens as u32,
    };
    let kernel = gpu.kernel(&ROUTE, T::KIND, "route_only", 0)?;
    let launch = Launch {
        grid: tokens.div_ceil(8),
        block: 256,
        shared: 0,
    };
    // SAFETY: all have room for the tokens.
    unsafe { gpu.launch(&kernel, launch, &arguments, &[]) }?;
    Ok((chosen, gates))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_room_for_any_smaller_batch() {
        for tokens in 1..=70_000 {
            let (chunk, blocks) = blocks(tokens);
            assert!(chunk * blocks >= tokens);
            assert!(
                blocks <= tokens.div_ceil(CHUNK).min(MOST_BLOCKS),
                "{tokens} tokens"
            );
        }
    }
}
