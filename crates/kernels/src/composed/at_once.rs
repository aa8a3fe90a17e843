//! Products of sorted rows by the kernels of [`crate::cuda`], one launch for all groups.

use super::products::{Between, filled};
use crate::grouped::Segment;
use crate::padded::{PIECE, common_rank};
use candle_core::DType;
#[cfg(feature = "linked")]
use {
    super::of_type,
    super::products::ByGroup,
    crate::cuda::{Gpu, Product, Way, aligned},
    crate::padded::{padded, without_padding},
    candle_core::{Device, Result, Tensor},
    std::sync::Arc,
};

/// The most groups that the kernels take.
const GROUPS: usize = 512;
/// As far as the kernels and the copy engine count rows of a stack, and pieces of rows.
const MOST: usize = i32::MAX as usize;
/// How many times as many components slots may be filled up to. More would cost more than one product after
/// the other does.
const FILLED: usize = 4;

/// What the kernels need to know of sorted rows and their groups.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    rows: usize,
    groups: usize,
    /// Of each group; with zeros behind its own where it has fewer.
    components: usize,
    /// First row of each group, and the end.
    first_rows: Vec<u32>,
}

impl Plan {
    /// For rows of this type in `segments` and stacks of these `widths`, whose rows `starts` gives to groups;
    /// nothing where the kernels cannot do it. Groups are filled up to as many components where nobody sees
    /// what is `between`.
    fn new(
        dtype: DType,
        widths: &[usize],
        segments: &[Segment],
        starts: &[usize],
        between: Between,
    ) -> Option<Self> {
        let groups = starts.len() - 1;
        let rows = segments.last().map_or(0, |last| last.start + last.len);
        if !matches!(dtype, DType::BF16 | DType::F16)
            || !(1..=GROUPS).contains(&groups)
            || !(1..=MOST).contains(&rows)
        {
            return None;
        }
        let components = match between {
            Between::Seen => starts[1] - starts[0],
            Between::Unseen => common_rank(starts),
        };
        let alike = |bounds: &[usize]| bounds[1] - bounds[0] == components;
        let filled_up =
            between == Between::Unseen && groups * components <= FILLED * starts[groups];
        let fits =
            |&size: &usize| size > 0 && size.is_multiple_of(PIECE) && size / PIECE * rows <= MOST;
        let fit = (filled_up || starts.windows(2).all(alike))
            && groups * components <= MOST
            && widths.iter().chain([&components]).all(fits);
        Some(Self {
            rows,
            groups,
            components,
            first_rows: fit.then(|| first_rows(segments, groups)).flatten()?,
        })
    }
}

/// The first row of each group, and the end; nothing if rows do not lie in the order of groups.
fn first_rows(segments: &[Segment], groups: usize) -> Option<Vec<u32>> {
    let mut first = vec![0];
    let mut end = 0;
    for segment in filled(segments) {
        if segment.group + 1 < first.len() {
            return None;
        }
        // Groups that were passed by have no rows; a group may have several segments.
        first.resize(first.len().max(segment.group + 1), end);
        end = (segment.start + segment.len) as u32;
    }
    first.resize(groups + 1, end);
    Some(first)
}

/// The products of our own kernels on candle's stream.
#[cfg(feature = "linked")]
pub(crate) struct AtOnce {
    gpu: Arc<Gpu>,
    plan: Plan,
    /// [`Plan::first_rows`] on the GPU.
    first_rows: Tensor,
    /// Where the components of each group begin, and the last end.
    starts: Arc<[usize]>,
}

#[cfg(feature = "linked")]
impl AtOnce {
    /// As [`super::products::by_group`]; nothing where the kernels cannot do it.
    pub(crate) fn new(
        x: &Tensor,
        stacks: &[&Tensor],
        segments: &[Segment],
        starts: &Arc<[usize]>,
        between: Between,
    ) -> Result<Option<Self>> {
        let Device::Cuda(device) = x.device() else {
            return Ok(None);
        };
        let widths = stacks
            .iter()
            .map(|w| w.dim(1))
            .collect::<Result<Vec<_>>>()?;
        let Some(plan) = Plan::new(x.dtype(), &widths, segments, starts, between) else {
            return Ok(None);
        };
        // Else it is candle that complains.
        if !stacks.iter().all(|w| w.device().same_device(x.device())) {
            return Ok(None);
        }
        let Some(gpu) = Gpu::of(device).map_err(candle_core::Error::wrap)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            gpu,
            first_rows: Tensor::new(&plan.first_rows[..], x.device())?,
            plan,
            starts: starts.clone(),
        }))
    }

    fn product(&self, way: Way, a: &Tensor, b: &Tensor, width: usize) -> Result<Tensor> {
        let product = Product {
            gpu: self.gpu.clone(),
            way,
            rows: self.plan.rows,
            groups: self.plan.groups,
            n: self.plan.components,
            k: width,
        };
        aligned(a)?.apply_op3_no_bwd(&aligned(b)?, &self.first_rows, &product)
    }

    /// A stack in the type of rows, every group filled up.
    fn stack(&self, w: &Tensor, rows: &Tensor) -> Result<Tensor> {
        padded(&of_type(w, rows)?, &self.starts, self.plan.components)
    }
}

#[cfg(feature = "linked")]
impl ByGroup for AtOnce {
    fn there(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        self.product(Way::There, x, &self.stack(w, x)?, w.dim(1)?)
    }

    fn back(&self, z: &Tensor, w: &Tensor) -> Result<Tensor> {
        self.product(Way::Back, z, &self.stack(w, z)?, w.dim(1)?)
    }

    fn outer(&self, z: &Tensor, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let sums = self.product(Way::Outer, z, x, x.dim(1)?)?;
        without_padding(&sums, &self.starts, self.plan.components)?.to_dtype(dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(runs: &[(usize, usize)]) -> Vec<Segment> {
        let mut start = 0;
        let segment = |&(group, len): &(usize, usize)| {
            start += len;
            Segment {
                group,
                start: start - len,
                len,
            }
        };
        runs.iter().map(segment).collect()
    }

    #[test]
    fn groups_begin_where_their_rows_do() {
        let of = |runs: &[(usize, usize)], groups| first_rows(&segments(runs), groups);
        assert_eq!(of(&[(0, 2), (1, 3)], 2), Some(vec![0, 2, 5]));
        // Without rows: the first, some in between, the last.
        let some = [(1, 2), (4, 1)];
        assert_eq!(of(&some, 6), Some(vec![0, 0, 2, 2, 2, 3, 3]));
        let empty = [(0, 0), (1, 2), (2, 0), (3, 0), (4, 1), (5, 0)];
        assert_eq!(of(&empty, 6), of(&some, 6));
        // Several segments of one group, and empty ones out of order.
        let twice = [(0, 1), (0, 2), (3, 0), (1, 4), (0, 0), (1, 1)];
        assert_eq!(of(&twice, 2), Some(vec![0, 3, 8]));
        assert_eq!(of(&[], 2), Some(vec![0, 0, 0]));
        assert_eq!(of(&[(1, 1), (0, 1)], 2), None);
        assert_eq!(of(&[(0, 1), (1, 1), (0, 1)], 2), None);
    }

    #[test]
    fn what_kernels_cannot_do_is_left_to_candle() {
        let runs = segments(&[(0, 3), (1, 0), (2, 6)]);
        let plan = |dtype, widths: &[usize], starts: &[usize]| {
            Plan::new(dtype, widths, &runs, starts, Between::Seen).is_some()
        };
        let starts = [0, 16, 32, 48];
        for dtype in [DType::BF16, DType::F16] {
            assert!(plan(dtype, &[8], &starts));
            assert!(plan(dtype, &[2048, 64], &starts));
        }
        assert!(!plan(DType::F32, &[8], &starts));
        assert!(!plan(DType::BF16, &[12], &starts));
        assert!(!plan(DType::BF16, &[8, 4], &starts));
        assert!(!plan(DType::BF16, &[0], &starts));
        // Components that are no multiple of 8, none, or not as many for each group.
        assert!(!plan(DType::BF16, &[8], &[0, 4, 8, 12]));
        assert!(!plan(DType::BF16, &[8], &[0, 0, 0, 0]));
        assert!(!plan(DType::BF16, &[8], &[0, 8, 16, 32]));
        // More pieces of rows than are counted.
        assert!(!plan(DType::BF16, &[MOST / 8 * 8], &starts));

        let all: Vec<usize> = (0..=513).map(|group| group * 8).collect();
        assert!(plan(DType::BF16, &[8], &all[..513]));
        assert!(!plan(DType::BF16, &[8], &all));
        let of = |runs: &[Segment], starts: &[usize]| {
            Plan::new(DType::BF16, &[8], runs, starts, Between::Seen)
        };
        assert_eq!(of(&[], &starts), None);
        assert_eq!(of(&[], &[0]), None);
        let turned = segments(&[(2, 3), (0, 6)]);
        assert_eq!(of(&turned, &starts), None);
    }

    #[test]
    fn slots_of_any_ranks_are_filled_up() {
        let runs = segments(&[(0, 3), (1, 0), (2, 6)]);
        let rank = |starts: &[usize]| {
            let plan = Plan::new(DType::BF16, &[8, 24], &runs, starts, Between::Unseen);
            plan.map(|plan| plan.components)
        };
        assert_eq!(rank(&[0, 16, 32, 48]), Some(16));
        assert_eq!(rank(&[0, 4, 8, 12]), Some(8));
        assert_eq!(rank(&[0, 8, 8, 32]), Some(24));
        assert_eq!(rank(&[0, 0, 0, 80]), Some(80));
        // One is much wider than all others, each is much narrower than what is copied, or there is nothing.
        assert_eq!(rank(&[0, 1, 2, 3, 4, 84]), None);
        assert_eq!(rank(&[0, 1, 2, 3]), None);
        assert_eq!(rank(&[0, 0, 0, 0]), None);
    }
}
