// Stands in for NVIDIA's driver: one device of compute capability 8.0, which is the host with device.h. Work is done when
// it is queued. Behind each piece of memory lies some that cannot be touched. Candle's kernels, which a program holds as
// PTX, are compiled of their text, in the folder that LIGHTMOE_CANDLE_KERNELS names, instead.
#include "library.h"
#include <array>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sys/mman.h>
#include <vector>

namespace {
typedef unsigned long long Address;
typedef std::function<void()>* (*Bind)(void**);
typedef void (*Run)(const unsigned*, const unsigned*, unsigned, const std::function<void()>&);
typedef std::vector<std::function<void()>> Graph;
struct Module { void* library; Run run; };
struct Function { Bind bind; Run run; unsigned shared; };

enum { DONE = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };
constexpr size_t PAGE = 4096;
constexpr unsigned SHARED = 48 << 10, MOST_SHARED = 163 << 10;
std::mutex lock;
std::map<Address, std::pair<void*, size_t>> taken;
Graph* recorded = nullptr;
thread_local void* current = nullptr;
int one;

int take(Address* at, size_t size) {
    const size_t data = (size + 15) / 16 * 16, pages = (data + PAGE - 1) / PAGE * PAGE;
    void* all = mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(static_cast<char*>(all) + pages, PAGE, PROT_NONE);
    std::lock_guard<std::mutex> held(lock);
    *at = reinterpret_cast<Address>(all) + pages - data;
    taken[*at] = {all, pages + PAGE};
    return DONE;
}
int leave(Address at) {
    std::lock_guard<std::mutex> held(lock);
    auto found = taken.find(at);
    if (found == taken.end()) return fprintf(stderr, "memory at %llx was not taken\n", at), abort(), NOT_FOUND;
    munmap(found->second.first, found->second.second);
    taken.erase(found);
    return DONE;
}
void* at(Address a) { return reinterpret_cast<void*>(a); }
// The library of candle's kernels that are this PTX.
Library of_candle(const std::string& ptx) {
    // A kernel of each file.
    static const char* const FILES[][2] = {
        {"affine_u8", "affine"}, {"badd_u8", "binary"}, {"cast_u8_u8", "cast"}, {"fill_u8", "fill"}, {"is_u8_u8", "indexing"},
        {"sum_f32", "reduce"}, {"asort_asc_u8", "sort"}, {"where_u8_u8", "ternary"}, {"usqr_f32", "unary"},
    };
    const char* named = getenv("LIGHTMOE_CANDLE_KERNELS");
    if (!named) return {"", "LIGHTMOE_CANDLE_KERNELS names no folder"};
    const fs::path sources = fs::absolute(named);
    // What they include, by a number: a change makes another library.
    std::string shared;
    for (const char* name : {"cuda_utils.cuh", "compatibility.cuh", "binary_op_macros.cuh"}) shared += read(sources / name);
    const std::string options = "-D__CUDA_ARCH__=800 -D__CUDACC_VER_MAJOR__=13 -D__CUDACC_VER_MINOR__=0 -DINCLUDED=" +
                                std::to_string(std::hash<std::string>()(shared)) + " -I" + (folder() / "include").string() + " -I" + sources.string();
    for (const auto& [kernel, file] : FILES)
        if (ptx.find(std::string(".entry ") + kernel + "(") != std::string::npos) return make(read(sources / (std::string(file) + ".cu")), "candle.h", options);
    return {"", "these kernels of candle have no stand-in"};
}
}  // namespace

extern "C" {
int cuInit(unsigned) { return DONE; }
int cuDriverGetVersion(int* version) { return *version = 1, DONE; }
int cuGetErrorName(int, const char** text) { return *text = "of the stand-in for the driver", DONE; }
int cuGetErrorString(int code, const char** text) { return *text = code == INVALID_VALUE ? "invalid value" : code == OUT_OF_MEMORY ? "out of memory" : "not found", DONE; }
int cuDeviceGet(int* device, int) { return *device = 0, DONE; }
int cuDeviceGetCount(int* count) { return *count = 1, DONE; }
int cuDeviceGetName(char* name, int size, int) { return snprintf(name, size, "the host"), DONE; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = 3; break;           // multiprocessors
        case 75: *value = 8; break;           // compute capability
        case 97: *value = MOST_SHARED; break;   // shared memory of a block
        case 115: *value = 1; break;          // pools of memory
        default: *value = 0;
    }
    return DONE;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &one, DONE; }
int cuDevicePrimaryCtxRelease_v2(int) { return DONE; }
int cuCtxSetCurrent(void* context) { return current = context, DONE; }
int cuCtxGetCurrent(void** context) { return *context = current, DONE; }
int cuCtxSynchronize() { return DONE; }
int cuStreamCreate(void** stream, unsigned) { return *stream = new int, DONE; }
int cuStreamDestroy_v2(void* stream) { return delete static_cast<int*>(stream), DONE; }
int cuStreamSynchronize(void*) { return DONE; }
int cuStreamWaitEvent(void*, void*, unsigned) { return DONE; }
int cuEventCreate(void** event, unsigned) { return *event = new int, DONE; }
int cuEventDestroy_v2(void* event) { return delete static_cast<int*>(event), DONE; }
int cuEventRecord(void*, void*) { return DONE; }
int cuEventSynchronize(void*) { return DONE; }
int cuEventElapsedTime_v2(float* time, void*, void*) { return *time = 1.0f, DONE; }
int cuDeviceGetDefaultMemPool(void** pool, int) { return *pool = &one, DONE; }
int cuMemPoolSetAttribute(void*, int, void*) { return DONE; }
int cuMemGetInfo_v2(size_t* left, size_t* all) { return *left = *all = size_t(8) << 30, DONE; }
int cuMemAlloc_v2(Address* a, size_t size) { return take(a, size); }
int cuMemAllocAsync(Address* a, size_t size, void*) { return take(a, size); }
int cuMemFree_v2(Address a) { return leave(a); }
int cuMemFreeAsync(Address a, void*) { return leave(a); }
int cuMemsetD8_v2(Address to, unsigned char v, size_t n) { return memset(at(to), v, n), DONE; }
int cuMemsetD8Async(Address to, unsigned char v, size_t n, void*) { return memset(at(to), v, n), DONE; }
int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t n, void*) { return memcpy(at(to), from, n), DONE; }
int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t n, void*) { return memcpy(to, at(from), n), DONE; }
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t n, void*) { return memcpy(at(to), at(from), n), DONE; }
int cuModuleLoadData(void** module, const void* image) {
    const std::string given = static_cast<const char*>(image);
    const Library made = given.find(".entry ") == std::string::npos ? Library{given, ""} : of_candle(given);
    void* library = made.path.empty() ? nullptr : dlopen(made.path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) return fprintf(stderr, "%s\n", made.path.empty() ? made.log.c_str() : dlerror()), NOT_FOUND;
    *module = new Module{library, reinterpret_cast<Run>(dlsym(library, "launch_blocks"))};
    return DONE;
}
// Recorded work may still call it, so the library stays.
int cuModuleUnload(void* module) { return delete static_cast<Module*>(module), DONE; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
    const Module& of = *static_cast<Module*>(module);
    const auto bind = reinterpret_cast<Bind>(dlsym(of.library, (std::string("bind_") + name).c_str()));
    if (!bind) return NOT_FOUND;
    *function = new Function{bind, of.run, SHARED};
    return DONE;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute == 8) static_cast<Function*>(function)->shared = value;  // dynamic shared memory
    return attribute == 8 && unsigned(value) > MOST_SHARED ? INVALID_VALUE : DONE;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { return *blocks = 2, DONE; }
int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void*, int, size_t, unsigned) { return *blocks = 2, DONE; }
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void*, void** arguments, void**) {
    const Function& of = *static_cast<Function*>(function);
    const std::array<unsigned, 3> grid{gx, gy, gz}, block{bx, by, bz};
    const unsigned long long threads = 1ull * bx * by * bz;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !threads || threads > 1024 || shared > of.shared) return INVALID_VALUE;
    const std::shared_ptr<std::function<void()>> kernel(of.bind(arguments));
    auto work = [=, run = of.run] { run(grid.data(), block.data(), shared, *kernel); };
    if (recorded) recorded->push_back(work);
    else work();
    return DONE;
}
int cuStreamBeginCapture_v2(void*, int) { return recorded = new Graph, DONE; }
int cuStreamEndCapture(void*, void** graph) { return *graph = recorded, recorded = nullptr, DONE; }
int cuStreamIsCapturing(void*, int* status) { return *status = recorded != nullptr, DONE; }
int cuGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long) { return *ready = graph, DONE; }
int cuGraphUpload(void*, void*) { return DONE; }
int cuGraphGetNodes(void* graph, void**, size_t* count) { return *count = static_cast<Graph*>(graph)->size(), DONE; }
int cuGraphLaunch(void* graph, void*) {
    for (const auto& work : *static_cast<Graph*>(graph)) work();
    return DONE;
}
int cuGraphExecDestroy(void*) { return DONE; }
int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), DONE; }
// What programs are linked with, but what nothing here calls.
#define UNUSED(name) int name() { return fprintf(stderr, #name " has no stand-in\n"), abort(), NOT_FOUND; }
UNUSED(cuCtxDestroy_v2)
UNUSED(cuMemcpyPeerAsync)
UNUSED(cuModuleLoad)
UNUSED(cuTensorMapEncodeTiled)
}
