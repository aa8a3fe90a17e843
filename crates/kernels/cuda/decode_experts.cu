// decode_gate_up and decode_down: what the experts compute. See decode.cuh.

// The first 4 of the 8 warps share the gate's sums over the hidden size of a dense position or of a base,
// the others those of `up`; then each warp adds the adapters of other positions to the base's result.
extern "C" __global__ void __launch_bounds__(256, 2) decode_gate_up(const Decode p) {
    extern __shared__ float4 pool[];
    __shared__ Survey survey;
    const Routing& r = p.routing;
    const u32 warp = threadIdx.x / WARP, top_k = p.scores.top_k;
    float* pre = reinterpret_cast<float*>(pool) + 8 * RING / 4;  // base results of gate, then of up, for each pair
    float* sums = pre + 2 * MAX_TOKENS * LINE;
    float* hs = sums;  // then silu(gate) * up of each adapted row of the unit
    float d[4][4];
    u32 column[4];

    if (blockIdx.x == 0 && threadIdx.x == 0) p.barrier[0] = 0;
    survey_tables(survey, p);
    const u32 items = survey.units * ((p.inner + TILE - 1) / TILE), two = p.rank > PIECE;  // pieces of the rank, less one
    u32 ahead = blockIdx.x, ahead_k = warp % 4 * PIECE, ahead_part = 0;
    auto next = [&](Piece& piece) {
        for (; ahead < items; ahead += gridDim.x, ahead_k = warp % 4 * PIECE, ahead_part = 0) {
            const Item item(survey, p, ahead);
            if (item.product && ahead_k < p.hidden) {
                piece = Piece{(warp < 4 ? item.gate(p) : item.up(p)) + ahead_k, p.hidden, item.rows, p.hidden - ahead_k};
                ahead_k += 4 * PIECE;
                return true;
            }
            if (item.dense) continue;
            const u32 hit = item.hit + warp + (ahead_part >> two + 1) * 8;
            if (hit >= item.hit_end) continue;
            const u32 k = (ahead_part & two) * PIECE;
            const elem* w = ahead_part >> two & 1 ? p.b_gate : p.b_up;
            piece = Piece{w + (u64(survey.hits[hit] - p.dense) * p.inner + item.inner) * p.rank + k, p.rank, item.rows, p.rank - k};
            ahead_part++;
            return true;
        }
        return false;
    };
    Ring<decltype(next)> ring(pool, next);
    for (u32 i = blockIdx.x; i < items; i += gridDim.x) {
        const Item item(survey, p, i);
        const u32 position = survey.hits[item.hit], row = survey.starts[position], rows = survey.starts[survey.hits[item.hit_end - 1] + 1] - row;
        const u32 group = survey.group[position];
        u32 pair = 0, pairs = 0;
        if (!item.dense && item.product) pair = r.pair_starts[group], pairs = r.pair_starts[group + 1] - pair;
        if (item.product) {
            const u32* tokens = item.dense ? r.row_tokens + row : r.pair_tokens + pair;
            const u32 columns = item.dense ? rows : pairs;
            columns_at(column, columns, p.hidden, [&](u32 c) { return tokens[c]; });
            clear(d);
#pragma unroll 1
            for (u32 k = warp % 4 * PIECE; k < p.hidden; k += 4 * PIECE) ring.multiply(d, p.x + k, column, (columns + 7) / 8, p.hidden - k);
            add_up<2, 8>(sums, d, columns, [&](u32 c, u32 f, const float2 (&v)[2]) {
                if (!item.dense) {
                    *reinterpret_cast<float2*>(pre + c * LINE + f) = v[0];
                    *reinterpret_cast<float2*>(pre + (MAX_TOKENS + c) * LINE + f) = v[1];
                } else if (f < item.rows) {
                    const float gate = r.row_gates[row + c];
                    *reinterpret_cast<u32*>(p.h + u64(row + c) * p.inner + item.inner + f) =
                        pack(gate * silu(v[0].x) * v[1].x, gate * silu(v[0].y) * v[1].y);
                }
            });
        }
        if (item.dense) continue;

        __syncthreads();
        // Each of its positions by one warp, first `up` and then the gate.
#pragma unroll 1
        for (u32 of = warp * 2; of < (item.hit_end - item.hit) * 2; of += of % 2 ? 15 : 1) {
            const u32 hit = survey.hits[item.hit + of / 2], first = survey.starts[hit], columns = survey.starts[hit + 1] - first;
            const bool is_gate = of % 2;
            float* to = hs + (first - row) * LINE;
            const float* base = pre + (is_gate ? 0 : MAX_TOKENS) * LINE;
            columns_at(column, columns, 2 * p.rank, [&](u32 c) { return first + c; });
            clear(d);
            if (item.product) each_value(d, columns, [&](u32 c, u32 f, float& v) { v = base[(r.pair_of_row[first + c] - pair) * LINE + f]; });
#pragma unroll 1
            for (u32 k = 0; k < p.rank; k += PIECE) ring.multiply(d, p.low + (is_gate ? 0 : p.rank) + k, column, (columns + 7) / 8, p.rank - k);
            each_value(d, columns, [&](u32 c, u32 f, float v) { to[c * LINE + f] = is_gate ? to[c * LINE + f] * silu(v) : v; });
        }
        __syncthreads();
        for (u32 j = threadIdx.x; j < rows * 8; j += 256) {
            const u32 f = j % 8 * 2;
            const float2 v = *reinterpret_cast<const float2*>(hs + j / 8 * LINE + f);
            const float gate = r.row_gates[row + j / 8];
            if (f < item.rows) *reinterpret_cast<u32*>(p.h + u64(row + j / 8) * p.inner + item.inner + f) = pack(gate * v.x, gate * v.y);
        }
        // In the order of a token's choices; its rows of this group are those in row .. row + rows.
        for (u32 j = threadIdx.x; j < pairs * 8; j += 256) {
            const u32 f = j % 8 * 2, choice = r.pair_tokens[pair + j / 8] * top_k;
            float2 sum = {};
            for (u32 of = choice; of < choice + top_k; of++) {
                const u32 s = r.row_of[of];
                if (s - row >= rows) continue;
                const float2 v = *reinterpret_cast<const float2*>(hs + (s - row) * LINE + f);
                sum.x += r.row_gates[s] * v.x, sum.y += r.row_gates[s] * v.y;
            }
            if (f < item.rows) *reinterpret_cast<u32*>(p.hsum + u64(pair + j / 8) * p.inner + item.inner + f) = pack(sum.x, sum.y);
        }
    }
}

// What decode_down multiplies: a matrix, and the rows of h, hsum or lowd of the tokens that have one there.
struct Source {
    u16 matrix, first;  // first row, of the first of the tokens
    u32 tokens;         // as bits
};

// A block owns 16 hidden columns at a time. Its 16 warps take the pieces of all units in turn, with all tokens
// as the columns, of which those elsewhere are zero. The adapters' part comes last, behind the barrier.
extern "C" __global__ void __launch_bounds__(512, 1) decode_down(const Decode p) {
    extern __shared__ float4 pool[];
    __shared__ Survey survey;
    __shared__ u32 tokens_of[MAX_POSITIONS];
    __shared__ Source sources[2 * MAX_POSITIONS];
    const Routing& r = p.routing;
    const u32 warp = threadIdx.x / WARP, top_k = p.scores.top_k;
    float* sums = reinterpret_cast<float*>(pool) + 16 * RING / 4;
    float d[4][4];
    u32 column[4];

    tokens_of[threadIdx.x] = 0;
    const u32 chosen = threadIdx.x < p.tokens * top_k ? r.chosen[threadIdx.x] : NONE;
    survey_tables(survey, p);
    if (chosen != NONE) atomicOr(&tokens_of[chosen], 1u << threadIdx.x / top_k);
    __syncthreads();
    const u32 adapted = survey.count - survey.dense, products = survey.products, rank_tiles = (p.rank + TILE - 1) / TILE;
    for (u32 i = threadIdx.x; i < products + adapted; i += 512) {
        const bool base = i >= survey.dense && i < products;
        const u32 position = survey.hits[i < products ? i : survey.dense + i - products];
        Source s{u16(i < products ? survey.matrix[i] : position - p.dense), survey.starts[position], tokens_of[position]};
        if (base) {
            s.first = r.pair_starts[s.matrix], s.tokens = 0;
            for (u32 hit = survey.unit[i]; hit < survey.unit[i + 1]; hit++) s.tokens |= tokens_of[survey.hits[hit]];
        }
        sources[i] = s;
    }
    __syncthreads();

    // Pieces of units, then of adapters.
    const u32 unit_pieces = pieces(p.inner), rank_pieces = pieces(p.rank);
    const u32 first_adapter = products * unit_pieces, all = first_adapter + adapted * rank_pieces;
    auto source_of = [&](u32 piece, u32& k) {
        const bool unit = piece < first_adapter;
        const u32 i = unit ? piece : piece - first_adapter, of = unit ? unit_pieces : rank_pieces;
        k = i % of * PIECE;
        return (unit ? 0 : products) + i / of;
    };
    // From the last block on: the first have more tiles below.
    u32 ahead_low = gridDim.x - 1 - blockIdx.x, ahead_k = warp * PIECE, ahead_hidden = blockIdx.x * TILE, ahead = warp;
    auto next = [&](Piece& piece) {
        for (; ahead_low < adapted * rank_tiles; ahead_low += gridDim.x, ahead_k = warp * PIECE) {
            if (ahead_k >= p.inner) continue;
            const u32 rank = ahead_low % rank_tiles * TILE;
            const elem* w = p.a_down + (u64(sources[products + ahead_low / rank_tiles].matrix) * p.rank + rank) * p.inner;
            piece = Piece{w + ahead_k, p.inner, min(p.rank - rank, TILE), p.inner - ahead_k};
            ahead_k += 16 * PIECE;
            return true;
        }
        for (; ahead_hidden < p.hidden; ahead_hidden += gridDim.x * TILE, ahead = warp) {
            if (ahead >= all) continue;
            u32 k;
            const u32 i = source_of(ahead, k), depth = i < products ? p.inner : p.rank;
            const elem* w = i < survey.dense ? p.down : i < products ? p.base_down : p.b_down;
            piece = Piece{w + (u64(sources[i].matrix) * p.hidden + ahead_hidden) * depth + k, depth, min(p.hidden - ahead_hidden, TILE), depth - k};
            ahead += 16;
            return true;
        }
        return false;
    };
    Ring<decltype(next)> ring(pool, next);

    for (u32 item = gridDim.x - 1 - blockIdx.x; item < adapted * rank_tiles; item += gridDim.x) {
        const u32 position = survey.hits[survey.dense + item / rank_tiles], rank = item % rank_tiles * TILE;
        const u32 first = survey.starts[position], columns = survey.starts[position + 1] - first;
        columns_at(column, columns, p.inner, [&](u32 i) { return first + i; });
        clear(d);
#pragma unroll 1
        for (u32 k = warp * PIECE; k < p.inner; k += 16 * PIECE) ring.multiply(d, p.h + k, column, (columns + 7) / 8, p.inner - k);
        add_up<1, 16>(sums, d, columns, [&](u32 i, u32 row, const float2 (&v)[1]) {
            if (rank + row < p.rank) *reinterpret_cast<u32*>(p.lowd + (first + i) * p.rank + rank + row) = pack(v[0].x, v[0].y);
        });
    }
    if (adapted) arrive(p.barrier + 1);
    for (u32 hidden = blockIdx.x * TILE; hidden < p.hidden; hidden += gridDim.x * TILE) {
        clear(d);
        u32 piece = warp;
#pragma unroll 1
        for (u32 adapters = 0; adapters < (adapted ? 2 : 1); adapters++) {
            if (adapters) await(p.barrier + 1);
#pragma unroll 1
            for (; piece < (adapters ? all : first_adapter); piece += 16) {
                u32 k;
                const u32 i = source_of(piece, k), depth = adapters ? p.rank : p.inner;
                const Source s = sources[i];
#pragma unroll
                for (u32 b = 0; b < 4; b++) {
                    const u32 token = 1u << (b * 8 + threadIdx.x % WARP / 4);
                    column[b] = s.tokens & token ? (s.first + __popc(s.tokens & token - 1)) * depth : NONE;
                }
                ring.multiply(d, (adapters ? p.lowd : i < survey.dense ? p.h : p.hsum) + k, column, (p.tokens + 7) / 8, depth - k);
            }
        }
        add_up<1, 16>(sums, d, p.tokens, [&](u32 t, u32 row, const float2 (&v)[1]) {
            if (hidden + row < p.hidden) *reinterpret_cast<u32*>(p.out + u64(t) * p.hidden + hidden + row) = pack(v[0].x, v[0].y);
        });
    }
}
