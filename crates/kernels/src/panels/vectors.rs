//! The vectors of AVX-512: a word of one row times those of sixteen columns.

use super::panel::{LANES, Multiply, To};
use half::bf16;
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_castsi512_ps, _mm512_dpbf16_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps,
};
use std::array::from_fn;
use std::mem::transmute;

/// Rows whose sums stay in registers.
const ROWS: usize = 8;

/// Matrices in f32.
pub(super) struct Singles;

/// Matrices in bf16.
pub(super) struct Pairs;

/// Defines what multiplies words, for any number of rows, with `$multiply(sum, row, columns)`.
macro_rules! multiply {
    ($unit:ident, $number:ty, $features:literal, $multiply:expr) => {
        impl Multiply for $unit {
            type Number = $number;
            const ROWS: usize = ROWS;
            const ALL: bool = false;

            unsafe fn begin() -> Self {
                Self
            }

            unsafe fn add(&self, rows: &[u32], words: usize, panel: [&[u32]; 2], to: To) {
                #[target_feature(enable = $features)]
                unsafe fn some<const M: usize>(
                    rows: &[u32],
                    words: usize,
                    panel: [&[u32]; 2],
                    to: To,
                ) {
                    let rows: [&[u32]; M] = from_fn(|r| &rows[r * words..][..words]);
                    let mut held = [[_mm512_setzero_ps(); 2]; M];
                    let [left, right] = panel.map(|half| half.chunks_exact(LANES));
                    for (word, (left, right)) in left.zip(right).take(words).enumerate() {
                        let columns = [sixteen(left), sixteen(right)];
                        for (row, held) in rows.iter().zip(&mut held) {
                            let row = _mm512_set1_epi32(row[word] as i32);
                            for (sum, column) in held.iter_mut().zip(columns) {
                                *sum = $multiply(*sum, row, column);
                            }
                        }
                    }
                    for (row, held) in held.into_iter().enumerate() {
                        for (half, held) in held.into_iter().enumerate() {
                            // SAFETY: the caller's promise.
                            unsafe { put(to.out.at(row, half * LANES).first, held, to.first) };
                        }
                    }
                }
                // SAFETY: the caller's promise.
                unsafe {
                    match rows.len() / words {
                        1 => some::<1>(rows, words, panel, to),
                        2 => some::<2>(rows, words, panel, to),
                        3 => some::<3>(rows, words, panel, to),
                        4 => some::<4>(rows, words, panel, to),
                        5 => some::<5>(rows, words, panel, to),
                        6 => some::<6>(rows, words, panel, to),
                        7 => some::<7>(rows, words, panel, to),
                        _ => some::<ROWS>(rows, words, panel, to),
                    }
                }
            }
        }
    };
}

multiply!(Singles, f32, "avx512f", |sum, row, column| {
    _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(column), sum)
});

multiply!(Pairs, bf16, "avx512f,avx512bf16", |sum, row, column| {
    // SAFETY: registers of as many bits.
    let [row, column] = [row, column].map(|w| unsafe { transmute::<__m512i, __m512bh>(w) });
    _mm512_dpbf16_ps(sum, row, column)
});

#[target_feature(enable = "avx512f")]
#[inline]
fn sixteen(from: &[u32]) -> __m512i {
    let from = &from[..LANES];
    // SAFETY: so many numbers are there.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// Writes numbers to a place, or adds them to those that are there.
///
/// # Safety
/// So many numbers are there, and nobody else uses them.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn put(to: *mut f32, numbers: __m512, first: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        let sum = match first {
            true => numbers,
            false => _mm512_add_ps(_mm512_loadu_ps(to), numbers),
        };
        _mm512_storeu_ps(to, sum);
    }
}
