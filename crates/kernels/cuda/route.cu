// Routing of any number of tokens, without the host: choices and gates from the logits of the router,
// rows sorted by position, and the distinct (token, group) pairs. Every table of `Routing` is written.
//
// A counting sort whose bins are the positions, then the groups. Each block has a chunk of tokens:
//   route_choose  chooses, and counts the bins of its chunk         grid [blocks], block [1024]
//   route_scan    per bin: chunks before each chunk, and the total  grid [ceil(bins / 8)], block [256]
//   route_place   places its chunk after those before it            grid [blocks], block [256]
// where bins = positions + groups <= 1024 and blocks = ceil(tokens / chunk). A chunk of
// max(32, ceil(tokens / 1024)) suits: a warp of route_choose then has one token, or few.
// Where choices and gates are given, route_choose only counts them. route_only chooses and does no more: a warp for each
// token, grid [ceil(tokens / 8)], block [256].
// Dynamic shared memory: bins * 4 bytes a block in route_choose, bins * 4 bytes a warp in route_place.
// Scratch: `counts` and `totals`, without initial values.
// Ranks come from warp matches and prefix sums, never from the order of atomics: the same logits give
// the same tables.
//
// Registers: choose 64, scan 20, place 32, only 64. Bound by latency, not by the
// tokens * (4 * experts + 44 * top_k) bytes that move. Last measured: H100, OLMoE-1B-7B, 4096 tokens: 9, 5 and 8 us.

struct Route {
    const float* logits;  // [tokens, experts]; not read where choices are given
    const u32* chosen;    // [tokens, top_k] positions that are given, or null
    const float* gates;   // [tokens, top_k] their gates
    Scores scores;
    const u32* group_of;  // [positions] group of each position, NONE: no base; null if groups is 0
    Routing out;
    u32* counts;          // [bins, blocks]
    u32* totals;          // [bins]
    u32 tokens, positions, groups;
    u32 chunk;            // tokens of a block
    u32 blocks;
};
static_assert(sizeof(Route) == 200);

extern __shared__ u32 memory[];

__device__ __forceinline__ u32 group_at(const Route& p, u32 position) { return p.groups ? p.group_of[position] : NONE; }

// Sum over the lanes up to and with this one.
__device__ __forceinline__ u32 inclusive_scan(u32 v, u32 lane) {
#pragma unroll
    for (u32 i = 1; i < WARP; i *= 2) {
        const u32 before = __shfl_up_sync(0xffffffffu, v, i);
        if (lane >= i) v += before;
    }
    return v;
}

// Choices of whole tokens, one a lane: as many tokens as a warp has room for.
struct Step {
    u32 choice, position, group;
    bool live;
    bool first;         // the first choice of its token in its group
    u32 opener;         // the lane that is this first choice
    u32 with_position;  // lanes of the same position
    u32 with_group;     // lanes that are first choices in the same group
};

__device__ __forceinline__ Step step_at(const Route& p, u32 token, u32 end, u32 lane) {
    const u32 top_k = p.scores.top_k;
    Step s;
    const u32 local = lane / top_k;
    s.live = local < WARP / top_k && token + local < end;
    s.choice = token * top_k + lane;
    s.position = s.live ? p.out.chosen[s.choice] : NONE;
    s.group = s.live ? group_at(p, s.position) : NONE;
    s.with_position = __match_any_sync(0xffffffffu, s.position);
    const u32 pair = __match_any_sync(0xffffffffu, s.group == NONE ? NONE : local << 16 | s.group);
    s.opener = __ffs(pair) - 1;
    s.first = s.group != NONE && s.opener == lane;
    s.with_group = __match_any_sync(0xffffffffu, s.group) & __ballot_sync(0xffffffffu, s.first);
    return s;
}

// Adds the choices of a step to the bins of its warp.
__device__ __forceinline__ void advance(const Route& p, const Step& s, u32* bins, u32 lane) {
    if (s.live && u32(__ffs(s.with_position)) == lane + 1) bins[s.position] += __popc(s.with_position);
    if (s.first && u32(__ffs(s.with_group)) == lane + 1) bins[p.positions + s.group] += __popc(s.with_group);
    __syncwarp();
}

// Places the tokens `begin .. end` of this block.
__device__ __forceinline__ void place(const Route& p, u32 begin, u32 end) {
    __shared__ u32 sums[WARP];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const u32 bins = p.positions + p.groups, rows = p.tokens * p.scores.top_k;
    const u32 stride = WARP / p.scores.top_k;

    for (u32 i = threadIdx.x; i < bins * warps; i += blockDim.x) memory[i] = 0;
    __syncthreads();
    u32* mine = memory + warp * bins;
    const u32 share = (end - begin + warps - 1) / warps;
    const u32 from = min(begin + warp * share, end), to = min(from + share, end);
    for (u32 token = from; token < to; token += stride) advance(p, step_at(p, token, to, lane), mine, lane);
    __syncthreads();

    // From counts of warps to the first row (or pair) of each warp in each bin. Positions hold all
    // rows, so that the scan has come to `rows` where the groups begin.
    u32 carry = 0;
    for (u32 base = 0; base < bins; base += blockDim.x) {
        const u32 bin = base + threadIdx.x;
        const u32 total = bin < bins ? p.totals[bin] : 0;
        u32 start = inclusive_scan(total, lane);
        if (lane == WARP - 1) sums[warp] = start;
        __syncthreads();
        u32 before = carry;
        for (u32 w = 0; w < warps; w++) {
            if (w < warp) before += sums[w];
            carry += sums[w];
        }
        __syncthreads();
        start += before - total;
        if (bin >= bins) continue;
        const bool is_group = bin >= p.positions;
        if (is_group) start -= rows;
        if (blockIdx.x == 0) *(is_group ? p.out.pair_starts + (bin - p.positions) : p.out.starts + bin) = start;
        u32 next = start + p.counts[bin * p.blocks + blockIdx.x];
        for (u32 w = 0; w < warps; w++) {
            const u32 count = memory[w * bins + bin];
            memory[w * bins + bin] = next;
            next += count;
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        p.out.starts[p.positions] = rows;
        p.out.pair_starts[p.groups] = carry - rows;
    }
    __syncthreads();

    const u32 below = (1u << lane) - 1;
    for (u32 token = from; token < to; token += stride) {
        const Step s = step_at(p, token, to, lane);
        u32 pair = NONE;
        if (s.first) pair = mine[p.positions + s.group] + __popc(s.with_group & below);
        const u32 of_token = __shfl_sync(0xffffffffu, pair, s.opener);
        if (s.live) {
            const u32 row = mine[s.position] + __popc(s.with_position & below);
            const u32 of = s.choice / p.scores.top_k;
            p.out.row_of[s.choice] = row;
            p.out.row_tokens[row] = of;
            p.out.row_gates[row] = p.out.gates[s.choice];
            p.out.pair_of_row[row] = s.group == NONE ? NONE : of_token;
            p.out.pair_of[s.choice] = pair;
            if (s.first) p.out.pair_tokens[pair] = of;
        }
        __syncwarp();
        advance(p, s, mine, lane);
    }
}

__device__ __forceinline__ void choose_token(const Route& p, u32 token) {
    const u32 at = token * p.scores.top_k, lane = threadIdx.x % WARP;
    if (p.chosen) {
        // Those that do not exist would be written to where they do not exist.
        if (lane < p.scores.top_k) p.out.chosen[at + lane] = min(p.chosen[at + lane], p.positions - 1), p.out.gates[at + lane] = p.gates[at + lane];
        return;
    }
    choose(p.scores, p.logits + u64(token) * p.scores.experts, p.out.chosen + at, p.out.gates + at);
}

extern "C" __global__ void __launch_bounds__(1024) route_choose(Route p) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const u32 bins = p.positions + p.groups;
    for (u32 i = threadIdx.x; i < bins; i += blockDim.x) memory[i] = 0;
    __syncthreads();
    const u32 begin = blockIdx.x * p.chunk, end = min(begin + p.chunk, p.tokens);
    for (u32 token = begin + warp; token < end; token += warps) {
        choose_token(p, token);
        __syncwarp();
        const bool live = lane < p.scores.top_k;
        const u32 position = live ? p.out.chosen[token * p.scores.top_k + lane] : NONE;
        const u32 group = live ? group_at(p, position) : NONE;
        const u32 same = __match_any_sync(0xffffffffu, group);
        // Sums of integers do not depend on their order.
        if (live) atomicAdd(memory + position, 1u);
        if (group != NONE && u32(__ffs(same)) == lane + 1) atomicAdd(memory + p.positions + group, 1u);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < bins; i += blockDim.x) p.counts[i * p.blocks + blockIdx.x] = memory[i];
}

// A warp per bin.
extern "C" __global__ void __launch_bounds__(256) route_scan(Route p) {
    const u32 lane = threadIdx.x % WARP;
    const u32 bin = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (bin >= p.positions + p.groups) return;
    u32* counts = p.counts + bin * p.blocks;
    u32 before = 0;
    for (u32 base = 0; base < p.blocks; base += WARP) {
        const bool there = base + lane < p.blocks;
        const u32 count = there ? counts[base + lane] : 0;
        const u32 sum = inclusive_scan(count, lane);
        if (there) counts[base + lane] = before + sum - count;
        before += __shfl_sync(0xffffffffu, sum, WARP - 1);
    }
    if (lane == 0) p.totals[bin] = before;
}

extern "C" __global__ void __launch_bounds__(256) route_place(Route p) {
    const u32 begin = blockIdx.x * p.chunk;
    place(p, begin, min(begin + p.chunk, p.tokens));
}

struct RouteOnly {
    const float* logits;  // [tokens, experts]
    Scores scores;
    u32* chosen;          // [tokens, top_k] positions, best first
    float* gates;         // [tokens, top_k]
    u32 tokens;
};
static_assert(sizeof(RouteOnly) == 80);

extern "C" __global__ void __launch_bounds__(256) route_only(RouteOnly p) {
    const u32 token = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (token >= p.tokens) return;
    const u32 at = token * p.scores.top_k;
    choose(p.scores, p.logits + u64(token) * p.scores.experts, p.chosen + at, p.gates + at);
}
