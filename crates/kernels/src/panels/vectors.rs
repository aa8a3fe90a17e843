//! The vectors of AVX-512: a word of one row times those of sixteen columns.

use super::panel::{LANES, Multiply, Number, To};
use half::bf16;
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_add_ps, _mm512_castsi512_ps,
    _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_ps,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::array::from_fn;
use std::mem::transmute;

/// Rows whose sums stay in registers.
const ROWS: usize = 8;
/// Lines of memory that are asked for before they are read, of each column.
const AHEAD: usize = 4;

/// Matrices in f32.
pub(super) struct Singles;

/// Matrices in bf16.
pub(super) struct Pairs;

/// Calls `$some` for as many rows as there are.
macro_rules! for_rows {
    ($some:ident($rows:ident, $words:ident, $columns:ident, $to:ident)) => {
        match $rows.len() / $words {
            1 => $some::<1>($rows, $words, $columns, $to),
            2 => $some::<2>($rows, $words, $columns, $to),
            3 => $some::<3>($rows, $words, $columns, $to),
            4 => $some::<4>($rows, $words, $columns, $to),
            5 => $some::<5>($rows, $words, $columns, $to),
            6 => $some::<6>($rows, $words, $columns, $to),
            7 => $some::<7>($rows, $words, $columns, $to),
            _ => $some::<ROWS>($rows, $words, $columns, $to),
        }
    };
}

/// Defines what multiplies words, for any number of rows, with `$multiply(sum, row, columns)`.
macro_rules! multiply {
    ($unit:ident, $number:ty, $features:literal, $multiply:expr) => {
        impl Multiply for $unit {
            type Number = $number;
            const ROWS: usize = ROWS;
            const STEP: usize = 1;

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
                    // SAFETY: the caller's promise.
                    unsafe { put_rows(held, to) };
                }
                // SAFETY: the caller's promise.
                unsafe { for_rows!(some(rows, words, panel, to)) }
            }

            unsafe fn add_columns(
                &self,
                rows: &[u32],
                words: usize,
                w: (&[Self::Number], usize),
                to: To,
            ) -> bool {
                #[target_feature(enable = $features)]
                unsafe fn some<const M: usize>(
                    rows: &[u32],
                    words: usize,
                    (w, stride): (&[$number], usize),
                    to: To,
                ) {
                    const OF_WORD: usize = <$number as Number>::OF_WORD;
                    let rows: [&[u32]; M] = from_fn(|r| &rows[r * words..][..words]);
                    let [mut left, mut right] = [[_mm512_setzero_ps(); M]; 2];
                    for first in (0..words).step_by(LANES) {
                        let w = &w[first * OF_WORD..];
                        for (w, sums) in [(w, &mut left), (&w[LANES * stride..], &mut right)] {
                            let turned = turn(w, stride);
                            for i in 0..LANES {
                                for r in 0..M {
                                    let row = _mm512_set1_epi32(rows[r][first + i] as i32);
                                    sums[r] = $multiply(sums[r], row, turned[i]);
                                }
                            }
                        }
                    }
                    // SAFETY: the caller's promise.
                    unsafe { put_rows::<M>(from_fn(|r| [left[r], right[r]]), to) };
                }
                // SAFETY: the caller's promise.
                unsafe { for_rows!(some(rows, words, w, to)) };
                true
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

/// Sixteen words of sixteen columns that lie `stride` numbers apart, turned: the first words of all, then the second
/// ones, and so on.
#[target_feature(enable = "avx512f")]
#[inline]
fn turn<N: Number>(w: &[N], stride: usize) -> [__m512i; LANES] {
    let columns: [__m512i; LANES] = from_fn(|c| {
        let from = &w[c * stride..][..LANES * N::OF_WORD];
        let ahead = from.as_ptr().wrapping_add(AHEAD * LANES * N::OF_WORD);
        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
        // SAFETY: so many numbers are there.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    });
    // Words of two columns side by side, then of four; a register has four such groups.
    let twos: [[__m512i; 2]; 8] = from_fn(|i| {
        let (a, b) = (columns[2 * i], columns[2 * i + 1]);
        [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)]
    });
    let fours: [[__m512i; 4]; 4] = from_fn(|i| {
        let ([a, b], [c, d]) = (twos[2 * i], twos[2 * i + 1]);
        [
            _mm512_unpacklo_epi64(a, c),
            _mm512_unpackhi_epi64(a, c),
            _mm512_unpacklo_epi64(b, d),
            _mm512_unpackhi_epi64(b, d),
        ]
    });
    // Those have words `j`, `4 + j`, `8 + j` and `12 + j` of their four columns.
    let mut turned = [_mm512_setzero_si512(); LANES];
    for j in 0..4 {
        let [a, b, c, d] = fours.map(|four| four[j]);
        let (first, third) = (
            [
                _mm512_shuffle_i32x4::<0x44>(a, b),
                _mm512_shuffle_i32x4::<0xee>(a, b),
            ],
            [
                _mm512_shuffle_i32x4::<0x44>(c, d),
                _mm512_shuffle_i32x4::<0xee>(c, d),
            ],
        );
        for (i, (ab, cd)) in first.into_iter().zip(third).enumerate() {
            turned[8 * i + j] = _mm512_shuffle_i32x4::<0x88>(ab, cd);
            turned[8 * i + 4 + j] = _mm512_shuffle_i32x4::<0xdd>(ab, cd);
        }
    }
    turned
}

/// Writes the sums of rows, or adds them to those that are there: of each those of both halves of the columns.
///
/// # Safety
/// They are there, and nobody else uses them.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn put_rows<const M: usize>(held: [[__m512; 2]; M], to: To) {
    for (row, held) in held.into_iter().enumerate() {
        for (half, held) in held.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { put(to.out.at(row, half * LANES).first, held, to.first) };
        }
    }
}

/// Writes numbers to a place, or adds them to those that are there.
///
/// # Safety
/// So many numbers are there, and nobody else uses them.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn put(to: *mut f32, numbers: __m512, first: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        let sum = match first {
            true => numbers,
            false => _mm512_add_ps(_mm512_loadu_ps(to), numbers),
        };
        _mm512_storeu_ps(to, sum);
    }
}
