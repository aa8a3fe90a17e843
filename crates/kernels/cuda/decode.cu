// A whole Mixture-of-Experts block for up to 32 tokens in three launches, without the host in between:
//   h[s] = silu(G x) * (U x)      G, U: Wg, Wu of a dense position; B + U_p V_p of an adapted one (B = 0 without a base)
//   out[t] = sum of g_s Wd h_s over its dense rows + sum over its groups of Bd (sum of g_s h_s) + sum of Ud Vd (g_s h_s)
// decode_route    logits, choice, Routing, low = V x   multiprocessors * 1 blocks of 512 threads, 128 registers
// decode_gate_up  h of all rows, hsum of all pairs     multiprocessors * 2 blocks of 256 threads, 121 registers
// decode_down     lowd = Vd (g h), then out            multiprocessors * 1 blocks of 512 threads, 123 registers
// Blocks of decode_route, and of decode_down, wait for each other: all must be on the device at once, so
// nothing else that waits like this may run beside them. The grids may be smaller, down to one block.
// Dynamic shared memory in bytes, with C = tokens rounded up to a multiple of 8:
//   decode_route max(1280 C, 64 experts); decode_down 1280 C;
//   decode_gate_up 1440 C, and 80 tokens * top_k more where positions are adapted.
// Static: 18.1, 6.1 and 6.1 KiB. Bound by the bytes of the weights hit, each read once: a warp has 16 rows of
// weights as one factor of `mma`, up to 32 tokens as the other, and 4 KiB of weights under way (64 KiB a
// multiprocessor). Weights go from memory to registers, inputs come from the first and second caches.
// Last measured: not yet.

// Weights as torch.nn.Linear holds them; positions as in Routing. All pointers are aligned to 16 bytes.
// hidden, inner and rank are multiples of 8; tokens <= 32, top_k <= 16, positions <= 512, rank <= 128.
struct Decode {
    const elem* x;          // [tokens, hidden]
    const elem* router;     // [experts, hidden]
    const elem* gate;       // [dense, inner, hidden]
    const elem* up;         // [dense, inner, hidden]
    const elem* down;       // [dense, hidden, inner]
    const elem* base_gate;  // [groups, inner, hidden]
    const elem* base_up;    // [groups, inner, hidden]
    const elem* base_down;  // [groups, hidden, inner]
    const elem* a_gate;     // [positions - dense, rank, hidden], as the other five by position - dense
    const elem* a_up;       // [.., rank, hidden]
    const elem* a_down;     // [.., rank, inner]
    const elem* b_gate;     // [.., inner, rank]
    const elem* b_up;       // [.., inner, rank]
    const elem* b_down;     // [.., hidden, rank]
    const u32* group_of;    // [positions] group of each adapted position, or NONE
    float* logits;          // [SPLITS, tokens, experts] partial sums
    elem* low;              // [S, 2 * rank] V_gate x, V_up x
    elem* h;                // [S, inner]
    elem* hsum;             // [tokens * min(top_k, groups), inner]
    elem* lowd;             // [S, rank]
    elem* out;              // [tokens, hidden]
    u32* barrier;           // [2], zero before the first launch
    Routing routing;
    Scores scores;
    u32 tokens, hidden, inner, rank, positions, dense, groups;
};

constexpr u32 MAX_ROWS = 512, MAX_POSITIONS = 512, SPLITS = 4;
constexpr u32 TILE = 16;   // rows of weights that a block works on at a time
constexpr u32 LINE = 20;   // floats between columns in shared memory: 16, and 4 that keep the lanes of a store in different banks
constexpr u32 CHUNK = 64;  // what the warps of decode_down divide the sums into

// A barrier of all blocks in two halves, so that work fits in between. It leaves the count at zero, so
// that launches of any grid may share it. The turn that `arrive` gives is for `await`; thread 0 holds it.
__device__ __forceinline__ u32 arrive(u32* barrier) {
    volatile u32* words = barrier;
    u32 turn = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        turn = words[1];
        __threadfence();
        if (atomicAdd(barrier, 1) == gridDim.x - 1) {
            words[0] = 0;
            __threadfence();
            words[1] = turn + 1;
        }
    }
    return turn;
}

__device__ __forceinline__ void await(u32* barrier, u32 turn) {
    if (threadIdx.x == 0) {
        while (*static_cast<volatile u32*>(barrier + 1) == turn) __nanosleep(20);
        __threadfence();
    }
    __syncthreads();
}

// Where each lane finds its column of each block of 8: row(i) is the input row of column i. Lanes past
// the last column repeat it; what they compute is not used.
template <typename Row>
__device__ __forceinline__ void columns_at(u32 (&at)[4], u32 columns, u32 stride, Row row) {
#pragma unroll
    for (u32 b = 0; b < 4; b++) at[b] = row(min(b * 8 + threadIdx.x % WARP / 4, columns - 1)) * stride;
}

// d = w · x by one warp, for 16 rows of each of M matrices and up to 32 columns, over k = from .. to.
// A lane's 8 neighbours in memory stand for k = c..c+1, c+8.. of two steps of `mma`, in the weights as in
// the inputs: the sum does not care. Weights of DEEP such double steps, 4 KiB, are under way at any time.
// Where APART, matrix m has inputs of its own, m * apart further on. Rows from `rows` on repeat the last.
template <u32 M, bool APART = false>
__device__ __forceinline__ void product(float (&d)[M][4][4], const elem* const (&w)[M], u32 rows, u32 stride, const elem* x,
                                        const u32 (&column)[4], u32 columns, u32 from, u32 to, u32 apart = 0) {
    const u32 lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4 * 8;
    const u32 below = (min(g + 8, rows - 1) - min(g, rows - 1)) * stride;  // from a lane's upper row to its lower
    const elem* upper[M];
#pragma unroll
    for (u32 m = 0; m < M; m++) upper[m] = w[m] + min(g, rows - 1) * stride;
    constexpr u32 DEEP = 4 / M;
    uint4 v[DEEP][M][2];
    auto load = [&](uint4 (&v)[M][2], u32 k) {
        if (k >= to) return;
        const u32 at = min(k + c, to - 8);
#pragma unroll
        for (u32 m = 0; m < M; m++) v[m][0] = stream(upper[m] + at), v[m][1] = stream(upper[m] + at + below);
    };
#pragma unroll
    for (u32 m = 0; m < M; m++)
#pragma unroll
        for (u32 b = 0; b < 4; b++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) d[m][b][i] = 0.0f;
#pragma unroll
    for (u32 u = 0; u < DEEP; u++) load(v[u], from + u * 32);
    while (from < to) {
#pragma unroll
        for (u32 u = 0; u < DEEP; u++) {
            if (from >= to) break;
            const u32 at = min(from + c, to - 8);
#pragma unroll
            for (u32 m = 0; m < M; m += APART ? 1 : M) {
                // All columns' inputs come at once, at the price of one latency.
                uint4 in[4];
#pragma unroll
                for (u32 b = 0; b < 4; b++)
                    if (b * 8 < columns) in[b] = *reinterpret_cast<const uint4*>(x + column[b] + m * apart + at);
#pragma unroll
                for (u32 b = 0; b < 4; b++) {
                    if (b * 8 >= columns) break;
                    if (from + c >= to) in[b] = uint4{0, 0, 0, 0};
#pragma unroll
                    for (u32 n = m; n < (APART ? m + 1 : M); n++) {
                        const uint4 &p = v[u][n][0], &q = v[u][n][1];
                        mma(d[n][b], {p.x, q.x, p.y, q.y}, {in[b].x, in[b].y});
                        mma(d[n][b], {p.z, q.z, p.w, q.w}, {in[b].z, in[b].w});
                    }
                }
            }
            load(v[u], from + DEEP * 32);
            from += 32;
        }
    }
}

// Calls of(column, row, value) for every value of d[4 blocks] that this lane holds of `columns` columns.
template <typename Of>
__device__ __forceinline__ void each_value(const float (&d)[4][4], u32 columns, Of of) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 b = 0; b < 4; b++) {
        if (b * 8 >= columns) break;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 column = b * 8 + lane % 4 * 2 + i % 2;
            if (column < columns) of(column, lane / 4 + i / 2 * 8, d[b][i]);
        }
    }
}

// Adds up what the warps of a block hold, in the order of the warps, and calls finish(column, row, sums
// of each matrix) for every pair of rows. `sums`: WARPS * M * columns * LINE floats. The barrier at the
// start lets the last call's readers finish, after the next product has begun.
template <u32 M, u32 WARPS, typename Finish>
__device__ __forceinline__ void add_up(float* sums, const float (&d)[M][4][4], u32 columns, Finish finish) {
    __syncthreads();
#pragma unroll
    for (u32 m = 0; m < M; m++) {
        float* mine = sums + (threadIdx.x / WARP * M + m) * columns * LINE;
        each_value(d[m], columns, [&](u32 column, u32 row, float v) { mine[column * LINE + row] = v; });
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < columns * 8; i += WARPS * WARP) {
        float2 v[M] = {};
#pragma unroll
        for (u32 warp = 0; warp < WARPS; warp++)
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                const float2 part = *reinterpret_cast<const float2*>(sums + ((warp * M + m) * columns + i / 8) * LINE + i % 8 * 2);
                v[m].x += part.x, v[m].y += part.y;
            }
        finish(i / 8, i % 8 * 2, v);
    }
}

// Part `i` of `parts` of a sum over `length`, in steps of 32.
__device__ __forceinline__ uint2 part_of(u32 length, u32 parts, u32 i) {
    const u32 steps = (length + 31) / 32;
    return uint2{steps * i / parts * 32, min(steps * (i + 1) / parts * 32, length)};
}

// One matrix, 16 rows, all 16 warps of a block sharing the sum.
template <typename Finish>
__device__ __forceinline__ void tile_product(float* sums, const elem* w, u32 rows, u32 stride, const elem* x, const u32 (&column)[4],
                                             u32 columns, uint2 range, Finish finish) {
    float d[1][4][4];
    const elem* const matrix[1] = {w};
    product<1>(d, matrix, rows, stride, x, column, columns, range.x, range.y);
    add_up<1, 16>(sums, d, columns, [&](u32 c, u32 row, const float2 (&v)[1]) { if (row < rows) finish(c, row, v[0]); });
}

// The positions that have rows, and the units of work they form: one dense position, or all positions of
// a group (those without one are the last unit).
struct Survey {
    u32 starts[MAX_POSITIONS + 1];
    u32 hits[MAX_POSITIONS];      // positions with rows, ascending
    u32 unit[MAX_POSITIONS + 1];  // first hit of each unit, and the end
    u32 count, dense, units;      // hits, dense ones among them, units
    u32 products;                 // units that have matrices of their own: all but that without a group
};

// One warp looks at `starts`; the whole block calls this and then sees the result.
__device__ __forceinline__ void survey_hits(Survey& s, const u32* group_of, u32 positions, u32 dense) {
    __syncthreads();
    if (threadIdx.x < WARP) {
        const u32 lane = threadIdx.x, before = (1u << lane) - 1;
        u32 count = 0, kept = 0, units = 0, products = 0;
        for (u32 i = 0; i < positions; i += WARP) {
            const u32 p = i + lane;
            const bool hit = p < positions && s.starts[p + 1] > s.starts[p];
            const u32 mask = __ballot_sync(0xffffffffu, hit);
            if (hit) s.hits[count + __popc(mask & before)] = p;
            count += __popc(mask);
            kept += __popc(__ballot_sync(0xffffffffu, hit && p < dense));
        }
        __syncwarp();
        for (u32 i = 0; i < count; i += WARP) {
            const u32 hit = i + lane;
            bool first = false, own = false;
            if (hit < count) {
                const u32 p = s.hits[hit];
                first = hit <= kept || group_of[p] != group_of[s.hits[hit - 1]];
                own = hit < kept || group_of[p] != NONE;
            }
            const u32 mask = __ballot_sync(0xffffffffu, first);
            if (first) s.unit[units + __popc(mask & before)] = hit;
            units += __popc(mask);
            products += __popc(__ballot_sync(0xffffffffu, first && own));
        }
        if (lane == 0) s.unit[units] = count, s.count = count, s.dense = kept, s.units = units, s.products = products;
    }
    __syncthreads();
}

__device__ __forceinline__ void survey_tables(Survey& s, const Decode& p) {
    for (u32 i = threadIdx.x; i <= p.positions; i += blockDim.x) s.starts[i] = p.routing.starts[i];
    survey_hits(s, p.group_of, p.positions, p.dense);
}

// Sum of `v` over the threads before this one, of 512. `totals`: 16 words.
__device__ __forceinline__ u32 sum_before(u32 v, u32* totals) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 sum = v;
#pragma unroll
    for (u32 i = 1; i < WARP; i *= 2) {
        const u32 other = __shfl_up_sync(0xffffffffu, sum, i);
        if (lane >= i) sum += other;
    }
    __syncthreads();
    if (lane == WARP - 1) totals[warp] = sum;
    __syncthreads();
    for (u32 i = 0; i < warp; i++) sum += totals[i];
    return sum - v;
}

// Every block finds the whole routing from the logits, which saves a barrier, and the first writes it. The
// tokens of a position, and of a group, are the bits of a word: at most 32.
extern "C" __global__ void __launch_bounds__(512, 1) decode_route(const Decode p) {
    extern __shared__ float4 pool[];
    __shared__ Survey survey;
    __shared__ u32 chosen[MAX_ROWS], row_tokens[MAX_ROWS], tokens_of[MAX_POSITIONS], tokens_of_group[MAX_POSITIONS], pair_starts[MAX_POSITIONS];
    __shared__ float gates[MAX_ROWS];
    __shared__ u32 totals[16];
    float* sums = reinterpret_cast<float*>(pool);
    const Routing& r = p.routing;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, experts = p.scores.experts, top_k = p.scores.top_k, choices = p.tokens * top_k;
    u32 column[4];

    const u32 expert_tiles = (experts + TILE - 1) / TILE, splits = max(min(gridDim.x / expert_tiles, SPLITS), 1u);
    columns_at(column, p.tokens, p.hidden, [](u32 t) { return t; });
    for (u32 item = blockIdx.x; item < expert_tiles * splits; item += gridDim.x) {
        const u32 split = item / expert_tiles, expert = item % expert_tiles * TILE;
        tile_product(sums, p.router + u64(expert) * p.hidden, min(experts - expert, TILE), p.hidden, p.x, column, p.tokens,
                     part_of(p.hidden, splits * 16, split * 16 + warp), [&](u32 t, u32 row, float2 v) {
                         float* to = p.logits + (split * p.tokens + t) * experts + expert + row;
                         to[0] = v.x;
                         if (expert + row + 1 < experts) to[1] = v.y;
                     });
    }
    const u32 turn = arrive(p.barrier);
    if (blockIdx.x != 0 && p.dense == p.positions) return;
    tokens_of[threadIdx.x] = 0, tokens_of_group[threadIdx.x] = 0;
    await(p.barrier, turn);

    float* logits = sums + warp * experts;
    for (u32 t = warp; t < p.tokens; t += 16) {
        for (u32 e = lane; e < experts; e += WARP) {
            float sum = 0.0f;
            for (u32 split = 0; split < splits; split++) sum += p.logits[(split * p.tokens + t) * experts + e];
            logits[e] = sum;
        }
        __syncwarp();
        choose(p.scores, logits, chosen + t * top_k, gates + t * top_k);
        __syncwarp();
    }
    __syncthreads();
    const u32 me = threadIdx.x;  // a choice, a position and a group, in turn
    if (me < choices) atomicOr(&tokens_of[chosen[me]], 1u << me / top_k);
    __syncthreads();
    const u32 rows = __popc(tokens_of[me]), start = sum_before(rows, totals);
    const u32 group = me >= p.dense && me < p.positions ? p.group_of[me] : NONE;
    if (me < p.positions) survey.starts[me + 1] = start + rows;
    if (me == 0) survey.starts[0] = 0;
    if (group != NONE && rows) atomicOr(&tokens_of_group[group], tokens_of[me]);
    __syncthreads();
    const u32 pairs = __popc(tokens_of_group[me]), pair_start = sum_before(pairs, totals);
    pair_starts[me] = pair_start;
    __syncthreads();
    if (me < choices) {
        const u32 t = me / top_k, before = (1u << t) - 1, position = chosen[me];
        const u32 row = survey.starts[position] + __popc(tokens_of[position] & before);
        row_tokens[row] = t;
        if (blockIdx.x == 0) {
            const u32 of = position < p.dense ? NONE : p.group_of[position];
            const u32 pair = of == NONE ? NONE : pair_starts[of] + __popc(tokens_of_group[of] & before);
            bool first = of != NONE;
            for (u32 other = t * top_k; other < me; other++)
                if (chosen[other] >= p.dense && p.group_of[chosen[other]] == of) first = false;
            if (first) r.pair_tokens[pair] = t;
            r.chosen[me] = position, r.gates[me] = gates[me], r.row_of[me] = row, r.pair_of[me] = first ? pair : NONE;
            r.row_tokens[row] = t, r.row_gates[row] = gates[me], r.pair_of_row[row] = pair;
        }
    }
    if (blockIdx.x == 0) {
        if (me < p.positions) r.starts[me + 1] = start + rows;
        if (me < p.groups) r.pair_starts[me + 1] = pair_start + pairs;
        if (me == 0) r.starts[0] = 0, r.pair_starts[0] = 0;
    }
    if (p.dense == p.positions) return;

    survey_hits(survey, p.group_of, p.positions, p.dense);
    const u32 rank_tiles = (p.rank + TILE - 1) / TILE;
    for (u32 item = blockIdx.x; item < (survey.count - survey.dense) * 2 * rank_tiles; item += gridDim.x) {
        const u32 matrix = item / rank_tiles % 2, rank = item % rank_tiles * TILE;
        const u32 position = survey.hits[survey.dense + item / rank_tiles / 2], first = survey.starts[position];
        columns_at(column, survey.starts[position + 1] - first, p.hidden, [&](u32 i) { return row_tokens[first + i]; });
        tile_product(sums, (matrix ? p.a_up : p.a_gate) + (u64(position - p.dense) * p.rank + rank) * p.hidden, min(p.rank - rank, TILE), p.hidden,
                     p.x, column, survey.starts[position + 1] - first, part_of(p.hidden, 16, warp), [&](u32 i, u32 row, float2 v) {
                         *reinterpret_cast<u32*>(p.low + ((first + i) * 2 + matrix) * p.rank + rank + row) = pack(v.x, v.y);
                     });
    }
}

// An item is 16 inner columns of a unit. The 8 warps share the sums over the hidden size of a dense position or
// of a base; then each warp adds the adapters of other positions to the base's result.
extern "C" __global__ void __launch_bounds__(256, 2) decode_gate_up(const Decode p) {
    extern __shared__ float4 pool[];
    __shared__ Survey survey;
    const Routing& r = p.routing;
    const u32 warp = threadIdx.x / WARP, top_k = p.scores.top_k, widest = (p.tokens + 7) / 8 * 8;
    float* sums = reinterpret_cast<float*>(pool);
    float* pre = sums + 16 * widest * LINE;  // base results of gate, then of up, for each pair
    float* hs = pre + 2 * widest * LINE;     // h of each adapted row of the unit
    float d[2][4][4];
    u32 column[4];

    survey_tables(survey, p);
    const u32 tiles = (p.inner + TILE - 1) / TILE;
    for (u32 item = blockIdx.x; item < survey.units * tiles; item += gridDim.x) {
        // From the last unit to the first: the groups have more to do.
        const u32 unit = survey.units - 1 - item / tiles, inner = item % tiles * TILE, valid = min(p.inner - inner, TILE);
        const u32 hit = survey.unit[unit], hit_end = survey.unit[unit + 1], position = survey.hits[hit];
        const u32 row = survey.starts[position], rows = survey.starts[survey.hits[hit_end - 1] + 1] - row;
        const bool dense = position < p.dense;
        const u32 group = dense ? NONE : p.group_of[position];
        u32 pair = 0, pairs = 0;
        if (group != NONE) pair = r.pair_starts[group], pairs = r.pair_starts[group + 1] - pair;
        if (dense || group != NONE) {
            const u64 at = (u64(dense ? position : group) * p.inner + inner) * p.hidden;
            const elem* const w[2] = {(dense ? p.gate : p.base_gate) + at, (dense ? p.up : p.base_up) + at};
            const u32* tokens = dense ? r.row_tokens + row : r.pair_tokens + pair;
            const u32 columns = dense ? rows : pairs;
            const uint2 range = part_of(p.hidden, 8, warp);
            columns_at(column, columns, p.hidden, [&](u32 i) { return tokens[i]; });
            product<2>(d, w, valid, p.hidden, p.x, column, columns, range.x, range.y);
            add_up<2, 8>(sums, d, columns, [&](u32 i, u32 f, const float2 (&v)[2]) {
                if (!dense) {
                    *reinterpret_cast<float2*>(pre + i * LINE + f) = v[0];
                    *reinterpret_cast<float2*>(pre + (widest + i) * LINE + f) = v[1];
                } else if (f < valid) {
                    *reinterpret_cast<u32*>(p.h + u64(row + i) * p.inner + inner + f) = pack(silu(v[0].x) * v[1].x, silu(v[0].y) * v[1].y);
                }
            });
        }
        if (dense) continue;

        __syncthreads();
        for (u32 i = hit + warp; i < hit_end; i += 8) {
            const u32 of = survey.hits[i], first = survey.starts[of], columns = survey.starts[of + 1] - first;
            const u64 at = (u64(of - p.dense) * p.inner + inner) * p.rank;
            const elem* const w[2] = {p.b_gate + at, p.b_up + at};
            columns_at(column, columns, 2 * p.rank, [&](u32 c) { return first + c; });
            product<2, true>(d, w, valid, p.rank, p.low, column, columns, 0, p.rank, p.rank);
            float* to = hs + (first - row) * LINE;
            each_value(d[1], columns, [&](u32 c, u32 f, float v) {
                to[c * LINE + f] = group == NONE ? v : v + pre[(widest + r.pair_of_row[first + c] - pair) * LINE + f];
            });
            each_value(d[0], columns, [&](u32 c, u32 f, float v) {
                to[c * LINE + f] *= silu(group == NONE ? v : v + pre[(r.pair_of_row[first + c] - pair) * LINE + f]);
            });
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < rows * 8; i += 256) {
            const u32 f = i % 8 * 2;
            const float2 v = *reinterpret_cast<const float2*>(hs + i / 8 * LINE + f);
            if (f < valid) *reinterpret_cast<u32*>(p.h + u64(row + i / 8) * p.inner + inner + f) = pack(v.x, v.y);
        }
        // In the order of a token's choices; its rows of this group are those in row .. row + rows.
        for (u32 i = threadIdx.x; i < pairs * 8; i += 256) {
            const u32 f = i % 8 * 2, choice = r.pair_tokens[pair + i / 8] * top_k;
            float2 sum = {};
            for (u32 j = 0; j < top_k; j++) {
                const u32 s = r.row_of[choice + j];
                if (s - row >= rows) continue;
                const float2 v = *reinterpret_cast<const float2*>(hs + (s - row) * LINE + f);
                sum.x += r.row_gates[s] * v.x, sum.y += r.row_gates[s] * v.y;
            }
            if (f < valid) *reinterpret_cast<u32*>(p.hsum + u64(pair + i / 8) * p.inner + inner + f) = pack(sum.x, sum.y);
        }
    }
}

// A block owns 16 hidden columns at a time. Its 16 warps share, in equal runs of CHUNK, the sums over all
// units, each into sums of its own for every token; the adapters' part comes last, behind the barrier.
extern "C" __global__ void __launch_bounds__(512, 1) decode_down(const Decode p) {
    extern __shared__ float4 pool[];
    __shared__ Survey survey;
    const Routing& r = p.routing;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float* sums = reinterpret_cast<float*>(pool);
    u32 column[4];

    survey_tables(survey, p);
    const u32 adapted = survey.count - survey.dense, rank_tiles = (p.rank + TILE - 1) / TILE;
    // From the last block on: the first have more tiles below.
    for (u32 item = gridDim.x - 1 - blockIdx.x; item < adapted * rank_tiles; item += gridDim.x) {
        const u32 position = survey.hits[survey.dense + item / rank_tiles], rank = item % rank_tiles * TILE;
        const u32 first = survey.starts[position], columns = survey.starts[position + 1] - first;
        columns_at(column, columns, p.inner, [&](u32 i) { return first + i; });
        tile_product(sums, p.a_down + (u64(position - p.dense) * p.rank + rank) * p.inner, min(p.rank - rank, TILE), p.inner, p.h, column, columns,
                     part_of(p.inner, 16, warp), [&](u32 i, u32 row, float2 v) {
                         const float gate = r.row_gates[first + i];
                         *reinterpret_cast<u32*>(p.lowd + (first + i) * p.rank + rank + row) = pack(gate * v.x, gate * v.y);
                     });
    }
    const u32 turn = adapted ? arrive(p.barrier) : 0;
    float* mine = sums + warp * p.tokens * LINE;
    for (u32 hidden = blockIdx.x * TILE; hidden < p.hidden; hidden += gridDim.x * TILE) {
        __syncthreads();
        for (u32 i = lane; i < p.tokens * LINE; i += WARP) mine[i] = 0.0f;
#pragma unroll
        for (u32 adapters = 0; adapters < 2; adapters++) {
            if (adapters) {
                if (!adapted) break;
                await(p.barrier, turn);
            }
            const u32 depth = adapters ? p.rank : p.inner, chunks = (depth + CHUNK - 1) / CHUNK, all = chunks * (adapters ? adapted : survey.products);
            u32 next = all * warp / 16;
            const u32 end = all * (warp + 1) / 16;
            while (next < end) {
                const u32 unit = next / chunks, from = next % chunks, to = min(chunks, from + end - next);
                const u32 position = survey.hits[adapters ? survey.dense + unit : survey.unit[unit]];
                const bool dense = position < p.dense, rows = dense || adapters;
                const u32 matrix = dense ? position : adapters ? position - p.dense : p.group_of[position];
                const u32 first = rows ? survey.starts[position] : r.pair_starts[matrix];
                const u32 columns = (rows ? survey.starts[position + 1] : r.pair_starts[matrix + 1]) - first;
                const u32* tokens = (rows ? r.row_tokens : r.pair_tokens) + first;
                const elem* const w[1] = {(dense ? p.down : adapters ? p.b_down : p.base_down) + (u64(matrix) * p.hidden + hidden) * depth};
                float d[1][4][4];
                columns_at(column, columns, depth, [&](u32 i) { return first + i; });
                product<1>(d, w, min(p.hidden - hidden, TILE), depth, dense ? p.h : adapters ? p.lowd : p.hsum, column, columns, from * CHUNK, min(to * CHUNK, depth));
                __syncwarp();
                each_value(d[0], columns, [&](u32 i, u32 row, float v) { mine[tokens[i] * LINE + row] += dense ? r.row_gates[first + i] * v : v; });
                next += to - from;
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < p.tokens * 8; i += 512) {
            const u32 row = i % 8 * 2;
            float2 sum = {};
#pragma unroll
            for (u32 other = 0; other < 16; other++) {
                const float2 v = *reinterpret_cast<const float2*>(sums + (other * p.tokens + i / 8) * LINE + row);
                sum.x += v.x, sum.y += v.y;
            }
            if (hidden + row < p.hidden) *reinterpret_cast<u32*>(p.out + u64(i / 8) * p.hidden + hidden + row) = pack(sum.x, sum.y);
        }
    }
}
