// Numbers of 16 bits as CUDA's language has them: computed with as f32, and rounded after each operation.
#pragma once
#include "floats.h"
#include <type_traits>

template <unsigned short (*Of)(float), float (*To)(unsigned short)>
struct SmallFloat {
    unsigned short __x;

    SmallFloat() = default;
    SmallFloat(float v) : __x(Of(v)) {}
    template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
    SmallFloat(T v) : __x(Of(odd(double(v)))) {}
    operator float() const { return To(__x); }

    friend SmallFloat operator+(SmallFloat a, SmallFloat b) { return float(a) + float(b); }
    friend SmallFloat operator-(SmallFloat a, SmallFloat b) { return float(a) - float(b); }
    friend SmallFloat operator*(SmallFloat a, SmallFloat b) { return float(a) * float(b); }
    friend SmallFloat operator/(SmallFloat a, SmallFloat b) { return float(a) / float(b); }
    friend SmallFloat operator-(SmallFloat a) { return -float(a); }
    SmallFloat& operator+=(SmallFloat other) { return *this = *this + other; }
    SmallFloat& operator*=(SmallFloat other) { return *this = *this * other; }
    friend bool operator==(SmallFloat a, SmallFloat b) { return float(a) == float(b); }
    friend bool operator!=(SmallFloat a, SmallFloat b) { return float(a) != float(b); }
    friend bool operator<(SmallFloat a, SmallFloat b) { return float(a) < float(b); }
    friend bool operator<=(SmallFloat a, SmallFloat b) { return float(a) <= float(b); }
    friend bool operator>(SmallFloat a, SmallFloat b) { return float(a) > float(b); }
    friend bool operator>=(SmallFloat a, SmallFloat b) { return float(a) >= float(b); }

private:
    // An f32 beside `v` whose last digit is odd if it is not `v` itself, so that rounding it rounds `v`.
    static float odd(double v) {
        const float near = float(v);
        if (near == v) return near;
        return bits<float>(bits<unsigned>(near) - (fabs(near) > fabs(v)) | 1);
    }
};
typedef SmallFloat<f16_of_float, f16_to_float> __half;

template <auto Of, auto To> bool __hisnan(SmallFloat<Of, To> v) { return float(v) != float(v); }
template <auto Of, auto To> SmallFloat<Of, To> __habs(SmallFloat<Of, To> v) { return fabsf(v); }
template <auto Of, auto To> SmallFloat<Of, To> hsqrt(SmallFloat<Of, To> v) { return sqrtf(v); }
template <auto Of, auto To> SmallFloat<Of, To> hcos(SmallFloat<Of, To> v) { return cosf(v); }
template <auto Of, auto To> SmallFloat<Of, To> hsin(SmallFloat<Of, To> v) { return sinf(v); }
template <auto Of, auto To> SmallFloat<Of, To> hlog(SmallFloat<Of, To> v) { return logf(v); }
template <auto Of, auto To> SmallFloat<Of, To> hexp(SmallFloat<Of, To> v) { return expf(v); }
// What is no number wins.
template <auto Of, auto To>
SmallFloat<Of, To> __hmax_nan(SmallFloat<Of, To> a, SmallFloat<Of, To> b) { return __hisnan(a) || a > b ? a : b; }
template <auto Of, auto To>
SmallFloat<Of, To> __hmin_nan(SmallFloat<Of, To> a, SmallFloat<Of, To> b) { return __hisnan(a) || a < b ? a : b; }

inline float __half2float(__half v) { return v; }
inline __half __float2half(float v) { return v; }
inline unsigned short __half_as_ushort(__half v) { return v.__x; }
inline __half __ushort_as_half(unsigned short v) { return bits<__half>(v); }
