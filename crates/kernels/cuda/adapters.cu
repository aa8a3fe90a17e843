// What lies between the grouped products where positions are a base with an adapter.
//   adapters_expand   :  h[s, :] = silu(U_gate[slot] . low_gate[s] + base_gate[pair of s, :])
//                                   * (U_up[slot]  . low_up[s]   + base_up[pair of s, :])
//   adapters_expand_pre: what stands in parentheses, two results, for the backward pass
//   adapters_sum_pairs:  sum[pair, :] = sum over the pair's choices j, in order, of gate_j * h[row_j, :]
//   combine           :  out[t, :] = sum over j, in order, of y[row_j, :] + ypair[pair that j is the first of, :]
//
// Grid: any number of blocks; every block takes its share in turn. As many as the device holds at once
// are best: 4 for each multiprocessor (expand), 4 (combine), 8 (sum_pairs).
// Block: expand 128 threads, the others 256.
// Shared memory: expand 8192 * (ceil(rank / 32) | 1) bytes, dynamic, at most 40960; the others none.
// Registers (sm_80, sm_90a): expand 122, 126; sum_pairs 30, 28; combine 51, 58.
// Bound: bytes. expand moves 6 inner bytes for each row (the base's two rows, and h; expand_pre 8), sum_pairs
// 2 inner for each row and each pair, combine 2 hidden for each row, each pair and each token.
// last measured: not yet

constexpr u32 THREADS = 256;

struct Expand {
    const elem* low;         // [S, 2 rank] V_gate . x, then V_up . x
    const elem* gate;        // [slots, inner, rank] U
    const elem* up;          // [slots, inner, rank]
    const elem* base_gate;   // [pairs, inner] or null
    const elem* base_up;     // [pairs, inner] or null
    elem* h;                 // [S, inner]
    const u32* pair_of_row;  // [S]; NONE: a row without a base
    const u32* starts;       // [slots + 1] slot i has the rows starts[i] .. starts[i + 1]
    u32 slots, inner, rank;  // inner, rank: multiples of 8; rank <= 128
};

constexpr u32 EXPAND_THREADS = 128;  // 2 warps along rows, 16 each, by 2 along columns, 32 each
constexpr u32 EXPAND_ROWS = 128;     // in a tile, in steps of 32
constexpr u32 EXPAND_COLUMNS = 64;   // in a tile

// d += 16 rows of `low` times 8 columns of U. `mma` may take k in any order, as long as both sides take
// the same: lane c of a quad gives elements 8 c .. 8 c + 8 of 32, so that its part is one load.
__device__ __forceinline__ void mma_32(float (&d)[4], const uint4& top, const uint4& bottom, const uint4& b) {
    mma(d, {top.x, bottom.x, top.y, bottom.y}, {b.x, b.y});
    mma(d, {top.z, bottom.z, top.w, bottom.w}, {b.z, b.w});
}

// Where PRE, `h` takes the pre-activations of the gate, and `pre_up` those of up.
template <bool PRE>
__device__ __forceinline__ void expand(const Expand& p, elem* pre_up) {
    extern __shared__ uint4 weights[];  // a line for each row of the gate's U, then of the up's
    // An odd number of 64-byte parts to a line keeps the lanes of a load in different banks.
    u32 parts = (p.rank + 31) / 32;
    u32 line = (parts | 1) * 4;
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 group = lane / 4, quad = lane % 4;
    u32 warp_row = warp / 2 * 16, warp_column = warp % 2 * 32;
    const uint4 zero = make_uint4(0, 0, 0, 0);

    Tiles<EXPAND_ROWS, EXPAND_COLUMNS> tile(p.starts, p.slots, p.inner);
    while (tile.advance()) {
        __syncthreads();  // all have left the weights of the tile before
        for (u32 i = threadIdx.x; i < 2 * EXPAND_COLUMNS * parts * 4; i += EXPAND_THREADS) {
            u32 chunk = i % (parts * 4), at = i / (parts * 4);
            u32 column = tile.column + at % EXPAND_COLUMNS;
            const elem* u = (at < EXPAND_COLUMNS ? p.gate : p.up) + (u64(tile.group) * p.inner + column) * p.rank + chunk * 8;
            copy_async(weights + at * line + chunk, u, column < p.inner && chunk * 8 < p.rank);
        }
        copy_commit();
        copy_wait<0>();
        __syncthreads();

        u32 column = tile.column + warp_column + quad * 8;
        u32 end = min(tile.row + EXPAND_ROWS, tile.end);
        for (u32 row = tile.row + warp_row; row < end; row += 32) {
            uint4 base[2][2];  // [top, bottom row][gate, up]: asked for before the products need them
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 at = row + i * 8 + group;
                u32 pair = p.base_gate && at < end && column < p.inner ? p.pair_of_row[at] : NONE;
                u64 from = u64(pair) * p.inner + column;
                base[i][0] = pair == NONE ? zero : stream(p.base_gate + from);
                base[i][1] = pair == NONE ? zero : stream(p.base_up + from);
            }
            float gate[4][4] = {}, up[4][4] = {};
            for (u32 part = 0; part < parts; part++) {
                uint4 low[2][2];
                u32 k = part * 32 + quad * 8;
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    u32 at = row + i * 8 + group;
                    const elem* from = p.low + u64(at) * (2 * p.rank) + k;
                    bool there = at < end && k < p.rank;
                    low[i][0] = there ? *reinterpret_cast<const uint4*>(from) : zero;
                    low[i][1] = there ? *reinterpret_cast<const uint4*>(from + p.rank) : zero;
                }
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    const uint4* u = weights + (warp_column + j * 8 + group) * line + part * 4 + quad;
                    mma_32(gate[j], low[0][0], low[1][0], u[0]);
                    mma_32(up[j], low[0][1], low[1][1], u[EXPAND_COLUMNS * line]);
                }
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 g[4] = {base[i][0].x, base[i][0].y, base[i][0].z, base[i][0].w};
                u32 u[4] = {base[i][1].x, base[i][1].y, base[i][1].z, base[i][1].w};
                transpose_quad(g);
                transpose_quad(u);
                u32 first[4], second[4];
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    float gate_left = gate[j][i * 2] + low(g[j]), gate_right = gate[j][i * 2 + 1] + high(g[j]);
                    float up_left = up[j][i * 2] + low(u[j]), up_right = up[j][i * 2 + 1] + high(u[j]);
                    first[j] = PRE ? pack(gate_left, gate_right) : pack(silu(gate_left) * up_left, silu(gate_right) * up_right);
                    second[j] = pack(up_left, up_right);
                }
                transpose_quad(first);
                if (PRE) transpose_quad(second);
                u32 at = row + i * 8 + group;
                u64 to = u64(at) * p.inner + column;
                if (at < end && column < p.inner) {
                    *reinterpret_cast<uint4*>(p.h + to) = make_uint4(first[0], first[1], first[2], first[3]);
                    if (PRE) *reinterpret_cast<uint4*>(pre_up + to) = make_uint4(second[0], second[1], second[2], second[3]);
                }
            }
        }
    }
}

struct ExpandPre {
    Expand expand;  // its `h` takes the pre-activations of the gate
    elem* pre_up;   // [S, inner]
};

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, 4) adapters_expand(Expand p) { expand<false>(p, nullptr); }
extern "C" __global__ void __launch_bounds__(EXPAND_THREADS, 4) adapters_expand_pre(ExpandPre p) { expand<true>(p.expand, p.pre_up); }

constexpr u32 SLAB = WARP * 8;  // columns of a warp: 16 bytes for each lane

struct SumPairs {
    const elem* h;           // [S, inner]
    elem* sum;               // [pairs, inner]
    const u32* row_of;       // [tokens, top_k]
    const u32* pair_of;      // [tokens, top_k] the pair that this choice is the first of, or NONE
    const u32* pair_of_row;  // [S]
    const float* gates;      // [tokens, top_k]
    u32 tokens, top_k, inner;  // top_k <= 32, inner a multiple of 8
};

// A warp for each token and slab of columns; lane j holds what belongs to choice j.
extern "C" __global__ void __launch_bounds__(THREADS) adapters_sum_pairs(SumPairs p) {
    u32 lane = threadIdx.x % WARP;
    u32 slabs = (p.inner + SLAB - 1) / SLAB;
    u32 warps = gridDim.x * (THREADS / WARP);
    for (u32 at = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; at < p.tokens * slabs; at += warps) {
        u32 choice = at / slabs * p.top_k + lane;
        u32 column = at % slabs * SLAB + lane * 8;
        bool held = lane < p.top_k;
        u32 row = held ? p.row_of[choice] : 0;
        u32 mine = held ? p.pair_of[choice] : NONE;
        float gate = held ? p.gates[choice] : 0.0f;
        u32 pair_of_row = held ? p.pair_of_row[row] : NONE;
        for (u32 firsts = __ballot_sync(0xffffffffu, mine != NONE); firsts; firsts &= firsts - 1) {
            u32 pair = __shfl_sync(0xffffffffu, mine, __ffs(firsts) - 1);
            float sum[8] = {};
            for (u32 members = __ballot_sync(0xffffffffu, pair_of_row == pair); members; members &= members - 1) {
                u32 j = __ffs(members) - 1;
                u32 from = __shfl_sync(0xffffffffu, row, j);
                float factor = __shfl_sync(0xffffffffu, gate, j);
                if (column < p.inner) add(sum, factor, stream(p.h + u64(from) * p.inner + column));
            }
            if (column < p.inner) *reinterpret_cast<uint4*>(p.sum + u64(pair) * p.inner + column) = pack_8(sum);
        }
    }
}

struct Combine {
    const elem* y;        // [S, hidden] results of rows, gates applied
    const elem* ypair;    // [pairs, hidden] results of pairs, or null
    elem* out;            // [tokens, hidden]
    const u32* row_of;    // [tokens, top_k]
    const u32* pair_of;   // [tokens, top_k] the pair that this choice is the first of, or NONE; may be null with `ypair`
    u32 tokens, top_k, hidden;  // top_k <= 32, hidden a multiple of 8
};

constexpr u32 IN_FLIGHT = 4;  // choices whose rows are asked for together

extern "C" __global__ void __launch_bounds__(THREADS) combine(Combine p) {
    u32 lane = threadIdx.x % WARP;
    u32 slabs = (p.hidden + SLAB - 1) / SLAB;
    u32 warps = gridDim.x * (THREADS / WARP);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    for (u32 at = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; at < p.tokens * slabs; at += warps) {
        u32 token = at / slabs;
        u32 column = at % slabs * SLAB + lane * 8;
        u32 row = lane < p.top_k ? p.row_of[token * p.top_k + lane] : NONE;
        u32 pair = lane < p.top_k && p.ypair ? p.pair_of[token * p.top_k + lane] : NONE;
        float sum[8] = {};
        for (u32 first = 0; first < p.top_k; first += IN_FLIGHT) {
            uint4 of_row[IN_FLIGHT], of_pair[IN_FLIGHT];
#pragma unroll
            for (u32 i = 0; i < IN_FLIGHT; i++) {
                u32 from = __shfl_sync(0xffffffffu, row, first + i);
                u32 also = __shfl_sync(0xffffffffu, pair, first + i);
                bool there = column < p.hidden;
                of_row[i] = there && from != NONE ? stream(p.y + u64(from) * p.hidden + column) : zero;
                of_pair[i] = there && also != NONE ? stream(p.ypair + u64(also) * p.hidden + column) : zero;
            }
#pragma unroll
            for (u32 i = 0; i < IN_FLIGHT; i++) {
                add(sum, 1.0f, of_row[i]);
                add(sum, 1.0f, of_pair[i]);
            }
        }
        if (column < p.hidden) *reinterpret_cast<uint4*>(p.out + u64(token) * p.hidden + column) = pack_8(sum);
    }
}
