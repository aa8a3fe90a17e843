//! Adapters of slots of different ranks as if all had the same: what a slot lacks is zeros.

use candle_core::{Result, Tensor};

/// Numbers of 16 bits that kernels copy at once, which are 16 bytes: rows and ranks are multiples of as many.
pub(crate) const PIECE: usize = 8;

/// The rank that all slots take, at least one piece.
pub(crate) fn common_rank(starts: &[usize]) -> usize {
    let widest = starts.windows(2).map(|bounds| bounds[1] - bounds[0]).max();
    widest.unwrap_or(0).next_multiple_of(PIECE).max(PIECE)
}

/// Where each slot's components lie among those of all, and `starts.last()`, a row of zeros behind them, for
/// those that it lacks of `rank(its own)`.
fn places(starts: &[usize], rank: impl Fn(usize) -> usize) -> Vec<u32> {
    let zeros = starts.last().copied().unwrap_or(0);
    let of_slot = |bounds: &[usize]| {
        let (first, end) = (bounds[0], bounds[1]);
        let all = first..first + rank(end - first);
        all.map(move |at| if at < end { at as u32 } else { zeros as u32 })
    };
    starts.windows(2).flat_map(of_slot).collect()
}

/// Where slots begin, and the last end, if each is filled up to whole pieces.
#[cfg(any(test, feature = "linked"))]
pub(crate) fn whole_pieces(starts: &[usize]) -> Vec<usize> {
    let mut end = 0;
    let ends = starts.windows(2).map(|bounds| {
        end += (bounds[1] - bounds[0]).next_multiple_of(PIECE);
        end
    });
    std::iter::once(0).chain(ends).collect()
}

/// A stack `[C, K]` of the components of slots, which begin at `starts`, each filled up to whole pieces.
#[cfg(any(test, feature = "linked"))]
pub(crate) fn in_pieces(stack: &Tensor, starts: &[usize]) -> Result<Tensor> {
    let mut bounds = starts.windows(2);
    if bounds.all(|bounds| (bounds[1] - bounds[0]).is_multiple_of(PIECE)) {
        return Ok(stack.clone());
    }
    let places = places(starts, |own| own.next_multiple_of(PIECE));
    let index = Tensor::new(places, stack.device())?;
    stack.pad_with_zeros(0, 0, 1)?.index_select(&index, 0)
}

/// Whether all slots have this rank.
fn are_alike(starts: &[usize], rank: usize) -> bool {
    let mut bounds = starts.windows(2);
    bounds.all(|bounds| bounds[1] - bounds[0] == rank)
}

/// A stack `[C, K]` of the components of `n` slots, which begin at `starts`, as `[n · rank, K]`.
pub(crate) fn padded(stack: &Tensor, starts: &[usize], rank: usize) -> Result<Tensor> {
    if are_alike(starts, rank) {
        return Ok(stack.clone());
    }
    let index = Tensor::new(places(starts, |_| rank), stack.device())?;
    stack.pad_with_zeros(0, 0, 1)?.index_select(&index, 0)
}

/// The components alone: the other way.
pub(crate) fn without_padding(stack: &Tensor, starts: &[usize], rank: usize) -> Result<Tensor> {
    if are_alike(starts, rank) {
        return Ok(stack.clone());
    }
    let bounds = starts.windows(2).enumerate();
    let of_slot = |(slot, bounds): (usize, &[usize])| {
        let first = (slot * rank) as u32;
        first..first + (bounds[1] - bounds[0]) as u32
    };
    let index: Vec<u32> = bounds.flat_map(of_slot).collect();
    stack.index_select(&Tensor::new(index, stack.device())?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn slots_are_filled_up_with_zeros() {
        let stack: Vec<Vec<f32>> = (1..=5).map(|i| vec![i as f32, -i as f32]).collect();
        let stack = Tensor::new(stack, &Device::Cpu).unwrap();
        let starts = [0, 2, 2, 5];
        assert_eq!(common_rank(&starts), 8);
        let all = padded(&stack, &starts, 3).unwrap();
        let first = all.narrow(1, 0, 1).unwrap().flatten_all().unwrap();
        let expected = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 5.0];
        assert_eq!(first.to_vec1::<f32>().unwrap(), expected);
        let back = without_padding(&all, &starts, 3).unwrap();
        let rows = |t: &Tensor| t.to_vec2::<f32>().unwrap();
        assert_eq!(rows(&back), rows(&stack));
    }

    #[test]
    fn slots_are_filled_up_to_whole_pieces() {
        let stack: Vec<Vec<f32>> = (1..=11).map(|i| vec![i as f32]).collect();
        let stack = Tensor::new(stack, &Device::Cpu).unwrap();
        let starts = [0, 2, 2, 11];
        assert_eq!(whole_pieces(&starts), [0, 8, 8, 24]);
        let all = in_pieces(&stack, &starts).unwrap().flatten_all().unwrap();
        let mut expected = vec![1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        expected.extend((3..=11).map(|i| i as f32));
        expected.resize(24, 0.0);
        assert_eq!(all.to_vec1::<f32>().unwrap(), expected);
    }

    #[test]
    fn ranks_are_multiples_of_what_is_copied() {
        for (starts, rank) in [(&[0, 0, 0][..], 8), (&[0, 8, 16], 8), (&[0, 9, 12], 16)] {
            assert_eq!(common_rank(starts), rank);
        }
    }
}
