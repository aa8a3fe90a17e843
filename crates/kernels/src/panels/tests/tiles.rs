//! A tile unit for processors without one: each of its instructions is invalid there, and what it would have done
//! is done here, as Intel's manual says, before the program goes on behind it.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a row.
const ROW: usize = 64;

/// Eight tiles of up to sixteen rows.
struct Tiles {
    rows: [usize; 8],
    /// Bytes of a row that are used.
    widths: [usize; 8],
    bytes: [[[u8; ROW]; 16]; 8],
}

struct Shared(UnsafeCell<Tiles>);

// SAFETY: only the thread that holds `IN_USE` runs instructions that get here.
unsafe impl Sync for Shared {}

static TILES: Shared = Shared(UnsafeCell::new(Tiles {
    rows: [0; 8],
    widths: [0; 8],
    bytes: [[[0; ROW]; 16]; 8],
}));

static IN_USE: Mutex<()> = Mutex::new(());

/// While it lives, this process has a tile unit.
pub(super) struct Unit {
    before: libc::sigaction,
    _lock: MutexGuard<'static, ()>,
}

impl Unit {
    pub(super) fn new() -> Self {
        let lock = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = MaybeUninit::uninit();
        // SAFETY: all zeros is an action; what was there before is written, and taken back later.
        let before = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = invalid as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(
                libc::sigaction(libc::SIGILL, &action, before.as_mut_ptr()),
                0
            );
            before.assume_init()
        };
        Self {
            before,
            _lock: lock,
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: what was there before.
        unsafe { libc::sigaction(libc::SIGILL, &self.before, std::ptr::null_mut()) };
    }
}

/// The registers in the order of their numbers in instructions.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn invalid(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system gives the state of the thread, whose instruction pointer is at an instruction; one of
    // the tile unit has at most ten bytes, and the program goes on behind them. Addresses are those that the
    // instruction itself would have used.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize] as *const u8;
        let byte = |i: usize| at.add(i).read();
        let tiles = &mut *TILES.0.get();
        let [prefix, high, low, operation, operands] = [0, 1, 2, 3, 4].map(byte);
        let is_known = prefix == 0xc4 && high & 0x1f == 2;
        if !is_known {
            libc::abort();
        }
        let (mode, first, second) = (operands >> 6, operands >> 3 & 7, operands & 7);
        let third = usize::from(!low >> 3 & 7);
        let [first, second] = [first, second].map(usize::from);
        let register = |number: u8| registers[REGISTERS[usize::from(number)] as usize] as usize;
        // Where memory is meant: its address, from row to row, and the length of the instruction.
        let memory = || {
            let far = |number: u8, bit: u8| number | (!high >> bit & 1) << 3;
            let (base, index, end) = match second {
                4 => (far(byte(5) & 7, 5), Some(far(byte(5) >> 3 & 7, 6)), 6),
                _ => (far(second as u8, 5), None, 5),
            };
            let (offset, end) = match mode {
                1 => (isize::from(byte(end) as i8), end + 1),
                2 => (at.add(end).cast::<i32>().read_unaligned() as isize, end + 4),
                _ => (0, end),
            };
            let stride = index.map_or(0, |index| register(index) << (byte(5) >> 6));
            ((register(base) as *mut u8).offset(offset), stride, end)
        };
        let mut end = 5;
        match (operation, low & 3, mode == 3) {
            // ldtilecfg
            (0x49, 0, false) => {
                let (from, _, len) = memory();
                for tile in 0..8 {
                    tiles.widths[tile] = from
                        .add(16 + 2 * tile)
                        .cast::<u16>()
                        .read_unaligned()
                        .into();
                    tiles.rows[tile] = from.add(48 + tile).read().into();
                }
                tiles.bytes = [[[0; ROW]; 16]; 8];
                end = len;
            }
            // tilerelease
            (0x49, 0, true) => tiles.rows = [0; 8],
            // tilezero
            (0x49, 3, true) => tiles.bytes[first] = [[0; ROW]; 16],
            // tileloadd
            (0x4b, 3, false) => {
                let (from, stride, len) = memory();
                for row in 0..tiles.rows[first] {
                    let to = tiles.bytes[first][row].as_mut_ptr();
                    from.add(row * stride)
                        .copy_to_nonoverlapping(to, tiles.widths[first]);
                }
                end = len;
            }
            // tilestored
            (0x4b, 2, false) => {
                let (to, stride, len) = memory();
                for row in 0..tiles.rows[first] {
                    let from = tiles.bytes[first][row].as_ptr();
                    to.add(row * stride)
                        .copy_from_nonoverlapping(from, tiles.widths[first]);
                }
                end = len;
            }
            // tdpbf16ps
            (0x5c, 2, true) => tiles.multiply(first, second, third),
            _ => libc::abort(),
        }
        registers[libc::REG_RIP as usize] += end as i64;
    }
}

impl Tiles {
    /// Adds to tile `to` the products of pairs of `a` and `b`.
    fn multiply(&mut self, to: usize, a: usize, b: usize) {
        let pair = |row: &[u8; ROW], i: usize| {
            [0, 2].map(|at| {
                let at = 4 * i + at;
                f32::from_bits(u32::from_le_bytes([0, 0, row[at], row[at + 1]]))
            })
        };
        for row in 0..self.rows[to] {
            for column in 0..self.widths[to] / 4 {
                let at = 4 * column..4 * column + 4;
                let sum = &self.bytes[to][row][at.clone()];
                let mut sum = f32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]);
                for k in 0..self.widths[a] / 4 {
                    let (x, w) = (
                        pair(&self.bytes[a][row], k),
                        pair(&self.bytes[b][k], column),
                    );
                    sum += x[0] * w[0] + x[1] * w[1];
                }
                self.bytes[to][row][at].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }
}
