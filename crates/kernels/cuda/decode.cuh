// What decode_route.cu and decode_experts.cu share: a whole Mixture-of-Experts block for up to 32 tokens in
// three launches, without the host in between. Compiled behind common.cuh and choose.cuh, in front of both.
//   h[s] = g_s silu(G x) * (U x)   G, U: Wg, Wu of a dense position; B + U_p V_p of an adapted one (B = 0 without a base)
//   out[t] = sum of Wd h_s over its dense rows + sum over its groups of Bd (sum of h_s) + sum of Ud Vd h_s
// decode_route    logits, choice, Routing, low = V x   multiprocessors * 1 blocks of 512 threads, 124 registers
// decode_gate_up  h of all rows, hsum of all pairs     multiprocessors * 2 blocks of 256 threads, 95 registers
// decode_down     lowd = Vd h, then out                multiprocessors * 1 blocks of 512 threads, 101 registers
// They run in this order, each once: they clear the barriers of each other. Blocks of decode_route,
// and of decode_down, wait for each other: all must be on the device at once, so nothing else that waits like
// this may run beside them. The grids may be smaller, down to one block.
// Dynamic shared memory in bytes, with C = tokens rounded up to a multiple of 8:
//   decode_route and decode_down 32768 SLOTS + 1280 C;
//   decode_gate_up 16384 SLOTS + 5120 + 80 max(8 C, tokens * top_k if any position is adapted).
// Static: 19.1, 5.1 and 15.1 KiB. Bound by the bytes of the weights hit, each read once: a warp has 16 rows of
// weights as one factor of `mma`, up to 32 tokens as the other, and SLOTS pieces of 2 KiB under way (96 KiB a
// multiprocessor) across all that it does. Inputs come from the first and second caches. Asking for the
// next kernel's first weights while the memory idles was tried, and cost up to 6 us.
// Last measured: H100, OLMoE-1B-7B, 32 tokens: decode_route 19 us, decode_gate_up 88 % of the copy rate, decode_down 83 %.

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
    elem* h;                // [S, inner], times the gates
    elem* hsum;             // [tokens * min(top_k, groups), inner]
    elem* lowd;             // [S, rank]
    elem* out;              // [tokens, hidden]
    u32* barrier;           // [2] blocks that arrived in decode_route, in decode_down; zero before the first launch
    Routing routing;
    Scores scores;
    u32 tokens, hidden, inner, rank, positions, dense, groups;
};
static_assert(sizeof(Decode) == 336);

typedef unsigned short u16;
constexpr u16 NO_GROUP = 0xffff;
constexpr u32 MAX_TOKENS = 32, MAX_ROWS = 512, MAX_POSITIONS = 512, SPLITS = 4;
constexpr u32 TILE = 16;                        // rows of weights that a warp multiplies at a time
constexpr u32 PIECE = 64;                       // how much of their sums: a line of memory for each row
constexpr u32 SLOTS = 3;                        // pieces that each warp has under way
constexpr u32 RING = SLOTS * TILE * PIECE * 2;  // bytes of shared memory for them
constexpr u32 LINE = 20;                        // floats between columns in shared memory: 16, and 4 for the banks of a store

__device__ __forceinline__ u32 pieces(u32 length) { return (length + PIECE - 1) / PIECE; }

// A barrier of all blocks in two halves, so that work fits in between. A kernel that runs before or after
// clears the count: decode_gate_up that of decode_route, decode_route that of decode_down.
__device__ __forceinline__ void arrive(u32* count) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(count, 1);
    }
}

__device__ __forceinline__ void await(u32* count) {
    if (threadIdx.x == 0) {
        while (*static_cast<volatile u32*>(count) < gridDim.x) __nanosleep(20);
        __threadfence();
    }
    __syncthreads();
}

// Where each lane finds its column of each block of 8: row(i) is the input row of column i, NONE past the last.
template <typename Row>
__device__ __forceinline__ void columns_at(u32 (&at)[4], u32 columns, u32 stride, Row row) {
#pragma unroll
    for (u32 b = 0; b < 4; b++) {
        const u32 column = b * 8 + threadIdx.x % WARP / 4;
        at[b] = column < columns ? row(column) * stride : NONE;
    }
}

// Up to 16 rows of weights, of `left` elements from `at` on.
struct Piece {
    const elem* at;
    u32 stride, rows, left;
};

// A warp's weights on their way through shared memory. next(piece) gives the pieces in the order in which
// they are multiplied, across all that the warp does: nothing drains in between. Each lane copies what it
// reads itself, so nothing waits for other lanes either.
// A lane's 8 neighbours in memory stand for k = c..c+1, c+8.. of two steps of `mma`, in the weights as in
// the inputs: the sum does not care.
template <typename Next>
struct Ring {
    uint4* slots;
    u32 slot = 0;
    Next& next;

    __device__ __forceinline__ Ring(void* pool, Next& next) : next(next) {
        slots = static_cast<uint4*>(pool) + threadIdx.x / WARP * (RING / 16) + threadIdx.x % WARP;
#pragma unroll 1
        for (u32 i = 0; i < SLOTS; i++) fetch(slots + i * (4 * WARP));
    }

    __device__ __forceinline__ void fetch(uint4* to) {
        const u32 row = threadIdx.x % WARP / 4, c = threadIdx.x % 4 * 8;
        Piece p;
        if (next(p)) {
            const elem* from = p.at + row * p.stride + c;
#pragma unroll
            for (u32 i = 0; i < 4; i++)
                copy_async(to + i * WARP, from + i / 2 * 8 * p.stride + i % 2 * 32, row + i / 2 * 8 < p.rows && c + i % 2 * 32 < p.left);
        }
        copy_commit();
    }

    // d += next piece · x, up to 8 * blocks columns; x: at this piece's start.
    __device__ __forceinline__ void multiply(float (&d)[4][4], const elem* x, const u32 (&column)[4], u32 blocks, u32 left) {
        const u32 c = threadIdx.x % 4 * 8;
        uint4 in[4][2];
#pragma unroll
        for (u32 b = 0; b < 4; b++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                in[b][i] = uint4{0, 0, 0, 0};
                if (column[b] != NONE && c + i * 32 < left) in[b][i] = *reinterpret_cast<const uint4*>(x + column[b] + c + i * 32);
            }
        // Keeps these loads above the wait for the weights, which the compiler moves up otherwise.
        __syncwarp();
        copy_wait<SLOTS - 1>();
        uint4* from = slots + slot * (4 * WARP);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const uint4 p = from[i * WARP], q = from[(i + 2) * WARP];
#pragma unroll
            for (u32 b = 0; b < 4; b++) {
                if (b >= blocks) break;
                mma(d[b], {p.x, q.x, p.y, q.y}, {in[b][i].x, in[b][i].y});
                mma(d[b], {p.z, q.z, p.w, q.w}, {in[b][i].z, in[b][i].w});
            }
        }
        // The products above have read the slot.
        fetch(from);
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
    }
};

__device__ __forceinline__ void clear(float (&d)[4][4]) {
#pragma unroll
    for (u32 b = 0; b < 4; b++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) d[b][i] = 0.0f;
}

// Calls of(column, row, value) for every value of d[4 blocks] that this lane holds of `columns` columns.
template <typename Of>
__device__ __forceinline__ void each_value(float (&d)[4][4], u32 columns, Of of) {
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

// Adds up what the warps of a block hold, in the order of the warps, and calls finish(column, row, sums)
// for every pair of rows: M sums of WARPS / M neighbouring warps each. `sums`: WARPS * columns * LINE
// floats. The barrier at the start lets the last readers finish.
template <u32 M, u32 WARPS, typename Finish>
__device__ __forceinline__ void add_up(float* sums, float (&d)[4][4], u32 columns, Finish finish) {
    __syncthreads();
    float* mine = sums + threadIdx.x / WARP * columns * LINE;
    each_value(d, columns, [&](u32 column, u32 row, float v) { mine[column * LINE + row] = v; });
    __syncthreads();
    for (u32 i = threadIdx.x; i < columns * 8; i += WARPS * WARP) {
        float2 v[M] = {};
#pragma unroll
        for (u32 warp = 0; warp < WARPS; warp++) {
            const float2 part = *reinterpret_cast<const float2*>(sums + (warp * columns + i / 8) * LINE + i % 8 * 2);
            v[warp / (WARPS / M)].x += part.x, v[warp / (WARPS / M)].y += part.y;
        }
        finish(i / 8, i % 8 * 2, v);
    }
}

// The positions that have rows, and the units of work they form: one dense position, or all positions of
// a group (those without one are the last unit).
struct Survey {
    u16 starts[MAX_POSITIONS + 1];
    u16 hits[MAX_POSITIONS];      // positions with rows, ascending
    u16 unit[MAX_POSITIONS + 1];  // first hit of each unit, and the end
    u16 group[MAX_POSITIONS];     // of each position, or NO_GROUP
    u16 matrix[MAX_POSITIONS];    // dense position or group of each unit
    u32 count, dense, units;      // hits, dense ones among them, units
    u32 products;                 // units that have matrices of their own: all but that without a group
};

// One warp looks at `starts` and `group`; the whole block calls this and then sees the result.
__device__ __forceinline__ void survey_hits(Survey& s, u32 positions, u32 dense) {
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
            bool first = false;
            u32 matrix = NO_GROUP;
            if (hit < count) {
                const u32 p = s.hits[hit];
                matrix = hit < kept ? p : s.group[p];
                first = hit <= kept || matrix != s.group[s.hits[hit - 1]];
            }
            const u32 mask = __ballot_sync(0xffffffffu, first), at = units + __popc(mask & before);
            if (first) s.unit[at] = hit, s.matrix[at] = matrix;
            units += __popc(mask);
            products += __popc(__ballot_sync(0xffffffffu, first && matrix != NO_GROUP));
        }
        if (lane == 0) s.unit[units] = count, s.count = count, s.dense = kept, s.units = units, s.products = products;
    }
    __syncthreads();
}

__device__ __forceinline__ void survey_tables(Survey& s, const Decode& p) {
    for (u32 i = threadIdx.x; i < p.positions; i += blockDim.x) {
        const u32 end = p.routing.starts[i + 1], group = p.group_of[i];
        s.starts[i + 1] = end, s.group[i] = group;
    }
    if (threadIdx.x == 0) s.starts[0] = 0;
    survey_hits(s, p.positions, p.dense);
}

// An item of decode_gate_up: 16 inner columns of a unit. From the last unit to the first: the groups have
// more to do.
struct Item {
    u32 inner, rows;     // first column, and how many
    u32 hit, hit_end;    // hits of the unit
    bool dense, product; // whether it is a dense position; whether it has matrices of its own
    u64 at;              // where in these the item's rows begin

    __device__ __forceinline__ Item(const Survey& s, const Decode& p, u32 item) {
        const u32 tiles = (p.inner + TILE - 1) / TILE, unit = s.units - 1 - item / tiles;
        inner = item % tiles * TILE, rows = min(p.inner - inner, TILE);
        hit = s.unit[unit], hit_end = s.unit[unit + 1];
        dense = unit < s.dense, product = unit < s.products;
        at = (u64(s.matrix[unit]) * p.inner + inner) * p.hidden;
    }
    __device__ __forceinline__ const elem* gate(const Decode& p) const { return (dense ? p.gate : p.base_gate) + at; }
    __device__ __forceinline__ const elem* up(const Decode& p) const { return (dense ? p.up : p.base_up) + at; }
};
