// What all kernels share, behind ptx.cuh. Structs that the host fills in are as long there, which both sides assert.

constexpr u32 NONE = 0xffffffffu;
constexpr u32 WARP = 32;

// What routing writes and every later kernel reads. `S = tokens * top_k` rows, sorted by the position
// of their expert, in token order within a position. Dense positions come first, then slots that keep their
// expert, those with a base by ascending group, and those without.
struct Routing {
    u32* chosen;       // [tokens * top_k] position of each choice, best first
    float* gates;      // [tokens * top_k] gate of each choice
    u32* starts;       // [positions + 1] first row of each position, and the end
    u32* row_tokens;   // [S] token of each row
    float* row_gates;  // [S] gate of each row
    u32* row_of;       // [tokens * top_k] row of each choice
    u32* pair_starts;  // [groups + 1] first (token, group) pair of each group, and the end
    u32* pair_tokens;  // [tokens * min(top_k, groups)] token of each pair
    u32* pair_of_row;  // [S] pair of each row; NONE where its position has no group
    u32* pair_of;      // [tokens * top_k] the pair that this choice is the first of; NONE elsewhere
};
static_assert(sizeof(Routing) == 80);

__device__ __forceinline__ float low(u32 v) { return to_float(elem(v & 0xffffu)); }
__device__ __forceinline__ float high(u32 v) { return to_float(elem(v >> 16)); }

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

__device__ __forceinline__ float warp_sum(float v) {
    for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

// Transposes 4x4 values in each quad of lanes: value j of lane c goes to value c of lane j. It turns
// the pairs of four accumulators of `mma` (one row, 32 columns) into 8 neighbouring columns of each
// lane, that is, one store of 16 bytes, and back. The whole warp calls it.
__device__ __forceinline__ void transpose_quad(u32 (&v)[4]) {
#pragma unroll
    for (u32 step = 1; step < 4; step *= 2) {
        bool upper = threadIdx.x & step;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (j & step) continue;
            u32 got = __shfl_xor_sync(0xffffffffu, upper ? v[j] : v[j | step], step);
            if (upper) v[j] = got;
            else v[j | step] = got;
        }
    }
}

// sum += factor * 8 elements
__device__ __forceinline__ void add(float (&sum)[8], float factor, const uint4& v) {
    u32 of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        sum[i * 2] += factor * low(of[i]);
        sum[i * 2 + 1] += factor * high(of[i]);
    }
}

__device__ __forceinline__ uint4 pack_8(const float (&v)[8]) {
    return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}

// How many rows (or inputs) the matrix of a group has, where each has a number of its own: `ends` says where each begins in
// a stack, and the last end; null: all have `each`. And where that of a group begins.
__device__ __forceinline__ u32 size_of_group(const u32* ends, u32 group, u32 each) { return ends ? ends[group + 1] - ends[group] : each; }
__device__ __forceinline__ u32 first_of_group(const u32* ends, u32 group, u32 each) { return ends ? ends[group] : group * each; }

// The tiles of groups of rows whose sizes only the device knows: every block takes the tiles
// blockIdx.x, + gridDim.x, .. Tiles of the same weights (rows inner) are neighbours, so that blocks
// running together read them once from memory. The whole warp calls `advance`.
template <u32 ROWS, u32 COLUMNS>
struct Tiles {
    const u32* starts;       // [groups + 1]
    u32 groups, columns;     // `columns`: all columns of the result
    u32 next = blockIdx.x;   // the tile that `advance` goes to
    u32 first = 0;           // first group of the 32 that the lanes look at
    u32 before = 0;          // tiles of the groups before it
    u32 group = 0, row = 0, end = 0, column = 0;  // this tile: its rows are row .. min(row + ROWS, end)

    __device__ __forceinline__ Tiles(const u32* starts, u32 groups, u32 columns) : starts(starts), groups(groups), columns(columns) {}

    // False where no tile is left.
    __device__ __forceinline__ bool advance() {
        u32 lane = threadIdx.x % WARP;
        for (; first < groups; first += WARP) {
            u32 mine = first + lane;
            u32 start = mine < groups ? starts[mine] : 0;
            u32 stop = mine < groups ? starts[mine + 1] : 0;
            u32 deep = (stop - start + ROWS - 1) / ROWS;
            u32 tiles = deep * ((columns + COLUMNS - 1) / COLUMNS);
            u32 sum = tiles;
#pragma unroll
            for (u32 i = 1; i < WARP; i *= 2) {
                u32 other = __shfl_up_sync(0xffffffffu, sum, i);
                if (lane >= i) sum += other;
            }
            u32 holders = __ballot_sync(0xffffffffu, before + sum > next);
            if (holders) {
                u32 holder = __ffs(holders) - 1;
                u32 tile = next - before - __shfl_sync(0xffffffffu, sum - tiles, holder);
                deep = __shfl_sync(0xffffffffu, deep, holder);
                group = first + holder;
                row = __shfl_sync(0xffffffffu, start, holder) + tile % deep * ROWS;
                end = __shfl_sync(0xffffffffu, stop, holder);
                column = tile / deep * COLUMNS;
                next += gridDim.x;
                return true;
            }
            before += __shfl_sync(0xffffffffu, sum, WARP - 1);
        }
        return false;
    }
};

// Where the 16-byte piece c < 4 of row g < 8 lies in a block of 8 rows of 64 bytes in shared memory. Neither
// lanes that write it (g = lane / 4, c = lane % 4) nor `load_matrices` meet in a bank.
__device__ __forceinline__ u32 piece_at(u32 g, u32 c) { return c * 8 + (g ^ c * 2); }

// Two operands a of `mma`, 32 places of the summed index, from the blocks of rows 0 .. 8 and, `apart` pieces
// further, rows 8 .. 16. `flip` was added (xor) to the rows' numbers.
__device__ __forceinline__ void load_rows(u32 (&a)[2][4], const uint4* block, u32 apart, u32 flip = 0) {
    u32 lane = threadIdx.x % WARP;
    block += lane / 8 % 2 * apart;
    load_matrices(a[0], block + piece_at(lane % 8 ^ flip, lane / 16));
    load_matrices(a[1], block + piece_at(lane % 8 ^ flip, 2 + lane / 16));
}

// Two operands b of `mma`, 32 places, from the block of 8 columns.
__device__ __forceinline__ void load_columns(u32 (&b)[4], const uint4* block, u32 flip = 0) {
    u32 lane = threadIdx.x % WARP;
    load_matrices(b, block + piece_at(lane % 8 ^ flip, lane / 8));
}

__device__ __forceinline__ void mma_32(float (&d)[4], const u32 (&a)[2][4], const u32 (&b)[4]) {
    mma(d, a[0], {b[0], b[1]});
    mma(d, a[1], {b[2], b[3]});
}

// A lane's results of four neighbouring blocks are 8 neighbouring columns, if a column of 32 lies in row
// `line` % 8 of block `line` / 8.
__device__ __forceinline__ u32 line_of_column(u32 column) { return column % 8 / 2 * 8 + column / 8 * 2 + column % 2; }

// The tiles of groups like `Tiles`, by bands: each band has the same share of every group's rows. Rows of
// a group are in token order, so that the rows of a band belong to about the same tokens, and what the
// rows of a token share is read from memory once and from the second cache by the others. A band has some
// tiles of rows from each group, all of their columns.
template <u32 ROWS, u32 COLUMNS>
struct Bands {
    const u32* starts;       // [groups + 1]
    u32 groups, across;      // `across`: tiles of columns
    u32 shift;               // there are 2^shift bands
    u32 band = 0;
    u32 next = blockIdx.x;   // the tile that `advance` goes to
    u32 first = 0;           // first group of the 32 that the lanes look at
    u32 before = 0;          // tiles before its part of the band
    u32 group = 0, row = 0, end = 0, column = 0;  // this tile: its rows are row .. min(row + ROWS, end)

    __device__ __forceinline__ Bands(const u32* starts, u32 groups, u32 columns) : starts(starts), groups(groups), across((columns + COLUMNS - 1) / COLUMNS) {
        u32 deep = groups ? (starts[groups] - starts[0]) / (2 * ROWS * groups) : 0;
        shift = deep ? WARP - __clz(deep) : 0;  // one tile or two of an average group to a band
    }

    // False where no tile is left.
    __device__ __forceinline__ bool advance() {
        u32 lane = threadIdx.x % WARP;
        for (; band >> shift == 0; band++, first = 0) {
            for (; first < groups; first += WARP) {
                u32 mine = first + lane;
                u32 start = mine < groups ? starts[mine] : 0;
                u32 stop = mine < groups ? starts[mine + 1] : 0;
                u32 deep = (stop - start + ROWS - 1) / ROWS;
                u32 upper = u32(u64(deep) * band >> shift);
                deep = u32(u64(deep) * (band + 1) >> shift) - upper;
                u32 tiles = deep * across;
                u32 sum = tiles;
#pragma unroll
                for (u32 i = 1; i < WARP; i *= 2) {
                    u32 other = __shfl_up_sync(0xffffffffu, sum, i);
                    if (lane >= i) sum += other;
                }
                u32 holders = __ballot_sync(0xffffffffu, before + sum > next);
                if (holders) {
                    u32 holder = __ffs(holders) - 1;
                    u32 tile = next - before - __shfl_sync(0xffffffffu, sum - tiles, holder);
                    deep = __shfl_sync(0xffffffffu, deep, holder);
                    group = first + holder;
                    row = __shfl_sync(0xffffffffu, start + upper * ROWS, holder) + tile % deep * ROWS;
                    end = __shfl_sync(0xffffffffu, stop, holder);
                    column = tile / deep * COLUMNS;
                    next += gridDim.x;
                    return true;
                }
                before += __shfl_sync(0xffffffffu, sum, WARP - 1);
            }
        }
        return false;
    }
};
