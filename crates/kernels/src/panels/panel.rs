//! What all units share: rows and panels are brought into order part by part, and the sums of the parts added up.

use super::{Inputs, Product, Scratch};
use crate::few::parts;
use crate::gemm::Part;
use half::bf16;
use std::arch::x86_64::{
    __m256bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm256_loadu_si256, _mm256_storeu_si256,
    _mm512_castsi512_si256, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_extracti64x4_epi64,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_or_si512, _mm512_permutex2var_epi64,
    _mm512_set_epi64, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::array::from_fn;
use std::mem::transmute;
use std::ops::Range;

/// Columns of half a panel, and words that are brought into order at a time: those of a register, and of a row of
/// the tile unit.
pub(super) const LANES: usize = 16;
/// Columns that are worked on at a time.
pub(super) const COLUMNS: usize = 2 * LANES;
/// Words of a panel, which then stays in the first cache.
const WORDS: usize = crate::few::DEPTH;
/// Words of half a panel, with the few more that the last part may have, filled up.
const HALF: usize = (WORDS + LANES) * LANES;
/// Rows up to which matrices are read column by column.
const FEW: usize = 32;
/// Columns that are turned at a time.
const TURNED: usize = LANES / 2;
/// Bytes of a line of memory.
const LINE: usize = 64;

/// What multiplies.
pub(super) trait Multiply {
    /// What it takes matrices as.
    type Number: Number;
    /// The most rows that it takes at a time.
    const ROWS: usize;
    /// It takes multiples of so many; there are zeros where no more are left.
    const STEP: usize;

    /// Makes it ready on this thread.
    ///
    /// # Safety
    /// The processor has it.
    unsafe fn begin() -> Self;

    /// Multiplies `rows: [rows, words]` with a panel, each half of which is `[words, LANES]`, and adds the sums to
    /// `out: [count, COLUMNS]`, or writes them where it is the first time. The number of words is a multiple of
    /// [`LANES`].
    ///
    /// # Safety
    /// The processor has it, and nobody else uses that part of an output at the same time.
    unsafe fn add(&self, rows: &[u32], words: usize, panel: [&[u32]; 2], to: To);

    /// The same with [`COLUMNS`] columns as they lie, `stride` numbers from one to the next, where so few rows are
    /// not worth a panel; whether it did.
    ///
    /// # Safety
    /// As above.
    unsafe fn add_columns(
        &self,
        _rows: &[u32],
        _words: usize,
        _w: (&[Self::Number], usize),
        _to: To,
    ) -> bool {
        false
    }
}

/// Where sums go.
#[derive(Clone, Copy)]
pub(super) struct To {
    pub(super) out: Part<f32>,
    /// Rows, which may be fewer than were multiplied.
    pub(super) count: usize,
    /// Whether nothing is there yet.
    pub(super) first: bool,
}

/// What a matrix is stored as.
pub(super) trait Number: Copy + Default {
    /// How many of them make a word.
    const OF_WORD: usize;

    /// Rows that are words as they lie.
    fn as_words(row: &[f32]) -> Option<&[u32]>;

    /// A row as words, and zeros for what is missing of the last one.
    ///
    /// # Safety
    /// The processor has AVX-512, of the numbers' own kind too.
    unsafe fn words(row: &[f32], words: &mut [u32]);

    /// The words of sixteen columns whose numbers stand below each other: those of word `word`.
    ///
    /// # Safety
    /// The processor has AVX-512.
    unsafe fn below(w: &[Self], stride: usize, word: usize) -> __m512i;
}

impl Number for f32 {
    const OF_WORD: usize = 1;

    fn as_words(row: &[f32]) -> Option<&[u32]> {
        // SAFETY: of one size, and any bits are words.
        Some(unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), row.len()) })
    }

    unsafe fn words(row: &[f32], words: &mut [u32]) {
        let words = &mut words[..row.len()];
        words
            .iter_mut()
            .zip(row)
            .for_each(|(word, x)| *word = x.to_bits());
    }

    #[inline(always)]
    unsafe fn below(w: &[Self], stride: usize, word: usize) -> __m512i {
        let from = &w[word * stride..][..LANES];
        // SAFETY: so many numbers are there; the caller's promise.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }
}

impl Number for bf16 {
    const OF_WORD: usize = 2;

    fn as_words(_: &[f32]) -> Option<&[u32]> {
        None
    }

    unsafe fn words(row: &[f32], words: &mut [u32]) {
        // SAFETY: the caller's promise.
        unsafe { round(row, words) };
    }

    #[inline(always)]
    unsafe fn below(w: &[Self], stride: usize, word: usize) -> __m512i {
        let [even, odd] = [2 * word, 2 * word + 1].map(|row| {
            let from = &w[row * stride..][..LANES];
            // SAFETY: so many numbers are there; the caller's promise.
            unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast())) }
        });
        // SAFETY: the caller's promise.
        unsafe { _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd)) }
    }
}

/// Numbers rounded to bf16, two to a word.
#[target_feature(enable = "avx512f,avx512bf16")]
fn round(row: &[f32], words: &mut [u32]) {
    let steps = row.chunks_exact(LANES);
    let mut last = [0.0; LANES];
    let rest = steps.remainder().len();
    last[..rest].copy_from_slice(steps.remainder());
    let steps = steps.chain((rest > 0).then_some(&last[..]));
    for (step, to) in steps.zip(words.chunks_mut(LANES / 2)) {
        // SAFETY: there are so many numbers; sixteen of 16 bits are eight of 32.
        let rounded = unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(step.as_ptr()));
            transmute::<__m256bh, [u32; LANES / 2]>(rounded)
        };
        to.copy_from_slice(&rounded[..to.len()]);
    }
}

/// As [`super::Stored::run`].
///
/// # Safety
/// The processor has AVX-512 with BW, and what `M` is; nobody else uses that part of an output at the same time.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn product<'a, M: Multiply>(
    product: &Product<'a, '_, M::Number>,
    scratch: &mut Scratch<'a>,
    out: Part<f32>,
) {
    let count = product.rows;
    let rows = count.next_multiple_of(M::STEP);
    let parts: Vec<Depth> = Depth::all::<M::Number>(product.inner, rows).collect();
    let ordered = match in_order::<M>(product, &parts) {
        Some(words) => words,
        None => {
            // SAFETY: the caller's promise.
            unsafe { order::<M>(product, &parts, rows, scratch) };
            &scratch.rows
        }
    };
    let panel = &mut scratch.panel;
    panel.resize(2 * HALF, 0);
    // SAFETY: the caller's promise.
    let unit = unsafe { M::begin() };
    // Few rows stay in the cache with all their parts, and the matrix is read in its order. Of many a part does.
    let columns = || (0..product.columns).step_by(COLUMNS);
    let blocks: Vec<(usize, &Depth)> = match rows <= FEW {
        true => columns()
            .flat_map(|column| parts.iter().map(move |part| (column, part)))
            .collect(),
        false => parts
            .iter()
            .flat_map(|part| columns().map(move |column| (column, part)))
            .collect(),
    };
    let whole = product.columns / COLUMNS * COLUMNS;
    let rest = product.columns - whole;
    scratch.rest.clear();
    scratch
        .rest
        .resize(if rest > 0 { count * COLUMNS } else { 0 }, 0.0);
    let beside = Part {
        first: scratch.rest.as_mut_ptr(),
        stride: COLUMNS,
    };
    let groups = rows.div_ceil(M::ROWS);
    for (i, &(column, part)) in blocks.iter().enumerate() {
        let is_full = column < whole && part.inputs.len() == part.words * M::Number::OF_WORD;
        if groups == 1 && is_full && product.inputs == Inputs::InRows {
            let (w, stride) = product.w;
            let w = (&w[column * stride + part.inputs.start..], stride);
            let rows = &ordered[part.start..][..rows * part.words];
            // SAFETY: rows and columns of the product, and the caller's promise.
            let done = unsafe {
                let to = To {
                    out: out.at(0, column),
                    count,
                    first: part.inputs.start == 0,
                };
                unit.add_columns(rows, part.words, w, to)
            };
            if done {
                continue;
            }
        }
        let (left, right) = panel.split_at_mut(HALF);
        fill(product, part.inputs.clone(), column, left);
        fill(product, part.inputs.clone(), column + LANES, right);
        let filled = part.words * LANES;
        let panel = [&left[..filled], &right[..filled]];
        // Few rows are done before much of the next panel could be there.
        let next = blocks.get(i + 1).filter(|_| rows > LANES.min(M::ROWS));
        let rows = ordered[part.start..][..rows * part.words].chunks(M::ROWS * part.words);
        for (group, rows) in rows.enumerate() {
            if let Some((column, part)) = next {
                fetch(product, part.inputs.clone(), *column, (group, groups));
            }
            let row = group * M::ROWS;
            let (part_of_out, column) = match column < whole {
                true => (out, column),
                false => (beside, 0),
            };
            // SAFETY: rows and columns of the product, and the caller's promise.
            unsafe {
                let to = To {
                    out: part_of_out.at(row, column),
                    count: M::ROWS.min(count - row),
                    first: part.inputs.start == 0,
                };
                unit.add(rows, part.words, panel, to);
            }
        }
    }
    for (row, sums) in scratch.rest.chunks_exact(COLUMNS).enumerate() {
        // SAFETY: the last columns of a row of the product, and the caller's promise.
        unsafe {
            let to = out.at(row, whole).first;
            std::ptr::copy_nonoverlapping(sums.as_ptr(), to, rest);
        }
    }
}

/// Inputs that are multiplied at a time.
struct Depth {
    inputs: Range<usize>,
    /// How many words they are, filled up to whole steps.
    words: usize,
    /// Where the words of all rows begin.
    start: usize,
}

impl Depth {
    fn all<N: Number>(inner: usize, rows: usize) -> impl Iterator<Item = Self> {
        let mut end = 0;
        parts(inner, WORDS * N::OF_WORD).map(move |inputs| {
            let words = inputs.len().div_ceil(N::OF_WORD).next_multiple_of(LANES);
            let start = end;
            end += rows * words;
            Self {
                inputs,
                words,
                start,
            }
        })
    }
}

/// The words of all rows, if they lie in order.
fn in_order<'a, M: Multiply>(
    product: &Product<'a, '_, M::Number>,
    parts: &[Depth],
) -> Option<&'a [u32]> {
    let (x, stride) = product.x;
    match parts {
        [one] if one.words == stride && product.rows.is_multiple_of(M::STEP) => {
            M::Number::as_words(&x[..product.rows * stride])
        }
        _ => None,
    }
}

/// Brings the words of all rows into order, unless they are.
///
/// # Safety
/// The processor has AVX-512, of the numbers' own kind too.
unsafe fn order<'a, M: Multiply>(
    product: &Product<'a, '_, M::Number>,
    parts: &[Depth],
    rows: usize,
    scratch: &mut Scratch<'a>,
) {
    let (x, stride) = product.x;
    // As many rows with zeros beside them may have been fewer.
    let sizes = [
        product.rows,
        rows,
        product.inner,
        stride,
        M::Number::OF_WORD,
    ];
    let same = |(of, had): (&[f32], [usize; 5])| std::ptr::eq(of, x) && had == sizes;
    if scratch.of.is_some_and(same) {
        return;
    }
    scratch.of = Some((x, sizes));
    let all = parts
        .last()
        .map_or(0, |part| part.start + rows * part.words);
    scratch.rows.resize(all, 0);
    for part in parts {
        let filled = part.inputs.len().div_ceil(M::Number::OF_WORD);
        let words = &mut scratch.rows[part.start..][..rows * part.words];
        let (words, missing) = words.split_at_mut(product.rows * part.words);
        for (row, words) in words.chunks_exact_mut(part.words).enumerate() {
            let from = &x[row * stride..][part.inputs.clone()];
            // SAFETY: the caller's promise.
            unsafe { M::Number::words(from, words) };
            words[filled..].fill(0);
        }
        missing.fill(0);
    }
}

/// Asks for one of so many shares of what the panel of these inputs and columns will be made of.
fn fetch<N: Number>(
    product: &Product<'_, '_, N>,
    inputs: Range<usize>,
    column: usize,
    (share, shares): (usize, usize),
) {
    let (w, stride) = product.w;
    let columns = column..product.columns.min(column + COLUMNS);
    let (rows, numbers) = match product.inputs {
        Inputs::InRows => (columns, inputs),
        Inputs::InColumns => (inputs, columns),
    };
    let count = rows.len();
    for row in rows.start + share * count / shares..rows.start + (share + 1) * count / shares {
        for number in numbers.clone().step_by(LINE / size_of::<N>()) {
            let from = w.as_ptr().wrapping_add(row * stride + number);
            // SAFETY: nothing is read.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
        }
    }
}

/// Half a panel: `inputs` of [`LANES`] columns from `column` on, zeros where there are none.
#[target_feature(enable = "avx512f,avx512bw")]
fn fill<N: Number>(
    product: &Product<'_, '_, N>,
    inputs: Range<usize>,
    column: usize,
    panel: &mut [u32],
) {
    let columns = product.columns.saturating_sub(column).min(LANES);
    if columns == 0 {
        panel.fill(0);
        return;
    }
    let (w, stride) = product.w;
    let step = LANES * N::OF_WORD;
    let steps = inputs.clone().step_by(step);
    match product.inputs {
        Inputs::InRows => {
            // Of eight columns first: lines of memory at distances of powers of two share few places in the
            // cache.
            for half in [0, TURNED] {
                let first = column + half;
                let columns = columns.saturating_sub(half).min(TURNED);
                for (start, panel) in steps.clone().zip(panel.chunks_exact_mut(LANES * LANES)) {
                    let count = step.min(inputs.end - start);
                    if columns == TURNED && count == step {
                        let w = &w[first * stride + start..];
                        turn(from_fn(|c| sixteen(&w[c * stride..])), half, panel);
                        continue;
                    }
                    // At the borders a copy with zeros stands for the matrix.
                    let mut copy = [[N::default(); 2 * LANES]; TURNED];
                    for (c, to) in copy.iter_mut().take(columns).enumerate() {
                        let from = (first + c) * stride + start;
                        to[..count].copy_from_slice(&w[from..from + count]);
                    }
                    turn(from_fn(|c| sixteen(&copy[c])), half, panel);
                }
            }
        }
        Inputs::InColumns => {
            for (start, panel) in steps.zip(panel.chunks_exact_mut(LANES * LANES)) {
                let count = step.min(inputs.end - start);
                if columns == LANES && count == step {
                    join(&w[start * stride + column..], stride, panel);
                    continue;
                }
                let mut copy = [N::default(); LANES * 2 * LANES];
                for (i, to) in copy.chunks_exact_mut(LANES).take(count).enumerate() {
                    let from = (start + i) * stride + column;
                    to[..columns].copy_from_slice(&w[from..from + columns]);
                }
                join(&copy, LANES, panel);
            }
        }
    }
}

/// A step of half a panel from rows of the matrix, which stand below each other.
#[target_feature(enable = "avx512f")]
#[inline]
fn join<N: Number>(w: &[N], stride: usize, panel: &mut [u32]) {
    for (word, to) in panel.chunks_exact_mut(LANES).enumerate() {
        // SAFETY: there is room for so many numbers, and the processor has AVX-512.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), N::below(w, stride, word)) };
    }
}

/// Sixteen words.
#[target_feature(enable = "avx512f")]
#[inline]
fn sixteen<N: Number>(from: &[N]) -> __m512i {
    let from = &from[..LANES * N::OF_WORD];
    // SAFETY: so many numbers are there.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// Eight columns of sixteen words, turned into half of the lanes of sixteen rows of a panel: the first words of
/// all, then the second ones, and so on.
#[target_feature(enable = "avx512f")]
#[inline]
fn turn(columns: [__m512i; TURNED], first_lane: usize, panel: &mut [u32]) {
    // Words of two columns side by side, then of four; a register has four such groups.
    let twos: [[__m512i; 2]; 4] = from_fn(|i| {
        let (a, b) = (columns[2 * i], columns[2 * i + 1]);
        [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)]
    });
    let fours: [[__m512i; 4]; 2] = from_fn(|i| {
        let ([a, b], [c, d]) = (twos[2 * i], twos[2 * i + 1]);
        [
            _mm512_unpacklo_epi64(a, c),
            _mm512_unpackhi_epi64(a, c),
            _mm512_unpacklo_epi64(b, d),
            _mm512_unpackhi_epi64(b, d),
        ]
    });
    // Those have words `j`, `4 + j`, `8 + j` and `12 + j`.
    let (low, high) = (
        _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0),
        _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4),
    );
    let [upper, lower] = fours;
    for (j, (upper, lower)) in upper.into_iter().zip(lower).enumerate() {
        for (first, order) in [(j, low), (8 + j, high)] {
            let both = _mm512_permutex2var_epi64(upper, order, lower);
            let parts = [
                _mm512_castsi512_si256(both),
                _mm512_extracti64x4_epi64::<1>(both),
            ];
            for (word, part) in [first, first + 4].into_iter().zip(parts) {
                let to = &mut panel[word * LANES + first_lane..][..TURNED];
                // SAFETY: there is room for so many numbers.
                unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), part) };
            }
        }
    }
}
