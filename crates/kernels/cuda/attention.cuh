// What attention.cu and attention_backward.cu share: queries in tiles against keys and values in tiles, both in
// shared memory, so that no score ever lies in device memory (Dao, arXiv 2307.08691). A query head reads the
// key head of its group; D is the head size, 64, 128 or 192.

// What a query sees: with its position p = keys - queries + its number, the keys of its row of the batch from
// max(start, p - window + 1) to p; nothing if its number is not below the row's length.
struct Seen {
    const u32* starts;   // [batch], or null: 0
    const u32* lengths;  // [batch], or null: all queries
    u32 batch, queries, keys, heads, kv_heads;
    u32 window;          // at least 1
    float scale;         // of scores, times log2(e)

    __device__ __forceinline__ u32 start(u32 row) const { return starts ? starts[row] : 0; }
    __device__ __forceinline__ u32 length(u32 row) const { return lengths ? lengths[row] : queries; }
    // The first key that query `i` sees if nothing is padding, and that behind the last.
    __device__ __forceinline__ u32 first(u32 i) const { return keys - queries + i + 1 > window ? keys - queries + i + 1 - window : 0; }
    __device__ __forceinline__ u32 end(u32 i) const { return keys - queries + i + 1; }
};
static_assert(sizeof(Seen) == 48);

// Written as a number of its own, since the compiler at run time has no name for it.
__device__ __forceinline__ float infinite() { return __uint_as_float(0x7f800000u); }

// Over the four lanes that hold a row of an accumulator.
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// Rows of D numbers in shared memory. The pieces of 16 bytes of 8 neighbouring rows are turned against each
// other, so that lanes that read one column of them meet in no bank.
template <u32 D>
struct Tile {
    static constexpr u32 PIECES = D / 8;
    uint4* at;

    __device__ __forceinline__ uint4* piece(u32 row, u32 piece) const { return at + row * PIECES + (piece ^ row % 8); }

    // Rows first .. first + ROWS of memory, `stride` numbers apart, by all THREADS of the block; zeros from `end` on.
    template <u32 ROWS, u32 THREADS>
    __device__ __forceinline__ void fetch(const elem* from, u32 first, u32 end, u64 stride) const {
#pragma unroll
        for (u32 i = 0; i < ROWS * PIECES / THREADS; i++) {
            const u32 place = threadIdx.x + i * THREADS, row = place / PIECES, p = place % PIECES;
            copy_async(piece(row, p), from + (first + row) * stride + p * 8, first + row < end);
        }
    }

    // The factor `a` of `mma`: rows first .. first + 16, numbers 16 k .. 16 k + 16.
    __device__ __forceinline__ void rows(u32 (&a)[4], u32 first, u32 k) const {
        const u32 lane = threadIdx.x % WARP, m = lane / 8;
        load_matrices(a, piece(first + m % 2 * 8 + lane % 8, k * 2 + m / 2));
    }

    // The factors `b` of two `mma`: rows first .. first + 8 as columns, numbers 32 k .. 32 k + 32 as what is summed.
    __device__ __forceinline__ void columns(u32 (&b)[4], u32 first, u32 k) const {
        const u32 lane = threadIdx.x % WARP;
        load_matrices(b, piece(first + lane % 8, k * 4 + lane / 8));
    }

    // The factors `b` of two `mma`: numbers 16 n .. 16 n + 16 as columns of 8 and 8, rows first .. first + 16 as
    // what is summed.
    __device__ __forceinline__ void turned(u32 (&b)[4], u32 first, u32 n) const {
        const u32 lane = threadIdx.x % WARP, m = lane / 8;
        load_matrices_transposed(b, piece(first + m % 2 * 8 + lane % 8, n * 2 + m / 2));
    }
};

template <u32 N>
__device__ __forceinline__ void clear(float (&d)[N][4]) {
#pragma unroll
    for (u32 n = 0; n < N; n++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) d[n][i] = 0.0f;
}

// d = the rows a0 .. a0 + 16 of `a` times the N * 8 rows of `b`, over the head: [16, 8 N].
template <u32 D, u32 N>
__device__ __forceinline__ void products(float (&d)[N][4], const Tile<D>& a, u32 a0, const Tile<D>& b) {
    clear(d);
    // Unrolled further, loads come so early that registers run out.
#pragma unroll 2
    for (u32 k = 0; k < D / 32; k++) {
        u32 x[2][4];
        a.rows(x[0], a0, 2 * k);
        a.rows(x[1], a0, 2 * k + 1);
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            u32 y[4];
            b.columns(y, n * 8, k);
            mma(d[n], x[0], {y[0], y[1]});
            mma(d[n], x[1], {y[2], y[3]});
        }
    }
}

// d += `p`, an accumulator [16, 8 N] as 16-bit floats, times the 8 N rows of `b`: [16, D].
template <u32 D, u32 N>
__device__ __forceinline__ void add_products(float (&d)[D / 8][4], const float (&p)[N][4], const Tile<D>& b) {
#pragma unroll
    for (u32 k = 0; k < N / 2; k++) {
        const u32 a[4] = {pack(p[2 * k][0], p[2 * k][1]), pack(p[2 * k][2], p[2 * k][3]), pack(p[2 * k + 1][0], p[2 * k + 1][1]),
                          pack(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (u32 n = 0; n < D / 16; n++) {
            u32 y[4];
            b.turned(y, k * 16, n);
            mma(d[2 * n], a, {y[0], y[1]});
            mma(d[2 * n + 1], a, {y[2], y[3]});
        }
    }
}

// Writes two rows of an accumulator [16, D], those of this lane, times `factor`.
template <u32 D>
__device__ __forceinline__ void store_rows(elem* const (&to)[2], const bool (&there)[2], const float (&d)[D / 8][4], const float (&factor)[2]) {
    const u32 c = threadIdx.x % 4 * 2;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        if (!there[half]) continue;
#pragma unroll
        for (u32 n = 0; n < D / 8; n++)
            *reinterpret_cast<u32*>(to[half] + n * 8 + c) = pack(d[n][half * 2] * factor[half], d[n][half * 2 + 1] * factor[half]);
    }
}
