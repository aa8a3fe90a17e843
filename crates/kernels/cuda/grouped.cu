// The grouped matrix product of a Mixture-of-Experts layer on Hopper (sm_90a). Group g owns the sorted
// rows s of starts[g] .. starts[g + 1] and the matrices b0[g], b1[g]:
//   plain   y0[s] = scale[s] * b0[g] a[row(s)]
//   dual    y0[s] = b0[g] a[row(s)],  y1[s] = b1[g] a[row(s)]
//   swiglu  y0[s] = silu(b0[g] a[row(s)]) * (b1[g] a[row(s)])
//
// Arguments: Grouped, then tensor maps of 128 bytes each: of b0, (dual, swiglu) of b1, and of `a`.
// Grid: one block per multiprocessor, whatever the sizes. Block: 384 threads. Dynamic shared memory:
// 216064 bytes, Shape::SHARED.
//
// Tensor maps: two dimensions, 16-bit elements (BFLOAT16 or FLOAT16), element strides {1, 1}, no
// interleave, SWIZZLE_128B, L2_PROMOTION_256B, out-of-bounds fill NONE (zeros). Of a matrix [groups, n, k]:
// sizes {k, groups * n}, stride {k * 2 bytes}, box {64, BOX}, where BOX is given for each entry point at the
// end of this file. Of `a`: sizes {k, its rows}, stride {lda * 2 bytes}, box {64, 64}; used where `rows` is
// null, and else never read.
//
// Persistent and specialised by warp, as hopper.cuh says: one thread brings weights, and rows where they are
// not gathered; else three warps gather them. The number of rows of each group is known on the device only,
// so that every role walks the same list of tiles, which follows from `starts`. Parts of 64 rows without any
// row are neither brought nor multiplied.
//
// Bound: FLOPs for some 300 rows per group and more, the weights' bytes below. Tiles of 256 rows read half as many
// bytes of weights as tiles of 128; the tensor cores then read a fifth more of shared memory.
// Registers: tiles of 128 x 256 and 256 x 128: 168, of which 96 stay to load and 200 are taken to multiply; half: up to
// 128; narrow: up to 78.
// Last measured: H100, OLMoE-1B-7B: 97 % of the copy rate at 128 tokens, 69 % of the rate of a large cuBLAS product at
// 4096, 81 % at 32768.

struct Grouped {
    const elem* a;      // [*, k] inputs
    const u32* rows;    // [S] row of `a` of each sorted row; null: the sorted row itself
    const elem* b0;     // [groups, n, k], here read through the tensor map
    const elem* b1;
    elem* y0;
    elem* y1;
    const float* scale; // [S] factor of each result row, or null
    const u32* starts;  // [groups + 1]
    const u32* ranks;   // null: each group's matrix has n rows
    u32 groups, n, k, lda, ldy;  // at most MAX_GROUPS groups
};
static_assert(sizeof(Grouped) == 96);

enum Form { PLAIN, DUAL, SWIGLU };

template <Form FORM, u32 ROWS, u32 WIDTH>
__device__ __forceinline__ void grouped(const Grouped& args, const TensorMap& map0, const TensorMap& map1, const TensorMap& map_a) {
    using S = Shape<FORM == PLAIN ? 1 : 2, ROWS, WIDTH>;
    constexpr bool LARGE = ROWS * WIDTH == 128 * 256;  // 128 accumulators in a thread
    extern __shared__ unsigned char memory[];
    __shared__ u64 full[S::STAGES], empty[S::STAGES];
    __shared__ u32 starts[MAX_GROUPS + 1], before[MAX_GROUPS + 1];

    // The swizzle's pattern begins at multiples of 1024.
    unsigned char* ring = memory + (-shared_address(memory) & 1023);
    // Taken from lane 0, so that the compiler knows it for the same in the whole warp.
    u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;
    bool gathered = args.rows;
    ready_barriers<S>(full, empty, 1 + (gathered ? GATHERERS : 0));
    list_tiles<ROWS>(args.starts, args.groups, starts, before);

    TileList<ROWS, S::COLUMNS> tiles{starts, before, args.groups, (args.n + S::COLUMNS - 1) / S::COLUMNS};
    u32 count = tiles.count(), steps = (args.k + STEP - 1) / STEP;
    Place place;

    if (warp < 4) {
        if constexpr (LARGE) give_registers<96>();
        if (threadIdx.x == 0) {
            prefetch_map(map0);
            if constexpr (FORM != PLAIN) prefetch_map(map1);
            if (!gathered) prefetch_map(map_a);
            for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
                auto tile = tiles.at(index);
                u32 weight = tile.group * args.n + tile.column;
                u32 parts = gathered ? 0 : (tile.end - tile.row + 63) / 64;
                for (u32 step = 0; step < steps; step++) {
                    u64* barrier = &full[place.stage];
                    u32 x = step * STEP;
                    barrier_wait(&empty[place.stage], place.parity ^ 1);
                    barrier_arrive_expecting(barrier, S::B_BYTES + parts * 64 * LINE);
                    unsigned char *a = ring + place.stage * S::STAGE, *b = a + S::A_BYTES;
                    copy_box(b, map0, x, weight, barrier);
                    if constexpr (FORM != PLAIN) copy_box(b + S::BOX * LINE, map1, x, weight, barrier);
                    for (u32 part = 0; part < parts; part++) copy_box(a + part * 64 * LINE, map_a, x, tile.row + part * 64, barrier);
                    place.advance<S::STAGES>();
                }
            }
        } else if (gathered && warp > 0 && warp <= GATHERERS) {
            gather<S, 1>(args, tiles, count, steps, lane, place, ring, full, empty);
        }
    } else {
        if constexpr (LARGE) take_registers<200>();
        constexpr u32 SOME = S::BOX < 64 ? S::BOX : 64;  // columns written at a time
        u32 half = warp / 4 - 1;                         // which multiplying warpgroup
        u64 a_ring = operand(ring + half * 64 * LINE), b_ring = operand(ring + S::A_BYTES);
        elem* staging = (elem*)(ring + S::STAGES * S::STAGE) + (warp - 4) * 16 * PADDED;
        for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
            auto tile = tiles.at(index);
            u32 first = tile.row + half * 64;  // of the warpgroup; its parts are 128 rows apart
            u32 parts = __shfl_sync(0xffffffffu, first < tile.end ? (tile.end - first + 127) / 128 : 0, 0);
            float d[S::PARTS * WIDTH / 2];
            if (parts == S::PARTS) accumulate<S, false, false, S::PARTS>(d, steps, a_ring, b_ring, place, full, empty);
            else if (parts == 1) accumulate<S, false, false, 1>(d, steps, a_ring, b_ring, place, full, empty);
            else accumulate<S, false, false, 0>(d, steps, a_ring, b_ring, place, full, empty);

#pragma unroll
            for (u32 part = 0; part < S::PARTS; part++) {
                u32 row = first + part * 128 + warp % 4 * 16;
                if (row >= tile.end) break;
                float upper = 1.0f, lower = 1.0f;
                if (FORM == PLAIN && args.scale) {
                    u32 s = row + lane / 4;
                    if (s < tile.end) upper = args.scale[s];
                    if (s + 8 < tile.end) lower = args.scale[s + 8];
                }
                int rows = int(tile.end - row), columns = int(args.n - tile.column);
                u64 at = u64(row) * args.ldy + tile.column;
#pragma unroll
                for (u32 i = 0; i < S::BOX; i += SOME) {
                    const u32 x = part * (WIDTH / 2) + i / 2, z = x + WIDTH / 4;  // accumulators of b0 and b1
                    elem *y0 = args.y0 + at + i, *y1 = args.y1 + at + i;
                    int left = columns - int(i);
                    if constexpr (FORM == PLAIN) write<SOME>(staging, y0, args.ldy, rows, left, [&](u32 j) { return d[x + j] * (j & 2 ? lower : upper); });
                    if constexpr (FORM == DUAL) write<SOME>(staging, y0, args.ldy, rows, left, [&](u32 j) { return d[x + j]; });
                    if constexpr (FORM == DUAL) write<SOME>(staging, y1, args.ldy, rows, left, [&](u32 j) { return d[z + j]; });
                    // silu with a fast division: the exact one would cost a tenth of the tile's time.
                    if constexpr (FORM == SWIGLU) write<SOME>(staging, y0, args.ldy, rows, left, [&](u32 j) { return __fdividef(d[x + j], 1.0f + __expf(-d[x + j])) * d[z + j]; });
                }
            }
        }
    }
}

#define ENTRY_PLAIN(NAME, ROWS, WIDTH)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                \
        NAME(const __grid_constant__ Grouped args, const __grid_constant__ TensorMap map0, const __grid_constant__ TensorMap map_a) { \
        grouped<PLAIN, ROWS, WIDTH>(args, map0, map0, map_a);                                               \
    }
#define ENTRY(NAME, FORM, ROWS, WIDTH)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                \
        NAME(const __grid_constant__ Grouped args, const __grid_constant__ TensorMap map0, const __grid_constant__ TensorMap map1, \
             const __grid_constant__ TensorMap map_a) {                                                     \
        grouped<FORM, ROWS, WIDTH>(args, map0, map1, map_a);                                                \
    }

// Very many rows per group.                    BOX  rows x columns of a tile
ENTRY_PLAIN(grouped_plain, 128, 256)         // 256  128 x 256
ENTRY(grouped_dual, DUAL, 128, 256)          // 128  128 x 128
ENTRY(grouped_swiglu, SWIGLU, 128, 256)      // 128  128 x 128
// Fewer rows per group: weights are read once per 256 rows.
ENTRY_PLAIN(grouped_plain_tall, 256, 128)    // 128  256 x 128
ENTRY(grouped_dual_tall, DUAL, 256, 128)     //  64  256 x  64
ENTRY(grouped_swiglu_tall, SWIGLU, 256, 128) //  64  256 x  64
// Few columns, as of a low-rank adapter: bound by the rows.
ENTRY_PLAIN(grouped_plain_half, 128, 128)    // 128  128 x 128
ENTRY(grouped_dual_half, DUAL, 128, 128)     //  64  128 x  64
ENTRY_PLAIN(grouped_plain_narrow, 128, 64)   //  64  128 x  64
ENTRY(grouped_dual_narrow, DUAL, 128, 64)    //  32  128 x  32
