// A device on the host, one block after the other: what common.cuh gives the kernels, with a coroutine for each
// thread. Lanes that exchange numbers, and threads at a barrier, wait for each other; copies in the background are
// done at once. Memory that a launch gives to a block holds NaN before it is written.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short elem;
struct uint4 { u32 x, y, z, w; };
struct Index { u32 x; };
constexpr u32 WARP = 32, MOST = 256;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __expf expf_of_device

static Index threadIdx, blockIdx, blockDim, gridDim;
static uint4 pool[1 << 13];

namespace emulation {
constexpr size_t STACK = 256 << 10;
struct Barrier { u32 arrived = 0, generation = 0; };
struct Slot { u32 a[4], b[2]; const void* row; float number; };
static ucontext_t scheduler, threads[MOST];
static std::unique_ptr<char[]> stacks[MOST];
static bool done[MOST];
static Barrier of_block, of_warp[MOST / WARP];
static Slot slots[MOST];
static const std::function<void()>* kernel;

inline void wait(Barrier& barrier, u32 count) {
    const u32 generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0, barrier.generation++;
        return;
    }
    while (barrier.generation == generation) swapcontext(&threads[threadIdx.x], &scheduler);
}
inline void wait_for_warp() { wait(of_warp[threadIdx.x / WARP], WARP); }
inline void enter() {
    (*kernel)();
    done[threadIdx.x] = true;
}
// The slot of a lane of this warp.
inline const Slot& slot(u32 lane) { return slots[threadIdx.x / WARP * WARP + lane]; }
}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::of_block, blockDim.x); }

// Runs all blocks of a kernel.
inline void launch(u32 grid, u32 block, const std::function<void()>& kernel) {
    using namespace emulation;
    emulation::kernel = &kernel;
    gridDim.x = grid, blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        memset(pool, 0xff, sizeof pool);
        for (u32 t = 0; t < block; t++) {
            if (!stacks[t]) stacks[t].reset(new char[STACK]);
            done[t] = false;
            getcontext(&threads[t]);
            threads[t].uc_stack.ss_sp = stacks[t].get(), threads[t].uc_stack.ss_size = STACK, threads[t].uc_link = &scheduler;
            makecontext(&threads[t], enter, 0);
        }
        for (u32 left = block; left;)
            for (u32 t = left = 0; t < block; t++)
                if (!done[t]) threadIdx.x = t, swapcontext(&scheduler, &threads[t]), left++;
    }
}

inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
inline float to_float(elem v) { return __uint_as_float(u32(v) << 16); }
inline elem of_float(float f) {
    u32 v;
    memcpy(&v, &f, 4);
    return f != f ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
inline u32 pack(float lo, float hi) { return of_float(lo) | u32(of_float(hi)) << 16; }
inline float low(u32 v) { return to_float(v & 0xffff); }
inline float high(u32 v) { return to_float(v >> 16); }
inline float expf_of_device(float v) { return expf(v); }
inline float exp2_fast(float v) { return exp2f(v); }
template <typename T> T min(T a, T b) { return a < b ? a : b; }
template <typename T> T max(T a, T b) { return a > b ? a : b; }

inline float __shfl_xor_sync(u32, float v, u32 mask) {
    emulation::slots[threadIdx.x].number = v;
    emulation::wait_for_warp();
    v = emulation::slot(threadIdx.x % WARP ^ mask).number;
    emulation::wait_for_warp();
    return v;
}
inline float warp_sum(float v) {
    for (u32 i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}
inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    using namespace emulation;
    memcpy(slots[threadIdx.x].a, a, sizeof a), memcpy(slots[threadIdx.x].b, b, sizeof b);
    wait_for_warp();
    const u32 lane = threadIdx.x % WARP;
    auto half = [](u32 word, u32 k) { return k % 2 ? high(word) : low(word); };
    for (u32 i = 0; i < 4; i++) {
        const u32 row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (u32 k = 0; k < 16; k++)
            sum += half(slot(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k) * half(slot(column * 4 + k % 8 / 2).b[k / 8], k);
        d[i] += sum;
    }
    wait_for_warp();
}
inline void load_matrices(u32 (&r)[4], const void* row) {
    emulation::slots[threadIdx.x].row = row;
    emulation::wait_for_warp();
    const u32 lane = threadIdx.x % WARP;
    for (u32 m = 0; m < 4; m++) r[m] = static_cast<const u32*>(emulation::slot(m * 8 + lane / 4).row)[lane % 4];
    emulation::wait_for_warp();
}
inline void load_matrices_transposed(u32 (&r)[4], const void* row) {
    emulation::slots[threadIdx.x].row = row;
    emulation::wait_for_warp();
    const u32 lane = threadIdx.x % WARP;
    auto at = [&](u32 m, u32 row) { return static_cast<const elem*>(emulation::slot(m * 8 + row).row)[lane / 4]; };
    for (u32 m = 0; m < 4; m++) r[m] = at(m, lane % 4 * 2) | u32(at(m, lane % 4 * 2 + 1)) << 16;
    emulation::wait_for_warp();
}
inline void copy_async(void* to, const void* from, bool there) {
    if (there) memcpy(to, from, 16);
    else memset(to, 0, 16);
}
inline void copy_commit() {}
template <int N> void copy_wait() {}
inline void add(float (&sum)[8], float factor, const uint4& v) {
    const u32 of[4] = {v.x, v.y, v.z, v.w};
    for (u32 i = 0; i < 4; i++) sum[i * 2] += factor * low(of[i]), sum[i * 2 + 1] += factor * high(of[i]);
}
inline uint4 pack_8(const float (&v)[8]) { return {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])}; }
