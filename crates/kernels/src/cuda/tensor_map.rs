//! What the copy engine of Hopper is told of tensors.

use super::compile::ElementKind;
use super::device::{Address, arguments};
use super::{Result, Trying};
use cudarc::driver::sys;

/// How the copy engine of Hopper reads a matrix.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(super) struct TensorMap(sys::CUtensorMap);

arguments!(TensorMap: 128);

impl TensorMap {
    /// 16-bit numbers at `address`, read in boxes with a swizzle of 128 bytes, zeros outside. Sizes are
    /// those of the tensor from its last dimension to its first.
    pub(super) fn new(
        address: Address,
        element: ElementKind,
        sizes: &[usize],
        boxes: &[u32],
    ) -> Result<Self> {
        use sys::CUtensorMapDataType::{
            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as BF16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16 as F16,
        };
        let mut map = std::mem::MaybeUninit::<sys::CUtensorMap>::uninit();
        let strides: Vec<u64> = sizes[..sizes.len() - 1]
            .iter()
            .scan(2, |bytes, &size| {
                *bytes *= size as u64;
                Some(*bytes)
            })
            .collect();
        let steps = vec![1u32; sizes.len()];
        let counts: Vec<u64> = sizes.iter().map(|&size| size as u64).collect();
        // SAFETY: all arrays have as many entries as the map has dimensions, the strides one less; it is
        // written on success.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                if element == ElementKind::F16 {
                    F16
                } else {
                    BF16
                },
                sizes.len() as u32,
                address.0 as *mut _,
                counts.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .trying(format!(
                "describing a tensor of {sizes:?} to the copy engine"
            ))?;
            Ok(Self(map.assume_init()))
        }
    }
}
