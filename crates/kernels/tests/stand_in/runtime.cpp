// Stands in for CUDA's runtime, which kernels of candle that are linked with the program are registered with, and which
// nothing here calls.
#include <cstdio>
#include <cstdlib>

extern "C" {
void** __cudaRegisterFatBinary(void*) {
    static void* registered;
    return &registered;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaRegisterFunction() {}
void __cudaRegisterVar() {}
void __cudaUnregisterFatBinary(void**) {}
#define UNUSED(name) int name() { return fprintf(stderr, #name " has no stand-in\n"), abort(), 1; }
UNUSED(__cudaGetKernel)
UNUSED(__cudaLaunchKernel_ptsz)
UNUSED(__cudaPopCallConfiguration)
UNUSED(__cudaPushCallConfiguration)
UNUSED(cudaDeviceGetAttribute)
UNUSED(cudaFree)
UNUSED(cudaFreeAsync_ptsz)
UNUSED(cudaFuncGetAttributes)
UNUSED(cudaFuncSetAttribute)
UNUSED(cudaGetDevice)
UNUSED(cudaGetDeviceCount)
UNUSED(cudaGetErrorName)
UNUSED(cudaGetErrorString)
UNUSED(cudaGetLastError)
UNUSED(cudaMalloc)
UNUSED(cudaMallocAsync_ptsz)
UNUSED(cudaMemsetAsync_ptsz)
UNUSED(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)
UNUSED(cudaPeekAtLastError)
UNUSED(cudaSetDevice)
UNUSED(cudaStreamSynchronize_ptsz)
}
