// Rounded products (see rounded_plain.h) for many tokens on x86-64 with AMX, whose instruction multiplies a tile of 16
// tokens by 64 codes of x with one of 64 codes by 16 rows of weights, and adds to 16 by 16 sums of 32 bits.
//
// A tile of the file is such an operand as it is: 16 chunks of 64 bytes, each four codes of 16 rows. Two tiles and
// twice 16 tokens go together, so each operand is used twice; while they are multiplied, the sums before them are put
// into the totals, which takes longer than the products. Blocks that are not whole operands, and few tokens, are left to
// AVX-512.
#pragma once
#include "rounded_vnni.h"

#if defined(__x86_64__) && defined(__linux__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define MOSS_HAS_AMX 1
#endif
#endif

#if MOSS_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

#define MOSS_AMX __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")))

// The compiler's own names for these are not used: those of GCC 12 do not say which memory they read and write.
#define MOSS_TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define MOSS_TILE_STORE(tile, to) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)64) : "memory")
#define MOSS_TILE_ZERO(tile) asm volatile("tilezero %tmm" #tile)
#define MOSS_TILE_PRODUCT(sum, x, w) asm volatile("tdpbssd %tmm" #w ", %tmm" #x ", %tmm" #sum)

namespace moss {

constexpr int64_t kOperandInputs = 64;  // codes of x, and chunks of four weights times 16, of one operand
constexpr int64_t kOperandBytes = 1024;
constexpr int kOperandTokens = 16;
// Bytes of weights that few tokens fetch ahead: what these processors read ahead by themselves is too little.
constexpr int kFetchAhead = 3072;

// Whether the processor has AMX and the system lets this process use its registers, which it must be asked for.
static inline bool can_run_amx() {
    static const bool can = [] {
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
        constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
        return syscall(SYS_arch_prctl, ask, tile_data) == 0;
    }();
    return can;
}

MOSS_AMX static void amx_begin() {
    struct alignas(64) {
        uint8_t palette = 1, first_row = 0, unused[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    static_assert(sizeof shapes == 64, "as the processor wants it");
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}

// Registers in use would have to be saved whenever another thread takes the core.
MOSS_AMX static void amx_end() { asm volatile("tilerelease"); }

// Whether a block of so many chunks is made of whole operands.
template <int BITS>
constexpr bool whole_operands(int64_t chunks) {
    return chunks * (32 / BITS) % kOperandInputs == 0;
}

// Codes less what all of a row have in common, so that they are signed bytes: the zero point, which then needs no more
// attention, or, of int8, as much of it as leaves them in range. `zeros` is what is left to be taken off.
template <int BITS>
MOSS_AMX static void amx_prepare(const BlockRun& run, ReadyBlock& to) {
    if (!whole_operands<BITS>(run.chunks)) {
        avx512_prepare<BITS>(run, to);
        return;
    }
    avx2_prepare_group<BITS>(run, to);
    to.next = run.codes + run.chunks * 64;
    if (BITS == 8) {
        const __m512i middle = _mm512_set1_epi8((char)128);
        for (int64_t c = 0; c < run.chunks; c++)
            _mm512_store_si512(to.codes + c * 64, _mm512_xor_si512(_mm512_loadu_si512(run.codes + c * 64), middle));
        const __m512i left = _mm512_sub_epi32(_mm512_load_si512(to.zeros), _mm512_set1_epi32(128));
        _mm512_store_si512(to.zeros, _mm512_and_si512(left, _mm512_set1_epi32(0xffff)));  // for products of pairs
        to.centred = _mm512_test_epi32_mask(left, left) == 0;
        return;
    }
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i zeros = _mm512_mullo_epi32(_mm512_load_si512(to.zeros), _mm512_set1_epi32(0x01010101));
    for (int64_t c = 0; c < run.chunks; c++) {
        const __m512i both = _mm512_loadu_si512(run.codes + c * 64);
        const __m512i parts[2] = {_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16(both, 4), low)};
        for (int i = 0; i < 2; i++) _mm512_store_si512(to.codes + c * 128 + 64 * i, _mm512_sub_epi8(parts[i], zeros));
    }
    to.centred = true;
}

// Two tiles by twice 16 tokens, or fewer: where their sums belong.
struct AmxGroup {
    const ReadyBlock* w;  // of the first tile; that of the second follows
    const float* steps;   // of the first token
    const int32_t* x_sums;
    float* totals;  // of the first tile and token; from tile to tile:
    int64_t apart;
    int tokens[2];  // of each 16
    int count;      // of the tiles by 16 tokens
};

typedef int32_t AmxSums[4][kOperandTokens * kTileRows];  // [half of the tokens * tiles + tile]

template <bool CENTRED>
MOSS_AMX MOSS_INLINE void amx_add_row(const int32_t* sums, int32_t x_sum, float step, __m512i zeros, __m512 scales,
                                      float* total) {
    __m512i whole = _mm512_load_si512(sums);
    if (!CENTRED) whole = _mm512_sub_epi32(whole, _mm512_madd_epi16(zeros, _mm512_set1_epi32(x_sum)));
    __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(step));
    asm("" : "+v"(factor));  // keep_as_is, in a register
    __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), factor);
    asm("" : "+v"(part));
    _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), part));
}

// The tokens from `from` on, at most 8 of them, of 16.
template <bool CENTRED>
MOSS_AMX MOSS_INLINE void amx_add_rows(const AmxGroup& group, const int32_t* sums, int tile, int half, int from) {
    const __m512i zeros = _mm512_load_si512(group.w[tile].zeros);
    const __m512 scales = _mm512_load_ps(group.w[tile].scales);
    const int first = half * kOperandTokens;
    const float* steps = group.steps + first;
    const int32_t* x_sums = group.x_sums + first;
    float* totals = group.totals + tile * group.apart + first * kTileRows;
    if (from + 8 <= group.tokens[half]) {
#pragma GCC unroll 8
        for (int i = from; i < from + 8; i++)
            amx_add_row<CENTRED>(sums + i * kTileRows, x_sums[i], steps[i], zeros, scales, totals + i * kTileRows);
    } else {
        for (int i = from; i < group.tokens[half]; i++)
            amx_add_row<CENTRED>(sums + i * kTileRows, x_sums[i], steps[i], zeros, scales, totals + i * kTileRows);
    }
}

// Half of the rows of one of a group's tiles by 16 tokens.
template <int TILES>
MOSS_AMX MOSS_INLINE void amx_add(const AmxGroup& group, const AmxSums& sums, int which, int part) {
    if (which >= group.count) return;
    const int tile = which % TILES, half = which / TILES, from = part * 8;
    group.w[tile].centred ? amx_add_rows<true>(group, sums[which], tile, half, from)
                          : amx_add_rows<false>(group, sums[which], tile, half, from);
}

// What a group fetches for the next block: its share of the codes of x and of the tiles' weights, a little at a time, since
// a processor has few places for what is on its way.
struct AmxAhead {
    const char* from[3];
    int64_t bytes[3];  // whole lines, in kSteps steps
    static constexpr int kSteps = 8;

    MOSS_AMX inline __attribute__((always_inline)) void fetch(int step) const {
        for (int i = 0; i < 3; i++)
            for (int64_t at = bytes[i] * step / kSteps; at < bytes[i] * (step + 1) / kSteps; at += 64)
                _mm_prefetch(from[i] + at, _MM_HINT_T0);
    }
};

// The sums of a group, whose codes of x are at x[half]; those of the group before are added meanwhile.
template <int TILES, int HALVES>
MOSS_AMX static void amx_products(const AmxGroup& group, const int8_t* const (&x)[2], int64_t x_stride, int64_t operands,
                                  AmxSums& sums, const AmxGroup& before, const AmxSums& sums_before,
                                  const AmxAhead& ahead) {
    MOSS_TILE_ZERO(0);
    if (TILES == 2) MOSS_TILE_ZERO(1);
    if (HALVES == 2) MOSS_TILE_ZERO(2);
    if (TILES == 2 && HALVES == 2) MOSS_TILE_ZERO(3);
    const uint8_t *w0 = group.w[0].codes, *w1 = group.w[TILES - 1].codes;
    for (int part = 0; part < operands; part++) {
        MOSS_TILE_LOAD(4, x[0] + part * kOperandInputs, x_stride);
        MOSS_TILE_LOAD(6, w0 + part * kOperandBytes, 64);
        MOSS_TILE_PRODUCT(0, 4, 6);
        amx_add<TILES>(before, sums_before, 0, part);
        ahead.fetch(part * 4);
        if (TILES == 2) {
            MOSS_TILE_LOAD(7, w1 + part * kOperandBytes, 64);
            MOSS_TILE_PRODUCT(1, 4, 7);
        }
        amx_add<TILES>(before, sums_before, 1, part);
        ahead.fetch(part * 4 + 1);
        if (HALVES == 2) {
            MOSS_TILE_LOAD(5, x[1] + part * kOperandInputs, x_stride);
            MOSS_TILE_PRODUCT(2, 5, 6);
        }
        amx_add<TILES>(before, sums_before, 2, part);
        ahead.fetch(part * 4 + 2);
        if (TILES == 2 && HALVES == 2) MOSS_TILE_PRODUCT(3, 5, 7);
        amx_add<TILES>(before, sums_before, 3, part);
        ahead.fetch(part * 4 + 3);
    }
    if (operands == 1) {  // then half of all is still to be done
        for (int i = 0; i < 4; i++) {
            amx_add<TILES>(before, sums_before, i, 1);
            ahead.fetch(4 + i);
        }
    }
    MOSS_TILE_STORE(0, sums[0]);
    if (TILES == 2) MOSS_TILE_STORE(1, sums[1]);
    if (HALVES == 2) MOSS_TILE_STORE(2, sums[TILES]);
    if (TILES == 2 && HALVES == 2) MOSS_TILE_STORE(3, sums[3]);
}

// Some tiles that go together in pairs, or one alone.
template <int BITS, int TILES>
MOSS_AMX static void amx_tiles(const ReadyBlock* w, int64_t tiles, const BlockTokens& x, const int8_t* last,
                               float* totals, int64_t apart) {
    const int64_t operands = w->chunks * (32 / BITS) / kOperandInputs, x_bytes = x.count * x.stride;
    const int64_t pairs = (x.count + 2 * kOperandTokens - 1) / (2 * kOperandTokens), groups = pairs * (tiles / TILES);
    const int64_t x_share = x_bytes / groups / 64 * 64, w_share = w->chunks * 64 / pairs / 64 * 64;
    alignas(64) AmxSums sums[2];
    AmxGroup group[2];
    group[1].count = 0;
    int turn = 0;
    int64_t n = 0;
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t t = pair * 2 * kOperandTokens, left = x.count - t;
        const int8_t* codes[2];
        int tokens[2];
        for (int half = 0; half < 2; half++) {
            const int64_t here = left - half * kOperandTokens;
            tokens[half] = here > kOperandTokens ? kOperandTokens : (int)here;
            codes[half] = tokens[half] == kOperandTokens ? x.codes + (t + half * kOperandTokens) * x.stride : last;
        }
        const int halves = tokens[1] > 0 ? 2 : 1;
        for (int64_t tile = 0; tile < tiles; tile += TILES, n++, turn = 1 - turn) {
            group[turn] = {w + tile, x.steps + t, x.sums + t, totals + tile * apart + t * kTileRows, apart,
                           {tokens[0], tokens[1]}, TILES * halves};
            const char* next[2] = {(const char*)w[tile].next, (const char*)w[tile + TILES - 1].next};
            const AmxAhead ahead{{(const char*)x.codes + x_bytes + n * x_share, next[0] + pair * w_share,
                                  next[1] + pair * w_share},
                                 {x_share, w_share, TILES == 2 ? w_share : 0}};
            const auto products = halves == 2 ? amx_products<TILES, 2> : amx_products<TILES, 1>;
            products(group[turn], codes, x.stride, operands, sums[turn], group[1 - turn], sums[1 - turn], ahead);
        }
    }
    for (int i = 0; i < 8; i++) amx_add<TILES>(group[1 - turn], sums[1 - turn], i / 2, i % 2);
}

template <int BITS>
MOSS_AMX static void amx_multiply(const ReadyBlock* w, int64_t tiles, const BlockTokens& x, float* totals,
                                  int64_t apart) {
    if (!whole_operands<BITS>(w->chunks)) {
        avx512_multiply<BITS>(w, tiles, x, totals, apart);
        return;
    }
    alignas(64) int8_t last[kOperandTokens * kMaxBlock];  // the last tokens, where they are fewer than an operand's
    const int64_t whole = x.count / kOperandTokens * kOperandTokens;
    if (whole < x.count) {
        const int64_t bytes = (x.count - whole) * x.stride;
        std::memcpy(last, x.codes + whole * x.stride, bytes);
        std::memset(last + bytes, 0, kOperandTokens * x.stride - bytes);
    }
    const int64_t paired = tiles / 2 * 2;
    if (paired > 0) amx_tiles<BITS, 2>(w, paired, x, last, totals, apart);
    if (paired < tiles) amx_tiles<BITS, 1>(w + paired, 1, x, last, totals + paired * apart, apart);
}

template <int BITS>
static inline RoundedKernels amx_kernels() {
    RoundedKernels kernels = avx512_kernels<BITS, kFetchAhead>();
    kernels.tiles_at_once = kTilesReady;
    kernels.tokens_at_once = kRunTokens;
    kernels.prepare = amx_prepare<BITS>;
    kernels.multiply = amx_multiply<BITS>;
    kernels.begin = amx_begin;
    kernels.end = amx_end;
    return kernels;
}

}  // namespace moss
#endif
