//! Products of sorted rows with the matrices of their groups, there and back, and the sums of outer products
//! that are the matrices' gradients.

#[cfg(feature = "linked")]
use super::at_once::AtOnce;
use super::{add, of_type};
use crate::grouped::Segment;
use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

/// The segments that have rows.
pub(super) fn filled(segments: &[Segment]) -> impl Iterator<Item = &Segment> {
    segments.iter().filter(|segment| segment.len > 0)
}

/// Those of its rows.
pub(super) fn rows(x: &Tensor, segment: &Segment) -> Result<Tensor> {
    x.narrow(0, segment.start, segment.len)
}

/// Results of segments, one behind the other; `like` has their type.
pub(super) fn joined(parts: &[Tensor], width: usize, like: &Tensor) -> Result<Tensor> {
    match parts.is_empty() {
        true => Tensor::zeros((0, width), like.dtype(), like.device()),
        false => Tensor::cat(parts, 0),
    }
}

/// The products of some sorted rows. The matrices of all groups lie one behind the other in a stack `[C, K]`,
/// as many rows of it to a group as the group has components. Rows `x: [S, K]` meet them on one side; what
/// they have on the other, `z`, is a number for each component of their group, row after row, whatever its
/// shape. Stacks may have another type than rows.
pub(super) trait ByGroup: Send + Sync {
    /// `z = x·wᵀ`
    fn there(&self, x: &Tensor, w: &Tensor) -> Result<Tensor>;

    /// `x = z·w`
    fn back(&self, z: &Tensor, w: &Tensor) -> Result<Tensor>;

    /// `w = zᵀ·x`, of this type; zeros for groups without rows.
    fn outer(&self, z: &Tensor, x: &Tensor, dtype: DType) -> Result<Tensor>;
}

/// Whether anyone sees what rows have on the other side, and so whether there may be more of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Between {
    Seen,
    Unseen,
}

/// The products of rows like `x` that are sorted into `segments`, with `stacks` whose rows `starts` gives to
/// groups: in one launch of a kernel of our own where they can be had so, else by candle.
pub(super) fn by_group(
    x: &Tensor,
    stacks: &[&Tensor],
    segments: &Arc<[Segment]>,
    starts: &Arc<[usize]>,
    between: Between,
) -> Result<Box<dyn ByGroup>> {
    #[cfg(feature = "linked")]
    if let Some(products) = AtOnce::new(x, stacks, segments, starts, between)? {
        return Ok(Box::new(products));
    }
    #[cfg(not(feature = "linked"))]
    let _ = (x, stacks, between);
    Ok(Box::new(OneByOne {
        segments: segments.clone(),
        starts: starts.clone(),
    }))
}

/// Candle's products, one segment after the other.
struct OneByOne {
    segments: Arc<[Segment]>,
    /// Where the components of each group begin, and the last end.
    starts: Arc<[usize]>,
}

/// A segment that has rows.
struct Run {
    segment: Segment,
    /// Its group's first component, and how many there are.
    first: usize,
    count: usize,
    /// Where its numbers on the other side begin.
    at: usize,
}

impl Run {
    /// The matrix of the group.
    fn matrix(&self, w: &Tensor) -> Result<Tensor> {
        w.narrow(0, self.first, self.count)
    }

    /// The segment's numbers on the other side, which lie in one line.
    fn part(&self, z: &Tensor) -> Result<Tensor> {
        let rows = self.segment.len;
        z.narrow(0, self.at, rows * self.count)?
            .reshape((rows, self.count))
    }
}

impl OneByOne {
    fn runs(&self) -> impl Iterator<Item = Run> {
        let mut at = 0;
        filled(&self.segments).map(move |&segment| {
            let first = self.starts[segment.group];
            let count = self.starts[segment.group + 1] - first;
            let run = Run {
                segment,
                first,
                count,
                at,
            };
            at += segment.len * count;
            run
        })
    }

    /// Those whose groups have components.
    fn some(&self) -> impl Iterator<Item = Run> {
        self.runs().filter(|run| run.count > 0)
    }
}

impl ByGroup for OneByOne {
    fn there(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        let parts = self.some().map(|run| {
            let w = of_type(&run.matrix(w)?, x)?;
            rows(x, &run.segment)?.matmul(&w.t()?)?.flatten_all()
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        joined(&parts, 0, x)?.flatten_all()
    }

    fn back(&self, z: &Tensor, w: &Tensor) -> Result<Tensor> {
        let (z, k) = (z.flatten_all()?, w.dim(1)?);
        let parts = self.runs().map(|run| match run.count {
            0 => Tensor::zeros((run.segment.len, k), z.dtype(), z.device()),
            _ => run.part(&z)?.matmul(&of_type(&run.matrix(w)?, &z)?),
        });
        joined(&parts.collect::<Result<Vec<_>>>()?, k, &z)
    }

    fn outer(&self, z: &Tensor, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let (z, k) = (z.flatten_all()?, x.dim(1)?);
        let mut sums = vec![None; self.starts.len() - 1];
        for run in self.some() {
            let product = run.part(&z)?.t()?.matmul(&rows(x, &run.segment)?)?;
            add(&mut sums[run.segment.group], product)?;
        }
        let all = sums.into_iter().zip(self.starts.windows(2));
        let all = all.filter(|(_, bounds)| bounds[1] > bounds[0]);
        let all = all.map(|(sum, bounds)| match sum {
            Some(sum) => sum.to_dtype(dtype),
            None => Tensor::zeros((bounds[1] - bounds[0], k), dtype, x.device()),
        });
        let all = all.collect::<Result<Vec<_>>>()?;
        match all.is_empty() {
            true => Tensor::zeros((0, k), dtype, x.device()),
            false => Tensor::cat(&all, 0),
        }
    }
}
