// Floats of 8 bits are named by candle's kernels, but nothing here computes with them.
#pragma once
#include "cuda_fp16.h"
#include <stdlib.h>

enum { __NV_E4M3 };
struct __nv_fp8_e4m3 {
    unsigned char __x;

    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float) { abort(); }
};
inline __half __nv_cvt_fp8_to_halfraw(unsigned char, int) { abort(); }
