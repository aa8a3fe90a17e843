// The router's product, logits[t, e] = weight[e] · x[t], kept in f32: a rounded logit can change the choice.
//
// Grid: ceil(tokens / 32) * ceil(experts / 64) blocks, those of the same tokens side by side.
// Block: 256 threads; its 8 warps share the sum over the hidden size. Static shared memory: 8 KiB.
// Registers (sm_80, sm_90a): 125, 128.
// Bound by the bytes of x, which the experts' blocks read from the L2 after the first.
// Last measured: H100, OLMoE-1B-7B: 22 us up to 1024 tokens, 26 us at 4096, 105 us at 32768 (43 % of the copy rate).

struct Router {
    const elem* x;       // [tokens, hidden]
    const elem* weight;  // [experts, hidden]
    float* logits;       // [tokens, experts]
    u32 tokens, experts, hidden;
};
static_assert(sizeof(Router) == 40);

constexpr u32 TOKENS = 32, EXPERTS = 64, WARPS = 8;

// Eight neighbours of a row; zeros past its end or for a row that is not there.
__device__ __forceinline__ uint4 piece(const elem* rows, u32 row, u32 count, u32 k, u32 hidden) {
    if (row >= count || k >= hidden) return uint4{0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(rows + u64(row) * hidden + k);
}

extern "C" __global__ void __launch_bounds__(256) router_logits(const Router p) {
    __shared__ float sums[TOKENS][EXPERTS];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, c = lane % 4;
    u32 chunks = (p.experts + EXPERTS - 1) / EXPERTS;
    u32 token = blockIdx.x / chunks * TOKENS, expert = blockIdx.x % chunks * EXPERTS;

    float d[2][8][4] = {};
    // A thread's eight neighbours serve two steps of 16; the sum does not care in which order, as long
    // as both factors agree.
    for (u32 k = warp * 32 + c * 8; k - c * 8 < p.hidden; k += WARPS * 32) {
        uint4 a[4];
        for (u32 i = 0; i < 4; i++) a[i] = piece(p.x, token + g + 8 * i, p.tokens, k, p.hidden);
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
            uint4 b = piece(p.weight, expert + n * 8 + g, p.experts, k, p.hidden);
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
                mma(d[m][n], {a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y}, {b.x, b.y});
                mma(d[m][n], {a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w}, {b.z, b.w});
            }
        }
    }
    for (u32 turn = 0; turn < WARPS; turn++) {
        if (turn == warp) {
#pragma unroll
            for (u32 m = 0; m < 2; m++)
#pragma unroll
                for (u32 n = 0; n < 8; n++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        float& sum = sums[m * 16 + g + i / 2 * 8][n * 8 + c * 2 + i % 2];
                        sum = turn == 0 ? d[m][n][i] : sum + d[m][n][i];
                    }
        }
        __syncthreads();
    }
    for (u32 i = threadIdx.x; i < TOKENS * EXPERTS; i += blockDim.x) {
        u32 t = token + i / EXPERTS, e = expert + i % EXPERTS;
        if (t < p.tokens && e < p.experts) p.logits[u64(t) * p.experts + e] = sums[i / EXPERTS][i % EXPERTS];
    }
}
