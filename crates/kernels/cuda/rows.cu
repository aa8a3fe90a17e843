// What the backward pass does by rows, between its grouped products.
//   swiglu_backward:  of row s of choice c, with a = gate[s, :], b = up[s, :], g = gates[c] and
//                     dh = dh[s, :] + base_share * dpair[pair of s, :] + own_share * dh_own[s, :]:
//                     h[s, :] = silu(a) * b                 d_gates[c] = sum of h * dh
//                     d_gate[s, :] = g * dh * b * silu'(a)  d_up[s, :] = g * dh * silu(a)
//   sum_pairs_two  :  sum_i[pair, :] = share * sum over the pair's choices j, in order, of x_i[row_j, :], i = 0, 1
//
// Grid: any number of blocks; every block takes its share in turn. As many as the device holds at once
// are best: 5 for each multiprocessor (swiglu_backward), 6 (sum_pairs_two).
// Block: 256 threads. Shared memory: none.
// Registers (sm_80, sm_90a): swiglu_backward 48, 47; sum_pairs_two 38, 37.
// Bound: bytes. swiglu_backward moves 14 inner bytes for each row with a pair (12 without; the rows of a
// token that share a pair follow each other), sum_pairs_two 4 inner for each row and each pair.
// Last measured: not timed alone.

constexpr u32 THREADS = 256;
constexpr u32 SLAB = WARP * 8;  // columns of a warp: 16 bytes for each lane

struct SwigluBackward {
    const elem* gate;        // [S, inner] pre-activations
    const elem* up;          // [S, inner]
    const elem* dh;          // [S, inner] gradient of h, gates not applied
    const elem* dpair;       // [pairs, inner] what the pair's base adds to it, or null
    const elem* dh_own;      // [S, inner] what a slot's whole expert adds to it, or null
    const u32* pair_of_row;  // [S]; NONE: a row without a base; may be null with `dpair`
    const u32* row_of;       // [tokens * top_k]
    const float* gates;      // [tokens * top_k]
    elem* h;                 // [S, inner]; may be `dh`
    elem* d_gate;            // [S, inner]; may be `gate`
    elem* d_up;              // [S, inner]; may be `up`
    float* d_gates;          // [tokens * top_k]
    const u32* own_from;     // the first row that `dh_own` has; null without it
    const u32* replaced_from;  // the first row whose share in it is `own_share` and not 1
    u32 choices, inner;      // tokens * top_k; a multiple of 8
    float base_share, own_share;
};
static_assert(sizeof(SwigluBackward) == 128);

// A warp for each choice. Any result may lie where an input of the same row lay: a lane reads its
// columns of all of them before it writes.
extern "C" __global__ void __launch_bounds__(THREADS) swiglu_backward(SwigluBackward p) {
    u32 lane = threadIdx.x % WARP;
    u32 warps = gridDim.x * (THREADS / WARP);
    for (u32 choice = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; choice < p.choices; choice += warps) {
        u32 row = p.row_of[choice];
        u32 pair = p.dpair ? p.pair_of_row[row] : NONE;
        float own_share = !p.dh_own || row < *p.own_from ? 0.0f : row < *p.replaced_from ? 1.0f : p.own_share;
        float factor = p.gates[choice];
        float sum = 0.0f;
        for (u32 column = lane * 8; column < p.inner; column += SLAB) {
            u64 at = u64(row) * p.inner + column;
            uint4 gate = *reinterpret_cast<const uint4*>(p.gate + at);
            uint4 up = *reinterpret_cast<const uint4*>(p.up + at);
            float dh[8] = {}, h[8], d_gate[8], d_up[8];
            add(dh, 1.0f, *reinterpret_cast<const uint4*>(p.dh + at));
            if (pair != NONE) add(dh, p.base_share, *reinterpret_cast<const uint4*>(p.dpair + u64(pair) * p.inner + column));
            if (own_share != 0.0f) add(dh, own_share, *reinterpret_cast<const uint4*>(p.dh_own + at));
            u32 gates[4] = {gate.x, gate.y, gate.z, gate.w}, ups[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                float a = i % 2 ? high(gates[i / 2]) : low(gates[i / 2]);
                float b = i % 2 ? high(ups[i / 2]) : low(ups[i / 2]);
                float logistic = 1.0f / (1.0f + __expf(-a));
                float silu_a = a * logistic;
                h[i] = silu_a * b;
                sum += h[i] * dh[i];
                d_gate[i] = factor * dh[i] * b * (logistic + silu_a * (1.0f - logistic));
                d_up[i] = factor * dh[i] * silu_a;
            }
            *reinterpret_cast<uint4*>(p.h + at) = pack_8(h);
            *reinterpret_cast<uint4*>(p.d_gate + at) = pack_8(d_gate);
            *reinterpret_cast<uint4*>(p.d_up + at) = pack_8(d_up);
        }
        sum = warp_sum(sum);
        if (lane == 0) p.d_gates[choice] = sum;
    }
}

struct SumPairsTwo {
    const elem* x0;          // [S, inner]
    const elem* x1;          // [S, inner]
    elem* sum0;              // [pairs, inner]
    elem* sum1;              // [pairs, inner]
    const u32* row_of;       // [tokens, top_k]
    const u32* pair_of;      // [tokens, top_k] the pair that this choice is the first of, or NONE
    const u32* pair_of_row;  // [S]
    u32 tokens, top_k, inner;  // top_k <= 32, inner a multiple of 8
    float share;
};
static_assert(sizeof(SumPairsTwo) == 72);

// A warp for each token and slab of columns; lane j holds what belongs to choice j.
extern "C" __global__ void __launch_bounds__(THREADS) sum_pairs_two(SumPairsTwo p) {
    u32 lane = threadIdx.x % WARP;
    u32 slabs = (p.inner + SLAB - 1) / SLAB;
    u32 warps = gridDim.x * (THREADS / WARP);
    for (u32 at = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; at < p.tokens * slabs; at += warps) {
        u32 choice = at / slabs * p.top_k + lane;
        u32 column = at % slabs * SLAB + lane * 8;
        bool held = lane < p.top_k;
        u32 row = held ? p.row_of[choice] : 0;
        u32 mine = held ? p.pair_of[choice] : NONE;
        u32 pair_of_row = held ? p.pair_of_row[row] : NONE;
        for (u32 firsts = __ballot_sync(0xffffffffu, mine != NONE); firsts; firsts &= firsts - 1) {
            u32 pair = __shfl_sync(0xffffffffu, mine, __ffs(firsts) - 1);
            float sum0[8] = {}, sum1[8] = {};
            for (u32 members = __ballot_sync(0xffffffffu, pair_of_row == pair); members; members &= members - 1) {
                u64 from = u64(__shfl_sync(0xffffffffu, row, __ffs(members) - 1)) * p.inner + column;
                if (column < p.inner) {
                    add(sum0, 1.0f, stream(p.x0 + from));
                    add(sum1, 1.0f, stream(p.x1 + from));
                }
            }
            u64 to = u64(pair) * p.inner + column;
            if (column < p.inner) {
#pragma unroll
                for (u32 i = 0; i < 8; i++) sum0[i] *= p.share, sum1[i] *= p.share;
                *reinterpret_cast<uint4*>(p.sum0 + to) = pack_8(sum0);
                *reinterpret_cast<uint4*>(p.sum1 + to) = pack_8(sum1);
            }
        }
    }
}
