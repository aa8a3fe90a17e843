//! Products of a few rows with a matrix as it lies: every weight is read once and used for all rows.
//!
//! What a row gives has the bits that it has beside hundreds of others, in [`gemm`](crate::gemm)'s products of
//! parts of [`DEPTH`] inputs: of each part the products are summed in their order with fused multiply-adds, and
//! the sums of the parts in theirs. So what a model says of a sequence does not depend on what is computed
//! beside it.

use std::ops::Range;

/// Inputs whose products are summed before they are added to what those before them gave.
pub(crate) const DEPTH: usize = 256;
/// Terms of which `gemm` makes no sum of its own: it adds each to the output, rounded on its way.
const FEWEST: usize = 2;
/// Rows up to which this takes less time than turning the weights beforehand.
const MOST: usize = 12;

/// Parts of `terms` terms, which are summed apart: of `most` each, and the last of what is left. None is so
/// short that `gemm` adds it in another way, but for a sum that is.
pub(crate) fn parts(terms: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = terms - start;
        let len = if left <= most + FEWEST { left } else { most };
        start += len;
        (len > 0).then_some(start - len..start)
    })
}

/// `y = x · wᵀ` for `x: [rows, inner]`, `w: [columns, inner]`, `y: [rows, columns]`, each without a gap.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) columns: usize,
}

impl Shape {
    /// Whether the product is to be computed here: of few rows for the time that it takes, of a single column
    /// or few inputs since `gemm` has another order for them.
    pub(crate) fn is_small(&self) -> bool {
        self.rows <= MOST || self.columns == 1 || self.inner <= FEWEST
    }
}

/// Computes the product, if the processor has what it takes; whether it did.
pub(crate) fn product(shape: Shape, x: &[f32], w: &[f32], y: &mut [f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") {
            // SAFETY: the processor has the features that the function is compiled for.
            unsafe { wide::product(shape, x, w, y) };
            return true;
        }
    }
    let _ = (shape, x, w, y);
    false
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use super::{DEPTH, Shape};
    use std::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_set1_ps,
        _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps,
        _mm256_unpacklo_ps,
    };
    use std::array::from_fn;

    /// Numbers of a register, and columns that are worked on at a time.
    const LANES: usize = 8;

    /// As [`super::product`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn product(shape: Shape, x: &[f32], w: &[f32], y: &mut [f32]) {
        let Shape {
            rows,
            inner,
            columns,
        } = shape;
        y[..rows * columns].fill(0.0);
        // The rows part by part: they would push each other out of the cache at distances of powers of two.
        let mut packed = Vec::with_capacity(rows * inner);
        for part in super::parts(inner, DEPTH) {
            let rows = x.chunks_exact(inner).take(rows);
            rows.for_each(|row| packed.extend_from_slice(&row[part.clone()]));
        }
        let mut last = Vec::new();
        for column in (0..columns).step_by(LANES) {
            let width = LANES.min(columns - column);
            let mut w = &w[column * inner..];
            if width < LANES {
                // Zeros stand for the weights of columns that are not there.
                last.extend_from_slice(&w[..width * inner]);
                last.resize(LANES * inner, 0.0);
                w = &last;
            }
            for part in super::parts(inner, DEPTH) {
                let part = Part {
                    w: &w[part.start..],
                    inner,
                    x: &packed[part.start * rows..],
                    len: part.len(),
                };
                let mut row = 0;
                while row < rows {
                    let y = y[row * columns + column..].chunks_mut(columns);
                    let y = y.map(|y| &mut y[..width]);
                    row += match rows - row {
                        1 => part.add::<1>(row, y),
                        2 => part.add::<2>(row, y),
                        3 => part.add::<3>(row, y),
                        4 => part.add::<4>(row, y),
                        5 => part.add::<5>(row, y),
                        6 => part.add::<6>(row, y),
                        7 => part.add::<7>(row, y),
                        _ => part.add::<8>(row, y),
                    };
                }
            }
        }
    }

    /// Some inputs of as many columns as a register has numbers: so few weights that they stay in the first
    /// cache for all rows.
    struct Part<'a> {
        /// Those of the first column, and what follows.
        w: &'a [f32],
        /// From a column to the next.
        inner: usize,
        /// Those of all rows, without a gap.
        x: &'a [f32],
        /// How many inputs.
        len: usize,
    }

    impl Part<'_> {
        /// Adds to `y` what `M` rows from `first` on give; how many these are.
        #[target_feature(enable = "avx2,fma")]
        #[inline]
        fn add<'a, const M: usize>(
            &self,
            first: usize,
            y: impl Iterator<Item = &'a mut [f32]>,
        ) -> usize {
            let Self { w, inner, len, .. } = *self;
            let x = &self.x[first * len..];
            let mut sums = [_mm256_setzero_ps(); M];
            let whole = len / LANES * LANES;
            for at in (0..whole).step_by(LANES) {
                let turned = turn(from_fn(|c| load(&w[c * inner + at..])));
                for (i, turned) in turned.into_iter().enumerate() {
                    for (r, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm256_fmadd_ps(_mm256_set1_ps(x[r * len + at + i]), turned, *sum);
                    }
                }
            }
            for at in whole..len {
                let turned: [f32; LANES] = from_fn(|c| w[c * inner + at]);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_fmadd_ps(_mm256_set1_ps(x[r * len + at]), load(&turned), *sum);
                }
            }
            for (y, sum) in y.zip(sums) {
                let mut numbers = [0.0; LANES];
                store(sum, &mut numbers);
                y.iter_mut().zip(numbers).for_each(|(y, sum)| *y += sum);
            }
            M
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn load(from: &[f32]) -> __m256 {
        let from = &from[..LANES];
        // SAFETY: so many numbers are there.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn store(numbers: __m256, to: &mut [f32]) {
        let to = &mut to[..LANES];
        // SAFETY: so many numbers are there.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), numbers) }
    }

    /// Eight rows of eight numbers, turned: the first numbers of all, then the second ones, and so on.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn turn(rows: [__m256; LANES]) -> [__m256; LANES] {
        // Numbers of two rows, of four, of eight side by side.
        let pairs: [[__m256; 2]; 4] = from_fn(|i| {
            let (a, b) = (rows[2 * i], rows[2 * i + 1]);
            [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)]
        });
        let fours: [[__m256; 4]; 2] = from_fn(|i| {
            let ([a, b], [c, d]) = (pairs[2 * i], pairs[2 * i + 1]);
            [
                _mm256_shuffle_ps::<0x44>(a, c),
                _mm256_shuffle_ps::<0xee>(a, c),
                _mm256_shuffle_ps::<0x44>(b, d),
                _mm256_shuffle_ps::<0xee>(b, d),
            ]
        });
        let [upper, lower] = fours;
        from_fn(|i| match i < 4 {
            true => _mm256_permute2f128_ps::<0x20>(upper[i], lower[i]),
            false => _mm256_permute2f128_ps::<0x31>(upper[i - 4], lower[i - 4]),
        })
    }
}
