// The choice of experts for one token by one warp: scores, limited groups, the `top_k` best, gates.
// Compiled between common.cuh and the kernels that route.

constexpr u32 MAX_EXPERTS = 512;

// How a family turns logits into choices. The host makes sure that top_k <= 16, that at least `top_k`
// of the experts are present, and that there are at most 32 expert groups.
struct Scores {
    const float* bias;      // [experts], added to the scores that choose, not to the gates; or null
    const u32* position;    // [experts] position of each expert; NONE: the router has no row for it
    u32 experts, top_k;
    u32 sigmoid;            // logistic of each logit, instead of the softmax of all
    u32 expert_groups;      // 0, or the number of equal groups of neighbours that limit the choice
    u32 groups_kept;        // experts of this many groups can be chosen
    u32 two_best;           // a group counts the sum of its two best scores, instead of the best
    u32 renormalize;        // gates are divided by their sum
    float scaling;          // factor of the gates
};
static_assert(sizeof(Scores) == 48);

// Scores as integers that sort like them. NaN is below minus infinity, and above what groups exclude: else an expert of
// another group would take its place.
constexpr u32 ABSENT_KEY = 0;
constexpr u32 EXCLUDED_KEY = 1;
constexpr u32 NAN_KEY = 2;
constexpr u32 LOWEST_KEY = 0x007fffffu;  // minus infinity

__device__ __forceinline__ u32 sort_key(float v) {
    if (v != v) return NAN_KEY;
    // Both zeros are equal.
    u32 bits = v == 0.0f ? 0 : __float_as_uint(v);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_value(u32 key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// What an expert adds to the score of its group: minus infinity for NaN. One that is absent counts as very bad.
__device__ __forceinline__ float in_group(u32 key) {
    return key == ABSENT_KEY ? -1e30f : key_value(max(key, LOWEST_KEY));
}

// The groups that can be chosen from, as bits. Expert `i * WARP + lane` has `keys[i]`.
template <u32 N>
__device__ __forceinline__ u32 keep_groups(const Scores& s, const u32 (&keys)[N], u32 lane) {
    const u32 size = s.experts / s.expert_groups;
    u32 rank = ABSENT_KEY;  // lane g: that of group g
    for (u32 g = 0; g < s.expert_groups; g++) {
        u32 best = ABSENT_KEY, next = ABSENT_KEY;
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            const u32 expert = i * WARP + lane;
            if (expert < g * size || expert >= (g + 1) * size) continue;
            next = max(next, min(best, keys[i]));
            best = max(best, keys[i]);
        }
        const u32 first = __reduce_max_sync(0xffffffffu, best);
        float score = in_group(first);
        if (s.two_best && size > 1) {
            const u32 owner = __ffs(__ballot_sync(0xffffffffu, best == first)) - 1;
            score += in_group(__reduce_max_sync(0xffffffffu, lane == owner ? next : best));
        }
        if (lane == g) rank = sort_key(score);
    }
    u32 kept = 0;
    for (u32 i = 0; i < s.groups_kept; i++) {
        const u32 best = __reduce_max_sync(0xffffffffu, rank);
        const u32 group = __ffs(__ballot_sync(0xffffffffu, rank == best)) - 1;
        kept |= 1u << group;
        if (lane == group) rank = ABSENT_KEY;
    }
    return kept;
}

template <u32 N>
__device__ __forceinline__ void choose_of(const Scores& s, const float* logits, u32* chosen, float* gates) {
    const u32 lane = threadIdx.x % WARP;
    u32 keys[N];
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        const u32 expert = i * WARP + lane;
        const bool there = expert < s.experts && s.position[expert] != NONE;
        keys[i] = there ? sort_key(logits[expert]) : ABSENT_KEY;
    }

    // The softmax is exp(logit - peak) / total.
    float peak = 0.0f, total = 1.0f;
    if (!s.sigmoid) {
        u32 top = keys[0];
#pragma unroll
        for (u32 i = 1; i < N; i++) top = max(top, keys[i]);
        peak = key_value(__reduce_max_sync(0xffffffffu, top));
        total = 0.0f;
#pragma unroll
        for (u32 i = 0; i < N; i++)
            if (keys[i] != ABSENT_KEY) total += expf(logits[i * WARP + lane] - peak);
        total = warp_sum(total);
    }
    auto probability = [&](u32 expert) {
        const float logit = logits[expert];
        return s.sigmoid ? __fdividef(1.0f, 1.0f + expf(-logit)) : __fdividef(expf(logit - peak), total);
    };

    // The softmax keeps the order of the logits, and rounds: without a bias the logits choose.
    if (s.sigmoid || s.bias) {
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            const u32 expert = i * WARP + lane;
            if (keys[i] != ABSENT_KEY) keys[i] = sort_key(probability(expert) + (s.bias ? s.bias[expert] : 0.0f));
        }
    }
    if (s.expert_groups) {
        const u32 kept = keep_groups(s, keys, lane);
        const u32 size = s.experts / s.expert_groups;
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            const u32 group = (i * WARP + lane) / size;
            if (keys[i] != ABSENT_KEY && !(kept >> group & 1)) keys[i] = EXCLUDED_KEY;
        }
    }

    u32 mine = 0;  // lane j: the expert of choice j
    for (u32 j = 0; j < s.top_k; j++) {
        u32 best = keys[0], at = 0;
#pragma unroll
        for (u32 i = 1; i < N; i++)
            if (keys[i] > best) best = keys[i], at = i;
        const u32 first = __reduce_max_sync(0xffffffffu, best);
        const u32 expert = __reduce_min_sync(0xffffffffu, best == first ? at * WARP + lane : NONE);
#pragma unroll
        for (u32 i = 0; i < N; i++)
            if (i * WARP + lane == expert) keys[i] = ABSENT_KEY;
        if (lane == j) mine = expert;
    }

    const bool live = lane < s.top_k;
    float gate = live ? probability(mine) : 0.0f;
    if (s.renormalize) gate = __fdividef(gate, warp_sum(gate) + 1e-20f);
    if (live) {
        chosen[lane] = s.position[mine];
        gates[lane] = gate * s.scaling;
    }
}

// Chooses for the token that has `logits: [experts]`: `chosen: [top_k]` positions, best first, ties to
// the lower expert and NaN last, and their `gates: [top_k]`. To be called by all lanes of a warp.
__device__ __forceinline__ void choose(const Scores& s, const float* logits, u32* chosen, float* gates) {
    if (s.experts <= 2 * WARP) choose_of<2>(s, logits, chosen, gates);
    else if (s.experts <= 4 * WARP) choose_of<4>(s, logits, chosen, gates);
    else if (s.experts <= 8 * WARP) choose_of<8>(s, logits, chosen, gates);
    else choose_of<MAX_EXPERTS / WARP>(s, logits, chosen, gates);
}
