// Causal attention, forward.
//   attend_D      any number of queries. Grid: ceil(queries / 64) * heads * batch blocks of 128 threads, each
//                 with a tile of 64 queries, whose keys and values pass by in tiles of 64, two under way.
//                 Dynamic shared memory: 512 D bytes. For D = 192 tiles have 32 keys, and the queries lie beside
//                 them: 384 D bytes.
//   attend_one_D  one query a row. Grid: heads * batch blocks of 256 threads; each warp takes four keys at a
//                 time. Static shared memory: 128 D + 256 bytes. Bound by the bytes of keys and values.
// Registers (sm_90a) for D = 192, 128 and 64: attend 240, 246 and 150, attend_one 74, 61 and 48. Checked on an H200, but
// for 192, which has not run on a card; not timed by itself.

struct Attend {
    const elem* q;  // [batch, queries, heads, D]
    const elem* k;  // [batch, keys, kv_heads, D], rows of the batch `k_row` numbers apart
    const elem* v;
    elem* out;      // [batch, queries, heads, D]
    float* sums;    // [batch, heads, queries] log2 of the sum of exponentials, infinite where nothing is seen; or null
    Seen seen;
    u64 k_row, v_row;
};
static_assert(sizeof(Attend) == 104);

template <u32 D>
__device__ __forceinline__ void attend(const Attend& p) {
    // Wider queries in registers, or more keys beside them, would leave none.
    constexpr bool HELD = D <= 128;
    constexpr u32 ROWS = 64, KEYS = HELD ? 64 : 32;
    extern __shared__ uint4 pool[];
    const Seen& s = p.seen;
    const u32 tiles = (s.queries + ROWS - 1) / ROWS, of = blockIdx.x / tiles;
    // The last tiles see the most keys: they begin first.
    const u32 tile = tiles - 1 - blockIdx.x % tiles, row = of / s.heads, head = of % s.heads, kv_head = head / (s.heads / s.kv_heads);
    const u32 lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4 * 2;
    const u32 mine = tile * ROWS + threadIdx.x / WARP * 16 + g;  // and the query 8 further
    const u32 start = s.start(row), length = s.length(row);
    const u64 q_stride = u64(s.heads) * D, k_stride = u64(s.kv_heads) * D;
    const elem* k = p.k + row * p.k_row + kv_head * D;
    const elem* v = p.v + row * p.v_row + kv_head * D;

    u32 q[HELD ? D / 16 : 1][4];
    const Tile<D> queries = {pool + 4 * KEYS * Tile<D>::PIECES};
    if constexpr (HELD) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 query = mine + 8 * i;
            const u32* from = reinterpret_cast<const u32*>(p.q + (u64(row) * s.queries + query) * q_stride + head * D + c);
#pragma unroll
            for (u32 n = 0; n < D / 8; n++) q[n / 2][i + n % 2 * 2] = query < s.queries ? from[n * 4] : 0;
        }
    } else {
        queries.template fetch<ROWS, 128>(p.q + u64(row) * s.queries * q_stride + head * D, tile * ROWS, s.queries, q_stride);
    }

    float out[D / 8][4], peak[2] = {-infinite(), -infinite()}, sum[2] = {0.0f, 0.0f};
    clear(out);
    const u32 last = min(tile * ROWS + ROWS, s.queries) - 1;
    const u32 begin = max(s.first(tile * ROWS), start) / KEYS, end = length > tile * ROWS ? (s.end(last) + KEYS - 1) / KEYS : 0;
    auto stage = [&](u32 j, u32 of) { return Tile<D>{pool + (2 * (j % 2) + of) * KEYS * Tile<D>::PIECES}; };
    auto fetch = [&](u32 j) {
        if (j < end) {
            stage(j, 0).template fetch<KEYS, 128>(k, j * KEYS, s.keys, k_stride);
            stage(j, 1).template fetch<KEYS, 128>(v, j * KEYS, s.keys, k_stride);
        }
        copy_commit();
    };
    fetch(begin);
#pragma unroll 1
    for (u32 j = begin; j < end; j++) {
        fetch(j + 1);
        copy_wait<1>();
        __syncthreads();
        const Tile<D> keys = stage(j, 0);
        float score[KEYS / 8][4];
        if constexpr (HELD) {
            clear(score);
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < D / 32; i++) {
                    u32 b[4];
                    keys.columns(b, n * 8, i);
                    mma(score[n], q[2 * i], {b[0], b[1]});
                    mma(score[n], q[2 * i + 1], {b[2], b[3]});
                }
        } else {
            products<D, KEYS / 8>(score, queries, threadIdx.x / WARP * 16, keys);
        }
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 query = mine + 8 * half, from = max(s.first(query), start), to = s.end(query);
            float high = peak[half];
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    float& v = score[n][half * 2 + i];
                    const u32 key = j * KEYS + n * 8 + c + i;
                    v = key >= from && key < to ? v * s.scale : -infinite();
                    high = fmaxf(high, v);
                }
            high = quad_max(high);
            // Where nothing was seen yet, all exponents are minus infinity.
            const float base = high == -infinite() ? 0.0f : high, factor = exp2_fast(peak[half] - base);
            peak[half] = high;
            float more = 0.0f;
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    float& v = score[n][half * 2 + i];
                    v = exp2_fast(v - base);
                    more += v;
                }
            sum[half] = sum[half] * factor + more;
#pragma unroll
            for (u32 n = 0; n < D / 8; n++) out[n][half * 2] *= factor, out[n][half * 2 + 1] *= factor;
        }
        add_products<D, KEYS / 8>(out, score, stage(j, 1));
        __syncthreads();
    }
    elem* to[2];
    bool there[2];
    float factor[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 query = mine + 8 * half;
        const float all = quad_sum(sum[half]);
        // The sum has one at least, of the peak, where a key is seen, and is no number where scores are none.
        const bool sees = query < length && all != 0.0f;
        there[half] = query < s.queries;
        to[half] = p.out + (u64(row) * s.queries + query) * q_stride + head * D;
        factor[half] = sees ? 1.0f / all : 0.0f;
        if (p.sums && there[half] && c == 0) p.sums[u64(of) * s.queries + query] = sees ? peak[half] + log2f(all) : infinite();
    }
    store_rows<D>(to, there, out, factor);
}

extern "C" __global__ void __launch_bounds__(128) attend_64(const Attend p) { attend<64>(p); }
extern "C" __global__ void __launch_bounds__(128) attend_128(const Attend p) { attend<128>(p); }
extern "C" __global__ void __launch_bounds__(128) attend_192(const Attend p) { attend<192>(p); }

template <u32 D>
__device__ __forceinline__ void attend_one(const Attend& p) {
    constexpr u32 PARTS = D / 64, GROUPS = 32;  // pieces of a lane; groups of 8 lanes in a block, a key each
    __shared__ float outs[GROUPS][D], peaks[GROUPS], sums[GROUPS];
    const Seen& s = p.seen;
    const u32 row = blockIdx.x / s.heads, head = blockIdx.x % s.heads, kv_head = head / (s.heads / s.kv_heads);
    const u32 group = threadIdx.x / 8, part = threadIdx.x % 8;
    const u64 stride = u64(s.kv_heads) * D;
    const elem* k = p.k + row * p.k_row + kv_head * D + part * 8;
    const elem* v = p.v + row * p.v_row + kv_head * D + part * 8;
    const u32 begin = max(s.first(0), s.start(row)), end = s.length(row) ? s.keys : 0;

    float q[PARTS][8] = {}, out[PARTS][8] = {}, peak = -infinite(), sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PARTS; i++)
        add(q[i], s.scale, *reinterpret_cast<const uint4*>(p.q + u64(blockIdx.x) * D + part * 8 + i * 64));
    // As many turns for all lanes of a warp, since they add up together.
#pragma unroll 2
    for (u32 base = begin; base < end; base += GROUPS) {
        const u32 key = base + group;
        float score = 0.0f;
        uint4 value[PARTS];
#pragma unroll
        for (u32 i = 0; i < PARTS; i++) {
            const uint4 none = {0, 0, 0, 0};
            const uint4 of = key < end ? *reinterpret_cast<const uint4*>(k + key * stride + i * 64) : none;
            value[i] = key < end ? *reinterpret_cast<const uint4*>(v + key * stride + i * 64) : none;
            const u32 words[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
            for (u32 w = 0; w < 4; w++) score += q[i][w * 2] * low(words[w]) + q[i][w * 2 + 1] * high(words[w]);
        }
        score += __shfl_xor_sync(0xffffffffu, score, 1);
        score += __shfl_xor_sync(0xffffffffu, score, 2);
        score += __shfl_xor_sync(0xffffffffu, score, 4);
        if (key >= end) score = -infinite();
        const float top = fmaxf(peak, score), at = top == -infinite() ? 0.0f : top;
        const float factor = exp2_fast(peak - at), weight = exp2_fast(score - at);
        peak = top;
        sum = sum * factor + weight;
#pragma unroll
        for (u32 i = 0; i < PARTS; i++) {
#pragma unroll
            for (u32 w = 0; w < 8; w++) out[i][w] *= factor;
            add(out[i], weight, value[i]);
        }
    }
#pragma unroll
    for (u32 i = 0; i < PARTS; i++)
#pragma unroll
        for (u32 w = 0; w < 8; w++) outs[group][i * 64 + part * 8 + w] = out[i][w];
    if (part == 0) peaks[group] = peak, sums[group] = sum;
    __syncthreads();
    if (threadIdx.x >= D / 2) return;
    float top = -infinite(), all = 0.0f, lo = 0.0f, hi = 0.0f;
    for (u32 i = 0; i < GROUPS; i++) top = fmaxf(top, peaks[i]);
    const float at = top == -infinite() ? 0.0f : top;
    for (u32 i = 0; i < GROUPS; i++) {
        const float factor = exp2_fast(peaks[i] - at);
        all += sums[i] * factor;
        lo += outs[i][threadIdx.x * 2] * factor, hi += outs[i][threadIdx.x * 2 + 1] * factor;
    }
    const float factor = all != 0.0f ? 1.0f / all : 0.0f;
    reinterpret_cast<u32*>(p.out + u64(blockIdx.x) * D)[threadIdx.x] = pack(lo * factor, hi * factor);
    if (p.sums && threadIdx.x == 0) p.sums[blockIdx.x] = all != 0.0f ? top + log2f(all) : infinite();
}

extern "C" __global__ void __launch_bounds__(256) attend_one_64(const Attend p) { attend_one<64>(p); }
extern "C" __global__ void __launch_bounds__(256) attend_one_128(const Attend p) { attend_one<128>(p); }
extern "C" __global__ void __launch_bounds__(256) attend_one_192(const Attend p) { attend_one<192>(p); }
