//! The tile unit of Intel's processors from Sapphire Rapids on: sixteen rows of pairs of inputs times those of
//! sixteen columns in one instruction. Its intrinsics are not stable in Rust, so they are written as assembly.

use super::panel::{COLUMNS, LANES, Multiply, To};
use half::bf16;
use std::arch::asm;
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
    const ROWS: usize = LANES;
    const ALL: bool = true;

    unsafe fn begin() -> Self {
        // SAFETY: the caller's promise; the 64 bytes are there.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, preserves_flags)) };
        Self(())
    }

    unsafe fn add(&self, rows: &[u32], words: usize, [left, right]: [&[u32]; 2], to: To) {
        let steps = words / LANES;
        let all = words * LANES;
        assert!(steps > 0 && rows.len() == all && left.len() == all && right.len() == all);
        let mut part = [0f32; LANES * COLUMNS];
        // SAFETY: sixteen rows of words and both halves of the panel are read, and sixteen rows of sums written,
        // as far as they reach; the caller has the instructions.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm2, [{rows} + {rows_row}]",
                "tileloadd tmm3, [{left} + {row}]",
                "tileloadd tmm4, [{right} + {row}]",
                "tdpbf16ps tmm0, tmm2, tmm3",
                "tdpbf16ps tmm1, tmm2, tmm4",
                "add {rows}, {ROW}",
                "add {left}, {TILE}",
                "add {right}, {TILE}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{part} + {part_row}], tmm0",
                "tilestored [{part} + {part_row} + {ROW}], tmm1",
                ROW = const ROW,
                TILE = const TILE,
                part = in(reg) part.as_mut_ptr(),
                part_row = in(reg) 4 * COLUMNS,
                rows = inout(reg) rows.as_ptr() => _,
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
                options(nostack),
            );
        }
        for (row, sums) in part.chunks_exact(COLUMNS).take(to.count).enumerate() {
            for (column, &sum) in sums.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    let out = to.out.at(row, column).first;
                    *out = if to.first { sum } else { *out + sum };
                }
            }
        }
    }
}
