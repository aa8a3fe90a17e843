// What lies between the grouped products where positions are a base with an adapter.
//   adapters_expand   :  h[s, :] = silu(U_gate[slot] . low_gate[s] + base_share * base_gate[pair of s, :] + own_share * own_gate[s, :])
//                                   * (U_up[slot]  . low_up[s]   + base_share * base_up[pair of s, :]   + own_share * own_up[s, :])
//   adapters_expand_pre: what stands in parentheses, two results, for the backward pass
//   adapters_join     :  the same of what wider adapters made before: silu(gate[s, :] + base_share * base_gate[..]) * (up[s, :] + ..)
//   adapters_sum_pairs:  sum[pair, :] = share * sum over the pair's choices j, in order, of gate_j * h[row_j, :]
//   combine           :  out[t, :] = sum over j, in order, of y[row_j, :] + own_share * y_own[row_j, :]
//                                   + ypair[pair that j is the first of, :]
//   add_vectors       :  out[t, :] += sum over j, in order, of gate_j * vectors[vector of j's position, :], where it has one
// `own` is what a whole expert of the slot makes of the row: one that is kept, for the first slots, and counts whole;
// or the one that the slot replaces, while recovery anneals it away, and counts by `own_share`.
//
// Grid: any number of blocks; every block takes its share in turn. As many as the device holds at once
// are best: what shared memory allows (expand), 4 for each multiprocessor (combine, add_vectors), 8 (sum_pairs).
// Block: 256 threads; expand 128 where rank > 32.
// Dynamic shared memory: none, but for expand. With parts = ceil(rank / 32) and warps of a block,
// 32 * (512 * parts + warps * (256 + 128 * parts)) bytes: 114688 for one part, then 98304, 131072, 163840.
// Registers (sm_80, sm_90a): expand 123, 124; join 42, 42; sum_pairs 47, 48; combine 48, 55; add_vectors 30, 29.
// Bound: bytes. expand reads 4 inner bytes of the base for each row, from memory once for each pair, and
// writes 2 (expand_pre 4); join reads 4 inner for each row and each pair, and writes 2; sum_pairs moves 2 inner for
// each row and each pair, combine 2 hidden for each row, each pair and each token, add_vectors 4 hidden for each token
// whose choices have vectors, which come from the cache.
// Last measured: H100, OLMoE-1B-7B, half replaced, 4096 tokens: expand 57 us, sum_pairs 18 us, combine 58 us (97 % of the
// copy rate), before slots could keep their experts. join and add_vectors have not run on a card.

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
    const elem* own_gate;    // [S, inner] or null
    const elem* own_up;      // [S, inner] or null
    u32 slots, inner, rank;  // inner, rank: multiples of 8; rank <= 128
    u32 kept;                // slots whose own share is 1, the first ones
    float base_share, own_share;
};
static_assert(sizeof(Expand) == 104);

constexpr u32 EXPAND_COLUMNS = 64;  // in a tile

// Every warp has 16 rows of a tile, and all columns. A tile's U and its rows of `low` and of the base go
// through two stages of shared memory: the next tile is on its way while this one is computed. The
// places of tiles and the pairs of rows are found one tile earlier still.
// Where PRE, `h` takes the pre-activations of the gate, and `pre_up` those of up.
template <u32 WARPS, bool PRE>
__device__ __forceinline__ void expand(const Expand& p, elem* pre_up) {
    extern __shared__ uint4 memory[];
    __shared__ uint4 places[2];  // group, first row, end of the group, first column; group NONE: no tile is left
    const u32 parts = WARPS == 8 ? 1 : (p.rank + 31) / 32;  // of the rank
    const u32 weights = parts * 512, own = 256 + parts * 128, stage = weights + WARPS * own;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, quad = lane % 4;
    const u32 mine = weights + warp * own;  // what only this warp needs: 8 pieces of the base a lane, then `low`
    const u32 first = warp * 16 + group;    // this lane's rows of a tile are this one and the eighth after it

    Bands<WARPS * 16, EXPAND_COLUMNS> tile(p.starts, p.slots, p.inner);
    auto find = [&](u32 slot) {
        bool there = tile.advance();
        if (lane == 0) places[slot] = there ? make_uint4(tile.group, tile.row, tile.end, tile.column) : make_uint4(NONE, 0, 0, 0);
    };
    u32 pair[2];
    auto find_pairs = [&](const uint4& at) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 row = at.y + first + i * 8;
            pair[i] = p.base_gate && row < at.z ? p.pair_of_row[row] : NONE;
        }
    };
    auto fetch = [&](const uint4& at, uint4* to) {
        for (u32 i = threadIdx.x; i < weights; i += WARPS * WARP) {
            u32 chunk = i % (parts * 4), of = i / (parts * 4);  // `of`: column of the gate's U, then of the up's
            u32 column = at.w + of % EXPAND_COLUMNS, line = of / 32 * 32 + line_of_column(of % 32);
            const elem* u = (of < EXPAND_COLUMNS ? p.gate : p.up) + (u64(at.x) * p.inner + column) * p.rank + chunk * 8;
            copy_async(to + (line / 8 * parts + chunk / 4) * WARP + piece_at(line % 8, chunk % 4), u, column < p.inner && chunk * 8 < p.rank);
        }
        uint4* base = to + mine + lane;
        uint4* low = to + mine + 256 + piece_at(group, quad);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            u32 column = at.w + quad * 8;
            u64 from = u64(pair[i] == NONE ? 0 : pair[i]) * p.inner + column;
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                bool there = pair[i] != NONE && column + half * 32 < p.inner;
                copy_async(base + (half * 4 + i * 2) * WARP, p.base_gate + from + half * 32, there);
                copy_async(base + (half * 4 + i * 2 + 1) * WARP, p.base_up + from + half * 32, there);
            }
        }
        u32 row = at.y + first;
        const elem* from_low = p.low + u64(row) * (2 * p.rank) + quad * 8;
#pragma unroll 1
        for (u32 part = 0; part < parts; part++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                bool there = row + i * 8 < at.z && part * 32 + quad * 8 < p.rank;
                const elem* from = from_low + i * 16 * p.rank + part * 32;
                copy_async(low + (part * 4 + i) * WARP, from, there);
                copy_async(low + (part * 4 + i + 2) * WARP, from + p.rank, there);
            }
        }
    };
    auto compute = [&](const uint4& at, const uint4* from) {
        const uint4* base = from + mine + lane;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float gate[4][4], up[4][4];  // of four blocks of columns, which begin as the base's
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                uint4 v = base[(half * 4 + i) * WARP];
                u32 of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    float* d = (i % 2 ? up : gate)[j] + i / 2 * 2;
                    d[0] = p.base_share * low(of[j]);
                    d[1] = p.base_share * high(of[j]);
                }
            }
#pragma unroll 1
            for (u32 part = 0; part < parts; part++) {
                u32 low_gate[2][4], low_up[2][4];
                load_rows(low_gate, from + mine + 256 + part * 4 * WARP, WARP);
                load_rows(low_up, from + mine + 256 + (part * 4 + 2) * WARP, WARP);
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    u32 b[4];
                    load_columns(b, from + ((half * 4 + j) * parts + part) * WARP);
                    mma_32(gate[j], low_gate, b);
                    load_columns(b, from + ((half * 4 + j + 8) * parts + part) * WARP);
                    mma_32(up[j], low_up, b);
                }
            }
            u32 column = at.w + half * 32 + quad * 8;
            if (column >= p.inner) continue;
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 row = at.y + first + i * 8;
                if (row >= at.z) continue;
                u64 to = u64(row) * p.inner + column;
                float h[8], second[8];
#pragma unroll
                for (u32 j = 0; j < 8; j++) h[j] = gate[j / 2][i * 2 + j % 2], second[j] = up[j / 2][i * 2 + j % 2];
                float own_share = at.x < p.kept ? 1.0f : p.own_share;
                if (p.own_gate && own_share != 0.0f) {
                    add(h, own_share, *reinterpret_cast<const uint4*>(p.own_gate + to));
                    add(second, own_share, *reinterpret_cast<const uint4*>(p.own_up + to));
                }
#pragma unroll
                for (u32 j = 0; j < 8; j++)
                    if (!PRE) h[j] = fast_silu(h[j]) * second[j];
                *reinterpret_cast<uint4*>(p.h + to) = pack_8(h);
                if (PRE) *reinterpret_cast<uint4*>(pre_up + to) = pack_8(second);
            }
        }
    };

    if (warp == 0) {
        find(0);
        find(1);
    }
    __syncthreads();
    uint4 now = make_uint4(NONE, 0, 0, 0), ahead = places[0];
    find_pairs(ahead);
    for (u32 turn = 0; now.x != NONE || ahead.x != NONE; turn ^= 1) {
        if (ahead.x != NONE) fetch(ahead, memory + turn * stage);
        copy_commit();
        uint4 later = places[turn ^ 1];
        find_pairs(later);
        copy_wait<1>();
        __syncthreads();
        if (warp == 0) find(turn);
        if (now.x != NONE) compute(now, memory + (turn ^ 1) * stage);
        __syncthreads();  // all have left the stage
        now = ahead, ahead = later;
    }
}

struct ExpandPre {
    Expand expand;  // its `h` takes the pre-activations of the gate
    elem* pre_up;   // [S, inner]
};
static_assert(sizeof(ExpandPre) == 112);

extern "C" __global__ void __launch_bounds__(THREADS, 2) adapters_expand(Expand p) {
    if (p.rank <= 32) expand<8, false>(p, nullptr);
    else expand<4, false>(p, nullptr);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) adapters_expand_pre(ExpandPre p) {
    if (p.expand.rank <= 32) expand<8, true>(p.expand, p.pre_up);
    else expand<4, true>(p.expand, p.pre_up);
}

constexpr u32 SLAB = WARP * 8;  // columns of a warp: 16 bytes for each lane
constexpr u32 IN_FLIGHT = 4;    // choices whose rows are asked for together

struct Join {
    const elem* gate;        // [S, inner] what adapters make of a row
    const elem* up;          // [S, inner]
    const elem* base_gate;   // [pairs, inner] or null
    const elem* base_up;     // [pairs, inner] or null
    elem* h;                 // [S, inner]
    const u32* pair_of_row;  // [S]; NONE: a row without a base
    const u32* starts;       // [slots + 1] slot i has the rows starts[i] .. starts[i + 1]
    u32 slots, inner;        // inner a multiple of 8
    float base_share;
};
static_assert(sizeof(Join) == 72);

// A warp for each row and slab of columns.
extern "C" __global__ void __launch_bounds__(THREADS) adapters_join(Join p) {
    u32 lane = threadIdx.x % WARP, warps = gridDim.x * (THREADS / WARP);
    u32 slabs = (p.inner + SLAB - 1) / SLAB;
    u32 first = p.starts[0], rows = p.starts[p.slots] - first;
    for (u32 at = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; at < rows * slabs; at += warps) {
        u32 row = first + at / slabs, column = at % slabs * SLAB + lane * 8;
        if (column >= p.inner) continue;
        u64 to = u64(row) * p.inner + column;
        float h[8] = {}, second[8] = {};
        add(h, 1.0f, stream(p.gate + to));
        add(second, 1.0f, stream(p.up + to));
        u32 pair = p.base_gate ? p.pair_of_row[row] : NONE;
        if (pair != NONE) {
            u64 from = u64(pair) * p.inner + column;
            add(h, p.base_share, *reinterpret_cast<const uint4*>(p.base_gate + from));
            add(second, p.base_share, *reinterpret_cast<const uint4*>(p.base_up + from));
        }
#pragma unroll
        for (u32 j = 0; j < 8; j++) h[j] = fast_silu(h[j]) * second[j];
        *reinterpret_cast<uint4*>(p.h + to) = pack_8(h);
    }
}

struct SumPairs {
    const elem* h;           // [S, inner]
    elem* sum;               // [pairs, inner]
    const u32* row_of;       // [tokens, top_k]
    const u32* pair_of;      // [tokens, top_k] the pair that this choice is the first of, or NONE
    const u32* pair_of_row;  // [S]
    const float* gates;      // [tokens, top_k]
    u32 tokens, top_k, inner;  // top_k <= 32, inner a multiple of 8
    float share;
};
static_assert(sizeof(SumPairs) == 64);

// A warp for each token and slab of columns; lane j holds what belongs to choice j.
extern "C" __global__ void __launch_bounds__(THREADS) adapters_sum_pairs(SumPairs p) {
    u32 lane = threadIdx.x % WARP;
    u32 slabs = (p.inner + SLAB - 1) / SLAB;
    u32 warps = gridDim.x * (THREADS / WARP);
    const uint4 zero = make_uint4(0, 0, 0, 0);
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
            for (u32 members = __ballot_sync(0xffffffffu, pair_of_row == pair); members;) {
                uint4 of_row[IN_FLIGHT];
                float factor[IN_FLIGHT];
#pragma unroll
                for (u32 i = 0; i < IN_FLIGHT; i++) {
                    bool there = members && column < p.inner;
                    u32 j = (__ffs(members) - 1) % WARP;
                    members &= members - 1;
                    u32 from = __shfl_sync(0xffffffffu, row, j);
                    factor[i] = __shfl_sync(0xffffffffu, gate, j);
                    of_row[i] = there ? stream(p.h + u64(from) * p.inner + column) : zero;
                }
#pragma unroll
                for (u32 i = 0; i < IN_FLIGHT; i++) add(sum, factor[i], of_row[i]);
            }
#pragma unroll
            for (u32 i = 0; i < 8; i++) sum[i] *= p.share;
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
    const elem* y_own;    // [S, hidden] the same of slots' whole experts, or null
    const u32* own_from;  // the first row that `y_own` has
    const u32* replaced_from;  // the first row whose share in it is `own_share` and not 1
    u32 tokens, top_k, hidden;  // top_k <= 32, hidden a multiple of 8
    float own_share;
};
static_assert(sizeof(Combine) == 80);

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
            for (u32 i = 0; p.y_own && i < IN_FLIGHT; i++) {
                u32 from = __shfl_sync(0xffffffffu, row, first + i);
                bool there = column < p.hidden && from != NONE && from >= *p.own_from;
                float share = there && from >= *p.replaced_from ? p.own_share : 1.0f;
                if (there && share != 0.0f) add(sum, share, stream(p.y_own + u64(from) * p.hidden + column));
            }
        }
        if (column < p.hidden) *reinterpret_cast<uint4*>(p.out + u64(token) * p.hidden + column) = pack_8(sum);
    }
}

struct AddVectors {
    const elem* vectors;   // [n, hidden]
    const u32* vector_of;  // [positions] the vector of a position, or NONE
    const u32* chosen;     // [tokens, top_k] positions
    const float* gates;    // [tokens, top_k]
    elem* out;             // [tokens, hidden]
    u32 tokens, top_k, hidden;  // top_k <= 32, hidden a multiple of 8
};
static_assert(sizeof(AddVectors) == 56);

extern "C" __global__ void __launch_bounds__(THREADS) add_vectors(AddVectors p) {
    const u32 lane = threadIdx.x % WARP, slabs = (p.hidden + SLAB - 1) / SLAB, warps = gridDim.x * (THREADS / WARP);
    for (u32 at = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; at < p.tokens * slabs; at += warps) {
        const u32 token = at / slabs, column = at % slabs * SLAB + lane * 8, choice = token * p.top_k + lane;
        const u32 vector = lane < p.top_k ? p.vector_of[p.chosen[choice]] : NONE;
        const float gate = lane < p.top_k ? p.gates[choice] : 0.0f;
        u32 with = __ballot_sync(0xffffffffu, vector != NONE);
        if (!with) continue;
        elem* out = p.out + u64(token) * p.hidden + column;
        float sum[8] = {};
        if (column < p.hidden) add(sum, 1.0f, *reinterpret_cast<const uint4*>(out));
        for (; with; with &= with - 1) {
            const u32 from = __ffs(with) - 1;
            const u32 row = __shfl_sync(0xffffffffu, vector, from);
            const float share = __shfl_sync(0xffffffffu, gate, from);
            if (column < p.hidden) add(sum, share, *reinterpret_cast<const uint4*>(p.vectors + u64(row) * p.hidden + column));
        }
        if (column < p.hidden) *reinterpret_cast<uint4*>(out) = pack_8(sum);
    }
}
