// Floats of 16 bits as they lie in memory, from f32 to the nearest of them, of two the even one, and back.
#pragma once
#include <cmath>
#include <cstring>

template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline float f16_to_float(unsigned short v) {
    const unsigned sign = (v & 0x8000u) << 16, exponent = v >> 10 & 31, digits = v & 0x3ff;
    if (exponent == 31) return bits<float>(sign | 0x7f800000 | digits << 13);
    if (exponent) return bits<float>(sign | (exponent + 112) << 23 | digits << 13);
    const float small = digits * 0x1p-24f;
    return sign ? -small : small;
}
inline unsigned short f16_of_float(float f) {
    const unsigned v = bits<unsigned>(f), sign = v >> 16 & 0x8000;
    const float size = fabsf(f);
    if (f != f) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | unsigned(nearbyintf(size * 0x1p24f));
    return sign | ((v & 0x7fffffff) + 0xfff + (v >> 13 & 1) - (112 << 23)) >> 13;
}
inline float bf16_to_float(unsigned short v) { return bits<float>(unsigned(v) << 16); }
inline unsigned short bf16_of_float(float f) {
    const unsigned v = bits<unsigned>(f);
    return f != f ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
