//! The tile unit of Intel's processors from Sapphire Rapids on: sixteen rows of pairs of inputs times those of
//! sixteen columns in one instruction. Its intrinsics are not stable in Rust, so they are written as assembly.
//!
//! The sums of a product are there only after others could have begun. So there are four chains of sums, thirty-two
//! rows by thirty-two columns: that takes all eight tiles, and each that is loaded is multiplied twice. The last
//! sixteen rows or fewer have two chains. All of this has only run in tests that carry the instructions out one by one
//! (`tests/tiles.rs`), and has not been timed on a processor with such a unit.

use super::panel::{COLUMNS, LANES, Multiply, To};
use super::vectors::put;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::_mm512_loadu_ps;
use std::mem::MaybeUninit;
use std::ptr::null;
use std::sync::OnceLock;

/// Bytes of a tile's row, and of a tile.
const ROW: usize = 4 * LANES;
const TILE: usize = LANES * ROW;

/// Whether the processor has it, and the system lets this process use it.
pub(super) fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| has_instructions() && is_permitted())
}

fn has_instructions() -> bool {
    use std::arch::x86_64::__cpuid_count;
    const BF16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    // A processor that has AVX-512 has this leaf.
    std::arch::is_x86_feature_detected!("avx512f")
        && __cpuid_count(7, 0).edx & (BF16 | TILES) == BF16 | TILES
}

/// Linux keeps the tiles of a process from one turn to the next only if it is asked to.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: two numbers that the system checks; threads that are there already get the permission too.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn is_permitted() -> bool {
    false
}

/// The shapes of the tiles, as the processor reads them.
#[repr(C, align(64))]
struct Shapes([u8; 64]);

/// Eight tiles of sixteen rows of 64 bytes.
const SHAPES: Shapes = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = ROW as u8;
        bytes[48 + tile] = LANES as u8;
        tile += 1;
    }
    Shapes(bytes)
};

/// The tiles of this thread, in use.
pub(super) struct Tiles(());

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made it had the instructions.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
}

impl Multiply for Tiles {
    type Number = bf16;
    const ROWS: usize = 2 * LANES;
    const STEP: usize = LANES;

    unsafe fn begin() -> Self {
        // SAFETY: the caller's promise; the 64 bytes are there.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, preserves_flags)) };
        Self(())
    }

    unsafe fn add(&self, rows: &[u32], words: usize, [left, right]: [&[u32]; 2], to: To) {
        let steps = words / LANES;
        let all = words * LANES;
        let (upper, lower) = rows.split_at(all);
        assert!(steps > 0 && left.len() == all && right.len() == all);
        assert!(lower.is_empty() || lower.len() == all);
        let mut sums = MaybeUninit::<[f32; Self::ROWS * COLUMNS]>::uninit();
        // SAFETY: all rows of words and both halves of the panel are read, and as many rows of sums written; the
        // caller has the instructions.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{upper} + {rows_row}]",
                "tileloadd tmm6, [{left} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + {row}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "test {lower}, {lower}",
                "jz 3f",
                "tileloadd tmm5, [{lower} + {rows_row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {lower}, {ROW}",
                "3:",
                "add {upper}, {ROW}",
                "add {left}, {TILE}",
                "add {right}, {TILE}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {sums_row}], tmm0",
                "tilestored [{sums} + {sums_row} + {ROW}], tmm1",
                "test {lower}, {lower}",
                "jz 4f",
                "tilestored [{sums} + {sums_row} + {LOWER}], tmm2",
                "tilestored [{sums} + {sums_row} + {LOWER} + {ROW}], tmm3",
                "4:",
                ROW = const ROW,
                TILE = const TILE,
                LOWER = const 2 * TILE,
                sums = in(reg) sums.as_mut_ptr(),
                sums_row = in(reg) 2 * ROW,
                upper = inout(reg) upper.as_ptr() => _,
                lower = inout(reg) if lower.is_empty() { null() } else { lower.as_ptr() } => _,
                rows_row = in(reg) 4 * words,
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right.as_ptr() => _,
                row = in(reg) ROW,
                steps = inout(reg) steps => _,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            );
            let written = rows.len() / words * COLUMNS;
            put_rows(
                std::slice::from_raw_parts(sums.as_ptr().cast(), written),
                to,
            );
        }
    }
}

/// Writes sums, or adds them to those that are there.
///
/// # Safety
/// As of [`Multiply::add`].
#[target_feature(enable = "avx512f")]
unsafe fn put_rows(sums: &[f32], to: To) {
    for (row, sums) in sums.chunks_exact(COLUMNS).take(to.count).enumerate() {
        for (half, sums) in sums.chunks_exact(LANES).enumerate() {
            // SAFETY: so many sums are there; the caller's promise.
            unsafe {
                let out = to.out.at(row, half * LANES).first;
                put(out, _mm512_loadu_ps(sums.as_ptr()), to.first);
            }
        }
    }
}
