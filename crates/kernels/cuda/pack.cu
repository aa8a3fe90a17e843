// Parameters as they train, rounded and laid out as the products of a layer take them: stacks of slots in 16 bits, all of
// one rank, with zeros for the components that a slot lacks. Any number of stacks in one launch.
//
// Grid: any number of blocks; every block takes its share of each job in turn. Block: 256 threads. Shared memory: none.
// Registers (sm_80, sm_90a): 34, 33. Bound: bytes, 6 for each number.
// Last measured: has not run on a card.

constexpr u32 THREADS = 256, MAX_JOBS = 18;

// to[slot, outer, inner] = from[slot's first component + component, ..], where one of `outer` and `inner` counts components.
struct PackJob {
    const float* wide;     // the source in f32, or null
    const elem* narrow;    // the source in 16 bits, or null; with neither, all is zeros
    const u32* starts;     // [slots + 1] where the components of slots begin in the source; null: each slot has `rank`
    elem* to;              // [slots, outer, inner]
    u32 slots, outer, inner;  // inner a multiple of 8
    u32 rank;              // components of each slot in the source
    u32 width;             // numbers of a component
    u32 outer_step, inner_step;  // from one number to the next within a slot of the source
    u32 inner_is_rank;     // whether `inner` counts components, and not `outer`
};
static_assert(sizeof(PackJob) == 64);

struct Pack {
    PackJob jobs[MAX_JOBS];
    u32 count;
};
static_assert(sizeof(Pack) == 1160);

__device__ __forceinline__ void pack_job(const PackJob& job) {
    const u32 pieces = job.inner / 8, all = job.slots * job.outer * pieces;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < all; i += gridDim.x * THREADS) {
        // Neighbours read neighbours.
        const u32 fast = job.inner_is_rank ? job.outer : pieces, slow = job.inner_is_rank ? pieces : job.outer;
        const u32 first = i % fast, second = i / fast % slow, slot = i / fast / slow;
        const u32 outer = job.inner_is_rank ? first : second, inner = (job.inner_is_rank ? second : first) * 8;
        const u32 begin = job.starts ? job.starts[slot] : slot * job.rank;
        const u32 rank = job.starts ? job.starts[slot + 1] - begin : job.rank;
        const u64 from = u64(begin) * job.width + u64(outer) * job.outer_step;
        float values[8];
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            const bool there = (job.inner_is_rank ? inner + j : outer) < rank;
            const u64 at = from + u64(inner + j) * job.inner_step;
            values[j] = !there ? 0.0f : job.wide ? job.wide[at] : job.narrow ? to_float(job.narrow[at]) : 0.0f;
        }
        *reinterpret_cast<uint4*>(job.to + u64(i / fast / slow * job.outer + outer) * job.inner + inner) = pack_8(values);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) pack_stacks(const __grid_constant__ Pack p) {
    for (u32 job = 0; job < p.count; job++) pack_job(p.jobs[job]);
}
