// The products of a Mixture-of-Experts layer's backward on Hopper (sm_90a). Group g owns the sorted rows s
// of starts[g] .. starts[g + 1].
//   transposed      y[s] = scale[s] * a[row(s)] b[g]                            b [groups, k, n] as the forward has it
//   transposed_two  y[s] = scale[s] * (a[row(s)] b[g] + a1[row(s)] b1[g])
//   outer           dw[g] = sum over s of scale[s] * a[row_a(s)] (x) b[row_b(s)]   [n, k], f32; zeros for no rows
//
// Arguments: Transposed, then a tensor map of b and (two) one of b1, 128 bytes each; or Outer alone.
// Grid: one block per multiprocessor, whatever the sizes. Block: 384 threads. Dynamic shared memory: given
// for each entry point at the end of this file.
//
// Tensor map of a matrix [groups, k, n]: three dimensions, 16-bit elements (BFLOAT16 or FLOAT16), sizes
// {n, k, groups}, strides {n * 2 bytes, k * n * 2 bytes}, box {64, 64, 1}, element strides {1, 1, 1}, no
// interleave, SWIZZLE_128B, L2_PROMOTION_256B, out-of-bounds fill NONE (zeros). The third dimension keeps
// the end of a group's sum from reaching into the weights of the next group.
//
// Both are the persistent product of hopper.cuh with turned operands: weights of `transposed` lie with the
// summed index outermost, and so do both operands of `outer`, whose summed index is the row. A box of 64
// places of the summed index times 64 columns is 64 lines of shared memory.
//
// Bound: as the forward product; `outer` by FLOPs for some 300 rows per group and more, by the bytes of dw below.
// Registers: 256 wide: 168, of which 72 stay to load and 216 are taken to multiply; 128 wide: up to 128; 64 wide: up to 86.
// Last measured: H100, OLMoE-1B-7B, half replaced, bases and adapters trained, 4096 tokens: the whole backward takes 2.4 of the
// forward's time; these kernels were not timed alone.

struct Transposed {
    const elem* a;      // [*, k] inputs, row stride lda
    const elem* a1;
    const u32* rows;    // [S] row of `a` and `a1` of each sorted row; null: the sorted row itself
    const elem* b;      // [groups, k, n], here read through the tensor map
    const elem* b1;
    elem* y;            // [S, n], row stride ldy
    const float* scale; // [S] factor of each result row, or null
    const u32* starts;  // [groups + 1]
    const u32* ranks;   // null: each group's matrix has k rows
    u32 groups, n, k, lda, ldy;  // at most MAX_GROUPS groups
};
static_assert(sizeof(Transposed) == 96);

struct Outer {
    const elem* a;       // [*, n], row stride lda
    const u32* rows_a;   // [S] row of `a` of each sorted row; null: the sorted row itself
    const elem* b;       // [*, k], row stride ldb
    const u32* rows_b;
    float* dw;           // [groups, n, k]
    const float* scale;  // [S] factor of each row of `a`, or null
    const u32* starts;   // [groups + 1]
    u32 groups, n, k, lda, ldb;
};
static_assert(sizeof(Outer) == 80);

constexpr u32 BOX_BYTES = 64 * LINE;

template <u32 PAIRS, u32 ROWS, u32 WIDTH>
__device__ __forceinline__ void transposed(const Transposed& args, const TensorMap& map, const TensorMap& map1) {
    using S = Shape<1, ROWS, WIDTH>;
    extern __shared__ unsigned char memory[];
    __shared__ u64 full[S::STAGES], empty[S::STAGES];
    __shared__ u32 starts[MAX_GROUPS + 1], before[MAX_GROUPS + 1];

    // The swizzle's pattern begins at multiples of 1024.
    unsigned char* ring = memory + (-shared_address(memory) & 1023);
    u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;
    ready_barriers<S>(full, empty, 1 + GATHERERS);
    list_tiles<ROWS>(args.starts, args.groups, starts, before);

    TileList<ROWS, S::COLUMNS> tiles{starts, before, args.groups, (args.n + S::COLUMNS - 1) / S::COLUMNS};
    u32 count = tiles.count(), steps = (args.k + STEP - 1) / STEP;
    Place place;

    if (warp < 4) {
        if constexpr (WIDTH == 256) give_registers<72>();
        if (threadIdx.x == 0) {
            prefetch_map(map);
            if constexpr (PAIRS == 2) prefetch_map(map1);
            for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
                auto tile = tiles.at(index);
                for (u32 step = 0; step < PAIRS * steps; step++) {
                    barrier_wait(&empty[place.stage], place.parity ^ 1);
                    barrier_arrive_expecting(&full[place.stage], S::B_BYTES);
                    unsigned char* to = ring + place.stage * S::STAGE + S::A_BYTES;
                    bool second = PAIRS == 2 && step >= steps;
                    u32 place_of_sum = (second ? step - steps : step) * STEP;
#pragma unroll
                    for (u32 box = 0; box < S::COLUMNS / 64; box++)
                        copy_box(to + box * BOX_BYTES, second ? map1 : map, tile.column + box * 64, place_of_sum, tile.group, &full[place.stage]);
                    place.advance<S::STAGES>();
                }
            }
        } else if (warp > 0 && warp <= GATHERERS) {
            gather<S, PAIRS>(args, tiles, count, steps, lane, place, ring, full, empty);
        }
    } else {
        if constexpr (WIDTH == 256) take_registers<216>();
        u32 half = warp / 4 - 1;  // which multiplying warpgroup
        u64 a_ring = operand(ring + (S::SLICES == 1 ? half * 64 * LINE : 0));
        u64 b_ring = operand(ring + S::A_BYTES + (S::SLICES == 2 ? half * WIDTH * LINE : 0), BOX_BYTES);
        u32 row_offset = (S::SLICES == 1 ? half * 64 : 0) + warp % 4 * 16;
        u32 column_offset = S::SLICES == 2 ? half * WIDTH : 0;
        elem* staging = (elem*)(ring + S::STAGES * S::STAGE) + (warp - 4) * 16 * PADDED;
        for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
            auto tile = tiles.at(index);
            u32 row = tile.row + row_offset, column = tile.column + column_offset;
            float upper = 1.0f, lower = 1.0f;
            if (args.scale) {
                u32 s = row + lane / 4;
                if (s < tile.end) upper = args.scale[s];
                if (s + 8 < tile.end) lower = args.scale[s + 8];
            }
            float d[WIDTH / 2];
            accumulate<S, false, true>(d, PAIRS * steps, a_ring, b_ring, place, full, empty);

            int rows = int(tile.end) - int(row), columns = int(args.n) - int(column);
            elem* y = args.y + u64(row) * args.ldy + column;
#pragma unroll
            for (u32 i = 0; i < WIDTH; i += 64)
                write<64>(staging, y + i, args.ldy, rows, columns - int(i), [&](u32 j) { return d[i / 2 + j] * (j & 2 ? lower : upper); });
        }
    }
}

// The tiles of dw: by group, by column, by row.
template <u32 ROWS, u32 COLUMNS>
struct GradientTiles {
    struct Tile {
        u32 group, row, column, start, end;  // place in dw[group], and the rows to sum over
    };
    const u32* starts;
    u32 groups, down, across;

    __device__ __forceinline__ u32 count() const { return groups * down * across; }

    __device__ __forceinline__ Tile at(u32 index) const {
        u32 group = index / (down * across), inner = index % (down * across);
        return {group, inner % down * ROWS, inner / down * COLUMNS, starts[group], starts[group + 1]};
    }
};

// Eight elements times a factor.
__device__ __forceinline__ uint4 scaled(uint4 v, float factor) {
    v.x = pack(low(v.x) * factor, high(v.x) * factor);
    v.y = pack(low(v.y) * factor, high(v.y) * factor);
    v.z = pack(low(v.z) * factor, high(v.z) * factor);
    v.w = pack(low(v.w) * factor, high(v.w) * factor);
    return v;
}

template <u32 ROWS, u32 WIDTH>
__device__ __forceinline__ void outer(const Outer& args) {
    using S = Shape<1, ROWS, WIDTH>;
    constexpr u32 PASSES = STEP / 16;  // the first four warps copy 16 lines at a time
    extern __shared__ unsigned char memory[];
    __shared__ u64 full[S::STAGES], empty[S::STAGES];
    __shared__ float factors[S::STAGES][STEP];

    unsigned char* ring = memory + (-shared_address(memory) & 1023);
    u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;
    ready_barriers<S>(full, empty, 4);
    __syncthreads();

    GradientTiles<ROWS, S::COLUMNS> tiles{args.starts, args.groups, (args.n + ROWS - 1) / ROWS, (args.k + S::COLUMNS - 1) / S::COLUMNS};
    u32 count = tiles.count();
    Place place;

    if (warp < 4) {
        if constexpr (WIDTH == 256) give_registers<72>();
        // Eight neighbouring threads copy a line, of 64 elements of a row; a thread's lines are 16 apart, so
        // that they all have the same swizzle.
        u32 line = threadIdx.x / 8, piece = threadIdx.x % 8;
        u32 offset = line * LINE + (piece ^ line % 8) * 16;
        Place arrived;  // the oldest stage whose rows were not yet reported
        u32 pending = 0;
        auto report = [&] {
            if (args.scale) {
                __syncwarp();
                unsigned char* at = ring + arrived.stage * S::STAGE + offset;
#pragma unroll
                for (u32 i = 0; i < PASSES; i++) {
                    float factor = factors[arrived.stage][line + 16 * i];
#pragma unroll
                    for (u32 box = 0; box < ROWS / 64; box++) {
                        uint4* own = (uint4*)(at + box * BOX_BYTES + i * 16 * LINE);
                        *own = scaled(*own, factor);
                    }
                }
            }
            show_writes();
            __syncwarp();
            if (lane == 0) barrier_arrive(&full[arrived.stage]);
            arrived.advance<S::STAGES>();
        };
        u32 row_a[PASSES], row_b[PASSES];
        float factor[PASSES];
        auto find = [&](u32 first, u32 end) {
#pragma unroll
            for (u32 i = 0; i < PASSES; i++) {
                u32 s = first + line + 16 * i;
                bool there = s < end;
                row_a[i] = there && args.rows_a ? args.rows_a[s] : s;
                row_b[i] = there && args.rows_b ? args.rows_b[s] : s;
                factor[i] = there && args.scale ? args.scale[s] : 0.0f;
            }
        };
        for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
            auto tile = tiles.at(index);
            find(tile.start, tile.end);
            for (u32 first = tile.start; first < tile.end; first += STEP) {
                // Reported before the wait for a free stage, which may depend on it.
                if (pending == S::LAG) {
                    copy_wait<S::LAG - 1>();
                    report();
                } else {
                    pending++;
                }
                barrier_wait(&empty[place.stage], place.parity ^ 1);
                unsigned char* to = ring + place.stage * S::STAGE + offset;
                u32 column_a = tile.row + piece * 8, column_b = tile.column + piece * 8;
#pragma unroll
                for (u32 i = 0; i < PASSES; i++) {
                    bool there = first + line + 16 * i < tile.end;
                    const elem* a = args.a + u64(there ? row_a[i] : 0) * args.lda;
                    const elem* b = args.b + u64(there ? row_b[i] : 0) * args.ldb;
#pragma unroll
                    for (u32 box = 0; box < ROWS / 64; box++) {
                        u32 column = column_a + box * 64;
                        copy_async(to + i * 16 * LINE + box * BOX_BYTES, a + (column < args.n ? column : 0), there && column < args.n);
                    }
#pragma unroll
                    for (u32 box = 0; box < S::COLUMNS / 64; box++) {
                        u32 column = column_b + box * 64;
                        copy_async(to + i * 16 * LINE + S::A_BYTES + box * BOX_BYTES, b + (column < args.k ? column : 0), there && column < args.k);
                    }
                }
                copy_commit();
                if (args.scale && piece == 0) {
#pragma unroll
                    for (u32 i = 0; i < PASSES; i++) factors[place.stage][line + 16 * i] = factor[i];
                }
                place.advance<S::STAGES>();
                // Their loads end while this thread waits.
                find(first + STEP, tile.end);
            }
        }
        copy_wait<0>();
        for (; pending > 0; pending--) report();
    } else {
        if constexpr (WIDTH == 256) take_registers<216>();
        u32 half = warp / 4 - 1;  // which multiplying warpgroup
        u64 a_ring = operand(ring + (S::SLICES == 1 ? half * BOX_BYTES : 0), BOX_BYTES);
        u64 b_ring = operand(ring + S::A_BYTES + (S::SLICES == 2 ? half * WIDTH * LINE : 0), BOX_BYTES);
        u32 row_offset = (S::SLICES == 1 ? half * 64 : 0) + warp % 4 * 16 + lane / 4;
        u32 column_offset = (S::SLICES == 2 ? half * WIDTH : 0) + lane % 4 * 2;
        for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
            auto tile = tiles.at(index);
            u32 steps = (tile.end - tile.start + STEP - 1) / STEP;
            float d[WIDTH / 2];
            if (steps > 0) accumulate<S, true, true>(d, steps, a_ring, b_ring, place, full, empty);

            // The four lanes of a row write 32 bytes together.
            u32 row = tile.row + row_offset, column = tile.column + column_offset;
            float* to = args.dw + (u64(tile.group) * args.n + row) * args.k + column;
            auto sum = [&](u32 i) { return steps > 0 ? d[i] : 0.0f; };
#pragma unroll
            for (u32 i = 0; i < WIDTH; i += 8) {
                bool inside = column + i < args.k;
                if (inside && row < args.n) *(float2*)(to + i) = {sum(i / 2), sum(i / 2 + 1)};
                if (inside && row + 8 < args.n) *(float2*)(to + u64(8) * args.k + i) = {sum(i / 2 + 2), sum(i / 2 + 3)};
            }
        }
    }
}

#define ENTRY(NAME, ROWS, WIDTH)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Transposed args, const __grid_constant__ TensorMap map) { \
        transposed<1, ROWS, WIDTH>(args, map, map);                                                                                       \
    }
#define ENTRY_TWO(NAME, ROWS, WIDTH)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                  \
        NAME(const __grid_constant__ Transposed args, const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap map1) { \
        transposed<2, ROWS, WIDTH>(args, map, map1);                                                          \
    }
#define ENTRY_OUTER(NAME, ROWS, WIDTH) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Outer args) { outer<ROWS, WIDTH>(args); }

// Many rows per group.                            SHARED  rows x columns of a tile
ENTRY(backward_transposed, 128, 256)            // 216064  128 x 256
ENTRY_TWO(backward_transposed_two, 128, 256)    // 216064  128 x 256
// Few columns, as of a low-rank adapter: bound by the rows.
ENTRY(backward_transposed_half, 128, 128)       // 216064  128 x 128
ENTRY(backward_transposed_narrow, 128, 64)      // 216064  128 x  64
// Gradients of n x k.
ENTRY_OUTER(backward_outer, 128, 256)           // 197632  128 x 256
ENTRY_OUTER(backward_outer_half, 128, 128)      // 197632  128 x 128, for k to 128
ENTRY_OUTER(backward_outer_narrow, 128, 64)     // 197632  128 x  64, for k to 64
ENTRY_OUTER(backward_outer_flat, 64, 128)       // 205824   64 x 256, for n to 64
