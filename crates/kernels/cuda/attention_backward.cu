// Causal attention, backward: the shares of keys are computed again, from the sums that the forward pass left.
// Every gradient is written once, by one block, so nothing depends on chance.
//   attend_delta      delta = out · dout of each query and head. One warp each; 4 warps a block.
//   attend_keys_D     dk and dv of 64 keys. Grid: ceil(keys / 64) * kv_heads * batch blocks of 128 threads; the
//                     queries of all heads of the group pass by in tiles of 32. Dynamic shared memory: 512 D + 512 bytes.
//                     For D = 192 a block has one of the two, so that its sums stay in registers: twice as many blocks.
//   attend_queries_D  dq of 64 queries. Grid: ceil(queries / 64) * heads * batch blocks of 128 threads; keys and
//                     values pass by in tiles of 32. Dynamic shared memory: 512 D bytes.
// Registers (sm_90a) for D = 192, 128 and 64: attend_keys 211, 244 and 168, attend_queries 224, 163 and 138; attend_delta
// 31. Checked on an H200, but for 192, which has not run on a card; not timed by itself.

struct AttendBackward {
    const elem* q;      // [batch, queries, heads, D]
    const elem* k;      // [batch, keys, kv_heads, D]
    const elem* v;
    const elem* out;    // as q
    const elem* dout;
    const float* sums;  // [batch, heads, queries], as `attend` left them
    float* delta;       // [batch, heads, queries]
    elem* dq;
    elem* dk;
    elem* dv;
    Seen seen;
    float scale;        // of scores
    u32 width;          // D
};
static_assert(sizeof(AttendBackward) == 136);

extern "C" __global__ void __launch_bounds__(128) attend_delta(const AttendBackward p) {
    const Seen& s = p.seen;
    const u32 lane = threadIdx.x % WARP, all = s.batch * s.queries * s.heads;
    const u32 of = blockIdx.x * 4 + threadIdx.x / WARP;
    if (of >= all) return;
    const u32 head = of % s.heads, query = of / s.heads % s.queries, row = of / s.heads / s.queries;
    float sum = 0.0f;
    for (u32 i = lane; i < p.width / 2; i += WARP) {
        const u32 a = reinterpret_cast<const u32*>(p.out + u64(of) * p.width)[i], b = reinterpret_cast<const u32*>(p.dout + u64(of) * p.width)[i];
        sum += low(a) * low(b) + high(a) * high(b);
    }
    sum = warp_sum(sum);
    if (lane == 0) p.delta[(u64(row) * s.heads + head) * s.queries + query] = sum;
}

// Both gradients, or that of the keys alone or of the values alone.
enum Which { BOTH, OF_KEYS, OF_VALUES };

template <u32 D, Which WHICH>
__device__ __forceinline__ void attend_keys(const AttendBackward& p, u32 block) {
    constexpr u32 ROWS = 64, QUERIES = 32, PIECES = Tile<D>::PIECES;
    constexpr bool OF_K = WHICH != OF_VALUES, OF_V = WHICH != OF_KEYS;
    extern __shared__ uint4 pool[];
    const Seen& s = p.seen;
    const u32 tiles = (s.keys + ROWS - 1) / ROWS, of = block / tiles;
    const u32 tile = block % tiles, row = of / s.kv_heads, kv_head = of % s.kv_heads, each = s.heads / s.kv_heads;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4 * 2;
    const u32 mine = tile * ROWS + warp * 16 + g;  // and the key 8 further
    const u32 start = s.start(row), length = s.length(row), before = s.keys - s.queries;
    const u64 q_stride = u64(s.heads) * D, k_stride = u64(s.kv_heads) * D;
    const Tile<D> keys = {pool}, values = {pool + ROWS * PIECES};
    auto stage = [&](u32 i, u32 of) { return Tile<D>{pool + 2 * ROWS * PIECES + (2 * (i % 2) + of) * QUERIES * PIECES}; };
    float* numbers = reinterpret_cast<float*>(pool + 2 * ROWS * PIECES + 4 * QUERIES * PIECES);  // [2][2][QUERIES]
    keys.template fetch<ROWS, 128>(p.k + row * s.keys * k_stride + kv_head * D, tile * ROWS, s.keys, k_stride);
    values.template fetch<ROWS, 128>(p.v + row * s.keys * k_stride + kv_head * D, tile * ROWS, s.keys, k_stride);

    // The queries that see a key of the tile.
    const u32 first_key = tile * ROWS, last_key = min(first_key + ROWS, s.keys) - 1;
    const u32 begin = (first_key > before ? first_key - before : 0) / QUERIES;
    const u32 reach = u32(min(u64(s.queries), u64(last_key) + s.window > before ? u64(last_key) + s.window - before : 0ull));
    const u32 end = last_key < start ? 0 : (min(reach, length) + QUERIES - 1) / QUERIES;
    const u32 span = end > begin ? end - begin : 0;
    auto query_of = [&](u32 i) { return (begin + i % span) * QUERIES; };
    auto fetch = [&](u32 i) {
        if (i < each * span) {
            const u32 head = kv_head * each + i / span, first = query_of(i);
            const u64 from = row * s.queries * q_stride + head * D;
            stage(i, 0).template fetch<QUERIES, 128>(p.q + from, first, s.queries, q_stride);
            stage(i, 1).template fetch<QUERIES, 128>(p.dout + from, first, s.queries, q_stride);
            if (threadIdx.x < 2 * QUERIES) {
                const u32 query = first + threadIdx.x % QUERIES;
                const u64 at = (u64(row) * s.heads + head) * s.queries + query;
                const bool there = query < s.queries;
                numbers[(i % 2) * 2 * QUERIES + threadIdx.x] = threadIdx.x < QUERIES ? (there ? p.sums[at] : infinite()) : (there ? p.delta[at] : 0.0f);
            }
        }
        copy_commit();
    };
    float dk[OF_K ? D / 8 : 1][4], dv[OF_V ? D / 8 : 1][4];
    clear(dk);
    clear(dv);
    fetch(0);
#pragma unroll 1
    for (u32 i = 0; i < each * span; i++) {
        fetch(i + 1);
        copy_wait<1>();
        __syncthreads();
        const Tile<D> queries = stage(i, 0), douts = stage(i, 1);
        const float *sums = numbers + (i % 2) * 2 * QUERIES, *delta = sums + QUERIES;
        float share[QUERIES / 8][4], d[QUERIES / 8][4];
        products<D, QUERIES / 8>(share, keys, warp * 16, queries);
        const u32 first = query_of(i);
#pragma unroll
        for (u32 n = 0; n < QUERIES / 8; n++)
#pragma unroll
            for (u32 m = 0; m < 4; m++) {
                const u32 at = n * 8 + c + m % 2, key = mine + m / 2 * 8;
                const bool sees = key >= max(s.first(first + at), start) && key < s.end(first + at);
                share[n][m] = sees ? exp2_fast(share[n][m] * s.scale - sums[at]) : 0.0f;
            }
        if constexpr (OF_V) add_products<D, QUERIES / 8>(dv, share, douts);
        if constexpr (OF_K) {
            products<D, QUERIES / 8>(d, values, warp * 16, douts);
#pragma unroll
            for (u32 n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (u32 m = 0; m < 4; m++) d[n][m] = share[n][m] * (d[n][m] - delta[n * 8 + c + m % 2]);
            add_products<D, QUERIES / 8>(dk, d, queries);
        }
        __syncthreads();
    }
    copy_wait<0>();
    bool there[2];
    elem *to_k[2], *to_v[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 key = mine + 8 * half;
        const u64 at = (row * u64(s.keys) + key) * k_stride + kv_head * D;
        there[half] = key < s.keys;
        to_k[half] = p.dk + at, to_v[half] = p.dv + at;
    }
    if constexpr (OF_K) store_rows<D>(to_k, there, dk, {p.scale, p.scale});
    if constexpr (OF_V) store_rows<D>(to_v, there, dv, {1.0f, 1.0f});
}

extern "C" __global__ void __launch_bounds__(128) attend_keys_64(const AttendBackward p) { attend_keys<64, BOTH>(p, blockIdx.x); }
extern "C" __global__ void __launch_bounds__(128) attend_keys_128(const AttendBackward p) { attend_keys<128, BOTH>(p, blockIdx.x); }
extern "C" __global__ void __launch_bounds__(128) attend_keys_192(const AttendBackward p) {
    if (blockIdx.x % 2) attend_keys<192, OF_VALUES>(p, blockIdx.x / 2);
    else attend_keys<192, OF_KEYS>(p, blockIdx.x / 2);
}

template <u32 D>
__device__ __forceinline__ void attend_queries(const AttendBackward& p) {
    constexpr u32 ROWS = 64, KEYS = 32, PIECES = Tile<D>::PIECES;
    extern __shared__ uint4 pool[];
    const Seen& s = p.seen;
    const u32 tiles = (s.queries + ROWS - 1) / ROWS, of = blockIdx.x / tiles;
    const u32 tile = tiles - 1 - blockIdx.x % tiles, row = of / s.heads, head = of % s.heads, kv_head = head / (s.heads / s.kv_heads);
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4 * 2;
    const u32 mine = tile * ROWS + warp * 16 + g;
    const u32 start = s.start(row), length = s.length(row);
    const u64 q_stride = u64(s.heads) * D, k_stride = u64(s.kv_heads) * D;
    const Tile<D> queries = {pool}, douts = {pool + ROWS * PIECES};
    auto stage = [&](u32 j, u32 of) { return Tile<D>{pool + 2 * ROWS * PIECES + (2 * (j % 2) + of) * KEYS * PIECES}; };
    const u64 from = row * s.queries * q_stride + head * D, of_keys = row * s.keys * k_stride + kv_head * D;
    queries.template fetch<ROWS, 128>(p.q + from, tile * ROWS, s.queries, q_stride);
    douts.template fetch<ROWS, 128>(p.dout + from, tile * ROWS, s.queries, q_stride);

    float sums[2], delta[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 query = mine + 8 * half;
        const bool there = query < s.queries;
        sums[half] = there ? p.sums[u64(of) * s.queries + query] : infinite();
        delta[half] = there ? p.delta[u64(of) * s.queries + query] : 0.0f;
    }
    const u32 last = min(tile * ROWS + ROWS, s.queries) - 1;
    const u32 begin = max(s.first(tile * ROWS), start) / KEYS, end = length > tile * ROWS ? (s.end(last) + KEYS - 1) / KEYS : 0;
    auto fetch = [&](u32 j) {
        if (j < end) {
            stage(j, 0).template fetch<KEYS, 128>(p.k + of_keys, j * KEYS, s.keys, k_stride);
            stage(j, 1).template fetch<KEYS, 128>(p.v + of_keys, j * KEYS, s.keys, k_stride);
        }
        copy_commit();
    };
    float dq[D / 8][4];
    clear(dq);
    fetch(begin);
#pragma unroll 1
    for (u32 j = begin; j < end; j++) {
        fetch(j + 1);
        copy_wait<1>();
        __syncthreads();
        const Tile<D> keys = stage(j, 0), values = stage(j, 1);
        float share[KEYS / 8][4], d[KEYS / 8][4];
        products<D, KEYS / 8>(share, queries, warp * 16, keys);
        products<D, KEYS / 8>(d, douts, warp * 16, values);
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (u32 m = 0; m < 4; m++) {
                const u32 half = m / 2, query = mine + 8 * half, key = j * KEYS + n * 8 + c + m % 2;
                const bool sees = key >= max(s.first(query), start) && key < s.end(query);
                const float weight = sees ? exp2_fast(share[n][m] * s.scale - sums[half]) : 0.0f;
                d[n][m] = weight * (d[n][m] - delta[half]);
            }
        add_products<D, KEYS / 8>(dq, d, keys);
        __syncthreads();
    }
    copy_wait<0>();
    elem* to[2];
    bool there[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 query = mine + 8 * half;
        there[half] = query < s.queries;
        to[half] = p.dq + from + query * q_stride;
    }
    store_rows<D>(to, there, dq, {p.scale, p.scale});
}

extern "C" __global__ void __launch_bounds__(128) attend_queries_64(const AttendBackward p) { attend_queries<64>(p); }
extern "C" __global__ void __launch_bounds__(128) attend_queries_128(const AttendBackward p) { attend_queries<128>(p); }
extern "C" __global__ void __launch_bounds__(128) attend_queries_192(const AttendBackward p) { attend_queries<192>(p); }
