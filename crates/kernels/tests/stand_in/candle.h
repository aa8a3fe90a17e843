// What candle's kernels ask of a device beside what device.h gives: integers and floats that many threads change, and
// functions of CUDA's mathematics that C does not have.
#pragma once
#include "device.h"

// Puts `change` of what is there in its place, and gives what was there.
template <typename T, typename F>
T replace(T* at, const F& change) {
    T old, next;
    __atomic_load(at, &old, __ATOMIC_RELAXED);
    do next = change(old);
    while (!__atomic_compare_exchange(at, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
template <typename T> T atomicAdd(T* at, std::type_identity_t<T> v) { return replace(at, [=](T old) -> T { return old + v; }); }
template <typename T> T atomicMin(T* at, std::type_identity_t<T> v) { return replace(at, [=](T old) { return min(old, v); }); }
template <typename T> T atomicMax(T* at, std::type_identity_t<T> v) { return replace(at, [=](T old) { return max(old, v); }); }
template <typename T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    __atomic_compare_exchange(at, &expected, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

inline float __int_as_float(int v) { return bits<float>(v); }
inline int __float_as_int(float v) { return bits<int>(v); }
inline double __longlong_as_double(long long v) { return bits<double>(v); }
inline long long __double_as_longlong(double v) { return bits<long long>(v); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double normcdf(double v) { return 0.5 * erfc(-v * M_SQRT1_2); }
inline float normcdff(float v) { return float(normcdf(v)); }
