// A device on the host: what ptx.cuh, and the language that NVRTC compiles, give the kernels. A block of a launch is a
// thread of the host, and each of its threads a coroutine; the blocks that run beside each other are as many as
// RESIDENT. Lanes that exchange numbers, and threads at a barrier, wait for each other; what is copied in the
// background arrives as late as it may. Dynamic shared memory holds NaN before it is written. x86-64 alone.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <sched.h>
#include <sys/mman.h>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#define ON_HOST
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short elem;
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct Index { u32 x; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __expf expf_of_device

inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

// Goes on where `to` stopped, and notes in `from` where this stops.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.local emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace emulation {
constexpr u32 LANES = 32, MOST = 1024, RESIDENT = 16;
constexpr size_t STACK = 64 << 10, DYNAMIC = 256 << 10;

struct Barrier { u32 arrived = 0, generation = 0; };
// What a lane gives to the others of its warp, and gets.
struct Lane {
    u32 value, of, got;
    const void* row;
    const u32 *a, *b;
    float* d;
    u32* matrices;
};
struct Copy { void* to; const void* from; };
struct Thread {
    void* stack;
    bool done;
    const Barrier* at;  // where it waits, if it does
    u32 generation;     // until this has passed
    std::deque<std::vector<Copy>> copies;  // groups under way, the open one last
};
// What a block needs.
struct Block {
    char* stacks = static_cast<char*>(mmap(nullptr, STACK * MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    char* dynamic = static_cast<char*>(aligned_alloc(1024, DYNAMIC));
    void* scheduler;
    Thread threads[MOST];
    Lane lanes[MOST];
    Barrier of_block, of_warp[MOST / LANES];
    bool moved;
    const std::function<void()>* kernel;
};
inline thread_local Block* block;

inline Thread& self() { return block->threads[threadIdx.x]; }
inline void yield() { emulation_switch(&self().stack, block->scheduler); }
// Waits until `count` threads have come; the last of them does what there is to do for `all`.
template <typename F>
void meet(Barrier& barrier, u32 count, F&& all) {
    if (++barrier.arrived == count) {
        all();
        barrier.arrived = 0, barrier.generation++;
        return;
    }
    self().at = &barrier, self().generation = barrier.generation;
    yield();
    self().at = nullptr;
}
// The same in a warp: `all` is given its lanes.
template <typename F>
Lane& meet_lanes(const Lane& mine, F&& all) {
    const u32 warp = threadIdx.x / LANES;
    Lane* lanes = block->lanes + warp * LANES;
    Lane& own = lanes[threadIdx.x % LANES];
    own = mine;
    meet(block->of_warp[warp], std::min(LANES, blockDim.x - warp * LANES), [&] { all(lanes); });
    return own;
}
inline void enter() {
    (*block->kernel)();
    self().done = true;
    block->moved = true;
    yield();
}
inline void run_block(u32 index, u32 size, u32 shared, const std::function<void()>& kernel) {
    Block& b = *block;
    b.kernel = &kernel;
    memset(b.dynamic, 0xff, shared);
    blockIdx.x = index;
    for (u32 t = 0; t < size; t++) {
        void** top = reinterpret_cast<void**>(b.stacks + (t + 1) * STACK) - 2;
        *top = reinterpret_cast<void*>(enter);
        b.threads[t].stack = top - 6, b.threads[t].done = false, b.threads[t].at = nullptr;
        b.threads[t].copies.assign(1, {});
    }
    for (u32 left = size; left;) {
        u32 asked = 0;
        b.moved = false;
        for (u32 t = left = 0; t < size; t++) {
            Thread& thread = b.threads[t];
            if (thread.done) continue;
            left++;
            if (thread.at && thread.at->generation == thread.generation) continue;
            b.moved |= thread.at != nullptr, asked++;
            threadIdx.x = t;
            emulation_switch(&b.scheduler, thread.stack);
        }
        if (left && !asked) fprintf(stderr, "all threads of block %u wait for one that has ended\n", index), abort();
        if (!b.moved) sched_yield();
    }
}

// Blocks that were used before.
inline std::mutex idle_lock;
inline std::vector<Block*> idle;
}  // namespace emulation

// Runs all blocks of a kernel.
inline void launch(u32 grid, u32 size, u32 shared, const std::function<void()>& kernel) {
    using namespace emulation;
    if (size > MOST || shared > DYNAMIC) fprintf(stderr, "a block of %u threads with %u bytes\n", size, shared), abort();
    std::atomic<u32> next = 0;
    auto work = [&] {
        {
            std::lock_guard<std::mutex> held(idle_lock);
            if (idle.empty()) idle.push_back(new Block);
            block = idle.back(), idle.pop_back();
        }
        gridDim.x = grid, blockDim.x = size;
        for (u32 index; (index = next++) < grid;) run_block(index, size, shared, kernel);
        std::lock_guard<std::mutex> held(idle_lock);
        idle.push_back(block);
    };
    std::vector<std::thread> beside;
    for (u32 i = 1; i < std::min(grid, RESIDENT); i++) beside.emplace_back(work);
    // Not here, where another launch's memory would be found.
    std::thread(work).join();
    for (auto& thread : beside) thread.join();
}
inline void launch(u32 grid, u32 size, const std::function<void()>& kernel) { launch(grid, size, emulation::DYNAMIC, kernel); }

template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(u32 v) { return bits<float>(v); }
inline u32 __float_as_uint(float v) { return bits<u32>(v); }
#ifdef ELEMENT_F16
inline float to_float(elem v) {
    const u32 sign = u32(v & 0x8000) << 16, exponent = v >> 10 & 31, digits = v & 0x3ff;
    if (exponent == 31) return bits<float>(sign | 0x7f800000 | digits << 13);
    if (exponent) return bits<float>(sign | (exponent + 112) << 23 | digits << 13);
    const float small = digits * 0x1p-24f;
    return sign ? -small : small;
}
inline elem of_float(float f) {
    const u32 v = bits<u32>(f), sign = v >> 16 & 0x8000;
    const float size = fabsf(f);
    if (f != f) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | u32(nearbyintf(size * 0x1p24f));
    return sign | ((v & 0x7fffffff) + 0xfff + (v >> 13 & 1) - (112 << 23)) >> 13;
}
#else
inline float to_float(elem v) { return bits<float>(u32(v) << 16); }
inline elem of_float(float f) {
    const u32 v = bits<u32>(f);
    return f != f ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
#endif
inline u32 pack(float lo, float hi) { return of_float(lo) | u32(of_float(hi)) << 16; }

inline float expf_of_device(float v) { return expf(v); }
inline float exp2_fast(float v) { return exp2f(v); }
inline float fast_silu(float v) { return v / (1.0f + expf(-v)); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __ffs(u32 v) { return __builtin_ffs(int(v)); }
inline int __clz(u32 v) { return v ? __builtin_clz(v) : 32; }
template <typename T> T min(T a, T b) { return a < b ? a : b; }
template <typename T> T max(T a, T b) { return a > b ? a : b; }
inline uint4 stream(const void* p) { return *static_cast<const uint4*>(p); }
inline u32 atomicAdd(u32* to, u32 v) { return __atomic_fetch_add(to, v, __ATOMIC_RELAXED); }
inline u32 atomicOr(u32* to, u32 v) { return __atomic_fetch_or(to, v, __ATOMIC_RELAXED); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __nanosleep(u32) { emulation::yield(); }

inline void __syncthreads() { emulation::meet(emulation::block->of_block, blockDim.x, [] {}); }
inline void __syncwarp() { emulation::meet_lanes({}, [](emulation::Lane*) {}); }
// What lane `of` has.
template <typename T>
T shuffle(T v, u32 of) {
    return bits<T>(emulation::meet_lanes({bits<u32>(v), of}, [](emulation::Lane* l) {
        for (u32 i = 0; i < emulation::LANES; i++) l[i].got = l[l[i].of % emulation::LANES].value;
    }).got);
}
template <typename T> T __shfl_sync(u32, T v, u32 lane) { return shuffle(v, lane); }
template <typename T> T __shfl_xor_sync(u32, T v, u32 mask) { return shuffle(v, threadIdx.x % emulation::LANES ^ mask); }
template <typename T> T __shfl_up_sync(u32, T v, u32 by) {
    const u32 lane = threadIdx.x % emulation::LANES;
    return shuffle(v, lane < by ? lane : lane - by);
}
// The same for all lanes.
template <typename F>
u32 reduce(u32 v, u32 sum, F&& with) {
    return emulation::meet_lanes({v}, [&](emulation::Lane* l) {
        for (u32 i = 0; i < emulation::LANES; i++) sum = with(sum, l[i].value, i);
        for (u32 i = 0; i < emulation::LANES; i++) l[i].got = sum;
    }).got;
}
inline u32 __ballot_sync(u32, bool v) { return reduce(v, 0, [](u32 sum, u32 v, u32 i) { return sum | v << i; }); }
inline u32 __reduce_max_sync(u32, u32 v) { return reduce(v, 0, [](u32 sum, u32 v, u32) { return std::max(sum, v); }); }
inline u32 __reduce_min_sync(u32, u32 v) { return reduce(v, ~0u, [](u32 sum, u32 v, u32) { return std::min(sum, v); }); }
inline u32 __match_any_sync(u32, u32 v) {
    return emulation::meet_lanes({v}, [](emulation::Lane* l) {
        for (u32 i = 0; i < emulation::LANES; i++) {
            l[i].got = 0;
            for (u32 j = 0; j < emulation::LANES; j++) l[i].got |= u32(l[i].value == l[j].value) << j;
        }
    }).got;
}
inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulation::meet_lanes({.a = a, .b = b, .d = d}, [](emulation::Lane* l) {
        float of_a[16][16], of_b[16][8];
        auto half = [](u32 word, u32 i) { return to_float(elem(word >> i * 16)); };
        for (u32 lane = 0; lane < emulation::LANES; lane++)
            for (u32 i = 0; i < 2; i++) {
                const u32 row = lane / 4, k = lane % 4 * 2 + i;
                for (u32 j = 0; j < 4; j++) of_a[row + j % 2 * 8][k + j / 2 * 8] = half(l[lane].a[j], i);
                for (u32 j = 0; j < 2; j++) of_b[k + j * 8][row] = half(l[lane].b[j], i);
            }
        for (u32 row = 0; row < 16; row++) {
            float sum[8] = {};
            for (u32 k = 0; k < 16; k++)
                for (u32 n = 0; n < 8; n++) sum[n] += of_a[row][k] * of_b[k][n];
            for (u32 n = 0; n < 8; n++) l[row % 8 * 4 + n / 2].d[row / 8 * 2 + n % 2] += sum[n];
        }
    });
}
inline void load_matrices(u32 (&r)[4], const void* row) {
    emulation::meet_lanes({.row = row, .matrices = r}, [](emulation::Lane* l) {
        for (u32 i = 0; i < emulation::LANES; i++)
            for (u32 m = 0; m < 4; m++) l[i].matrices[m] = static_cast<const u32*>(l[m * 8 + i / 4].row)[i % 4];
    });
}
inline void load_matrices_transposed(u32 (&r)[4], const void* row) {
    emulation::meet_lanes({.row = row, .matrices = r}, [](emulation::Lane* l) {
        auto at = [&](u32 m, u32 row, u32 column) { return static_cast<const elem*>(l[m * 8 + row].row)[column]; };
        for (u32 i = 0; i < emulation::LANES; i++)
            for (u32 m = 0; m < 4; m++) l[i].matrices[m] = at(m, i % 4 * 2, i / 4) | u32(at(m, i % 4 * 2 + 1, i / 4)) << 16;
    });
}
inline void copy_async(void* to, const void* from, bool there) { emulation::self().copies.back().push_back({to, there ? from : nullptr}); }
inline void copy_commit() { emulation::self().copies.emplace_back(); }
template <int N>
void copy_wait() {
    for (auto& copies = emulation::self().copies; copies.size() > N + 1; copies.pop_front())
        for (const auto& [to, from] : copies.front()) from ? memcpy(to, from, 16) : memset(to, 0, 16);
}

// A call of a kernel with arguments as the driver is given them, which are copied.
template <typename... A>
std::function<void()>* bound(void (*kernel)(A...), void** given) {
    return [&]<size_t... I>(std::index_sequence<I...>) {
        std::tuple<std::remove_cv_t<A>...> arguments{*static_cast<std::remove_cv_t<A>*>(given[I])...};
        return new std::function<void()>([=] { std::apply(kernel, arguments); });
    }(std::index_sequence_for<A...>{});
}
