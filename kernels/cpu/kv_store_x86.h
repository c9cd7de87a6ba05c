// The KV cache's numbers with AVX2 and F16C, where a row is whole groups of 32 channels; see kv_store.h.
//
// For one query the stored numbers are widened in registers and used at once; for several they are widened
// into memory, which costs as much as one query and is shared.
#pragma once
#include "kv_store.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define MOSS_AVX2 __attribute__((target("avx2,f16c")))
#define MOSS_AVX2_INLINE MOSS_AVX2 static inline __attribute__((always_inline))
#endif

namespace moss {

#if defined(__x86_64__)

constexpr int64_t kGroup = 32;  // channels
constexpr int kSideBySide = 4;  // rows

MOSS_ORDERED

// A group of channels: where it begins in a row, what all its numbers need, and eight of them as floats.
struct StoredFloats {
    static constexpr int64_t bytes = 4 * kGroup;
    MOSS_AVX2_INLINE __m256 prepare(const KVRows&, const uint8_t*, int64_t) { return _mm256_setzero_ps(); }
    MOSS_AVX2_INLINE __m256 eight(const uint8_t* group, int i, __m256) {
        return _mm256_loadu_ps((const float*)group + 8 * i);
    }
};

struct StoredHalves {
    static constexpr int64_t bytes = 2 * kGroup;
    MOSS_AVX2_INLINE __m256 prepare(const KVRows&, const uint8_t*, int64_t) { return _mm256_setzero_ps(); }
    MOSS_AVX2_INLINE __m256 eight(const uint8_t* group, int i, __m256) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)group + i));
    }
};

struct StoredCodes {
    static constexpr int64_t bytes = kGroup;
    MOSS_AVX2_INLINE __m256 prepare(const KVRows& s, const uint8_t* row, int64_t g) {
        uint16_t bits;
        std::memcpy(&bits, row + s.width + 2 * g, sizeof bits);
        return _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)((uint32_t)bits << 16)));
    }
    MOSS_AVX2_INLINE __m256 eight(const uint8_t* group, int i, __m256 step) {
        const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(group + 8 * i)));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(codes), step);
    }
};

// Group `number` of what is read now stands for as many bytes of what is read later.
template <class Stored>
MOSS_AVX2_INLINE void fetch_group(const KVRows& s, const uint8_t* ahead, int64_t number) {
    const int64_t bytes = s.row_bytes / (s.width / kGroup);
    for (int64_t i = 0; i < Stored::bytes; i += 64) fetch(ahead + number * bytes + i);
}

template <class Stored>
MOSS_AVX2 static void widen_avx2(const KVRows& s, const uint8_t* rows, int64_t count, const uint8_t* ahead, float* to) {
    const int64_t groups = s.width / kGroup;
    for (int64_t r = 0; r < count; r++, rows += s.row_bytes) {
        for (int64_t g = 0; g < groups; g++, to += kGroup) {
            fetch_group<Stored>(s, ahead, r * groups + g);
            const __m256 step = Stored::prepare(s, rows, g);
            for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + 8 * i, Stored::eight(rows + g * Stored::bytes, i, step));
        }
    }
}

// Scores of one query with eight keys, a few rows side by side: nearly in the order of their addresses.
template <class Stored>
MOSS_AVX2 static void score_avx2(const KVRows& s, const float* query, const uint8_t* rows, const uint8_t* ahead,
                                 float* to) {
    const int64_t groups = s.width / kGroup;
    f32x8 each[8];
    for (int first = 0; first < 8; first += kSideBySide) {
        __m256 sum[kSideBySide];
        for (int r = 0; r < kSideBySide; r++) sum[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; g++) {
            for (int r = 0; r < kSideBySide; r++) {
                const uint8_t* row = rows + (first + r) * s.row_bytes;
                fetch_group<Stored>(s, ahead, first * groups + g * kSideBySide + r);
                const __m256 step = Stored::prepare(s, row, g);
                for (int i = 0; i < 4; i++) {
                    const __m256 key = Stored::eight(row + g * Stored::bytes, i, step);
                    sum[r] = _mm256_add_ps(sum[r], _mm256_mul_ps(_mm256_loadu_ps(query + g * kGroup + 8 * i), key));
                }
            }
        }
        for (int r = 0; r < kSideBySide; r++) each[first + r] = (f32x8)sum[r];
    }
    store8(to, sum_each(each));
}

// sums += weights[row] * values[row], row after row.
template <class Stored>
MOSS_AVX2 static void add_avx2(const KVRows& s, const float* weights, const uint8_t* rows, int64_t count,
                               const uint8_t* ahead, float* sums) {
    const int64_t groups = s.width / kGroup;
    for (int64_t first = 0; first < count; first += kSideBySide) {
        const int64_t some = count - first < kSideBySide ? count - first : kSideBySide;
        for (int64_t g = 0; g < groups; g++) {
            __m256 sum[4];
            for (int i = 0; i < 4; i++) sum[i] = _mm256_loadu_ps(sums + g * kGroup + 8 * i);
            for (int64_t r = first; r < first + some; r++) {
                const uint8_t* row = rows + r * s.row_bytes;
                fetch_group<Stored>(s, ahead, first * groups + g * some + r - first);
                const __m256 step = Stored::prepare(s, row, g), weight = _mm256_set1_ps(weights[r]);
                for (int i = 0; i < 4; i++) {
                    const __m256 value = Stored::eight(row + g * Stored::bytes, i, step);
                    sum[i] = _mm256_add_ps(sum[i], _mm256_mul_ps(weight, value));
                }
            }
            for (int i = 0; i < 4; i++) _mm256_storeu_ps(sums + g * kGroup + 8 * i, sum[i]);
        }
    }
}

MOSS_AVX2 static void narrow_halves_avx2(const KVRows& s, const float* from, uint8_t* row) {
    for (int64_t i = 0; i < s.width; i += 8) {
        const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i*)row + i / 8, eight);
    }
}

MOSS_ORDERED_END

static inline bool has_avx2_f16c() {
    unsigned a, b, c = 0, d;  // __builtin_cpu_supports does not know f16c in older compilers
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

template <class Stored>
static inline KVStore kv_store_avx2(void (*narrow)(const KVRows&, const float*, uint8_t*)) {
    return {widen_avx2<Stored>, narrow, score_avx2<Stored>, add_avx2<Stored>};
}

static inline bool has_kv_store_avx2(const KVRows& s) {
    return s.width % kGroup == 0 && (s.kind != kCacheInt8 || s.step_channels == kGroup) && has_avx2_f16c();
}

static inline KVStore kv_store_avx2(int64_t kind) {
    if (kind == kCacheHalf) return kv_store_avx2<StoredHalves>(narrow_halves_avx2);
    if (kind == kCacheInt8) return kv_store_avx2<StoredCodes>(narrow_codes);
    return kv_store_avx2<StoredFloats>(narrow_floats);
}

#endif

// `plain` asks for the version that every processor has.
static inline KVStore kv_store(const KVRows& s, bool plain) {
#if defined(__x86_64__)
    if (!plain && has_kv_store_avx2(s)) return kv_store_avx2(s.kind);
#endif
    (void)plain;
    return plain_kv_store(s.kind);
}

}  // namespace moss
