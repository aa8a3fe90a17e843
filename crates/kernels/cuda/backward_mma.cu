// The two grouped products of the backward pass, for sm_80 and later.
//   backward_mma_transposed     :  y[s, :] = scale[s] * (a0[row(s), :] . b0[g])
//   backward_mma_transposed_two :  y[s, :] = scale[s] * (a0[row(s), :] . b0[g] + a1[row(s), :] . b1[g])
//   backward_mma_outer          :  dw[g][i, j] = sum over the group's rows s of scale[s] * a[row_a(s), i] * b[row_b(s), j]
// and the same in narrow tiles, for adapters, where the first has n <= 128 and the last n or k <= 128:
//   backward_mma_transposed_narrow, backward_mma_outer_narrow
//
// Grid: any number of blocks, best as many as the device holds at once: one for each multiprocessor, two
// of the narrow ones. Every block takes tiles in turn. Block: 256 threads.
// Shared memory, dynamic: transposed, transposed_two 147456 bytes, outer 148224; transposed_narrow
// 73728, outer_narrow 74496.
// Registers (sm_80, sm_90a): transposed 221, 227; transposed_two 222, 228; outer 251, 209;
// transposed_narrow 111, 113; outer_narrow 109, 101.
// Bound: the tensor cores for bases and dense weights; bytes for adapters: the rows, and what is written.
// Last measured: checked on an H100, not timed; with ranks it has not run on a card.
//
// Here the summed index is the row of an operand as it lies in memory, not the column: `ldmatrix`
// transposes such operands on their way from shared memory to registers. Copies run two steps of 64 of
// the summed index ahead, over the borders of tiles, as in grouped_mma.cu. The scale of `outer` goes to
// the rows of `a`, which are rounded to elements once more.

struct Transposed {
    const elem* a0;      // [*, k] inputs, row stride lda
    const elem* a1;      // the same, of the second product; `_two` only
    const u32* rows;     // [S] row of `a` for each sorted row; null: the sorted row itself
    const elem* b0;      // [groups, k, n]
    const elem* b1;      // the same, of the second product
    elem* y;             // result, row stride ldy
    const float* scale;  // [S] factor of each result row, or null
    const u32* starts;   // [groups + 1] group i has the sorted rows starts[i] .. starts[i + 1]
    const u32* ranks;    // [groups + 1] where the rows of each group's matrices begin, and the last end; null: each has k, which else is the most
    u32 groups, n, k, lda, ldy;  // n, k, lda, ldy, ranks: multiples of 8
};
static_assert(sizeof(Transposed) == 96);

struct Outer {
    const elem* a;       // [*, n], row stride lda
    const u32* rows_a;   // [S] row of `a` for each sorted row; null: the sorted row itself
    const elem* b;       // [*, k], row stride ldb
    const u32* rows_b;   // the same for `b`
    float* dw;           // [groups, n, k], zero for a group without rows
    const float* scale;  // [S] factor of each row, or null
    const u32* starts;   // [groups + 1] group i has the sorted rows starts[i] .. starts[i + 1]
    u32 groups, n, k, lda, ldb;  // multiples of 8, but for `groups`
};
static_assert(sizeof(Outer) == 80);

constexpr u32 THREADS = 256;
constexpr u32 ROWS = 128;   // of inputs in a tile of `transposed`
constexpr u32 DEPTH = 64;   // of the summed index in a step
constexpr u32 STAGES = 3;
constexpr u32 LINE = 128;   // bytes: 64 elements in 8 chunks of 16 bytes, chunk c of line l at c ^ l % 8
constexpr u32 SLAB = DEPTH * LINE;   // 64 columns of an operand whose lines are the summed index
constexpr u32 COPIED = THREADS / 8;  // lines that the block copies at once

// Copies this thread's chunks of a line of WIDTH columns, that from `column` on, into the slabs. Those
// beyond `columns` keep what they held: it reaches only results that are not stored.
template <u32 WIDTH>
__device__ __forceinline__ void copy_line(unsigned char* to, const elem* row, u32 column, u32 columns, bool there) {
    column += threadIdx.x % 8 * 8;
#pragma unroll
    for (u32 i = 0; i < WIDTH / 64; i++) {
        if (column + i * 64 < columns) copy_async(to + i * SLAB, row + column + i * 64, there);
    }
}

// d += a * b, for 16 of the summed index: `line` is this lane's of a slab of b, `chunk` its first chunk.
template <u32 SIDE>
__device__ __forceinline__ void multiply(float (&d)[SIDE / 16][SIDE / 8][4], const u32 (&a)[SIDE / 16][4], const unsigned char* line, u32 chunk) {
#pragma unroll
    for (u32 j = 0; j < SIDE / 16; j++) {
        u32 b[4];
        load_matrices_transposed(b, line + (chunk ^ j * 2) * 16);
#pragma unroll
        for (u32 m = 0; m < SIDE / 16; m++) {
            mma(d[m][j * 2], a[m], {b[0], b[1]});
            mma(d[m][j * 2 + 1], a[m], {b[2], b[3]});
        }
    }
}

// A tile is ROWS by COLUMNS, a warp's part of it SIDE by SIDE.
template <u32 COLUMNS, u32 SIDE, u32 PRODUCTS>
__device__ __forceinline__ void transposed(const Transposed& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr u32 STAGE = (ROWS + COLUMNS) * LINE;  // the lines of a, then the slabs of b

    // The copying side: this thread's chunk of each line, and the input row of its lines.
    u32 line = threadIdx.x / 8, chunk = threadIdx.x % 8;
    Tiles<ROWS, COLUMNS> ahead(p.starts, p.groups, p.n);
    u32 source[ROWS / COPIED];
    u32 ahead_k = 0, ahead_product = 0, ahead_stage = 0, ahead_size = 0, ahead_first = 0;
    bool more;

    // Those that sum over nothing are passed by.
    auto enter = [&] {
        do {
            more = ahead.advance();
            ahead_size = more ? size_of_group(p.ranks, ahead.group, p.k) : 0;
        } while (more && ahead_size == 0);
        if (more) ahead_first = first_of_group(p.ranks, ahead.group, p.k);
#pragma unroll
        for (u32 i = 0; i < ROWS / COPIED; i++) {
            u32 row = ahead.row + line + i * COPIED;
            source[i] = !more || row >= ahead.end ? NONE : p.rows ? p.rows[row] : row;
        }
    };

    // Lines of no row keep what they held, as columns of no result do. The end of k is filled with zeros.
    auto fetch = [&] {
        if (more) {
            unsigned char* to = shared + ahead_stage * STAGE + line * LINE + (chunk ^ line % 8) * 16;
            const elem* a = ahead_product ? p.a1 : p.a0;
            const elem* b = ahead_product ? p.b1 : p.b0;
            u32 k = ahead_k + chunk * 8;
#pragma unroll
            for (u32 i = 0; i < ROWS / COPIED; i++) {
                if (source[i] != NONE) copy_async(to + i * COPIED * LINE, a + u64(source[i]) * p.lda + k, k < ahead_size);
            }
#pragma unroll
            for (u32 i = 0; i < DEPTH / COPIED; i++) {
                u32 row = ahead_k + line + i * COPIED;
                const elem* from = b + (u64(ahead_first) + min(row, ahead_size - 1)) * p.n;
                copy_line<COLUMNS>(to + (ROWS + i * COPIED) * LINE, from, ahead.column, p.n, row < ahead_size);
            }
            ahead_k += DEPTH;
            if (ahead_k >= ahead_size) {
                ahead_k = 0;
                ahead_product = ahead_product + 1 == PRODUCTS ? 0 : ahead_product + 1;
                if (ahead_product == 0) enter();
            }
        }
        copy_commit();
        ahead_stage = ahead_stage + 1 == STAGES ? 0 : ahead_stage + 1;
    };

    // The multiplying side.
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 warp_row = warp % (ROWS / SIDE) * SIDE, warp_column = warp / (ROWS / SIDE) * SIDE;
    u32 inputs = (warp_row + lane % 16) * LINE;
    u32 weights = ROWS * LINE + warp_column / 64 * SLAB + lane % 16 * LINE;
    u32 weight_chunk = (warp_column % 64 / 8 + lane / 16) ^ lane % 8;
    Tiles<ROWS, COLUMNS> now(p.starts, p.groups, p.n);
    u32 stage = 0;

    enter();
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) fetch();
    while (now.advance()) {
        float d[SIDE / 16][SIDE / 8][4] = {};
        bool busy = now.row + warp_row < now.end && now.column + warp_column < p.n;
        u32 steps = (size_of_group(p.ranks, now.group, p.k) + DEPTH - 1) / DEPTH * PRODUCTS;
        for (u32 i = 0; i < steps; i++) {
            copy_wait<STAGES - 2>();
            // This step's lines of all threads have come, and all have left the stage that is filled next.
            __syncthreads();
            fetch();
            if (busy) {
                const unsigned char* from = shared + stage * STAGE;
#pragma unroll
                for (u32 step = 0; step < DEPTH / 16; step++) {
                    u32 a[SIDE / 16][4];
#pragma unroll
                    for (u32 m = 0; m < SIDE / 16; m++) load_matrices(a[m], from + inputs + m * 16 * LINE + ((step * 2 + lane / 16) ^ lane % 8) * 16);
                    multiply<SIDE>(d, a, from + weights + step * 16 * LINE, weight_chunk);
                }
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        if (!busy) continue;
#pragma unroll
        for (u32 i = 0; i < SIDE / 8; i++) {
            u32 e = i % 2 * 2;  // the accumulators' row: lane / 4, or 8 below it
            u32 row = now.row + warp_row + i * 8 + lane / 4;
            bool there = row < now.end;
            float factor = p.scale && there ? p.scale[row] : 1.0f;
#pragma unroll
            for (u32 part = 0; part < SIDE / 32; part++) {
                u32 column = now.column + warp_column + part * 32 + lane % 4 * 8;
                u32 pairs[4];
#pragma unroll
                for (u32 j = 0; j < 4; j++) pairs[j] = pack(factor * d[i / 2][part * 4 + j][e], factor * d[i / 2][part * 4 + j][e + 1]);
                transpose_quad(pairs);
                if (there && column < p.n) *reinterpret_cast<uint4*>(p.y + u64(row) * p.ldy + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_mma_transposed(Transposed p) { transposed<256, 64, 1>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_mma_transposed_two(Transposed p) { transposed<256, 64, 2>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) backward_mma_transposed_narrow(Transposed p) { transposed<64, 32, 1>(p); }

// A tile of dw, and the rows that it sums over.
struct Part { u32 group, n, k, row, end; };

// A tile is N by K, a warp's part of it SIDE by SIDE. Every group has all its tiles, with or without
// rows. No two blocks share a sum, so that its order is that of the rows.
template <u32 N, u32 K, u32 SIDE>
__device__ __forceinline__ void outer(const Outer& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr u32 STAGE = (N + K) * LINE;  // the slabs of a, then those of b
    float* factors = reinterpret_cast<float*>(shared + STAGES * STAGE);  // [STAGES, DEPTH]

    u32 tall = (p.n + N - 1) / N, wide = (p.k + K - 1) / K;
    u32 tiles = p.groups * tall * wide;
    auto part = [&](u32 tile) {
        u32 group = tile / (tall * wide);
        return Part{group, tile % tall * N, tile / tall % wide * K, p.starts[group], p.starts[group + 1]};
    };

    // The copying side. The rows of a step are looked up when the step before it is copied.
    u32 line = threadIdx.x / 8, chunk = threadIdx.x % 8;
    u32 next = blockIdx.x, ahead_stage = 0;
    Part ahead = {};
    u32 from_a[DEPTH / COPIED], from_b[DEPTH / COPIED];  // NONE: beyond the group
    float factor[DEPTH / COPIED];

    // The rows of the next step, in the next tile that has any where this one is done. No tile left:
    // `ahead` stays without rows.
    auto look_up = [&] {
        while (ahead.row >= ahead.end && next < tiles) {
            ahead = part(next);
            next += gridDim.x;
        }
#pragma unroll
        for (u32 i = 0; i < DEPTH / COPIED; i++) {
            u32 row = ahead.row + line + i * COPIED;
            bool there = row < ahead.end;
            from_a[i] = !there ? NONE : p.rows_a ? p.rows_a[row] : row;
            from_b[i] = !there ? NONE : p.rows_b ? p.rows_b[row] : row;
            factor[i] = there && p.scale ? p.scale[row] : 0.0f;
        }
    };

    // Lines beyond the group are filled with zeros.
    auto fetch = [&] {
        if (ahead.row < ahead.end) {
            unsigned char* to = shared + ahead_stage * STAGE + line * LINE + (chunk ^ line % 8) * 16;
#pragma unroll
            for (u32 i = 0; i < DEPTH / COPIED; i++) {
                bool there = from_a[i] != NONE;
                copy_line<N>(to + i * COPIED * LINE, p.a + u64(there ? from_a[i] : 0) * p.lda, ahead.n, p.n, there);
                copy_line<K>(to + N * LINE + i * COPIED * LINE, p.b + u64(there ? from_b[i] : 0) * p.ldb, ahead.k, p.k, there);
                if (p.scale && chunk == 0) factors[ahead_stage * DEPTH + line + i * COPIED] = factor[i];
            }
            ahead.row += DEPTH;
            look_up();
        }
        copy_commit();
        ahead_stage = ahead_stage + 1 == STAGES ? 0 : ahead_stage + 1;
    };

    // The multiplying side.
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 warp_n = warp % (N / SIDE) * SIDE, warp_k = warp / (N / SIDE) * SIDE;
    u32 line_a = warp_n / 64 * SLAB + (lane / 16 * 8 + lane % 8) * LINE;
    u32 chunk_a = (warp_n % 64 / 8 + lane / 8 % 2) ^ lane % 8;
    u32 line_b = N * LINE + warp_k / 64 * SLAB + lane % 16 * LINE;
    u32 chunk_b = (warp_k % 64 / 8 + lane / 16) ^ lane % 8;
    u32 stage = 0;

    look_up();
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) fetch();
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        Part now = part(tile);
        float d[SIDE / 16][SIDE / 8][4] = {};
        bool busy = now.n + warp_n < p.n && now.k + warp_k < p.k;
        for (; now.row < now.end; now.row += DEPTH) {
            copy_wait<STAGES - 2>();
            // This step's lines of all threads have come, and all have left the stage that is filled next.
            __syncthreads();
            fetch();
            if (busy) {
                const unsigned char* from = shared + stage * STAGE;
#pragma unroll
                for (u32 step = 0; step < DEPTH / 16; step++) {
                    u32 a[SIDE / 16][4];
#pragma unroll
                    for (u32 m = 0; m < SIDE / 16; m++) load_matrices_transposed(a[m], from + line_a + step * 16 * LINE + (chunk_a ^ m * 2) * 16);
                    if (p.scale) {
                        const float* of = factors + stage * DEPTH + step * 16 + lane % 4 * 2;
#pragma unroll
                        for (u32 i = 0; i < 4; i++) {
                            float2 two = *reinterpret_cast<const float2*>(of + i / 2 * 8);
#pragma unroll
                            for (u32 m = 0; m < SIDE / 16; m++) a[m][i] = pack(two.x * low(a[m][i]), two.y * high(a[m][i]));
                        }
                    }
                    multiply<SIDE>(d, a, from + line_b + step * 16 * LINE, chunk_b);
                }
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        if (!busy) continue;
#pragma unroll
        for (u32 i = 0; i < SIDE / 8; i++) {
            u32 n = now.n + warp_n + i * 8 + lane / 4;
            float* row = p.dw + (u64(now.group) * p.n + n) * p.k;
#pragma unroll
            for (u32 j = 0; j < SIDE / 8; j++) {
                u32 k = now.k + warp_k + j * 8 + lane % 4 * 2;
                if (n < p.n && k < p.k) *reinterpret_cast<float2*>(row + k) = make_float2(d[i / 2][j][i % 2 * 2], d[i / 2][j][i % 2 * 2 + 1]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) backward_mma_outer(Outer p) { outer<128, 256, 64>(p); }
// The short side of the tile is that of the result.
extern "C" __global__ void __launch_bounds__(THREADS, 2) backward_mma_outer_narrow(Outer p) {
    if (p.n < p.k) outer<64, 128, 32>(p);
    else outer<128, 64, 32>(p);
}
