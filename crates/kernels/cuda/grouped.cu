// The grouped matrix product of a Mixture-of-Experts layer on Hopper (sm_90a). Group g owns the sorted
// rows s of starts[g] .. starts[g + 1] and the matrices b0[g], b1[g]:
//   plain   y0[s] = scale[s] * b0[g] a[row(s)]
//   dual    y0[s] = b0[g] a[row(s)],  y1[s] = b1[g] a[row(s)]
//   swiglu  y0[s] = silu(b0[g] a[row(s)]) * (b1[g] a[row(s)])
//
// Arguments: Grouped, then one tensor map of b0 and (dual, swiglu) one of b1, 128 bytes each.
// Grid: one block per multiprocessor, whatever the sizes. Block: 384 threads. Dynamic shared memory:
// Shape::SHARED, given for each entry point at the end of this file, beside the columns of one box.
//
// Tensor map of a matrix [groups, n, k]: two dimensions, 16-bit elements (BFLOAT16 or FLOAT16), sizes
// {k, groups * n}, stride {k * 2 bytes}, box {64, BOX}, element strides {1, 1}, no interleave,
// SWIZZLE_128B, L2_PROMOTION_256B, out-of-bounds fill NONE (zeros).
//
// Persistent and specialised by warp, as hopper.cuh says: one thread brings weights, two warps gather rows. The
// number of rows of each group is known on the device only, so that every role walks the same list of
// tiles, which follows from `starts`.
//
// Bound: FLOPs for some 300 rows per group and more, the weights' bytes below.
// Registers: 256 wide: 168, of which 72 stay to load and 216 are taken to multiply; 128 wide: up to 128; 64 wide: 84.
// last measured: not yet

struct Grouped {
    const elem* a;      // [*, k] inputs
    const u32* rows;    // [S] row of `a` of each sorted row; null: the sorted row itself
    const elem* b0;     // [groups, n, k], here read through the tensor map
    const elem* b1;
    elem* y0;
    elem* y1;
    const float* scale; // [S] factor of each result row, or null
    const u32* starts;  // [groups + 1]
    u32 groups, n, k, lda, ldy, max_rows;  // at most MAX_GROUPS groups
};

enum Form { PLAIN, DUAL, SWIGLU };

template <Form FORM, u32 ROWS, u32 WIDTH>
__device__ __forceinline__ void grouped(const Grouped& args, const TensorMap& map0, const TensorMap& map1) {
    using S = Shape<FORM == PLAIN ? 1 : 2, ROWS, WIDTH>;
    extern __shared__ unsigned char memory[];
    __shared__ u64 full[S::STAGES], empty[S::STAGES];
    __shared__ u32 starts[MAX_GROUPS + 1], before[MAX_GROUPS + 1];

    // The swizzle's pattern begins at multiples of 1024.
    unsigned char* ring = memory + (-shared_address(memory) & 1023);
    // Taken from lane 0, so that the compiler knows it for the same in the whole warp.
    u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP;
    ready_barriers<S>(full, empty, 1 + GATHERERS);
    list_tiles<ROWS>(args.starts, args.groups, starts, before);

    TileList<ROWS, S::COLUMNS> tiles{starts, before, args.groups, (args.n + S::COLUMNS - 1) / S::COLUMNS};
    u32 count = tiles.count(), steps = (args.k + STEP - 1) / STEP;
    Place place;

    if (warp < 4) {
        if constexpr (WIDTH == 256) give_registers<72>();
        if (threadIdx.x == 0) {
            prefetch_map(map0);
            if constexpr (FORM != PLAIN) prefetch_map(map1);
            for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
                auto tile = tiles.at(index);
                u32 weight = tile.group * args.n + tile.column;
                for (u32 step = 0; step < steps; step++) {
                    barrier_wait(&empty[place.stage], place.parity ^ 1);
                    barrier_arrive_expecting(&full[place.stage], S::B_BYTES);
                    unsigned char* to = ring + place.stage * S::STAGE + S::A_BYTES;
#pragma unroll
                    for (u32 slice = 0; slice < S::SLICES; slice++) {
                        u32 y = weight + slice * S::BOX;
                        copy_box(to + slice * WIDTH * LINE, map0, step * STEP, y, &full[place.stage]);
                        if constexpr (FORM != PLAIN) copy_box(to + (slice * WIDTH + S::BOX) * LINE, map1, step * STEP, y, &full[place.stage]);
                    }
                    place.advance<S::STAGES>();
                }
            }
        } else if (warp > 0 && warp <= GATHERERS) {
            gather<S, 1>(args, tiles, count, steps, lane, place, ring, full, empty);
        }
    } else {
        if constexpr (WIDTH == 256) take_registers<216>();
        constexpr u32 PART = S::BOX < 64 ? S::BOX : 64;  // columns written at a time
        u32 half = warp / 4 - 1;                         // which multiplying warpgroup
        u64 a_ring = operand(ring + (S::SLICES == 1 ? half * 64 * LINE : 0));
        u64 b_ring = operand(ring + S::A_BYTES + (S::SLICES == 2 ? half * WIDTH * LINE : 0));
        u32 row_offset = (S::SLICES == 1 ? half * 64 : 0) + warp % 4 * 16;
        u32 column_offset = S::SLICES == 2 ? half * S::BOX : 0;
        elem* staging = (elem*)(ring + S::STAGES * S::STAGE) + (warp - 4) * 16 * PADDED;
        for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
            auto tile = tiles.at(index);
            u32 row = tile.row + row_offset, column = tile.column + column_offset;
            float upper = 1.0f, lower = 1.0f;
            if (FORM == PLAIN && args.scale) {
                u32 s = row + lane / 4;
                if (s < tile.end) upper = args.scale[s];
                if (s + 8 < tile.end) lower = args.scale[s + 8];
            }
            float d[WIDTH / 2];
            accumulate<S, false, false>(d, steps, a_ring, b_ring, place, full, empty);

            int rows = int(tile.end) - int(row), columns = int(args.n) - int(column);
            u64 at = u64(row) * args.ldy + column;
#pragma unroll
            for (u32 i = 0; i < S::BOX; i += PART) {
                const u32 x = i / 2, z = x + WIDTH / 4;  // accumulators of b0 and b1
                elem *y0 = args.y0 + at + i, *y1 = args.y1 + at + i;
                int left = columns - int(i);
                if constexpr (FORM == PLAIN) write<PART>(staging, y0, args.ldy, rows, left, [&](u32 j) { return d[x + j] * (j & 2 ? lower : upper); });
                if constexpr (FORM == DUAL) write<PART>(staging, y0, args.ldy, rows, left, [&](u32 j) { return d[x + j]; });
                if constexpr (FORM == DUAL) write<PART>(staging, y1, args.ldy, rows, left, [&](u32 j) { return d[z + j]; });
                // silu with a fast division: the exact one would cost a tenth of the tile's time.
                if constexpr (FORM == SWIGLU) write<PART>(staging, y0, args.ldy, rows, left, [&](u32 j) { return __fdividef(d[x + j], 1.0f + __expf(-d[x + j])) * d[z + j]; });
            }
        }
    }
}

#define ENTRY_PLAIN(NAME, ROWS, WIDTH)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Grouped args, const __grid_constant__ TensorMap map0) { \
        grouped<PLAIN, ROWS, WIDTH>(args, map0, map0);                                                                                \
    }
#define ENTRY(NAME, FORM, ROWS, WIDTH)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                \
        NAME(const __grid_constant__ Grouped args, const __grid_constant__ TensorMap map0, const __grid_constant__ TensorMap map1) { \
        grouped<FORM, ROWS, WIDTH>(args, map0, map1);                                                       \
    }

// Many rows per group.                         SHARED  BOX  rows x columns of a tile
ENTRY_PLAIN(grouped_plain, 128, 256)         // 216064  256  128 x 256
ENTRY(grouped_dual, DUAL, 128, 256)          // 216064  128  128 x 128
ENTRY(grouped_swiglu, SWIGLU, 128, 256)      // 216064  128  128 x 128
// Up to some 64 rows per group: bound by the weights.
ENTRY_PLAIN(grouped_plain_few, 64, 128)      // 224256  128   64 x 256
ENTRY(grouped_dual_few, DUAL, 64, 128)       // 224256   64   64 x 128
ENTRY(grouped_swiglu_few, SWIGLU, 64, 128)   // 224256   64   64 x 128
// Few columns, as of a low-rank adapter: bound by the rows.
ENTRY_PLAIN(grouped_plain_half, 128, 128)    // 216064  128  128 x 128
ENTRY(grouped_dual_half, DUAL, 128, 128)     // 216064   64  128 x  64
ENTRY_PLAIN(grouped_plain_narrow, 128, 64)   // 216064   64  128 x  64
ENTRY(grouped_dual_narrow, DUAL, 128, 64)    // 216064   32  128 x  32
