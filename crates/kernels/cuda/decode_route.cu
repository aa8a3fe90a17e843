// decode_route: the choice of experts, and V x of the adapted ones. See decode.cuh.

// Sum of `v` over the threads before this one, of 512. `totals`: 16 words.
__device__ __forceinline__ u32 sum_before(u32 v, u32* totals) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 sum = v;
#pragma unroll
    for (u32 i = 1; i < WARP; i *= 2) {
        const u32 other = __shfl_up_sync(0xffffffffu, sum, i);
        if (lane >= i) sum += other;
    }
    if (lane == WARP - 1) totals[warp] = sum;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 16; i++)
        if (i < warp) sum += totals[i];
    return sum - v;
}

// 16 rows of one matrix by all 16 warps of a block, which take the pieces first, first + step, .. in turn.
template <typename Finish>
__device__ __forceinline__ void tile_product(float4* pool, const elem* w, u32 rows, u32 length, const elem* x, const u32 (&column)[4],
                                             u32 columns, u32 first, u32 step, Finish finish) {
    u32 ahead = first * PIECE;
    auto next = [&](Piece& piece) {
        if (ahead >= length) return false;
        piece = Piece{w + ahead, length, rows, length - ahead};
        ahead += step * PIECE;
        return true;
    };
    Ring<decltype(next)> ring(pool, next);
    float d[4][4];
    clear(d);
#pragma unroll 1
    for (u32 k = first * PIECE; k < length; k += step * PIECE) ring.multiply(d, x + k, column, (columns + 7) / 8, length - k);
    add_up<1, 16>(reinterpret_cast<float*>(pool) + 16 * RING / 4, d, columns, [&](u32 c, u32 row, const float2 (&v)[1]) {
        if (row < rows) finish(c, row, v[0]);
    });
}

// Every block finds the whole routing from the logits, which saves a barrier, and the first writes it. The
// tokens of a position, and of a group, are the bits of a word: at most 32.
extern "C" __global__ void __launch_bounds__(512, 1) decode_route(const Decode p) {
    extern __shared__ float4 pool[];
    __shared__ Survey survey;
    __shared__ u32 chosen[MAX_ROWS], row_tokens[MAX_ROWS], tokens_of[MAX_POSITIONS], tokens_of_group[MAX_POSITIONS];
    __shared__ u32 position[MAX_EXPERTS], pair_starts[MAX_POSITIONS];
    __shared__ float gates[MAX_ROWS];
    __shared__ u32 totals[16];
    const Routing& r = p.routing;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, experts = p.scores.experts, top_k = p.scores.top_k, choices = p.tokens * top_k;
    const u32 me = threadIdx.x;  // an expert, a position, a group and a choice, in turn
    u32 column[4];

    if (blockIdx.x == 0 && me == 0) p.barrier[1] = 0;
    const u32 expert_tiles = (experts + TILE - 1) / TILE;
    const u32 splits = max(min(min(gridDim.x / expert_tiles, SPLITS), (pieces(p.hidden) + 15) / 16), 1u);
    columns_at(column, p.tokens, p.hidden, [](u32 t) { return t; });
    for (u32 item = blockIdx.x; item < expert_tiles * splits; item += gridDim.x) {
        const u32 split = item / expert_tiles, expert = item % expert_tiles * TILE;
        tile_product(pool, p.router + u64(expert) * p.hidden, min(experts - expert, TILE), p.hidden, p.x, column, p.tokens,
                     split * 16 + warp, splits * 16, [&](u32 t, u32 row, float2 v) {
                         float* to = p.logits + (split * p.tokens + t) * experts + expert + row;
                         to[0] = v.x;
                         if (expert + row + 1 < experts) to[1] = v.y;
                     });
    }
    arrive(p.barrier);
    position[me] = me < experts ? p.scores.position[me] : NONE;
    survey.group[me] = me >= p.dense && me < p.positions ? p.group_of[me] : NO_GROUP;
    tokens_of[me] = 0, tokens_of_group[me] = 0;
    Scores scores = p.scores;
    scores.position = position;
    await(p.barrier);

    float* logits = reinterpret_cast<float*>(pool) + warp * experts;  // where the ring was
    for (u32 t = warp; t < p.tokens; t += 16) {
        for (u32 e = lane; e < experts; e += WARP) {
            float sum = 0.0f;
#pragma unroll
            for (u32 split = 0; split < SPLITS; split++)
                if (split < splits) sum += p.logits[(split * p.tokens + t) * experts + e];
            logits[e] = sum;
        }
        __syncwarp();
        choose(scores, logits, chosen + t * top_k, gates + t * top_k);
        __syncwarp();
    }
    __syncthreads();
    if (me < choices) {
        const u32 token = 1u << me / top_k, of = survey.group[chosen[me]];
        atomicOr(&tokens_of[chosen[me]], token);
        if (of != NO_GROUP) atomicOr(&tokens_of_group[of], token);
    }
    __syncthreads();
    // Rows in the lower half of a word, pairs in the upper: there are at most 512 of either.
    const u32 counts = __popc(tokens_of[me]) | __popc(tokens_of_group[me]) << 16, before = sum_before(counts, totals), end = before + counts;
    if (me < p.positions) survey.starts[me + 1] = end & 0xffffu;
    if (me == 0) survey.starts[0] = 0;
    pair_starts[me] = before >> 16;
    survey_hits(survey, p.positions, p.dense);
    if (me < choices) {
        const u32 t = me / top_k, others = (1u << t) - 1, of = survey.group[chosen[me]];
        const u32 row = survey.starts[chosen[me]] + __popc(tokens_of[chosen[me]] & others);
        row_tokens[row] = t;
        if (blockIdx.x == 0) {
            const u32 pair = of == NO_GROUP ? NONE : pair_starts[of] + __popc(tokens_of_group[of] & others);
            bool first = of != NO_GROUP;
            for (u32 other = t * top_k; other < me; other++)
                if (survey.group[chosen[other]] == of) first = false;
            if (first) r.pair_tokens[pair] = t;
            r.chosen[me] = chosen[me], r.gates[me] = gates[me], r.row_of[me] = row, r.pair_of[me] = first ? pair : NONE;
            r.row_tokens[row] = t, r.row_gates[row] = gates[me], r.pair_of_row[row] = pair;
        }
    }
    if (blockIdx.x == 0) {
        if (me < p.positions) r.starts[me + 1] = end & 0xffffu;
        if (me < p.groups) r.pair_starts[me + 1] = end >> 16;
        if (me == 0) r.starts[0] = 0, r.pair_starts[0] = 0;
    }
    __syncthreads();

    const u32 rank_tiles = (p.rank + TILE - 1) / TILE;
    for (u32 item = blockIdx.x; item < (survey.count - survey.dense) * 2 * rank_tiles; item += gridDim.x) {
        const u32 matrix = item / rank_tiles % 2, rank = item % rank_tiles * TILE;
        const u32 hit = survey.hits[survey.dense + item / rank_tiles / 2], first = survey.starts[hit], columns = survey.starts[hit + 1] - first;
        columns_at(column, columns, p.hidden, [&](u32 i) { return row_tokens[first + i]; });
        tile_product(pool, (matrix ? p.a_up : p.a_gate) + (u64(hit - p.dense) * p.rank + rank) * p.hidden, min(p.rank - rank, TILE), p.hidden,
                     p.x, column, columns, warp, 16, [&](u32 i, u32 row, float2 v) {
                         *reinterpret_cast<u32*>(p.low + ((first + i) * 2 + matrix) * p.rank + rank + row) = pack(v.x, v.y);
                     });
    }
}
