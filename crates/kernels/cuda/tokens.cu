// What lies between the products of a model that trains: sums back to tokens, activations, norms. All of it is
// bound by bytes, is read and written in pieces of 16, and sums in f32 in a fixed order. Widths are multiples of 8.
// At most 32 registers. Checked on an H200; not timed by itself.

__device__ __forceinline__ void unpack(float (&to)[8], const uint4& v) {
    const u32 of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) to[i * 2] = low(of[i]), to[i * 2 + 1] = high(of[i]);
}

__device__ __forceinline__ const uint4* piece(const elem* rows, u64 row, u32 width) { return reinterpret_cast<const uint4*>(rows + row * width); }

struct SumRows {
    const elem* rows;      // [S, width]
    const float* weights;  // [S], or null: 1
    elem* out;             // [outputs, width]
    const u32* starts;     // [outputs + 1]
    const u32* index;      // the rows of output t are those at starts[t] .. starts[t + 1]
    u32 outputs, width;
};
static_assert(sizeof(SumRows) == 48);

// out[t] = sum of weights[s] rows[s] over the rows of t, in their order. A block of 256 threads for each output.
extern "C" __global__ void __launch_bounds__(256) sum_rows(const SumRows p) {
    const u32 t = blockIdx.x, begin = p.starts[t], end = p.starts[t + 1];
    for (u32 i = threadIdx.x; i < p.width / 8; i += blockDim.x) {
        float sum[8] = {};
        for (u32 at = begin; at < end; at++) {
            const u32 row = p.index[at];
            add(sum, p.weights ? p.weights[row] : 1.0f, piece(p.rows, row, p.width)[i]);
        }
        reinterpret_cast<uint4*>(p.out + u64(t) * p.width)[i] = pack_8(sum);
    }
}

struct SpreadRows {
    const elem* dout;      // [outputs, width]
    const elem* rows;      // [S, width]
    const float* weights;  // [S]
    const u32* targets;    // [S]
    elem* d_rows;          // [S, width], or null
    float* d_weights;      // [S], or null
    u32 count, width;
};
static_assert(sizeof(SpreadRows) == 56);

// The gradients of `sum_rows`. A warp for each row, 8 a block.
extern "C" __global__ void __launch_bounds__(256) spread_rows(const SpreadRows p) {
    const u32 s = blockIdx.x * 8 + threadIdx.x / WARP;
    if (s >= p.count) return;
    const uint4* dout = piece(p.dout, p.targets[s], p.width);
    const float weight = p.weights[s];
    float dot = 0.0f;
    for (u32 i = threadIdx.x % WARP; i < p.width / 8; i += WARP) {
        float d[8], x[8];
        unpack(d, dout[i]);
        if (p.d_weights) {
            unpack(x, piece(p.rows, s, p.width)[i]);
#pragma unroll
            for (u32 j = 0; j < 8; j++) dot += x[j] * d[j];
        }
        if (p.d_rows) {
#pragma unroll
            for (u32 j = 0; j < 8; j++) d[j] *= weight;
            reinterpret_cast<uint4*>(p.d_rows + u64(s) * p.width)[i] = pack_8(d);
        }
    }
    dot = warp_sum(dot);
    if (p.d_weights && threadIdx.x % WARP == 0) p.d_weights[s] = dot;
}

struct Swiglu {
    const elem* gate;
    const elem* up;
    const elem* dh;  // null forward
    elem* h;         // backward the gradient of `gate`
    elem* d_up;      // null forward
    u64 pieces;
};
static_assert(sizeof(Swiglu) == 48);

// h = silu(gate) up, or the gradients of both. A thread for each piece, 256 a block.
extern "C" __global__ void __launch_bounds__(256) swiglu(const Swiglu p) {
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.pieces) return;
    float gate[8], up[8], a[8], b[8];
    unpack(gate, reinterpret_cast<const uint4*>(p.gate)[i]);
    unpack(up, reinterpret_cast<const uint4*>(p.up)[i]);
    if (p.dh) unpack(b, reinterpret_cast<const uint4*>(p.dh)[i]);
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        const float s = 1.0f / (1.0f + __expf(-gate[j])), act = gate[j] * s;
        a[j] = act * up[j];
        if (p.dh) {
            a[j] = b[j] * up[j] * (s + act * (1.0f - s));
            b[j] *= act;
        }
    }
    reinterpret_cast<uint4*>(p.h)[i] = pack_8(a);
    if (p.dh) reinterpret_cast<uint4*>(p.d_up)[i] = pack_8(b);
}

struct NormGradient {
    const elem* x;       // [rows, width]
    const elem* weight;  // [width]
    const elem* dy;      // [rows, width]
    elem* dx;
    u32 width;
    float eps;
};
static_assert(sizeof(NormGradient) == 40);

// Of y = x r w with r = 1 / sqrt(mean(x x) + eps): dx = r (dy w - x r r mean(dy w x)). A block of 256 threads a row.
extern "C" __global__ void __launch_bounds__(256) norm_gradient(const NormGradient p) {
    __shared__ float squares[8], products[8];
    const uint4 *xs = piece(p.x, blockIdx.x, p.width), *dys = piece(p.dy, blockIdx.x, p.width);
    float square = 0.0f, product = 0.0f;
    for (u32 i = threadIdx.x; i < p.width / 8; i += blockDim.x) {
        float x[8], w[8], d[8];
        unpack(x, xs[i]), unpack(d, dys[i]), unpack(w, reinterpret_cast<const uint4*>(p.weight)[i]);
#pragma unroll
        for (u32 j = 0; j < 8; j++) square += x[j] * x[j], product += d[j] * w[j] * x[j];
    }
    square = warp_sum(square), product = warp_sum(product);
    if (threadIdx.x % WARP == 0) squares[threadIdx.x / WARP] = square, products[threadIdx.x / WARP] = product;
    __syncthreads();
    square = 0.0f, product = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; i++) square += squares[i], product += products[i];
    const float r = 1.0f / sqrtf(square / p.width + p.eps), part = r * r * product / p.width;
    for (u32 i = threadIdx.x; i < p.width / 8; i += blockDim.x) {
        float x[8], w[8], d[8];
        unpack(x, xs[i]), unpack(d, dys[i]), unpack(w, reinterpret_cast<const uint4*>(p.weight)[i]);
#pragma unroll
        for (u32 j = 0; j < 8; j++) d[j] = r * (d[j] * w[j] - x[j] * part);
        reinterpret_cast<uint4*>(p.dx + u64(blockIdx.x) * p.width)[i] = pack_8(d);
    }
}

struct Entropy {
    const float* logits;   // [rows, width]
    const u32* targets;    // [rows]
    float* sums;           // [rows] log of the sum of exponentials
    float* losses;         // [rows]; backward null
    const float* dlosses;  // [rows]; forward null
    float* dlogits;        // [rows, width]; forward null
    u32 width;
};
static_assert(sizeof(Entropy) == 56);

// losses = sums - logits[target], or dlogits = dlosses (exp(logits - sums) - [target]). A block of 256 threads a row.
extern "C" __global__ void __launch_bounds__(256) cross_entropy(const Entropy p) {
    __shared__ float peaks[8], parts[8];
    const float* row = p.logits + u64(blockIdx.x) * p.width;
    const u32 target = p.targets[blockIdx.x];
    if (p.dlogits) {
        const float sum = p.sums[blockIdx.x], d = p.dlosses[blockIdx.x];
        for (u32 i = threadIdx.x; i < p.width; i += blockDim.x)
            p.dlogits[u64(blockIdx.x) * p.width + i] = d * (__expf(row[i] - sum) - (i == target ? 1.0f : 0.0f));
        return;
    }
    // The least number, so that a difference of two is one, too.
    float peak = -3.4e38f, sum = 0.0f;
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x) {
        const float v = row[i], top = fmaxf(peak, v);
        sum = sum * __expf(peak - top) + __expf(v - top);
        peak = top;
    }
    for (u32 i = 16; i > 0; i /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, peak, i), more = __shfl_xor_sync(0xffffffffu, sum, i), top = fmaxf(peak, other);
        sum = sum * __expf(peak - top) + more * __expf(other - top);
        peak = top;
    }
    if (threadIdx.x % WARP == 0) peaks[threadIdx.x / WARP] = peak, parts[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (u32 i = 1; i < 8; i++) {
        const float top = fmaxf(peak, peaks[i]);
        sum = sum * __expf(peak - top) + parts[i] * __expf(peaks[i] - top);
        peak = top;
    }
    const float all = peak + logf(sum);
    p.sums[blockIdx.x] = all;
    p.losses[blockIdx.x] = all - row[target];
}
