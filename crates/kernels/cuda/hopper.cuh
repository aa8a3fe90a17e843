// What the grouped products of Hopper (sm_90a) share: its instructions, the ring of stages through which
// loading threads feed multiplying ones, the list of tiles, and the ways in and out of a tile.
//
// A block is specialised by warp. In the first warpgroup some warps gather rows (cp.async, swizzled by
// hand) and one thread may bring boxes of weights or rows (TMA), into a ring of stages of 64 places of the summed
// index; the two other warpgroups multiply (wgmma) and write. `full` counts who has filled a stage,
// `empty` the warps that have read it. The loading threads run ahead into the next tile while the others
// write; all roles walk the same list of tiles.

struct alignas(64) TensorMap {
    u64 opaque[16];
};
static_assert(sizeof(TensorMap) == 128);

constexpr u32 MAX_GROUPS = 512;
constexpr u32 THREADS = 384;
constexpr u32 STEP = 64;        // places of the summed index in a stage: 128 bytes, the swizzle's width
constexpr u32 LINE = STEP * 2;  // bytes of a line of a stage
constexpr u32 GATHERERS = 3;    // warps that gather rows beside a thread that brings boxes
constexpr u32 MULTIPLIERS = 8;  // warps that multiply
constexpr u32 BAND = 2048;      // rows whose tiles are worked on side by side
constexpr u32 PADDED = 72;      // elements of a row of results on their way out, free of bank conflicts

// A tile has TILE_ROWS rows. Each multiplying warpgroup computes PARTS parts of 64 of them times TILE_WIDTH rows
// of weights. With 128 rows and more the warpgroups share the weights, and the parts go to them in turn;
// with 64 they share the rows, and each has its own slice of weights. A slice holds as many rows of each
// of MATRICES matrices.
template <u32 MATRICES, u32 TILE_ROWS, u32 TILE_WIDTH>
struct Shape {
    static constexpr u32 ROWS = TILE_ROWS, WIDTH = TILE_WIDTH;
    static constexpr u32 SLICES = ROWS < 128 ? 2 : 1;
    static constexpr u32 PARTS = ROWS < 128 ? 1 : ROWS / 128;
    static constexpr u32 BOX = WIDTH / MATRICES;
    static constexpr u32 COLUMNS = BOX * SLICES;
    static constexpr u32 A_BYTES = ROWS * LINE;
    static constexpr u32 B_BYTES = SLICES * WIDTH * LINE;
    static constexpr u32 STAGE = A_BYTES + B_BYTES;
    static constexpr u32 STAGES = 200 * 1024 / STAGE;
    static constexpr u32 LAG = STAGES / 2;  // stages whose rows are on their way
    static constexpr u32 SHARED = 1024 + STAGES * STAGE + MULTIPLIERS * 16 * PADDED * 2;
};

// --- Hopper's instructions

__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes new barriers known to the copy engine.
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits for the end of the barrier's phase of this parity. The phase before the first one has parity 1.
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, u32 x, u32 y, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
                 "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, u32 x, u32 y, u32 z, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
                 "l"(&map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
                 : "memory");
}

// Copies 16 bytes of `a`, from place 16 * at on, as copy_async does: zeros where not `inside`, and nothing where not
// `there`. Written as one block, so that the compiler keeps `at` and not the addresses.
__device__ __forceinline__ void copy_piece(void* to, const elem* a, u32 at, bool inside, bool there) {
    asm volatile("{\n.reg .pred p;\n.reg .b64 from;\nsetp.ne.b32 p, %4, 0;\nmad.wide.u32 from, %2, 16, %1;\n"
                 "@p cp.async.cg.shared.global.L2::128B [%0], [from], 16, %3;\n}" ::"r"(shared_address(to)),
                 "l"(a), "r"(at), "r"(inside ? 16 : 0), "r"(u32(there))
                 : "memory");
}

// Shows this thread's writes of shared memory to wgmma.
__device__ __forceinline__ void show_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <u32 REGISTERS>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <u32 REGISTERS>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// Operand of wgmma: lines of 128 bytes, swizzled, in blocks of 8 lines that follow one another. The low
// bits are the address in units of 16 bytes, so that adding to the operand moves it. The lines of an
// upright operand are its rows, and hold 64 columns of the summed index. The lines of a turned operand
// are places of the summed index, and hold 64 of its rows; `next` bytes further lie the next 64 rows.
__device__ __forceinline__ u64 operand(const void* p, u32 next = 16) {
    return u64((shared_address(p) & 0x3ffff) >> 4) | u64(next >> 4) << 16 | u64(8 * LINE >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Keeps the compiler from moving accumulators across this point.
template <u32 N>
__device__ __forceinline__ void hold(float* d) {
#pragma unroll
    for (u32 i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#ifdef ELEMENT_F16
#define TYPES "f32.f16.f16"
#else
#define TYPES "f32.bf16.bf16"
#endif
#define LIST64 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST128 \
    LIST64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST256 \
    LIST128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" \
            ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define MULTIPLY(N, A, B, KEEP, TURN_A, TURN_B, ...)                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " KEEP ", 0;\n"                                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16." TYPES " {" LIST##N "}, " A ", " B ", p, 1, 1, " TURN_A ", " TURN_B ";\n}" \
                 : __VA_ARGS__                                                                             \
                 : "l"(a), "l"(b), "r"(keep), "n"(u32(A_TURNED)), "n"(u32(B_TURNED)))

// d = a * b^T, plus d where `keep` is not zero; a [64, 16], b [WIDTH, 16]. With g = lane / 4 + 16 * (warp % 4)
// and c = lane % 4 * 2, a thread's d[4 * i ..] are (g, 8 * i + c), (g, 8 * i + c + 1), and the same of row g + 8.
template <u32 WIDTH, bool A_TURNED, bool B_TURNED>
__device__ __forceinline__ void multiply(float* d, u64 a, u64 b, u32 keep) {
    if constexpr (WIDTH == 256) MULTIPLY(256, "%128", "%129", "%130", "%131", "%132", D32(0), D32(32), D32(64), D32(96));
    if constexpr (WIDTH == 128) MULTIPLY(128, "%64", "%65", "%66", "%67", "%68", D32(0), D32(32));
    if constexpr (WIDTH == 64) MULTIPLY(64, "%32", "%33", "%34", "%35", "%36", D32(0));
}

// --- The parts of a block

// A place in the ring, and the parity of the present round.
struct Place {
    u32 stage = 0, parity = 0;
    template <u32 STAGES>
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The tiles of a launch: by group, by band of row tiles, by column, by row, so that blocks which work at
// the same time share the rows of a band and a few columns of weights in the second cache. The row tiles
// of a group are equally deep in parts of 64 rows, as far as that goes, so that they take the same time.
template <u32 ROWS, u32 COLUMNS>
struct TileList {
    struct Tile {
        u32 group, row, end, column;  // its rows are row .. end, from column on
    };
    const u32 *starts, *before;  // first row of each group, row tiles before each group
    u32 groups, across;          // column tiles

    __device__ __forceinline__ u32 count() const { return before[groups] * across; }

    __device__ __forceinline__ Tile at(u32 index) const {
        u32 lowest = index / across, group = 0;
        for (u32 end = groups; end - group > 1;) {
            u32 middle = (group + end) / 2;
            if (before[middle] <= lowest) group = middle;
            else end = middle;
        }
        index -= before[group] * across;
        u32 deep = before[group + 1] - before[group];
        u32 band = index / (BAND / ROWS * across) * (BAND / ROWS);
        u32 height = min(BAND / ROWS, deep - band);
        index -= band * across;
        u32 start = starts[group], end = starts[group + 1];
        u32 rows = ((end - start + deep - 1) / deep + 63) / 64 * 64;
        u32 row = start + (band + index % height) * rows;
        return {group, row, min(row + rows, end), index / height * COLUMNS};
    }
};

// Fills `starts` and `before`; every thread of the block takes part.
template <u32 ROWS>
__device__ __forceinline__ void list_tiles(const u32* from, u32 groups, u32* starts, u32* before) {
    for (u32 i = threadIdx.x; i <= groups; i += THREADS) starts[i] = from[i];
    __syncthreads();
    if (threadIdx.x < WARP) {
        auto tiles = [&](u32 i) { return (starts[i + 1] - starts[i] + ROWS - 1) / ROWS; };
        u32 share = (groups + WARP - 1) / WARP;
        u32 first = min(threadIdx.x * share, groups), end = min(first + share, groups);
        u32 own = 0;
        for (u32 i = first; i < end; i++) own += tiles(i);
        u32 sum = own;
        for (u32 i = 1; i < WARP; i *= 2) {
            u32 lower = __shfl_up_sync(0xffffffffu, sum, i);
            if (threadIdx.x >= i) sum += lower;
        }
        if (threadIdx.x == WARP - 1) before[groups] = sum;
        sum -= own;
        for (u32 i = first; i < end; i++) {
            before[i] = sum;
            sum += tiles(i);
        }
    }
    __syncthreads();
}

// Readies the barriers of a ring, each stage of which is filled by `fillers`. The block synchronises before
// it uses them.
template <typename S>
__device__ __forceinline__ void ready_barriers(u64* full, u64* empty, u32 fillers) {
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < S::STAGES; i++) {
            barrier_init(&full[i], fillers);
            barrier_init(&empty[i], MULTIPLIERS);
        }
        barriers_ready();
    }
}

// The part of a gathering warp, the block's second and so on: rows of args.a [*, k] for each tile and then,
// with two PAIRS of operands, the same rows of args.a1. `steps` are those of one operand. Lines of rows that
// do not exist stay as they are: they reach only results that are not written.
template <typename S, u32 PAIRS, typename Arguments, typename List>
__device__ __forceinline__ void gather(const Arguments& args, const List& tiles, u32 count, u32 steps, u32 lane, Place& place, unsigned char* ring, u64* full, u64* empty) {
    // Eight neighbouring threads copy the 128 bytes of a row. A thread's rows are a multiple of 4 apart, so that
    // their places in the swizzle differ in one bit at most.
    constexpr u32 APART = GATHERERS * 4, LINES = (S::ROWS + APART - 1) / APART;
    u32 thread = threadIdx.x - WARP, line = thread / 8, piece = thread % 8;
    u32 even_offset = line * LINE + (piece ^ line % 8) * 16, odd_offset = even_offset ^ APART % 8 * 16;
    u32 pending = 0;  // stages whose rows were not yet reported
    auto report = [&] {
        if (lane == 0) barrier_arrive(&full[(place.stage + S::STAGES - pending) % S::STAGES]);
    };
    for (u32 index = blockIdx.x; index < count; index += gridDim.x) {
        auto tile = tiles.at(index);
        u32 first = tile.row + line;
        u32 from[LINES];  // in units of 16 bytes, which reach 64 GiB
#pragma unroll
        for (u32 i = 0; i < LINES; i++) {
            u32 row = first + APART * i;
            from[i] = row >= tile.end ? 0 : (args.rows ? args.rows[row] : row) * (args.lda / 8);
        }
        for (u32 step = 0; step < PAIRS * steps; step++) {
            // Reported before the wait for a free stage, which may depend on it.
            if (pending == S::LAG) {
                copy_wait<S::LAG - 1>();
                show_writes();
                __syncwarp();
                report();
            } else {
                pending++;
            }
            barrier_wait(&empty[place.stage], place.parity ^ 1);
            unsigned char *even = ring + place.stage * S::STAGE + even_offset, *odd = ring + place.stage * S::STAGE + odd_offset;
            u32 column = step * STEP + piece * 8;
            const elem* source = args.a;
            if constexpr (PAIRS == 2) {
                if (step >= steps) {
                    column -= steps * STEP;
                    source = args.a1;
                }
            }
            bool inside = column < args.k;
            const elem* a = source + (inside ? column : 0);
#pragma unroll
            for (u32 i = 0; i < LINES; i++)
                copy_piece((i % 2 ? odd : even) + i * APART * LINE, a, from[i], inside, first + APART * i < tile.end);
            copy_commit();
            place.advance<S::STAGES>();
        }
    }
    copy_wait<0>();
    show_writes();
    __syncwarp();
    for (; pending > 0; pending--) report();
}

// Sums the products of `steps` stages, at least one, from `place` on; a and b are operands in the first stage.
// PARTS parts of 64 rows follow one another in d, those of `a` 128 lines apart; with none the stages are passed by.
template <typename S, bool A_TURNED, bool B_TURNED, u32 PARTS = 1>
__device__ __forceinline__ void accumulate(float* d, u32 steps, u64 a_ring, u64 b_ring, Place& place, u64* full, u64* empty) {
    // 16 places of the summed index are 32 bytes along a line, or 16 lines.
    constexpr u32 A_MOVE = A_TURNED ? LINE : 2, B_MOVE = B_TURNED ? LINE : 2;
    constexpr u32 HELD = PARTS * S::WIDTH / 2;
    u32 lane = threadIdx.x % WARP, last = 0;
    for (u32 step = 0; step < steps; step++) {
        barrier_wait(&full[place.stage], place.parity);
        if constexpr (PARTS > 0) {
            u64 a = a_ring + place.stage * (S::STAGE >> 4), b = b_ring + place.stage * (S::STAGE >> 4);
            hold<HELD>(d);
            multiply_begin();
#pragma unroll
            for (u32 i = 0; i < STEP / 16; i++)
#pragma unroll
                for (u32 part = 0; part < PARTS; part++)
                    multiply<S::WIDTH, A_TURNED, B_TURNED>(d + part * (S::WIDTH / 2), a + A_MOVE * i + part * (128 * LINE >> 4), b + B_MOVE * i, step | i);
            multiply_commit();
            // The stage of the step before has been read once only the newest group is under way.
            multiply_wait<1>();
            hold<HELD>(d);
        }
        if (step > 0 && lane == 0) barrier_arrive(&empty[last]);
        last = place.stage;
        place.advance<S::STAGES>();
    }
    if constexpr (PARTS > 0) {
        multiply_wait<0>();
        hold<HELD>(d);
    }
    if (lane == 0) barrier_arrive(&empty[last]);
}

// Writes 16 rows of COLUMNS results of one warp, of which `rows` and `columns` exist, through `staging`.
// value(i) is this thread's accumulator i.
template <u32 COLUMNS, typename Value>
__device__ __forceinline__ void write(elem* staging, elem* y, u32 ldy, int rows, int columns, Value value) {
    constexpr u32 PIECES = COLUMNS / 8;  // of 16 bytes, in a row
    u32 lane = threadIdx.x % WARP;
    elem* to = staging + lane / 4 * PADDED + lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        *(u32*)(to + 8 * i) = pack(value(4 * i), value(4 * i + 1));
        *(u32*)(to + 8 * i + 8 * PADDED) = pack(value(4 * i + 2), value(4 * i + 3));
    }
    __syncwarp();
    u32 column = lane % PIECES * 8;
#pragma unroll
    for (u32 i = 0; i < 16; i += WARP / PIECES) {
        u32 row = i + lane / PIECES;
        if (int(row) < rows && int(column) < columns) *(uint4*)(y + u64(row) * ldy + column) = *(const uint4*)(staging + row * PADDED + column);
    }
    __syncwarp();
}
