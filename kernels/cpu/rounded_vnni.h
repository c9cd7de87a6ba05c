// Rounded products (see rounded_plain.h) on x86-64 with AVX-VNNI and AVX-512 VNNI.
//
// One instruction multiplies four unsigned bytes with four signed ones and adds the products in 32 bits, so bytes
// need not be split, and nothing can overflow on the way. Results take several cycles, so few tokens get several
// sums each, which are put together in the end. Everything else is that of AVX2.
#pragma once
#include "rounded_x86.h"

#if defined(__x86_64__)
#include <cpuid.h>

#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define MOSS_HAS_AVXVNNI 1
#endif

#define MOSS_AVXVNNI __attribute__((target("avx2,f16c,avxvnni")))
#define MOSS_AVX512 __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")))

namespace moss {

// Bytes from chunk to chunk of a block made ready, and of a stored one.
template <int BITS, bool READY>
constexpr int chunk_bytes() {
    return READY && BITS == 4 ? 128 : 64;
}

template <int BITS>
MOSS_AVX2 static void vnni_prepare(const BlockRun& run, ReadyBlock& to) {
    if (BITS == 4) {
        avx2_prepare<4>(run, to);
        return;
    }
    avx2_prepare_group<8>(run, to);
    std::memcpy(to.codes, run.codes, run.chunks * 64);
}

#if MOSS_HAS_AVXVNNI
// Compilers do not agree on a name for it.
static inline bool has_avxvnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// CHUNKS chunks, each four codes of x (int8) or twice four (int4) for every token; SUMS sums a token, by turns.
template <int BITS, int TOKENS, bool READY, int SUMS, int CHUNKS>
MOSS_AVXVNNI MOSS_INLINE void avxvnni_chunks(const uint8_t* codes, const int8_t* x, int64_t stride,
                                             __m256i (&sum)[SUMS][TOKENS][2]) {
    constexpr int parts = BITS == 4 ? 2 : 1, bytes = chunk_bytes<BITS, READY>();
#pragma GCC unroll 4
    for (int i = 0; i < CHUNKS * parts; i++) {
        const uint8_t* at = codes + i / parts * bytes + (READY && i % parts ? 64 : 0);
        __m256i w[2] = {load32(at), load32(at + 32)};
        if (BITS == 4 && !READY) {
            w[0] = nibbles(w[0], i & 1);
            w[1] = nibbles(w[1], i & 1);
        }
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
            int32_t four;
            std::memcpy(&four, x + t * stride + i * 4, 4);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
                sum[i % SUMS][t][h] = _mm256_dpbusd_avx_epi32(sum[i % SUMS][t][h], w[h], _mm256_set1_epi32(four));
        }
    }
}

template <int BITS, int TOKENS, bool READY>
MOSS_AVXVNNI MOSS_INLINE void avxvnni_products(const uint8_t* codes, int64_t chunks, const int8_t* x, int64_t stride,
                                               __m256i (&whole)[TOKENS][2]) {
    constexpr int sums = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1, at_once = BITS == 4 ? 2 : 4;
    constexpr int bytes = chunk_bytes<BITS, READY>(), inputs = 32 / BITS;
    __m256i sum[sums][TOKENS][2];
#pragma GCC unroll 4
    for (int s = 0; s < sums; s++)
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) sum[s][t][0] = sum[s][t][1] = _mm256_setzero_si256();
    int64_t c = 0;
    for (; c + at_once <= chunks; c += at_once)
        avxvnni_chunks<BITS, TOKENS, READY, sums, at_once>(codes + c * bytes, x + c * inputs, stride, sum);
    for (; c < chunks; c++)
        avxvnni_chunks<BITS, TOKENS, READY, sums, 1>(codes + c * bytes, x + c * inputs, stride, sum);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            whole[t][h] = sum[0][t][h];
#pragma GCC unroll 4
            for (int s = 1; s < sums; s++) whole[t][h] = _mm256_add_epi32(whole[t][h], sum[s][t][h]);
        }
}

template <int BITS, int TOKENS, int TILES>
MOSS_AVXVNNI static void avxvnni_sum(const BlockRun& run, int32_t* sums) {
    const uint8_t* codes = run.codes;
    const int8_t* x = run.x;
    for (int64_t i = 0; i < run.count; i++, codes += run.chunks * 64, x += run.x_block) {
        if (TOKENS == 1 && i + 1 < run.count) touch(x + run.x_block, run.x_token);
        __m256i sum[TILES][TOKENS][2];
        for (int tile = 0; tile < TILES; tile++)
            avxvnni_products<BITS, TOKENS, false>(codes + tile * run.second, run.chunks, x, run.x_token, sum[tile]);
        store_sums<TOKENS, TILES>(sum, sums + i * TILES * TOKENS * kTileRows);
    }
}

template <int BITS, int TOKENS>
MOSS_AVXVNNI MOSS_INLINE void avxvnni_tokens(const ReadyBlock& w, const BlockTokens& x, int64_t t, float* total) {
    __m256i sum[TOKENS][2];
    avxvnni_products<BITS, TOKENS, true>(w.codes, w.chunks, x.codes + t * x.stride, x.stride, sum);
    add_tokens<TOKENS>(sum, w, x, t, total);
}

template <int BITS>
MOSS_AVXVNNI static void avxvnni_multiply(const ReadyBlock* w, int64_t tiles, const BlockTokens& x, float* totals,
                                          int64_t apart) {
    for (int64_t i = 0; i < tiles; i++, w++, totals += apart) {
        int64_t t = 0;
        for (; t + 4 <= x.count; t += 4) avxvnni_tokens<BITS, 4>(*w, x, t, totals);
        for (; t < x.count; t++) avxvnni_tokens<BITS, 1>(*w, x, t, totals);
    }
}

template <int BITS>
static inline RoundedKernels avxvnni_kernels() {
    return {{avxvnni_sum<BITS, 1, 1>, avxvnni_sum<BITS, 2, 1>, avxvnni_sum<BITS, 3, 1>, avxvnni_sum<BITS, 4, 1>},
            {avx2_add<BITS, 1, 1>, avx2_add<BITS, 2, 1>, avx2_add<BITS, 3, 1>, avx2_add<BITS, 4, 1>},
            {avxvnni_sum<BITS, 1, 2>, avxvnni_sum<BITS, 2, 2>},
            {avx2_add<BITS, 1, 2>, avx2_add<BITS, 2, 2>},
            2, kFirstCacheTokens, vnni_prepare<BITS>, avxvnni_multiply<BITS>, nullptr, nullptr};
}
#endif

template <int BITS>
MOSS_AVX512 static void avx512_prepare(const BlockRun& run, ReadyBlock& to) {
    if (BITS == 8) {
        vnni_prepare<8>(run, to);
        return;
    }
    avx2_prepare_group<4>(run, to);
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t c = 0; c < run.chunks; c++) {
        _mm_prefetch((const char*)run.codes + (run.chunks + c) * 64, _MM_HINT_T0);  // of the next block
        const __m512i both = _mm512_loadu_si512(run.codes + c * 64);
        _mm512_store_si512(to.codes + c * 128, _mm512_and_si512(both, low));
        _mm512_store_si512(to.codes + c * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
}

// As avxvnni_chunks, with all 16 rows in one register. What lies AHEAD bytes further is fetched, if that is not 0.
template <int BITS, int TOKENS, bool READY, int AHEAD, int SUMS, int CHUNKS>
MOSS_AVX512 MOSS_INLINE void avx512_chunks(const uint8_t* codes, const int8_t* x, int64_t stride,
                                           __m512i (&sum)[SUMS][TOKENS]) {
    constexpr int parts = BITS == 4 ? 2 : 1, bytes = chunk_bytes<BITS, READY>();
#pragma GCC unroll 4
    for (int i = 0; i < CHUNKS * parts; i++) {
        __m512i w = _mm512_loadu_si512(codes + i / parts * bytes + (READY && i % parts ? 64 : 0));
        if (AHEAD > 0 && i % parts == 0) _mm_prefetch((const char*)codes + i / parts * bytes + AHEAD, _MM_HINT_T0);
        if (BITS == 4 && !READY)
            w = _mm512_and_si512(i % 2 == 0 ? w : _mm512_srli_epi16(w, 4), _mm512_set1_epi8(15));
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            int32_t four;
            std::memcpy(&four, x + t * stride + i * 4, 4);
            sum[i % SUMS][t] = _mm512_dpbusd_epi32(sum[i % SUMS][t], w, _mm512_set1_epi32(four));
        }
    }
}

template <int BITS, int TOKENS, bool READY, int AHEAD>
MOSS_AVX512 MOSS_INLINE void avx512_products(const uint8_t* codes, int64_t chunks, const int8_t* x, int64_t stride,
                                             __m512i (&whole)[TOKENS]) {
    constexpr int sums = TOKENS <= 2 ? 4 : 2, at_once = BITS == 4 ? 2 : 4;
    constexpr int bytes = chunk_bytes<BITS, READY>(), inputs = 32 / BITS;
    __m512i sum[sums][TOKENS];
#pragma GCC unroll 4
    for (int s = 0; s < sums; s++)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) sum[s][t] = _mm512_setzero_si512();
    int64_t c = 0;
    for (; c + at_once <= chunks; c += at_once)
        avx512_chunks<BITS, TOKENS, READY, AHEAD, sums, at_once>(codes + c * bytes, x + c * inputs, stride, sum);
    for (; c < chunks; c++)
        avx512_chunks<BITS, TOKENS, READY, AHEAD, sums, 1>(codes + c * bytes, x + c * inputs, stride, sum);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
        whole[t] = sum[0][t];
#pragma GCC unroll 4
        for (int s = 1; s < sums; s++) whole[t] = _mm512_add_epi32(whole[t], sum[s][t]);
    }
}

template <int BITS, int TOKENS, int TILES, int AHEAD>
MOSS_AVX512 static void avx512_sum(const BlockRun& run, int32_t* sums) {
    const uint8_t* codes = run.codes;
    const int8_t* x = run.x;
    for (int64_t i = 0; i < run.count; i++, codes += run.chunks * 64, x += run.x_block) {
        if (TOKENS == 1 && i + 1 < run.count) touch(x + run.x_block, run.x_token);
        for (int tile = 0; tile < TILES; tile++) {
            __m512i sum[TOKENS];
            avx512_products<BITS, TOKENS, false, AHEAD>(codes + tile * run.second, run.chunks, x, run.x_token, sum);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++, sums += kTileRows) _mm512_storeu_si512(sums, sum[t]);
        }
    }
}

template <int BITS, int TOKENS>
MOSS_AVX512 MOSS_INLINE void avx512_tokens(const ReadyBlock& w, const BlockTokens& x, int64_t t, float* total) {
    __m512i sum[TOKENS];
    avx512_products<BITS, TOKENS, true, 0>(w.codes, w.chunks, x.codes + t * x.stride, x.stride, sum);
    const __m512i zeros = _mm512_loadu_si512(w.zeros);
    const __m512 scales = _mm512_loadu_ps(w.scales);
#pragma GCC unroll 8
    for (int i = 0; i < TOKENS; i++) {
        float* to = total + (t + i) * kTileRows;
        const __m512i whole = _mm512_sub_epi32(sum[i], _mm512_madd_epi16(zeros, _mm512_set1_epi32(x.sums[t + i])));
        __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(x.steps[t + i]));
        asm("" : "+v"(factor));  // keep_as_is, in a register
        __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), factor);
        asm("" : "+v"(part));
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), part));
    }
}

template <int BITS>
MOSS_AVX512 static void avx512_multiply(const ReadyBlock* w, int64_t tiles, const BlockTokens& x, float* totals,
                                        int64_t apart) {
    for (int64_t i = 0; i < tiles; i++, w++, totals += apart) {
        int64_t t = 0;
        for (; t + 8 <= x.count; t += 8) avx512_tokens<BITS, 8>(*w, x, t, totals);
        for (; t + 2 <= x.count; t += 2) avx512_tokens<BITS, 2>(*w, x, t, totals);
        for (; t < x.count; t++) avx512_tokens<BITS, 1>(*w, x, t, totals);
    }
}

template <int BITS, int AHEAD = 0>
static inline RoundedKernels avx512_kernels() {
    return {{avx512_sum<BITS, 1, 1, AHEAD>, avx512_sum<BITS, 2, 1, AHEAD>, avx512_sum<BITS, 3, 1, AHEAD>,
             avx512_sum<BITS, 4, 1, AHEAD>},
            {avx2_add<BITS, 1, 1>, avx2_add<BITS, 2, 1>, avx2_add<BITS, 3, 1>, avx2_add<BITS, 4, 1>},
            {avx512_sum<BITS, 1, 2, AHEAD>, avx512_sum<BITS, 2, 2, AHEAD>},
            {avx2_add<BITS, 1, 2>, avx2_add<BITS, 2, 2>},
            2, kFirstCacheTokens, avx512_prepare<BITS>, avx512_multiply<BITS>, nullptr, nullptr};
}

}  // namespace moss
#endif
