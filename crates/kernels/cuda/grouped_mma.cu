// The grouped product for sm_80 and later: every group of sorted rows times the weights of its group.
//   grouped_mma_plain :  y0[s, :] = scale[s] * (b0[g] . a[row(s), :])
//   grouped_mma_dual  :  y0[s, :] = b0[g] . a[row(s), :]        y1[s, :] = b1[g] . a[row(s), :]
//   grouped_mma_swiglu:  y0[s, :] = silu(b0[g] . a[row(s), :]) * (b1[g] . a[row(s), :])
//
// Grid: any number of blocks, best one for each multiprocessor; every block takes tiles in turn.
// Block: 256 threads. Shared memory: GROUPED_MMA_SHARED = 147456 bytes, dynamic.
// Registers (sm_80, sm_90a): plain 220, 220; dual and swiglu 228, 222.
// Bound: the tensor cores where groups have some hundred rows, the bytes of the weights below that.
// Last measured: checked on an H100, not timed; with ranks it has not run on a card.
//
// A tile is 128 rows by 256 rows of weights (128 of each matrix where there are two), a warp's part of
// it 64 by 64: shared memory, not the tensor cores, would limit smaller parts. Copies run two steps of
// 64 elements of k ahead, over the borders of tiles, so that one tile's stores and the next one's
// loads overlap.

struct Grouped {
    const elem* a;       // [*, k] inputs, row stride lda
    const u32* rows;     // [S] row of `a` for each sorted row; null: the sorted row itself
    const elem* b0;      // [groups, n, k]
    const elem* b1;      // the same, for kernels of two matrices
    elem* y0;            // result, row stride ldy
    elem* y1;            // second result of `_dual`
    const float* scale;  // [S] factor of each result row, or null; `_plain` only
    const u32* starts;   // [groups + 1] group i has the sorted rows starts[i] .. starts[i + 1]
    const u32* ranks;    // [groups + 1] where the rows of each group's matrices begin, and the last end; null: each has n, which else is the most
    u32 groups, n, k, lda, ldy;  // n, k, lda, ldy, ranks: multiples of 8
};
static_assert(sizeof(Grouped) == 96);

enum Kind { PLAIN, DUAL, SWIGLU };

constexpr u32 THREADS = 256;
constexpr u32 ROWS = 128;     // of inputs in a tile
constexpr u32 WEIGHTS = 256;  // rows of weights in a tile
constexpr u32 DEPTH = 64;     // elements of k in a step
constexpr u32 STAGES = 3;
constexpr u32 LINE = DEPTH * sizeof(elem);  // 128 bytes: 8 chunks of 16, chunk c of line l at c ^ l % 8
constexpr u32 STAGE = (ROWS + WEIGHTS) * LINE;
constexpr u32 GROUPED_MMA_SHARED = STAGES * STAGE;
static_assert(GROUPED_MMA_SHARED <= 163 * 1024, "one block on each multiprocessor of sm_80");
constexpr u32 COPIED = THREADS / 8;  // lines that the block copies at once

// Stores four accumulators' pairs of a row, in order, as 32 columns of which `column` is this lane's first.
__device__ __forceinline__ void store(elem* row, u32 column, bool there, u32 (&pairs)[4]) {
    transpose_quad(pairs);
    if (there) *reinterpret_cast<uint4*>(row + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <Kind KIND>
__device__ __forceinline__ void grouped(const Grouped& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr u32 COLUMNS = KIND == PLAIN ? WEIGHTS : WEIGHTS / 2;  // of the result in a tile

    // The copying side: this thread's chunk of each line, and the input row of its lines.
    u32 line = threadIdx.x / 8, chunk = threadIdx.x % 8;
    Tiles<ROWS, COLUMNS> ahead(p.starts, p.groups, p.n);
    u32 source[ROWS / COPIED];
    u32 ahead_k = 0, ahead_stage = 0, ahead_n = 0, ahead_first = 0;
    bool more;

    // The next tile of a group that has such columns, and how many it has.
    auto advance = [&](Tiles<ROWS, COLUMNS>& tiles, u32& n) {
        bool there;
        do {
            there = tiles.advance();
            n = there ? size_of_group(p.ranks, tiles.group, p.n) : 0;
        } while (there && tiles.column >= n);
        return there;
    };

    auto enter = [&] {
        more = advance(ahead, ahead_n);
        if (more) ahead_first = first_of_group(p.ranks, ahead.group, p.n);
        ahead_k = 0;
#pragma unroll
        for (u32 i = 0; i < ROWS / COPIED; i++) {
            u32 row = ahead.row + line + i * COPIED;
            source[i] = !more || row >= ahead.end ? NONE : p.rows ? p.rows[row] : row;
        }
    };

    // Lines of no row or column keep what they held: it reaches only results that are not stored.
    // The end of k is filled with zeros.
    auto fetch = [&] {
        if (more) {
            unsigned char* to = shared + ahead_stage * STAGE + line * LINE + (chunk ^ line % 8) * 16;
            u32 k = ahead_k + chunk * 8;
#pragma unroll
            for (u32 i = 0; i < ROWS / COPIED; i++) {
                if (source[i] != NONE) copy_async(to + i * COPIED * LINE, p.a + u64(source[i]) * p.lda + k, k < p.k);
            }
#pragma unroll
            for (u32 i = 0; i < WEIGHTS / COPIED; i++) {
                const elem* b = i * COPIED < COLUMNS ? p.b0 : p.b1;
                u32 column = ahead.column + line + i * COPIED % COLUMNS;
                if (column < ahead_n) copy_async(to + (ROWS + i * COPIED) * LINE, b + (u64(ahead_first) + column) * p.k + k, k < p.k);
            }
        }
        copy_commit();
        ahead_stage = ahead_stage + 1 == STAGES ? 0 : ahead_stage + 1;
        ahead_k += DEPTH;
        if (more && ahead_k >= p.k) enter();
    };

    // The multiplying side: warps are 2 along rows by 4 along columns.
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 warp_row = warp % 2 * (ROWS / 2), warp_column = warp / 2 * (COLUMNS / 4);
    Tiles<ROWS, COLUMNS> now(p.starts, p.groups, p.n);
    u32 stage = 0, n;

    enter();
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) fetch();
    while (advance(now, n)) {
        // Where there are two matrices, d[m][0..3] belong to the first and d[m][4..7] to the second.
        float d[4][8][4] = {};
        bool busy = now.row + warp_row < now.end && now.column + warp_column < n;
        for (u32 k = 0; k < p.k; k += DEPTH) {
            copy_wait<STAGES - 2>();
            // This step's lines of all threads have come, and all have left the stage that is filled next.
            __syncthreads();
            fetch();
            if (busy) {
                unsigned char* inputs = shared + stage * STAGE + (warp_row + lane % 16) * LINE;
                unsigned char* weights = shared + stage * STAGE + (ROWS + warp_column + lane / 16 * 8 + lane % 8) * LINE;
#pragma unroll
                for (u32 step = 0; step < DEPTH / 16; step++) {
                    u32 a[4][4];
#pragma unroll
                    for (u32 m = 0; m < 4; m++) load_matrices(a[m], inputs + m * 16 * LINE + ((step * 2 + lane / 16) ^ lane % 8) * 16);
#pragma unroll
                    for (u32 j = 0; j < 4; j++) {
                        u32 of = KIND == PLAIN ? j * 16 : j / 2 * COLUMNS + j % 2 * 16;
                        u32 b[4];
                        load_matrices(b, weights + of * LINE + ((step * 2 + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
                        for (u32 m = 0; m < 4; m++) {
                            mma(d[m][j * 2], a[m], {b[0], b[1]});
                            mma(d[m][j * 2 + 1], a[m], {b[2], b[3]});
                        }
                    }
                }
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        if (!busy) continue;
        u32 column = now.column + warp_column + lane % 4 * 8;
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            float(&of)[8][4] = d[i / 2];
            u32 e = i % 2 * 2;  // the accumulators' row: lane / 4, or 8 below it
            u32 row = now.row + warp_row + i * 8 + lane / 4;
            bool there = row < now.end;
            float factor = KIND == PLAIN && p.scale && there ? p.scale[row] : 1.0f;
            u32 first[4], second[4];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                if (KIND == SWIGLU) {
                    first[j] = pack(silu(of[j][e]) * of[j + 4][e], silu(of[j][e + 1]) * of[j + 4][e + 1]);
                } else {
                    first[j] = pack(factor * of[j][e], factor * of[j][e + 1]);
                    second[j] = pack(factor * of[j + 4][e], factor * of[j + 4][e + 1]);
                }
            }
            u64 at = u64(row) * p.ldy;
            store(p.y0 + at, column, there && column < n, first);
            if (KIND == PLAIN) store(p.y0 + at, column + 32, there && column + 32 < n, second);
            if (KIND == DUAL) store(p.y1 + at, column, there && column < n, second);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_mma_plain(Grouped p) { grouped<PLAIN>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_mma_dual(Grouped p) { grouped<DUAL>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_mma_swiglu(Grouped p) { grouped<SWIGLU>(p); }
