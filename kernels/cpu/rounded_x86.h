// Rounded products (see rounded_plain.h) on x86-64 with AVX2, and what the newer versions share with it.
//
// All versions are compiled into every program, by target attributes; rounded.h chooses at run time. A chunk of
// 64 bytes is 16 rows times 4 bytes: two registers of 8 rows. AVX2 multiplies pairs of an unsigned and a signed
// byte and adds each two products in 16 bits, with saturation. Nibbles fit there, 8 sums of them: 8 * 2 * 15 * 127
// is below 2^15. So bytes are split in nibbles too, whose sums are put together in 32 bits. (Moving the sign of
// code - 128 over to x would need one multiplication less, but moving the sign takes the same ports.)
#pragma once
#include "rounded_plain.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define MOSS_AVX2 __attribute__((target("avx2,f16c")))
#define MOSS_INLINE static inline __attribute__((always_inline))

namespace moss {

constexpr int kFirstCacheTokens = 64;  // whose codes of a block and sums of two tiles stay in the first cache

MOSS_AVX2 MOSS_INLINE __m256i load32(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }

// Low (part 0) or high (part 1) nibbles.
MOSS_AVX2 MOSS_INLINE __m256i nibbles(__m256i bytes, int part) {
    return _mm256_and_si256(part == 0 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
}

// Nibbles of a chunk, [half], as avx2_prepare left them.
MOSS_AVX2 MOSS_INLINE void load_ready(const uint8_t* codes, int64_t chunk, int part, __m256i (&to)[2]) {
    to[0] = load32(codes + chunk * 128 + part * 64);
    to[1] = load32(codes + chunk * 128 + part * 64 + 32);
}

// A chunk as stored. Each line is loaded once: a second load of what is still on its way takes the place of another.
MOSS_AVX2 MOSS_INLINE void load_raw(const uint8_t* codes, int64_t chunk, __m256i (&to)[2]) {
    to[0] = load32(codes + chunk * 64);
    to[1] = load32(codes + chunk * 64 + 32);
    asm("" : "+x"(to[0]), "+x"(to[1]));
}

// Nibbles of two registers times four codes of x, in 16 bits: put in `a` and `b` (FIRST) or added. Spelled out because
// compilers gather the products of many steps to add them later, and run out of registers.
template <bool FIRST>
MOSS_AVX2 MOSS_INLINE void step(__m256i& a, __m256i& b, const __m256i (&w)[2], const int8_t* x) {
    __m256i four, products;
    if (FIRST) {
        asm("vpbroadcastd %3, %2\n\tvpmaddubsw %2, %4, %0\n\tvpmaddubsw %2, %5, %1"
            : "=&x"(a), "=&x"(b), "=&x"(four)
            : "m"(*(const int32_t*)x), "x"(w[0]), "x"(w[1]));
    } else {
        asm("vpbroadcastd %4, %2\n\tvpmaddubsw %2, %5, %3\n\tvpmaddubsw %2, %6, %2\n\t"
            "vpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
            : "+x"(a), "+x"(b), "=&x"(four), "=&x"(products)
            : "m"(*(const int32_t*)x), "x"(w[0]), "x"(w[1]));
    }
}

// One part of a chunk times four codes of each token; FIRST as in `step`.
template <int TOKENS, bool FIRST>
MOSS_AVX2 MOSS_INLINE void step_tokens(const __m256i (&w)[2], const int8_t* x, int64_t stride,
                                       __m256i (&narrow)[TOKENS][2]) {
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) step<FIRST>(narrow[t][0], narrow[t][1], w, x + t * stride);
}

template <int TOKENS>
MOSS_AVX2 MOSS_INLINE void add_narrow(const __m256i (&narrow)[TOKENS][2], int weight, __m256i (&sum)[TOKENS][2]) {
    const __m256i weights = _mm256_set1_epi16((int16_t)weight);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) sum[t][h] = _mm256_add_epi32(sum[t][h], _mm256_madd_epi16(narrow[t][h], weights));
}

// Up to 8 chunks: the low nibbles (FROM 0), the high ones (TO 2), or both.
template <int BITS, int TOKENS, bool READY, int CHUNKS, int FROM, int TO>
MOSS_AVX2 MOSS_INLINE void chunk_parts(const uint8_t* codes, int64_t c, const int8_t* x, int64_t stride,
                                       __m256i (&sum)[TOKENS][2]) {
    __m256i narrow[2][TOKENS][2];
#pragma GCC unroll 8
    for (int i = 0; i < CHUNKS; i++) {
        __m256i raw[2];
        if (!READY) load_raw(codes, c + i, raw);
#pragma GCC unroll 2
        for (int part = FROM; part < TO; part++) {
            __m256i w[2] = {nibbles(raw[0], part), nibbles(raw[1], part)};
            if (READY) load_ready(codes, c + i, part, w);
            const int8_t* at = x + (c + i) * (32 / BITS) + (BITS == 4 ? 4 * part : 0);
            if (i == 0) {
                step_tokens<TOKENS, true>(w, at, stride, narrow[part]);
            } else {
                step_tokens<TOKENS, false>(w, at, stride, narrow[part]);
            }
        }
    }
    if (FROM == 0) add_narrow<TOKENS>(narrow[0], 1, sum);
    if (TO == 2) add_narrow<TOKENS>(narrow[1], BITS == 4 ? 1 : 16, sum);
}

template <int BITS, int TOKENS, bool READY, int CHUNKS>
MOSS_AVX2 MOSS_INLINE void chunks(const uint8_t* codes, int64_t c, const int8_t* x, int64_t stride,
                                  __m256i (&sum)[TOKENS][2]) {
    if (TOKENS <= 2) {  // there are registers for both parts
        chunk_parts<BITS, TOKENS, READY, CHUNKS, 0, 2>(codes, c, x, stride, sum);
    } else {
        chunk_parts<BITS, TOKENS, READY, CHUNKS, 0, 1>(codes, c, x, stride, sum);
        chunk_parts<BITS, TOKENS, READY, CHUNKS, 1, 2>(codes, c, x, stride, sum);
    }
}

// Sums of code * x over the chunks of a block, of one tile or of two that are `second` bytes apart.
template <int BITS, int TOKENS, int TILES, bool READY>
MOSS_AVX2 MOSS_INLINE void avx2_products(const uint8_t* codes, int64_t second, int64_t count, const int8_t* x,
                                         int64_t stride, __m256i (&sum)[TILES][TOKENS][2]) {
#pragma GCC unroll 2
    for (int tile = 0; tile < TILES; tile++)
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) sum[tile][t][0] = sum[tile][t][1] = _mm256_setzero_si256();
    int64_t c = 0;
    for (; c + 8 <= count; c += 8)
#pragma GCC unroll 2
        for (int tile = 0; tile < TILES; tile++)
            chunks<BITS, TOKENS, READY, 8>(codes + tile * second, c, x, stride, sum[tile]);
    if (BITS == 4)  // groups of 32
        for (; c + 4 <= count; c += 4)
#pragma GCC unroll 2
            for (int tile = 0; tile < TILES; tile++)
                chunks<BITS, TOKENS, READY, 4>(codes + tile * second, c, x, stride, sum[tile]);
    for (; c < count; c++)
#pragma GCC unroll 2
        for (int tile = 0; tile < TILES; tile++)
            chunks<BITS, TOKENS, READY, 1>(codes + tile * second, c, x, stride, sum[tile]);
}

// Bring the codes of x of the next block near. A load does it without holding up the stream of weights.
static inline void touch(const int8_t* x, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) asm volatile("movl %0, %%eax" ::"m"(*(const int32_t*)(x + i)) : "eax");
}

template <int TOKENS, int TILES>
MOSS_AVX2 MOSS_INLINE void store_sums(const __m256i (&sum)[TILES][TOKENS][2], int32_t* to) {
#pragma GCC unroll 2
    for (int tile = 0; tile < TILES; tile++)
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++, to += kTileRows) {
            _mm256_storeu_si256((__m256i*)to, sum[tile][t][0]);
            _mm256_storeu_si256((__m256i*)(to + 8), sum[tile][t][1]);
        }
}

template <int BITS, int TOKENS, int TILES>
MOSS_AVX2 static void avx2_sum(const BlockRun& run, int32_t* sums) {
    const uint8_t* codes = run.codes;
    const int8_t* x = run.x;
    for (int64_t i = 0; i < run.count; i++, codes += run.chunks * 64, x += run.x_block) {
        if (TOKENS == 1 && i + 1 < run.count) touch(x + run.x_block, run.x_token);
        __m256i sum[TILES][TOKENS][2];
        avx2_products<BITS, TOKENS, TILES, false>(codes, run.second, run.chunks, x, run.x_token, sum);
        store_sums<TOKENS, TILES>(sum, sums + i * TILES * TOKENS * kTileRows);
    }
}

MOSS_AVX2 MOSS_INLINE __m256 widen_scales(const uint16_t* scales, int half) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)scales + half));
}

template <int BITS>
MOSS_AVX2 MOSS_INLINE __m256i widen_zeros(const uint8_t* zeros, int half) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(zeros + (BITS == 8 ? 8 * half : 0))));
    const __m256i stored = BITS == 8   ? bytes
                           : half == 0 ? _mm256_and_si256(bytes, _mm256_set1_epi32(15))
                                       : _mm256_srli_epi32(bytes, 4);
    return _mm256_add_epi32(stored, _mm256_set1_epi32(1));
}

// What one block adds to the totals of 8 rows. Zero points and the sum of x fit in 16 bits.
MOSS_AVX2 MOSS_INLINE __m256 part_of(__m256i sums, __m256i zeros, int32_t sum, __m256 scales, float step) {
    const __m256i whole = _mm256_sub_epi32(sums, _mm256_madd_epi16(zeros, _mm256_set1_epi32(sum)));
    __m256 factor = _mm256_mul_ps(scales, _mm256_set1_ps(step));
    asm("" : "+x"(factor));  // keep_as_is, in a register
    __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), factor);
    asm("" : "+x"(part));
    return part;
}

template <int BITS, int TOKENS, int TILES>
MOSS_AVX2 static void avx2_add(const BlockRun& run, const int32_t* sums, float* total) {
    __m256 whole[TILES][TOKENS][2];
    std::memcpy(whole, total, sizeof whole);
    GroupOf<BITS> group(run);
    for (int64_t i = 0; i < run.count; i++, group.next_block(), sums += TILES * TOKENS * kTileRows) {
        const int64_t at = i * run.tokens;
#pragma GCC unroll 2
        for (int tile = 0; tile < TILES; tile++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const __m256i zeros = widen_zeros<BITS>(group.zeros + tile * run.second, h);
                const __m256 scales = widen_scales(group.scales + tile * run.second / 2, h);
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; t++) {
                    const __m256i here = load32(sums + (tile * TOKENS + t) * kTileRows + 8 * h);
                    __m256& to = whole[tile][t][h];
                    to = _mm256_add_ps(to, part_of(here, zeros, run.sums[at + t], scales, run.steps[at + t]));
                    asm("" : "+x"(to));
                }
            }
    }
    std::memcpy(total, whole, sizeof whole);
}

template <int BITS>
MOSS_AVX2 MOSS_INLINE void avx2_prepare_group(const BlockRun& run, ReadyBlock& to) {
    for (int h = 0; h < 2; h++) {
        _mm256_store_ps(to.scales + 8 * h, widen_scales(run.scales, h));
        _mm256_store_si256((__m256i*)to.zeros + h, widen_zeros<BITS>(run.zeros, h));
    }
    to.chunks = run.chunks;
}

template <int BITS>
MOSS_AVX2 static void avx2_prepare(const BlockRun& run, ReadyBlock& to) {
    avx2_prepare_group<BITS>(run, to);
    const uint8_t* codes = run.codes;
    for (int64_t c = 0; c < to.chunks; c++) {
        _mm_prefetch((const char*)codes + (to.chunks + c) * 64, _MM_HINT_T0);  // of the next block
        __m256i* out = (__m256i*)(to.codes + c * 128);
        for (int i = 0; i < 4; i++)
            _mm256_store_si256(out + i, nibbles(load32(codes + c * 64 + (i & 1) * 32), i / 2));
    }
}

// Sums of code * x of the tokens from `t` on, added to their totals.
template <int TOKENS>
MOSS_AVX2 MOSS_INLINE void add_tokens(const __m256i (&sum)[TOKENS][2], const ReadyBlock& w, const BlockTokens& x,
                                      int64_t t, float* total) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const __m256i zeros = load32(w.zeros + 8 * h);
        const __m256 scales = _mm256_load_ps(w.scales + 8 * h);
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS; i++) {
            float* to = total + (t + i) * kTileRows + 8 * h;
            const __m256 part = part_of(sum[i][h], zeros, x.sums[t + i], scales, x.steps[t + i]);
            _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), part));
        }
    }
}

template <int BITS, int TOKENS>
MOSS_AVX2 MOSS_INLINE void avx2_tokens(const ReadyBlock& w, const BlockTokens& x, int64_t t, float* total) {
    __m256i sum[1][TOKENS][2];
    avx2_products<BITS, TOKENS, 1, true>(w.codes, 0, w.chunks, x.codes + t * x.stride, x.stride, sum);
    add_tokens<TOKENS>(sum[0], w, x, t, total);
}

template <int BITS>
MOSS_AVX2 static void avx2_multiply(const ReadyBlock* w, int64_t tiles, const BlockTokens& x, float* totals,
                                    int64_t apart) {
    for (int64_t i = 0; i < tiles; i++, w++, totals += apart) {
        int64_t t = 0;
        for (; t + 4 <= x.count; t += 4) avx2_tokens<BITS, 4>(*w, x, t, totals);
        for (; t < x.count; t++) avx2_tokens<BITS, 1>(*w, x, t, totals);
    }
}

template <int BITS>
static inline RoundedKernels avx2_kernels() {
    return {{avx2_sum<BITS, 1, 1>, avx2_sum<BITS, 2, 1>, avx2_sum<BITS, 3, 1>, avx2_sum<BITS, 4, 1>},
            {avx2_add<BITS, 1, 1>, avx2_add<BITS, 2, 1>, avx2_add<BITS, 3, 1>, avx2_add<BITS, 4, 1>},
            {avx2_sum<BITS, 1, 2>, avx2_sum<BITS, 2, 2>},
            {avx2_add<BITS, 1, 2>, avx2_add<BITS, 2, 2>},
            2, kFirstCacheTokens, avx2_prepare<BITS>, avx2_multiply<BITS>, nullptr, nullptr};
}

}  // namespace moss
#endif
