// Number formats and small vectors for the CPU kernels.
//
// Plain C++ with GCC/Clang vector extensions: 8 floats at a time, which the compiler maps to
// AVX, two SSE or two NEON registers. No intrinsics here, so that any machine can compile it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace moss {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

// Inlined whatever the options of the caller: the compiler refuses where they differ (attention.h).
#define MOSS_FORCED static inline __attribute__((always_inline))

MOSS_FORCED f32x8 load8(const float* p) {
    f32x8 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

MOSS_FORCED void store8(float* p, f32x8 v) { std::memcpy(p, &v, sizeof v); }

MOSS_FORCED f32x8 splat8(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

static inline float sum8(f32x8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

static inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// IEEE binary16 stored in 16 bits. Subnormals are kept; the arithmetic below is exact.
struct Half {
    uint16_t bits;
    static inline float widen(uint16_t h) {
        const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
        const uint32_t rest = h & 0x7fffu;
        if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
        if (rest >= 0x0400u) return bits_to_float(sign | ((rest << 13) + 0x38000000u));
        const float small = (float)(int32_t)rest * 5.9604644775390625e-8f;  // 2^-24 a step
        return sign ? -small : small;
    }
    // Round to nearest, ties to even; what is too large becomes infinity.
    static inline uint16_t narrow(float x) {
        const uint32_t bits = float_to_bits(x);
        const uint32_t sign = (bits >> 16) & 0x8000u;
        uint32_t rest = bits & 0x7fffffffu;
        if (rest >= 0x7f800000u) return (uint16_t)(sign | (rest > 0x7f800000u ? 0x7e00u : 0x7c00u));
        if (rest >= 0x38800000u) {  // a normal half
            rest += 0xfffu + ((rest >> 13) & 1u);
            rest -= 0x38000000u;
            return (uint16_t)(sign | (rest >= 0x0f800000u ? 0x7c00u : rest >> 13));
        }
        if (rest < 0x33000000u) return (uint16_t)sign;  // below half a step
        const uint32_t shift = 126u - (rest >> 23);  // 14 .. 24
        const uint32_t mantissa = (rest & 0x7fffffu) | 0x800000u;
        const uint32_t kept = mantissa >> shift;
        const uint32_t lost = mantissa & ((1u << shift) - 1u);
        const uint32_t half = 1u << (shift - 1u);
        return (uint16_t)(sign | (kept + (lost > half || (lost == half && (kept & 1u)))));
    }
};

struct BFloat {
    uint16_t bits;
    static inline float widen(uint16_t b) { return bits_to_float((uint32_t)b << 16); }
};

// Widen n stored numbers to floats. The branches of Half::widen are written as selections here so
// that the loop becomes vector code.
static inline void widen_half(const uint16_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t h = from[i];
        const uint32_t sign = (h & 0x8000u) << 16;
        const uint32_t rest = h & 0x7fffu;
        const uint32_t normal = (rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u);
        const float small = (float)(int32_t)rest * 5.9604644775390625e-8f;
        const uint32_t magnitude = rest < 0x0400u ? float_to_bits(small) : normal;
        to[i] = bits_to_float(sign | magnitude);
    }
}

static inline void widen_bfloat(const uint16_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = BFloat::widen(from[i]);
}

}  // namespace moss
