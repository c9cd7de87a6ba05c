// One block of a rounded product (see rounded_plain.h) on x86-64: AVX2, AVX-VNNI and AVX-512 VNNI.
//
// All of them are compiled into every program, by target attributes; rounded.h chooses at run time. A chunk of
// 64 bytes is 16 rows times 4 bytes: two registers of 8 rows, or one of 16. AVX-VNNI and AVX-512 have an
// instruction for four products of an unsigned and a signed byte, summed in 32 bits. AVX2 has two for pairs
// of products, summed in 16 bits with saturation:
//   int4  15 * 127 * 8 fits in 16 bits: 4 chunks (low and high nibbles) are summed there, then widened
//   int8  255 * 127 * 2 does not fit; |code - 128| * 127 * 2 does, with the sign moved over to x
#pragma once
#include "rounded_plain.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define MOSS_AVX2 __attribute__((target("avx2,f16c")))
#define MOSS_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")))
#define MOSS_INLINE inline __attribute__((always_inline))

namespace moss {

constexpr int64_t kFetchAhead = 4096;  // bytes: the processor's own prefetching stops at the end of a page

// The scales and zero points of a group, 8 rows each. Zero points are those of the registers of unpack8, so for
// int8 128 less, in the low half of each lane.
struct Group8 {
    __m256 scale[2];
    __m256i zero[2];
};

template <int BITS>
MOSS_AVX2 static MOSS_INLINE Group8 widen_group(const RoundedBlock& b) {
    Group8 g;
    const __m256i first = _mm256_set1_epi32(BITS == 8 ? (uint16_t)(1 - 128) : 1);
    for (int h = 0; h < 2; h++) {
        g.scale[h] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)b.scales + h));
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(b.zeros + (BITS == 8 ? 8 * h : 0))));
        const __m256i stored = BITS == 8 ? bytes
                               : h == 0  ? _mm256_and_si256(bytes, _mm256_set1_epi32(15))
                                         : _mm256_srli_epi32(bytes, 4);
        g.zero[h] = _mm256_add_epi16(stored, first);
    }
    return g;
}

MOSS_AVX2 static MOSS_INLINE __m256i four_codes(const int8_t* x) {
    int32_t codes;
    std::memcpy(&codes, x, 4);
    return _mm256_set1_epi32(codes);
}

// What a sum of code * x starts with: - zero * sum of x. Both fit in 16 bits.
MOSS_AVX2 static MOSS_INLINE __m256i minus_zeros(__m256i zero, int32_t sum) {
    return _mm256_madd_epi16(zero, _mm256_set1_epi32(-sum));
}

MOSS_AVX2 static MOSS_INLINE void add_total(float* total, __m256i whole, __m256 scale, float step) {
    __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(step));
    asm("" : "+x"(factor));  // keep_as_is, in a register
    __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), factor);
    asm("" : "+x"(part));
    _mm256_storeu_ps(total, _mm256_add_ps(_mm256_loadu_ps(total), part));
}

// The registers of a chunk: int4: low and high nibbles of rows 0-7, then of rows 8-15;
// int8: code - 128 and its magnitude of rows 0-7, then of rows 8-15.
template <int BITS>
MOSS_AVX2 static MOSS_INLINE void unpack8(const uint8_t* from, __m256i (&v)[4]) {
    for (int h = 0; h < 2; h++) {
        const __m256i raw = _mm256_loadu_si256((const __m256i*)from + h);
        if (BITS == 4) {
            const __m256i mask = _mm256_set1_epi8(15);
            v[2 * h] = _mm256_and_si256(raw, mask);
            v[2 * h + 1] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
        } else {
            v[2 * h] = _mm256_xor_si256(raw, _mm256_set1_epi8(-128));
            v[2 * h + 1] = _mm256_abs_epi8(v[2 * h]);
        }
    }
}

template <int BITS, bool READY>
MOSS_AVX2 static MOSS_INLINE void load_chunk(const uint8_t* codes, int64_t c, __m256i (&v)[4]) {
    if (READY) {
        for (int i = 0; i < 4; i++) v[i] = _mm256_load_si256((const __m256i*)(codes + c * 128) + i);
    } else {
        _mm_prefetch((const char*)codes + c * 64 + kFetchAhead, _MM_HINT_T0);
        unpack8<BITS>(codes + c * 64, v);
    }
}

// Up to 4 chunks of int4, in 16 bits, then added to `sum`.
template <int TOKENS, bool READY, int CHUNKS>
MOSS_AVX2 static MOSS_INLINE void multiply_int4(const uint8_t* codes, int64_t c, const int8_t* x, int64_t stride,
                                                __m256i (&sum)[TOKENS][2]) {
    __m256i narrow[TOKENS][2];
#pragma GCC unroll 4
    for (int i = 0; i < CHUNKS; i++) {
        __m256i v[4];
        load_chunk<4, READY>(codes, c + i, v);
        for (int t = 0; t < TOKENS; t++) {
            const int8_t* at = x + t * stride + (c + i) * 8;
            const __m256i low = four_codes(at), high = four_codes(at + 4);
            for (int h = 0; h < 2; h++) {
                const __m256i a = _mm256_maddubs_epi16(v[2 * h], low), b = _mm256_maddubs_epi16(v[2 * h + 1], high);
                narrow[t][h] = i == 0 ? _mm256_add_epi16(a, b) : _mm256_add_epi16(_mm256_add_epi16(narrow[t][h], a), b);
            }
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < 2; h++) sum[t][h] = _mm256_add_epi32(sum[t][h], _mm256_madd_epi16(narrow[t][h], ones));
}

template <int TOKENS, bool READY>
MOSS_AVX2 static MOSS_INLINE void multiply_int8(const uint8_t* codes, int64_t c, const int8_t* x, int64_t stride,
                                                __m256i (&sum)[TOKENS][2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i v[4];
    load_chunk<8, READY>(codes, c, v);
    for (int t = 0; t < TOKENS; t++) {
        const __m256i four = four_codes(x + t * stride + c * 4);
        for (int h = 0; h < 2; h++) {
            const __m256i pairs = _mm256_maddubs_epi16(v[2 * h + 1], _mm256_sign_epi8(four, v[2 * h]));
            sum[t][h] = _mm256_add_epi32(sum[t][h], _mm256_madd_epi16(pairs, ones));
        }
    }
}

template <int BITS, int TOKENS, bool READY>
MOSS_AVX2 static MOSS_INLINE void avx2_block(const RoundedBlock& b, const uint8_t* codes, const Group8& g) {
    __m256i sum[TOKENS][2];
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < 2; h++) sum[t][h] = minus_zeros(g.zero[h], b.sums[t]);
    int64_t c = 0;
    if (BITS == 4) {
        for (; c + 4 <= b.chunks; c += 4) multiply_int4<TOKENS, READY, 4>(codes, c, b.x, b.stride, sum);
        for (; c < b.chunks; c++) multiply_int4<TOKENS, READY, 1>(codes, c, b.x, b.stride, sum);
    } else {
        for (; c < b.chunks; c++) multiply_int8<TOKENS, READY>(codes, c, b.x, b.stride, sum);
    }
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < 2; h++) add_total(b.total + t * 16 + 8 * h, sum[t][h], g.scale[h], b.steps[t]);
}

static inline void fetch_group(const RoundedBlock& b) {
    _mm_prefetch((const char*)b.scales + b.ahead, _MM_HINT_T0);
    _mm_prefetch((const char*)b.zeros + b.ahead, _MM_HINT_T0);
}

template <int BITS, int TOKENS>
MOSS_AVX2 static void avx2_few(const RoundedBlock& b) {
    fetch_group(b);
    avx2_block<BITS, TOKENS, false>(b, b.codes, widen_group<BITS>(b));
}

template <int BITS>
MOSS_AVX2 static void avx2_prepare(const RoundedBlock& b, ReadyBlock& to) {
    fetch_group(b);
    const Group8 g = widen_group<BITS>(b);
    for (int h = 0; h < 2; h++) {
        _mm256_store_ps(to.scales + 8 * h, g.scale[h]);
        _mm256_store_si256((__m256i*)to.zeros + h, g.zero[h]);
    }
    for (int64_t c = 0; c < b.chunks; c++) {
        __m256i v[4];
        load_chunk<BITS, false>(b.codes, c, v);
        for (int i = 0; i < 4; i++) _mm256_store_si256((__m256i*)(to.codes + c * 128) + i, v[i]);
    }
}

MOSS_AVX2 static MOSS_INLINE Group8 load_group(const ReadyBlock& r) {
    Group8 g;
    for (int h = 0; h < 2; h++) {
        g.scale[h] = _mm256_load_ps(r.scales + 8 * h);
        g.zero[h] = _mm256_load_si256((const __m256i*)r.zeros + h);
    }
    return g;
}

template <int BITS, int TOKENS>
MOSS_AVX2 static void avx2_ready(const RoundedBlock& b, const ReadyBlock& r) {
    avx2_block<BITS, TOKENS, true>(b, r.codes, load_group(r));
}

template <int BITS>
static inline RoundedKernels avx2_kernels() {
    return {{avx2_few<BITS, 1>, avx2_few<BITS, 2>, avx2_few<BITS, 3>, avx2_few<BITS, 4>},
            avx2_prepare<BITS>, 4,
            {avx2_ready<BITS, 1>, avx2_ready<BITS, 2>, avx2_ready<BITS, 3>, avx2_ready<BITS, 4>}};
}

}  // namespace moss
#endif
