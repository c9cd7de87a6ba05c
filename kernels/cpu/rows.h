// y = x W^T (+ bias) with W stored as rows of float, half or bfloat; float arithmetic.
//
// Every output is computed by the same operations on every machine: 8 partial sums, of the inputs k, k + 8,
// k + 16, ..., each a chain of fused multiply-adds in the order of k (zeros fill the last 8 inputs up), then
//     ((s0 + s4) + (s1 + s5)) + ((s2 + s6) + (s3 + s7)).
// So the bits depend on the token and the row only. Fused, because half of the speed of many processors lies
// in that instruction; the few without it (x86 before 2013) compute the same through double, slowly.
//
// Up to 6 tokens are multiplied with the rows as they are stored. For more, 4 or 8 rows and 256 inputs at a
// time are widened into the first cache and serve all tokens; the partial sums wait in memory in between.
//
// The pragma: Jittor's flags let the compiler put sums into another order, and join products with sums.
#pragma once
#include <omp.h>

#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC push_options
#pragma GCC optimize("no-associative-math,no-reciprocal-math,signed-zeros,fp-contract=off")

namespace moss {

constexpr int64_t kLanes = 8;
constexpr int kDirectRows = 4, kDirectTokens = 3;  // at once, of rows as stored
constexpr int64_t kFewTokens = 6;
constexpr int kMostRows = 8, kMostTokens = 6;      // at once, of a panel
constexpr int64_t kDepth = 512;                    // inputs of a panel
constexpr int64_t kTokenBlock = 96;                // tokens of a panel's run: their inputs stay in the second cache
constexpr int64_t kJobRows = 128;                  // rows at most that a thread takes at a time
constexpr int64_t kWorthSharing = 2000000;         // products of one call, about 100 microseconds: see pointwise.h
constexpr int64_t kFetchBytes = 4096;              // how far ahead of the products a row is fetched

// Some rows and some tokens to multiply, 8 inputs a step; `sums` holds 8 floats a pair of row and token.
struct Products {
    const uint8_t* rows;
    int64_t row_bytes, row_step;  // bytes from row to row, and from step to step
    const float* x;
    int64_t x_stride, x_step;     // floats from token to token, and from step to step
    int64_t steps;
    float* sums;
    int64_t sum_stride;           // floats from row to row
};

typedef void (*ProductKernel)(const Products&);
typedef void (*WidenKernel)(const uint8_t* from, int64_t steps, float* to, int64_t to_step);  // one row

// One processor's version. A panel holds 8 inputs of every row, then the next 8 of every row; its tokens likewise.
struct RowsKernels {
    WidenKernel widen[3];                                 // by Stored
    ProductKernel direct[3][2][kDirectTokens];            // rows as stored: by Stored, one or kDirectRows, tokens - 1
    ProductKernel panel[kMostTokens];                     // by tokens - 1
    int rows, tokens;                                     // of a panel
};

// a * b + c, rounded once. The sum in double is made odd where it is not exact, so that rounding it again
// gives what rounding once would have given.
static inline float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, c);
#else
    const double product = (double)a * b, sum = product + c;
    const double back = sum - product, lost = (product - (sum - back)) + (c - back);
    int64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    if ((lost > 0 || lost < 0) && !(bits & 1)) bits += (lost > 0) == (sum > 0) ? 1 : -1;
    double odd;
    std::memcpy(&odd, &bits, sizeof odd);
    return (float)odd;
#endif
}

constexpr int64_t bytes_of(int stored) { return stored == kFloat32 ? 4 : 2; }

template <int STORED>
static inline void widen8(const uint8_t* from, float* to) {
    if (STORED == kFloat16) {
        widen_half((const uint16_t*)from, to, kLanes);
    } else if (STORED == kBFloat16) {
        widen_bfloat((const uint16_t*)from, to, kLanes);
    } else {
        std::memcpy(to, from, kLanes * 4);
    }
}

template <int STORED, int ROWS, int TOKENS>
static void plain_products(const Products& p) {
    for (int r = 0; r < ROWS; r++) {
        float sum[TOKENS][kLanes], w[kLanes];
        std::memcpy(sum, p.sums + r * p.sum_stride, sizeof sum);
        for (int64_t i = 0; i < p.steps; i++) {
            widen8<STORED>(p.rows + r * p.row_bytes + i * p.row_step, w);
            for (int t = 0; t < TOKENS; t++) {
                const float* x = p.x + t * p.x_stride + i * p.x_step;
                for (int l = 0; l < kLanes; l++) sum[t][l] = fused(w[l], x[l], sum[t][l]);
            }
        }
        std::memcpy(p.sums + r * p.sum_stride, sum, sizeof sum);
    }
}

template <int STORED>
static void plain_widen(const uint8_t* from, int64_t steps, float* to, int64_t to_step) {
    for (int64_t i = 0; i < steps; i++) widen8<STORED>(from + i * kLanes * bytes_of(STORED), to + i * to_step);
}

#define MOSS_DIRECT(KERNEL, STORED)                                      \
    {{KERNEL<STORED, 1, 1>, KERNEL<STORED, 1, 2>, KERNEL<STORED, 1, 3>}, \
     {KERNEL<STORED, kDirectRows, 1>, KERNEL<STORED, kDirectRows, 2>, KERNEL<STORED, kDirectRows, 3>}}

static inline RowsKernels plain_rows() {
    return {{plain_widen<kFloat32>, plain_widen<kFloat16>, plain_widen<kBFloat16>},
            {MOSS_DIRECT(plain_products, kFloat32), MOSS_DIRECT(plain_products, kFloat16),
             MOSS_DIRECT(plain_products, kBFloat16)},
            {plain_products<kFloat32, 4, 1>, plain_products<kFloat32, 4, 2>, plain_products<kFloat32, 4, 3>},
            4, 3};
}

#if defined(__x86_64__)
#define MOSS_FMA8 __attribute__((target("avx2,fma,f16c")))
#define MOSS_FMA16 __attribute__((target("avx512f,avx512dq,avx2,fma,f16c")))
#define MOSS_ALWAYS inline __attribute__((always_inline))

template <int STORED>
MOSS_FMA8 static MOSS_ALWAYS __m256 load_row8(const uint8_t* from) {
    if (STORED == kFloat16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    if (STORED == kBFloat16)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
    return _mm256_loadu_ps((const float*)from);
}

template <int ROWS, int TOKENS>
MOSS_FMA8 static MOSS_ALWAYS void load_sums8(const Products& p, __m256 (&sum)[ROWS][TOKENS]) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) sum[r][t] = _mm256_loadu_ps(p.sums + r * p.sum_stride + t * kLanes);
}

template <int ROWS, int TOKENS>
MOSS_FMA8 static MOSS_ALWAYS void store_sums8(const Products& p, const __m256 (&sum)[ROWS][TOKENS]) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) _mm256_storeu_ps(p.sums + r * p.sum_stride + t * kLanes, sum[r][t]);
}

template <int STORED, int ROWS, int TOKENS>
MOSS_FMA8 static MOSS_ALWAYS void step8(const Products& p, int64_t i, __m256 (&sum)[ROWS][TOKENS]) {
    __m256 x[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) x[t] = _mm256_loadu_ps(p.x + t * p.x_stride + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        const __m256 w = load_row8<STORED>(p.rows + r * p.row_bytes + i * kLanes * bytes_of(STORED));
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) sum[r][t] = _mm256_fmadd_ps(w, x[t], sum[r][t]);
    }
}

// Steps [from, to) of a product; `ahead` bytes further lies what is needed soon. It is fetched into the second
// cache: the first has room for few requests that are under way.
template <int STORED, int ROWS, int TOKENS>
MOSS_FMA8 static MOSS_ALWAYS void multiply8(const Products& p, int64_t from, int64_t to, int64_t ahead,
                                            __m256 (&sum)[ROWS][TOKENS]) {
    constexpr int64_t step = kLanes * bytes_of(STORED), line = 64 / step;  // steps in a line of the cache
    int64_t i = from;
    for (; i + line <= to; i += line) {
        for (int r = 0; r < ROWS; r++) _mm_prefetch((const char*)p.rows + r * p.row_bytes + i * step + ahead, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int64_t j = 0; j < line; j++) step8<STORED, ROWS, TOKENS>(p, i + j, sum);
    }
    for (; i < to; i++) step8<STORED, ROWS, TOKENS>(p, i, sum);
}

template <int STORED, int ROWS, int TOKENS>
MOSS_FMA8 static void direct8(const Products& given) {
    const Products p = given;
    __m256 sum[ROWS][TOKENS];
    load_sums8<ROWS, TOKENS>(p, sum);
    // near the end of a row, the start of the row that comes after these is fetched
    const int64_t far = p.steps - kFetchBytes / (kLanes * bytes_of(STORED)), turn = far < 0 ? 0 : far;
    multiply8<STORED, ROWS, TOKENS>(p, 0, turn, kFetchBytes, sum);
    multiply8<STORED, ROWS, TOKENS>(p, turn, p.steps, kFetchBytes + (ROWS - 1) * p.row_bytes, sum);
    store_sums8<ROWS, TOKENS>(p, sum);
}

// The loop that prefill spends its time in. What is loaded stays in a register for all its products, in this
// order: without the asm the compiler loads it again for each of them, which takes twice as long.
template <int TOKENS>
MOSS_FMA8 static void panel8(const Products& given) {
    const Products p = given;
    constexpr int rows = 4, across = 3;
    __m256 sum[rows][TOKENS];
    load_sums8<rows, TOKENS>(p, sum);
    const float *x = p.x, *w = (const float*)p.rows, *end = w + p.steps * rows * kLanes;
#pragma GCC unroll 1
    for (; w != end; w += rows * kLanes, x += across * kLanes) {
        __m256 inputs[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
            inputs[t] = _mm256_load_ps(x + t * kLanes);
            asm volatile("" : "+x"(inputs[t]));
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m256 row = _mm256_load_ps(w + r * kLanes);
            asm volatile("" : "+x"(row));
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) sum[r][t] = _mm256_fmadd_ps(row, inputs[t], sum[r][t]);
        }
    }
    store_sums8<rows, TOKENS>(p, sum);
}

template <int STORED>
MOSS_FMA8 static void widen_row8(const uint8_t* from, int64_t steps, float* to, int64_t to_step) {
    for (int64_t i = 0; i < steps; i++)
        _mm256_storeu_ps(to + i * to_step, load_row8<STORED>(from + i * kLanes * bytes_of(STORED)));
}

static inline RowsKernels avx2_rows() {
    return {{widen_row8<kFloat32>, widen_row8<kFloat16>, widen_row8<kBFloat16>},
            {MOSS_DIRECT(direct8, kFloat32), MOSS_DIRECT(direct8, kFloat16), MOSS_DIRECT(direct8, kBFloat16)},
            {panel8<1>, panel8<2>, panel8<3>},
            4, 3};
}

constexpr __mmask16 kBoth = 0xffff, kLow = 0x00ff, kHigh = 0xff00;

// A pair of rows of a panel is one register; the inputs of a token are in both of its halves.
template <int TOKENS>
MOSS_FMA16 static void panel16(const Products& given) {
    const Products p = given;
    constexpr int pairs = 4, across = 6;
    __m512 sum[pairs][TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < pairs; r++)
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; t++) {
            const float* from = p.sums + 2 * r * p.sum_stride + t * kLanes;
            const __m512 low = _mm512_maskz_broadcast_f32x8(kBoth, _mm256_loadu_ps(from));
            sum[r][t] = _mm512_mask_broadcast_f32x8(low, kHigh, _mm256_loadu_ps(from + p.sum_stride));
        }
    const float *x = p.x, *w = (const float*)p.rows, *end = w + p.steps * pairs * 2 * kLanes;
#pragma GCC unroll 1
    for (; w != end; w += pairs * 2 * kLanes, x += across * kLanes) {
        __m512 rows[pairs];
#pragma GCC unroll 4
        for (int r = 0; r < pairs; r++) {
            rows[r] = _mm512_loadu_ps(w + 2 * r * kLanes);
            asm volatile("" : "+v"(rows[r]));
        }
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; t++) {
            __m512 inputs = _mm512_maskz_broadcast_f32x8(kBoth, _mm256_load_ps(x + t * kLanes));
            asm volatile("" : "+v"(inputs));
#pragma GCC unroll 4
            for (int r = 0; r < pairs; r++) sum[r][t] = _mm512_fmadd_ps(rows[r], inputs, sum[r][t]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < pairs; r++)
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; t++) {
            float* to = p.sums + 2 * r * p.sum_stride + t * kLanes;
            _mm512_mask_storeu_ps(to, kLow, sum[r][t]);
            _mm512_mask_storeu_ps(to + p.sum_stride - kLanes, kHigh, sum[r][t]);
        }
}

static inline RowsKernels avx512_rows() {
    RowsKernels k = avx2_rows();
    const ProductKernel panel[kMostTokens] = {panel16<1>, panel16<2>, panel16<3>, panel16<4>, panel16<5>, panel16<6>};
    for (int t = 0; t < kMostTokens; t++) k.panel[t] = panel[t];
    k.rows = 8;
    k.tokens = 6;
    return k;
}
#endif

enum RowsVersion { kRowsBest = 0, kRowsPlain = 1, kRowsAvx2 = 2, kRowsAvx512 = 3 };

// The best version that this processor can run, up to `wanted`.
static inline int rows_version(int wanted) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool five = two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    if (five && (wanted == kRowsBest || wanted == kRowsAvx512)) return kRowsAvx512;
    if (two && wanted != kRowsPlain) return kRowsAvx2;
#endif
    return kRowsPlain;
}

static inline RowsKernels rows_kernels(int wanted) {
#if defined(__x86_64__)
    const int version = rows_version(wanted);
    if (version == kRowsAvx512) return avx512_rows();
    if (version == kRowsAvx2) return avx2_rows();
#endif
    return plain_rows();
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float sum_lanes(const float* v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// One call, as its threads see it.
struct RowsCall {
    const LinearShape& s;
    const float* x;
    const uint8_t* blob;
    const float* bias;
    float* y;
    RowsKernels kernels;

    int64_t item() const { return bytes_of((int)s.stored); }
    const uint8_t* at(int64_t row, int64_t k) const { return blob + (row * s.in + k) * item(); }
};

// The inputs past the last whole step, `rows` rows from `first` and `tokens` tokens from `token`.
static inline void multiply_rest(const RowsCall& call, int64_t first, int rows, int64_t token, int tokens, float* sums,
                                 int64_t sum_stride) {
    const int64_t done = call.s.in / kLanes * kLanes, rest = call.s.in - done;
    if (!rest) return;
    float x[kDirectTokens * kLanes] = {}, w[kDirectRows * kLanes] = {};
    for (int t = 0; t < tokens; t++) std::memcpy(x + t * kLanes, call.x + (token + t) * call.s.x_stride + done, rest * 4);
    for (int r = 0; r < rows; r++) {
        uint8_t bytes[kLanes * 4] = {};
        std::memcpy(bytes, call.at(first + r, done), rest * call.item());
        call.kernels.widen[call.s.stored](bytes, 1, w + r * kLanes, kLanes);
    }
    const Products p = {(const uint8_t*)w, kLanes * 4, 0, x, kLanes, 0, 1, sums, sum_stride};
    call.kernels.direct[kFloat32][rows > 1][tokens - 1](p);
}

// One or kDirectRows rows times up to 3 tokens.
static inline void multiply_few(const RowsCall& call, int64_t row, int rows, int64_t token, int tokens) {
    const LinearShape& s = call.s;
    float sums[kDirectRows * kDirectTokens * kLanes] = {};
    const Products p = {call.at(row, 0), s.in * call.item(), kLanes * call.item(), call.x + token * s.x_stride, s.x_stride,
                        kLanes, s.in / kLanes, sums, tokens * kLanes};
    call.kernels.direct[s.stored][rows > 1][tokens - 1](p);
    multiply_rest(call, row, rows, token, tokens, sums, tokens * kLanes);
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++)
            put(s, call.bias, call.y, token + t, row + r, sum_lanes(sums + (r * tokens + t) * kLanes));
}

// Rows [first, last) times all tokens; after the first 3 the rows are in a cache.
static inline void multiply_direct(const RowsCall& call, int64_t first, int64_t last) {
    for (int64_t row = first, rows; row < last; row += rows) {
        rows = last - row >= kDirectRows ? kDirectRows : 1;
        for (int64_t t = 0; t < call.s.tokens; t += kDirectTokens)
            multiply_few(call, row, (int)rows, t, (int)least(kDirectTokens, call.s.tokens - t));
    }
}

// Memory of one thread for many tokens.
struct RowsScratch {
    float* memory;
    float *panel, *x, *sums;

    RowsScratch() {
        const int64_t panel_size = kMostRows * kDepth, x_size = kTokenBlock * kDepth;
        memory = new float[panel_size + x_size + kJobRows * kTokenBlock * kLanes + 16];
        panel = memory + (64 - (uintptr_t)memory % 64) / 4;
        x = panel + panel_size;
        sums = x + x_size;
    }
    ~RowsScratch() { delete[] memory; }
    RowsScratch(const RowsScratch&) = delete;
    RowsScratch& operator=(const RowsScratch&) = delete;
};

// Inputs [k, k + depth) of some tokens, as many together as the kernels take; zeros up to a whole step.
static inline void gather_inputs(const RowsCall& call, int64_t token, int64_t tokens, int64_t k, int64_t depth, float* to) {
    const int64_t across = call.kernels.tokens;
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = call.x + (token + t) * call.s.x_stride + k;
        float* lanes = to + t / across * across * kDepth + t % across * kLanes;
        int64_t i = 0;
        for (; i + kLanes <= depth; i += kLanes, lanes += across * kLanes) std::memcpy(lanes, from + i, kLanes * 4);
        if (i == depth) continue;
        std::memset(lanes, 0, kLanes * 4);
        std::memcpy(lanes, from + i, (depth - i) * 4);
    }
}

// Inputs [k, k + depth) of `rows` rows as a panel; zeros for what is missing.
static inline void widen_panel(const RowsCall& call, int64_t row, int64_t rows, int64_t k, int64_t depth, float* panel) {
    const int64_t whole = depth / kLanes, rest = depth % kLanes, steps = whole + (rest > 0);
    const int64_t to_step = call.kernels.rows * kLanes;
    for (int64_t r = 0; r < call.kernels.rows; r++) {
        float* to = panel + r * kLanes;
        if (r >= rows) {
            for (int64_t i = 0; i < steps; i++) std::memset(to + i * to_step, 0, kLanes * 4);
            continue;
        }
        const uint8_t* from = call.at(row + r, k);
        call.kernels.widen[call.s.stored](from, whole, to, to_step);
        if (!rest) continue;
        uint8_t bytes[kLanes * 4] = {};
        std::memcpy(bytes, from + whole * kLanes * call.item(), rest * call.item());
        call.kernels.widen[call.s.stored](bytes, 1, to + whole * to_step, to_step);
    }
}

// Fetches the rows of the next panel, some lines of the cache with every run of tokens.
struct PanelFetch {
    const uint8_t* rows;
    int64_t row_bytes, lines, total, share, next = 0;

    PanelFetch(const RowsCall& call, int64_t row, int64_t k, int64_t runs)
        : rows(call.at(row, k)), row_bytes(call.s.in * call.item()), lines(kDepth * call.item() / 64),
          total(lines * call.kernels.rows), share((total + runs - 1) / runs) {}
    void fetch_some() {
        for (const int64_t end = least(total, next + share); next < end; next++)
            __builtin_prefetch(rows + next / lines * row_bytes + next % lines * 64, 0, 2);
    }
};

// A panel of `depth` inputs times its tokens.
static inline void multiply_panel(const RowsKernels& kernels, const RowsScratch& scratch, int64_t tokens, int64_t depth,
                                  float* sums, PanelFetch fetch) {
    for (int64_t t = 0; t < tokens; t += kernels.tokens) {
        fetch.fetch_some();
        const Products p = {(const uint8_t*)scratch.panel, kLanes * 4, kernels.rows * kLanes * 4,
                            scratch.x + t * kDepth, kLanes, kernels.tokens * kLanes,
                            (depth + kLanes - 1) / kLanes, sums + t * kLanes, tokens * kLanes};
        kernels.panel[least(kernels.tokens, tokens - t) - 1](p);
    }
}

// Rows [first, last), at most kJobRows, times tokens [token, token + tokens), at most kTokenBlock.
static inline void multiply_block(const RowsCall& call, int64_t first, int64_t last, int64_t token, int64_t tokens,
                                  const RowsScratch& scratch) {
    const int64_t sum_stride = tokens * kLanes, rows = call.kernels.rows;
    std::memset(scratch.sums, 0, kJobRows * sum_stride * sizeof(float));
    for (int64_t k = 0; k < call.s.in; k += kDepth) {
        const int64_t depth = least(kDepth, call.s.in - k);
        gather_inputs(call, token, tokens, k, depth, scratch.x);
        for (int64_t row = first; row < last; row += rows) {
            widen_panel(call, row, least(rows, last - row), k, depth, scratch.panel);
            const bool more = row + rows < last;
            const PanelFetch fetch(call, more ? row + rows : first, more ? k : k + kDepth, tokens / call.kernels.tokens + 1);
            multiply_panel(call.kernels, scratch, tokens, depth, scratch.sums + (row - first) * sum_stride, fetch);
        }
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t row = first; row < last; row++)
            put(call.s, call.bias, call.y, token + t, row, sum_lanes(scratch.sums + (row - first) * sum_stride + t * kLanes));
}

// Rows of a job: enough for every thread to have a few of them, in whole panels.
static inline int64_t job_rows(int64_t out, int64_t threads) {
    const int64_t fair = out / (4 * threads) / kMostRows * kMostRows;
    return fair < kMostRows ? kMostRows : least(fair, kJobRows);
}

static inline void linear_rows(const LinearShape& s, const float* x, const uint8_t* blob, const float* bias, float* y,
                               int version = kRowsBest) {
    const RowsCall call = {s, x, blob, bias, y, rows_kernels(version)};
    const bool share = s.out * s.in * s.tokens >= kWorthSharing;
    if (s.tokens <= kFewTokens) {
        const int64_t jobs = (s.out + kMostRows - 1) / kMostRows;
#pragma omp parallel for schedule(dynamic, 4) if (share)
        for (int64_t j = 0; j < jobs; j++) multiply_direct(call, j * kMostRows, least(s.out, (j + 1) * kMostRows));
        return;
    }
#pragma omp parallel if (share)
    {
        const RowsScratch scratch;
        const int64_t rows = job_rows(s.out, omp_get_num_threads()), jobs = (s.out + rows - 1) / rows;
#pragma omp for schedule(dynamic)
        for (int64_t j = 0; j < jobs; j++)
            for (int64_t t = 0; t < s.tokens; t += kTokenBlock)
                multiply_block(call, j * rows, least(s.out, (j + 1) * rows), t, least(kTokenBlock, s.tokens - t), scratch);
    }
}

}  // namespace moss

#pragma GCC pop_options
