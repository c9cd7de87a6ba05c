// y = x W^T (+ bias) with W stored as rows of float, half or bfloat; float arithmetic.
//
// Every output is computed by the same operations on every machine: 8 partial sums, of the inputs k, k + 8,
// k + 16, ..., each a chain of fused multiply-adds in the order of k (zeros fill the last 8 inputs up), then
//     ((s0 + s4) + (s1 + s5)) + ((s2 + s6) + (s3 + s7)).
// So the bits depend on the token and the row only. Fused, because half of the speed of many processors lies
// in that instruction; the few without it (x86 before 2013) compute the same through double, slowly.
//
// Up to 3 tokens are multiplied with the rows as they are stored. For more, 4 or 8 rows and 256 inputs at a
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
constexpr int kMostRows = 8, kMostTokens = 6;      // at once, of a panel
constexpr int64_t kDepth = 256;                    // inputs of a panel
constexpr int64_t kTokenBlock = 96;                // tokens of a panel's run: their inputs stay in the second cache
constexpr int64_t kJobRows = 64;                   // rows at most that a thread takes at a time
constexpr int64_t kWorthSharing = 2000000;         // products of one call, about 100 microseconds: see pointwise.h
constexpr int64_t kFetchBytes = 2048;              // how far ahead of the products a row is fetched

// How rows and tokens are given: rows as stored and tokens apart, or both in the order in which a panel's kernel
// needs them: 8 inputs of every row, then the next 8 of every row, and the tokens likewise.
enum Source { kRowsFloat = kFloat32, kRowsHalf = kFloat16, kRowsBFloat = kBFloat16, kPanel = 3 };

// Some rows and some tokens to multiply, 8 inputs a step; `sums` holds 8 floats a pair of row and token.
struct Products {
    const uint8_t* rows;
    int64_t row_bytes;   // from row to row, unless in a panel
    const float* x;
    int64_t x_stride;    // floats from token to token, unless in a panel
    int64_t steps;
    float* sums;
    int64_t sum_stride;  // floats from row to row
};

typedef void (*ProductKernel)(const Products&);
typedef void (*WidenKernel)(const uint8_t* from, int64_t steps, float* to, int64_t to_step);  // one row

// One processor's version.
struct RowsKernels {
    WidenKernel widen[3];                                   // by Stored
    ProductKernel direct[3][kDirectRows][kDirectTokens];    // by Stored, rows - 1 (only 1 and 4) and tokens - 1
    ProductKernel panel[kMostTokens];                       // by tokens - 1
    int rows, tokens;                                       // at once, of `panel`
};

// a * b + c, rounded once. The sum in double is made odd where it is not exact, so that rounding it again
// gives what rounding once would have given.
static inline float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) && !defined(MOSS_NO_FMA)
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

// Where the inputs of a step lie. ACROSS: rows or tokens of a panel.
template <int SOURCE, int ACROSS>
struct RowsAt {
    static constexpr int64_t bytes = SOURCE == kRowsHalf || SOURCE == kRowsBFloat ? 2 : 4;
    static constexpr int64_t step = (SOURCE == kPanel ? ACROSS : 1) * kLanes * bytes;
    static const uint8_t* of(const Products& p, int64_t r, int64_t i) {
        return p.rows + r * (SOURCE == kPanel ? kLanes * 4 : p.row_bytes) + i * step;
    }
};

template <int SOURCE, int ACROSS>
static inline const float* inputs_at(const Products& p, int64_t t, int64_t i) {
    return SOURCE == kPanel ? p.x + (i * ACROSS + t) * kLanes : p.x + t * p.x_stride + i * kLanes;
}

template <int SOURCE>
static inline void widen8(const uint8_t* from, float* to) {
    if (SOURCE == kRowsHalf) {
        widen_half((const uint16_t*)from, to, kLanes);
    } else if (SOURCE == kRowsBFloat) {
        widen_bfloat((const uint16_t*)from, to, kLanes);
    } else {
        std::memcpy(to, from, kLanes * 4);
    }
}

template <int SOURCE, int ROWS, int TOKENS>
static void plain_products(const Products& p) {
    for (int r = 0; r < ROWS; r++) {
        float sum[TOKENS][kLanes], w[kLanes];
        std::memcpy(sum, p.sums + r * p.sum_stride, sizeof sum);
        for (int64_t i = 0; i < p.steps; i++) {
            widen8<SOURCE>(RowsAt<SOURCE, 4>::of(p, r, i), w);
            for (int t = 0; t < TOKENS; t++) {
                const float* x = inputs_at<SOURCE, 3>(p, t, i);
                for (int l = 0; l < kLanes; l++) sum[t][l] = fused(w[l], x[l], sum[t][l]);
            }
        }
        std::memcpy(p.sums + r * p.sum_stride, sum, sizeof sum);
    }
}

template <int SOURCE>
static void plain_widen(const uint8_t* from, int64_t steps, float* to, int64_t to_step) {
    for (int64_t i = 0; i < steps; i++) widen8<SOURCE>(from + i * RowsAt<SOURCE, 1>::step, to + i * to_step);
}

#define MOSS_DIRECT(KERNEL, SOURCE)                                                    \
    {{KERNEL<SOURCE, 1, 1>, KERNEL<SOURCE, 1, 2>, KERNEL<SOURCE, 1, 3>}, {}, {},       \
     {KERNEL<SOURCE, 4, 1>, KERNEL<SOURCE, 4, 2>, KERNEL<SOURCE, 4, 3>}}

static inline RowsKernels plain_rows() {
    return {{plain_widen<kRowsFloat>, plain_widen<kRowsHalf>, plain_widen<kRowsBFloat>},
            {MOSS_DIRECT(plain_products, kRowsFloat), MOSS_DIRECT(plain_products, kRowsHalf),
             MOSS_DIRECT(plain_products, kRowsBFloat)},
            {plain_products<kPanel, 4, 1>, plain_products<kPanel, 4, 2>, plain_products<kPanel, 4, 3>},
            4, 3};
}

#if defined(__x86_64__)
#define MOSS_FMA8 __attribute__((target("avx2,fma,f16c")))
#define MOSS_FMA16 __attribute__((target("avx512f,avx512dq,avx2,fma,f16c")))
#define MOSS_ALWAYS inline __attribute__((always_inline))

template <int SOURCE>
MOSS_FMA8 static MOSS_ALWAYS __m256 load_row8(const uint8_t* from) {
    if (SOURCE == kRowsHalf) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    if (SOURCE == kRowsBFloat)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
    return _mm256_loadu_ps((const float*)from);
}

template <int SOURCE, int ROWS, int TOKENS>
MOSS_FMA8 static MOSS_ALWAYS void step8(const Products& p, int64_t i, __m256 (&sum)[ROWS][TOKENS]) {
    __m256 x[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) {
        x[t] = _mm256_loadu_ps(inputs_at<SOURCE, 3>(p, t, i));
        asm("" : "+x"(x[t]));  // stay in the register: loads for every product would be what takes the time
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        __m256 w = load_row8<SOURCE>(RowsAt<SOURCE, 4>::of(p, r, i));
        asm("" : "+x"(w));
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) sum[r][t] = _mm256_fmadd_ps(w, x[t], sum[r][t]);
    }
}

// Steps [from, to) of a product; `ahead` bytes further lies what is needed soon.
template <int SOURCE, int ROWS, int TOKENS>
MOSS_FMA8 static MOSS_ALWAYS void multiply8(const Products& p, int64_t from, int64_t to, int64_t ahead,
                                            __m256 (&sum)[ROWS][TOKENS]) {
    constexpr int64_t line = SOURCE == kPanel ? 1 : 64 / RowsAt<SOURCE, 4>::step;  // steps in a line of the cache
    int64_t i = from;
    for (; i + line <= to; i += line) {
        for (int r = 0; r < ROWS && SOURCE != kPanel; r++)
            _mm_prefetch((const char*)RowsAt<SOURCE, 4>::of(p, r, i) + ahead, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int64_t j = 0; j < line; j++) step8<SOURCE, ROWS, TOKENS>(p, i + j, sum);
    }
    for (; i < to; i++) step8<SOURCE, ROWS, TOKENS>(p, i, sum);
}

template <int SOURCE, int ROWS, int TOKENS>
MOSS_FMA8 static void products8(const Products& given) {
    const Products p = given;
    __m256 sum[ROWS][TOKENS];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) sum[r][t] = _mm256_loadu_ps(p.sums + r * p.sum_stride + t * kLanes);
    // near the end of a row, the start of the row that comes after these is fetched
    const int64_t far = p.steps - kFetchBytes / RowsAt<SOURCE, 4>::step, turn = SOURCE == kPanel || far < 0 ? 0 : far;
    multiply8<SOURCE, ROWS, TOKENS>(p, 0, turn, kFetchBytes, sum);
    multiply8<SOURCE, ROWS, TOKENS>(p, turn, p.steps, kFetchBytes + (ROWS - 1) * p.row_bytes, sum);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) _mm256_storeu_ps(p.sums + r * p.sum_stride + t * kLanes, sum[r][t]);
}

template <int SOURCE>
MOSS_FMA8 static void widen_row8(const uint8_t* from, int64_t steps, float* to, int64_t to_step) {
    for (int64_t i = 0; i < steps; i++)
        _mm256_storeu_ps(to + i * to_step, load_row8<SOURCE>(from + i * RowsAt<SOURCE, 1>::step));
}

static inline RowsKernels avx2_rows() {
    return {{widen_row8<kRowsFloat>, widen_row8<kRowsHalf>, widen_row8<kRowsBFloat>},
            {MOSS_DIRECT(products8, kRowsFloat), MOSS_DIRECT(products8, kRowsHalf), MOSS_DIRECT(products8, kRowsBFloat)},
            {products8<kPanel, 4, 1>, products8<kPanel, 4, 2>, products8<kPanel, 4, 3>},
            4, 3};
}

constexpr __mmask16 kBoth = 0xffff;

// A pair of rows of a panel is one register; the inputs of a token are in both of its halves.
template <int PAIRS, int TOKENS>
MOSS_FMA16 static void products16(const Products& given) {
    const Products p = given;
    __m512 sum[PAIRS][TOKENS];
    for (int r = 0; r < PAIRS; r++)
        for (int t = 0; t < TOKENS; t++) {
            float both[2 * kLanes];
            for (int half = 0; half < 2; half++)
                std::memcpy(both + half * kLanes, p.sums + (2 * r + half) * p.sum_stride + t * kLanes, kLanes * 4);
            sum[r][t] = _mm512_loadu_ps(both);
        }
    for (int64_t i = 0; i < p.steps; i++) {
        __m512 w[PAIRS];
        for (int r = 0; r < PAIRS; r++) w[r] = _mm512_loadu_ps((const float*)p.rows + (i * PAIRS + r) * 2 * kLanes);
        for (int t = 0; t < TOKENS; t++) {
            const __m512 x = _mm512_maskz_broadcast_f32x8(kBoth, _mm256_loadu_ps(inputs_at<kPanel, 6>(p, t, i)));
            for (int r = 0; r < PAIRS; r++) sum[r][t] = _mm512_fmadd_ps(w[r], x, sum[r][t]);
        }
    }
    for (int r = 0; r < PAIRS; r++)
        for (int t = 0; t < TOKENS; t++) {
            float both[2 * kLanes];
            _mm512_storeu_ps(both, sum[r][t]);
            for (int half = 0; half < 2; half++)
                std::memcpy(p.sums + (2 * r + half) * p.sum_stride + t * kLanes, both + half * kLanes, kLanes * 4);
        }
}

static inline RowsKernels avx512_rows() {
    RowsKernels k = avx2_rows();
    const ProductKernel panel[kMostTokens] = {products16<4, 1>, products16<4, 2>, products16<4, 3>,
                                              products16<4, 4>, products16<4, 5>, products16<4, 6>};
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

    int64_t item() const { return s.stored == kFloat32 ? 4 : 2; }
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
    const Products p = {(const uint8_t*)w, kLanes * 4, x, kLanes, 1, sums, sum_stride};
    call.kernels.direct[kFloat32][rows - 1][tokens - 1](p);
}

// Rows [first, last) times up to 3 tokens.
static inline void multiply_direct(const RowsCall& call, int64_t first, int64_t last) {
    const LinearShape& s = call.s;
    const int tokens = (int)s.tokens;
    for (int64_t row = first; row < last;) {
        const int rows = last - row >= kDirectRows ? kDirectRows : 1;
        float sums[kDirectRows * kDirectTokens * kLanes] = {};
        const Products p = {call.at(row, 0), s.in * call.item(), call.x, s.x_stride, s.in / kLanes, sums, tokens * kLanes};
        call.kernels.direct[s.stored][rows - 1][tokens - 1](p);
        multiply_rest(call, row, rows, 0, tokens, sums, tokens * kLanes);
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++) put(s, call.bias, call.y, t, row + r, sum_lanes(sums + (r * tokens + t) * kLanes));
        row += rows;
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
        for (int64_t i = 0; i < depth; i += kLanes, lanes += across * kLanes) {
            const int64_t count = least(kLanes, depth - i);
            if (count < kLanes) std::memset(lanes, 0, kLanes * 4);
            std::memcpy(lanes, from + i, count * 4);
        }
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

// Rows [first, last), at most kJobRows, times tokens [token, token + tokens), at most kTokenBlock.
static inline void multiply_block(const RowsCall& call, int64_t first, int64_t last, int64_t token, int64_t tokens,
                                  const RowsScratch& scratch) {
    const RowsKernels& kernels = call.kernels;
    const int64_t sum_stride = tokens * kLanes;
    std::memset(scratch.sums, 0, kJobRows * sum_stride * sizeof(float));
    for (int64_t k = 0; k < call.s.in; k += kDepth) {
        const int64_t depth = least(kDepth, call.s.in - k);
        gather_inputs(call, token, tokens, k, depth, scratch.x);
        for (int64_t row = first; row < last; row += kernels.rows) {
            widen_panel(call, row, least(kernels.rows, last - row), k, depth, scratch.panel);
            for (int64_t t = 0; t < tokens; t += kernels.tokens) {
                float* sums = scratch.sums + (row - first) * sum_stride + t * kLanes;
                const int64_t steps = (depth + kLanes - 1) / kLanes;
                const Products p = {(const uint8_t*)scratch.panel, 0, scratch.x + t * kDepth, 0, steps, sums, sum_stride};
                kernels.panel[least(kernels.tokens, tokens - t) - 1](p);
            }
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
    if (s.tokens <= kDirectTokens) {
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
