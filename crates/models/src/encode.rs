//! Numbers as the bytes of an element type.

use candle_core::DType;
use half::{bf16, f16};

/// Little-endian bytes of the rounded values, or the place of the first that is not finite then. Whole
/// numbers below 2^24 are what an f32 holds exactly; others are no u32 here.
pub(crate) fn encode(dtype: DType, values: &[f32]) -> Result<Vec<u8>, usize> {
    let bytes = match dtype {
        DType::BF16 => each(values, |v| bf16::from_f32(v).to_le_bytes()),
        DType::F16 => each(values, |v| f16::from_f32(v).to_le_bytes()),
        DType::U32 => {
            let whole = |v: &f32| v.fract() == 0.0 && (0.0..EXACT).contains(v);
            return match values.iter().position(|v| !whole(v)) {
                None => Ok(each(values, |v| (v as u32).to_le_bytes())),
                Some(at) => Err(at),
            };
        }
        _ => each(values, f32::to_le_bytes),
    };
    match first_not_finite(dtype, &bytes) {
        None => Ok(bytes),
        Some((at, _)) => Err(at),
    }
}

/// Up to here every whole number is an f32.
const EXACT: f32 = (1 << 24) as f32;

fn each<const N: usize>(values: &[f32], encode: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * N];
    for (to, &value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *to = encode(value);
    }
    bytes
}

/// The place and value of the first number that is NaN or infinite.
pub(crate) fn first_not_finite(dtype: DType, bytes: &[u8]) -> Option<(usize, f32)> {
    match dtype {
        DType::BF16 => first(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        DType::F16 => first(bytes, |b| f16::from_le_bytes(b).to_f32()),
        DType::U32 => None,
        _ => first(bytes, f32::from_le_bytes),
    }
}

fn first<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> f32) -> Option<(usize, f32)> {
    let numbers = bytes.as_chunks::<N>().0;
    // Without an early end, so that the check is vectorised.
    if numbers
        .iter()
        .fold(true, |ok, &b| ok & decode(b).is_finite())
    {
        return None;
    }
    let mut values = numbers.iter().map(|&b| decode(b)).enumerate();
    values.find(|(_, value)| !value.is_finite())
}
