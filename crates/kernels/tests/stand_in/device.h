// A device on the host: what ptx.cuh, and the language that NVRTC compiles, give the kernels. A block of a launch runs
// in a thread of the host, and its threads one after the other, each as far as it comes without another: those that
// wait become coroutines. As many blocks run beside each other as the host has processors, and where one waits for
// others as many as RESIDENT. Lanes that exchange numbers, and threads at a barrier, wait for each other; who has ended
// counts as there. What is copied in the background arrives as late as it may. Dynamic shared memory holds NaN before
// it is written. x86-64 alone.
#pragma once
#include "floats.h"
#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <math.h>
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
struct Index { u32 x = 1, y = 1, z = 1; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __device__
#define __host__
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
constexpr u32 FEW = 4096;  // threads of a launch that are not worth a second thread of the host
constexpr size_t STACK = 64 << 10, DYNAMIC = 256 << 10;

// Where threads wait until those that have not ended are all there; the last of them does what there is to do.
struct Barrier {
    u32 arrived = 0, ended = 0, generation = 0;
    void (*all)(const void*);
    const void* with;

    void pass() { all(with), arrived = 0, generation++; }
};
// What a lane gives to the others of its warp, and gets; of a warp, null where a lane has ended or never was.
struct Lane {
    u64 value;
    u32 of;
    const void* row;
    const u32 *a, *b;
    float* d;
    u32* matrices;
    u64 got;
};
struct Copy { void* to; const void* from; };
struct Thread {
    void* stack;  // where it goes on
    Index index;
    bool done;
    const Barrier* at;  // where it waits, if it does
    u32 generation;     // until this has passed
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> copies;  // groups under way
};
// What a block needs.
struct Block {
    char* stacks = static_cast<char*>(mmap(nullptr, STACK * MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    char* dynamic = static_cast<char*>(aligned_alloc(1024, DYNAMIC));
    void* scheduler;
    Thread threads[MOST];
    Lane* lanes[MOST];
    Barrier of_block, of_warp[MOST / LANES];
    u32 size, current, started, left;
    bool moved;
    const std::function<void()>* kernel;
};
inline thread_local Block* block;

inline Thread& self() { return block->threads[block->current]; }
inline u32 lane() { return block->current % LANES; }
inline void yield() { emulation_switch(&self().stack, block->scheduler); }
// Waits until `count` threads have come or ended, and one has called `all`.
template <typename F>
void meet(Barrier& barrier, u32 count, const F& all) {
    barrier.all = [](const void* all) { (*static_cast<const F*>(all))(); }, barrier.with = &all;
    if (++barrier.arrived + barrier.ended == count) return barrier.pass();
    self().at = &barrier, self().generation = barrier.generation;
    yield();
    self().at = nullptr;
}
inline u32 lanes_of(u32 warp) { return std::min(LANES, block->size - warp * LANES); }
// The same in a warp: `all` is given its lanes.
template <typename F>
u64 meet_lanes(Lane mine, const F& all) {
    const u32 warp = block->current / LANES;
    Lane** lanes = block->lanes + warp * LANES;
    lanes[lane()] = &mine;
    meet(block->of_warp[warp], lanes_of(warp), [&] { all(lanes); });
    return mine.got;
}
// Stops where an instruction of a whole warp lacks a lane.
inline void whole(Lane** lanes) {
    for (u32 i = 0; i < LANES; i++)
        if (!lanes[i]) fprintf(stderr, "a warp of block %u lacks lane %u\n", blockIdx.x, i), abort();
}
inline void begin(u32 t) {
    Thread& thread = block->threads[t];
    block->current = t;
    threadIdx = thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    thread.done = false, thread.at = nullptr;
    thread.open.clear();
    if (!thread.copies.empty()) thread.copies.clear();
}
inline void end() {
    const u32 warp = block->current / LANES;
    auto leave = [](Barrier& barrier, u32 count) {
        if (barrier.ended++, barrier.arrived && barrier.arrived + barrier.ended == count) barrier.pass();
    };
    self().done = block->moved = true, block->left--;
    block->lanes[block->current] = nullptr;
    leave(block->of_warp[warp], lanes_of(warp)), leave(block->of_block, block->size);
}
// Runs threads that have not begun until one waits, which then has this stack for itself.
inline void enter() {
    while (block->started < block->size) {
        begin(block->started++);
        (*block->kernel)();
        end();
    }
    void* never;
    emulation_switch(&never, block->scheduler);
}
inline u32 processors() {
    static const u32 number = std::min(std::thread::hardware_concurrency(), RESIDENT);
    return number;
}
// `help` is told how many blocks there should be beside each other where threads wait.
inline void run_block(u32 shared, const std::function<void()>& kernel, const std::function<void(u32)>& help) {
    Block& b = *block;
    b.kernel = &kernel, b.size = b.left = blockDim.x * blockDim.y * blockDim.z, b.started = 0;
    memset(b.dynamic, 0xff, shared);
    b.of_block = {};
    std::fill(std::begin(b.of_warp), std::end(b.of_warp), Barrier());
    std::fill(std::begin(b.lanes), std::end(b.lanes), nullptr);
    for (u32 fiber = 0; b.started < b.size; fiber++) {
        // Not all at the same place of a page, where they would meet in the cache.
        void** top = reinterpret_cast<void**>(b.stacks + (fiber + 1) * STACK - fiber % 31 * 128) - 2;
        *top = reinterpret_cast<void*>(enter);
        emulation_switch(&b.scheduler, top - 6);
    }
    if (b.left) help(processors());
    while (b.left) {
        bool asked = b.moved = false;
        for (u32 t = 0; t < b.size; t++) {
            Thread& thread = b.threads[t];
            if (thread.done || thread.at && thread.at->generation == thread.generation) continue;
            b.moved |= thread.at != nullptr, asked = true;
            b.current = t, threadIdx = thread.index;
            emulation_switch(&b.scheduler, thread.stack);
        }
        if (!asked) fprintf(stderr, "the threads of block %u wait for each other at different places\n", blockIdx.x), abort();
        if (!b.moved) help(RESIDENT), sched_yield();
    }
}

// Blocks that were used before.
inline std::mutex idle_lock;
inline std::vector<Block*> idle;
}  // namespace emulation

// Runs all blocks of a kernel, in this thread and in others if there is much to do or a block waits.
inline void launch(Index grid, Index size, u32 shared, const std::function<void()>& kernel) {
    using namespace emulation;
    const u64 blocks = u64(grid.x) * grid.y * grid.z, threads = u64(size.x) * size.y * size.z;
    if (threads > MOST || shared > DYNAMIC) fprintf(stderr, "a block of %llu threads with %u bytes\n", threads, shared), abort();
    std::atomic<u64> next = 0;
    std::mutex lock;
    std::vector<std::thread> beside;
    u32 workers = 1;
    std::function<void()> work;
    auto help = [&](u32 wanted) {
        std::lock_guard<std::mutex> held(lock);
        for (; workers < wanted && next < blocks; workers++) beside.emplace_back(work);
    };
    work = [&] {
        {
            std::lock_guard<std::mutex> held(idle_lock);
            if (idle.empty()) idle.push_back(new Block);
            block = idle.back(), idle.pop_back();
        }
        gridDim = grid, blockDim = size;
        for (u64 i; (i = next++) < blocks;) {
            blockIdx = {u32(i % grid.x), u32(i / grid.x % grid.y), u32(i / grid.x / grid.y)};
            run_block(shared, kernel, help);
        }
        std::lock_guard<std::mutex> held(idle_lock);
        idle.push_back(block);
    };
    if (blocks * threads > FEW) help(processors());
    work();
    for (;;) {
        std::thread one;
        {
            std::lock_guard<std::mutex> held(lock);
            if (beside.empty()) return;
            one = std::move(beside.back()), beside.pop_back();
        }
        one.join();
    }
}
inline void launch(u32 grid, u32 size, const std::function<void()>& kernel) { launch({grid}, {size}, emulation::DYNAMIC, kernel); }

inline float __uint_as_float(u32 v) { return bits<float>(v); }
inline u32 __float_as_uint(float v) { return bits<u32>(v); }
#ifdef ELEMENT_F16
inline float to_float(elem v) { return f16_to_float(v); }
inline elem of_float(float f) { return f16_of_float(f); }
#else
inline float to_float(elem v) { return bf16_to_float(v); }
inline elem of_float(float f) { return bf16_of_float(f); }
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

inline void __syncthreads() { emulation::meet(emulation::block->of_block, emulation::block->size, [] {}); }
inline void __syncwarp() { emulation::meet_lanes({}, [](emulation::Lane**) {}); }
// What lane `of` has; all bits are set of what none has.
template <typename T>
T shuffle(T v, u32 of) {
    u64 value = 0;
    memcpy(&value, &v, sizeof v);
    value = emulation::meet_lanes({value, of}, [](emulation::Lane** l) {
        for (u32 i = 0; i < emulation::LANES; i++)
            if (l[i]) l[i]->got = l[l[i]->of % emulation::LANES] ? l[l[i]->of % emulation::LANES]->value : ~0ull;
    });
    memcpy(&v, &value, sizeof v);
    return v;
}
template <typename T> T __shfl_sync(u32, T v, u32 lane) { return shuffle(v, lane); }
template <typename T> T __shfl_xor_sync(u32, T v, u32 mask, u32 = 32) { return shuffle(v, emulation::lane() ^ mask); }
template <typename T> T __shfl_up_sync(u32, T v, u32 by) { return shuffle(v, emulation::lane() - (emulation::lane() < by ? 0 : by)); }
// The same for all lanes.
template <typename F>
u32 reduce(u32 v, u32 sum, const F& with) {
    return u32(emulation::meet_lanes({v}, [&](emulation::Lane** l) {
        for (u32 i = 0; i < emulation::LANES; i++)
            if (l[i]) sum = with(sum, u32(l[i]->value), i);
        for (u32 i = 0; i < emulation::LANES; i++)
            if (l[i]) l[i]->got = sum;
    }));
}
inline u32 __ballot_sync(u32, bool v) { return reduce(v, 0, [](u32 sum, u32 v, u32 i) { return sum | v << i; }); }
inline u32 __reduce_max_sync(u32, u32 v) { return reduce(v, 0, [](u32 sum, u32 v, u32) { return std::max(sum, v); }); }
inline u32 __reduce_min_sync(u32, u32 v) { return reduce(v, ~0u, [](u32 sum, u32 v, u32) { return std::min(sum, v); }); }
inline u32 __match_any_sync(u32, u32 v) {
    return u32(emulation::meet_lanes({v}, [](emulation::Lane** l) {
        for (u32 i = 0; i < emulation::LANES; i++)
            for (u32 j = 0; l[i] && j < emulation::LANES; j++) l[i]->got |= u32(l[j] && l[i]->value == l[j]->value) << j;
    }));
}
inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulation::meet_lanes({.a = a, .b = b, .d = d}, [](emulation::Lane** l) {
        emulation::whole(l);
        float of_a[16][16], of_b[16][8];
        auto half = [](u32 word, u32 i) { return to_float(elem(word >> i * 16)); };
        for (u32 lane = 0; lane < emulation::LANES; lane++)
            for (u32 i = 0; i < 2; i++) {
                const u32 row = lane / 4, k = lane % 4 * 2 + i;
                for (u32 j = 0; j < 4; j++) of_a[row + j % 2 * 8][k + j / 2 * 8] = half(l[lane]->a[j], i);
                for (u32 j = 0; j < 2; j++) of_b[k + j * 8][row] = half(l[lane]->b[j], i);
            }
        for (u32 row = 0; row < 16; row++) {
            float sum[8] = {};
            for (u32 k = 0; k < 16; k++)
                for (u32 n = 0; n < 8; n++) sum[n] += of_a[row][k] * of_b[k][n];
            for (u32 n = 0; n < 8; n++) l[row % 8 * 4 + n / 2]->d[row / 8 * 2 + n % 2] += sum[n];
        }
    });
}
inline void load_matrices(u32 (&r)[4], const void* row) {
    emulation::meet_lanes({.row = row, .matrices = r}, [](emulation::Lane** l) {
        emulation::whole(l);
        for (u32 i = 0; i < emulation::LANES; i++)
            for (u32 m = 0; m < 4; m++) l[i]->matrices[m] = static_cast<const u32*>(l[m * 8 + i / 4]->row)[i % 4];
    });
}
inline void load_matrices_transposed(u32 (&r)[4], const void* row) {
    emulation::meet_lanes({.row = row, .matrices = r}, [](emulation::Lane** l) {
        emulation::whole(l);
        auto at = [&](u32 m, u32 row, u32 column) { return static_cast<const elem*>(l[m * 8 + row]->row)[column]; };
        for (u32 i = 0; i < emulation::LANES; i++)
            for (u32 m = 0; m < 4; m++) l[i]->matrices[m] = at(m, i % 4 * 2, i / 4) | u32(at(m, i % 4 * 2 + 1, i / 4)) << 16;
    });
}
inline void copy_async(void* to, const void* from, bool there) { emulation::self().open.push_back({to, there ? from : nullptr}); }
inline void copy_commit() {
    emulation::Thread& self = emulation::self();
    self.copies.push_back(std::move(self.open));
    self.open.clear();
}
template <int N>
void copy_wait() {
    for (auto& copies = emulation::self().copies; copies.size() > N; copies.pop_front())
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
