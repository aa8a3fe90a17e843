//! Loops over slices in a form that the compiler turns into vector instructions.
//!
//! A plain floating-point sum may not be reordered, so it stays scalar; here every reduction runs
//! over [`LANES`] partial results of fixed place. No operation depends on the vector width of the
//! machine: the bits are the same with and without AVX2.

use crate::real::Real;

/// Partial results of a reduction.
const LANES: usize = 16;
/// Rows of a block of [`transpose`].
const BLOCK: usize = 8;

/// Defines a function whose body is compiled a second time for AVX2, used where there is AVX2.
/// Everything that the body calls must be `#[inline(always)]`.
macro_rules! simd {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<T: Real>(
        $($arg:ident: $ty:ty),* $(,)?
    ) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name<T: Real>($($arg: $ty),*) $(-> $out)? {
            #[inline(always)]
            fn plain<T: Real>($($arg: $ty),*) $(-> $out)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide<T: Real>($($arg: $ty),*) $(-> $out)? {
                    plain($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has the feature that `wide` is compiled for.
                    return unsafe { wide($($arg),*) };
                }
            }
            plain($($arg),*)
        }
    };
}
pub(crate) use simd;

#[inline(always)]
fn reduce<T: Real>(values: &[T], start: T, map: impl Fn(T) -> T, join: impl Fn(T, T) -> T) -> T {
    let mut lanes = [start; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            lanes[i] = join(lanes[i], map(chunk[i]));
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = join(*lane, map(v));
    }
    lanes.into_iter().fold(start, join)
}

/// The largest element that is not NaN.
#[inline(always)]
pub(crate) fn max<T: Real>(values: &[T]) -> T {
    let larger = |a, b| if b > a { b } else { a };
    reduce(values, T::neg_infinity(), |v| v, larger)
}

/// `Σ map(v)`.
#[inline(always)]
pub(crate) fn sum<T: Real>(values: &[T], map: impl Fn(T) -> T) -> T {
    reduce(values, T::zero(), map, |a, b| a + b)
}

/// `Σ a[i] · b[i]`; `b` is at least as long as `a`.
#[inline(always)]
pub(crate) fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::zero(); LANES];
    let b = &b[..a.len()];
    let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in (&mut a).zip(&mut b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a.remainder()).zip(b.remainder()) {
        *lane += a * b;
    }
    lanes.into_iter().fold(T::zero(), |a, b| a + b)
}

simd! {
    /// `out[c, r] = x[r * stride + c]` for `rows` rows of `cols` columns; `out: [cols, rows]`.
    ///
    /// Block by block: a block touches a few cache lines and uses the whole of each, where a walk
    /// down a column would touch a line per element, and lines a power of two apart push each other
    /// out of the cache.
    pub(crate) fn transpose<T: Real>(x: &[T], stride: usize, rows: usize, cols: usize, out: &mut [T]) {
        for r in (0..rows).step_by(BLOCK) {
            for c in (0..cols).step_by(LANES) {
                if r + BLOCK <= rows && c + LANES <= cols {
                    let mut block = [[T::zero(); LANES]; BLOCK];
                    for (i, row) in block.iter_mut().enumerate() {
                        let start = (r + i) * stride + c;
                        row.copy_from_slice(&x[start..start + LANES]);
                    }
                    let lines = out[c * rows..].chunks_exact_mut(rows).take(LANES);
                    for (j, line) in lines.enumerate() {
                        for (to, from) in line[r..r + BLOCK].iter_mut().zip(&block) {
                            *to = from[j];
                        }
                    }
                } else {
                    for i in r..rows.min(r + BLOCK) {
                        for j in c..cols.min(c + LANES) {
                            out[j * rows + i] = x[i * stride + j];
                        }
                    }
                }
            }
        }
    }
}

/// `exp` within 2 units in the last place, with infinities, NaN and subnormal results.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // exp(x) = 2^n · exp(r) with n = round(x / ln 2), |r| ≤ ln 2 / 2. Beyond these bounds the
    // result is 0 or infinite; comparisons are such that NaN passes through.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    // Adding 1.5 · 2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, so that n · HIGH is exact.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    let r = x - n * HIGH - n * LOW;
    // Minimax polynomial of the Cephes library for (exp(r) - 1 - r) / r².
    let mut p = 1.987_569_1e-4;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    // 2^n in two factors, because n reaches from -150 to 128.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_everywhere() {
        let mut worst = 0.0f64;
        for i in -8_800_000..=8_872_000 {
            let x = i as f32 * 1e-5;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.4e-7, "relative error {worst}");
        for x in [-1e30f32, f32::NEG_INFINITY, -104.5] {
            assert_eq!(exp(x), 0.0);
        }
        for x in [1e30f32, f32::INFINITY, 88.73] {
            assert_eq!(exp(x), f32::INFINITY);
        }
        assert!(exp(f32::NAN).is_nan());
        assert_eq!((exp(0.0), exp(-0.0)), (1.0, 1.0));
        // Subnormal results.
        assert!((exp(-95.0) / (-95f32).exp() - 1.0).abs() < 1e-3);
    }

    #[test]
    fn transposes_of_every_shape() {
        for (rows, cols) in [(0, 3), (3, 0), (1, 1), (8, 16), (7, 40), (25, 17), (16, 32)] {
            let stride = cols + 3;
            let x: Vec<f32> = (0..rows * stride).map(|i| i as f32).collect();
            let mut out = vec![f32::NAN; rows * cols];
            transpose(&x, stride, rows, cols, &mut out);
            for r in 0..rows {
                for c in 0..cols {
                    assert_eq!(out[c * rows + r], x[r * stride + c], "{rows} x {cols}");
                }
            }
        }
    }

    #[test]
    fn reductions_of_every_length() {
        for len in 0..50 {
            let v: Vec<f64> = (0..len).map(|i| f64::from(i * 7 % 13) - 5.0).collect();
            assert_eq!(max(&v), v.iter().copied().fold(f64::NEG_INFINITY, f64::max));
            assert_eq!(sum(&v, |x| x * x), v.iter().map(|x| x * x).sum::<f64>());
            assert_eq!(dot(&v, &v), sum(&v, |x| x * x));
        }
    }
}
