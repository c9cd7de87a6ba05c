// dx = dy W: the product with a stored matrix turned around, for the gradients of its inputs. Float arithmetic.
//
//   dy      (T, N) float, row stride y_stride
//   blob    a piece of the stored matrix, as in linear.h
//   turned  (P, width) float, dx turned around: inputs in the order in which the matrix holds them, T tokens of
//           `width` (padded_tokens); P is the number of inputs rounded up to kColumnBlock. Zero at first, every piece adds
//
// Each sum is one chain of fused multiply-adds in the order of the rows. It goes on from piece to piece, so the bits
// do not depend on how the matrix is cut, nor on T, threads and processor. W is exact: a code less its zero
// point times a half fits in a float.
//
// Threads share out the inputs, so no two add to the same sum. 128 rows by 48 inputs at a time are widened and
// serve all tokens, 16 at a time.
#pragma once
#include "linear.h"

#pragma GCC push_options
#pragma GCC optimize("no-associative-math,no-reciprocal-math,signed-zeros,fp-contract=off")

namespace moss {

constexpr int64_t kTokenLanes = 16;    // tokens at once
constexpr int64_t kColumnBlock = 48;   // inputs of a panel
constexpr int64_t kPanelRows = 128;    // rows of a panel
constexpr int64_t kJobColumns = 1536;  // inputs at most that a thread takes at a time

// A panel is (rows, inputs) or, of tiles, (inputs, rows).
template <bool TILES>
struct PanelAt {
    static constexpr int64_t row = TILES ? 1 : kColumnBlock, column = TILES ? kPanelRows : 1;
};

// turned[kColumnBlock][16 tokens, `width` apart] += panel times dy, which holds 16 tokens a row
typedef void (*TurnKernel)(const float* panel, const float* dy, int64_t rows, float* turned, int64_t width);

template <bool TILES>
static void plain_turn(const float* panel, const float* dy, int64_t rows, float* turned, int64_t width) {
    for (int64_t c = 0; c < kColumnBlock; c++, turned += width) {
        float sum[kTokenLanes];
        std::memcpy(sum, turned, sizeof sum);
        for (int64_t r = 0; r < rows; r++) {
            const float w = panel[c * PanelAt<TILES>::column + r * PanelAt<TILES>::row];
            for (int l = 0; l < kTokenLanes; l++) sum[l] = fused(w, dy[r * kTokenLanes + l], sum[l]);
        }
        std::memcpy(turned, sum, sizeof sum);
    }
}

#if defined(__x86_64__)
template <bool TILES>
MOSS_FMA8 static void turn8(const float* panel, const float* dy, int64_t rows, float* turned, int64_t width) {
    constexpr int columns = 6;  // of 2 registers each; 2 hold dy
    for (int64_t c = 0; c < kColumnBlock; c += columns, turned += columns * width) {
        __m256 sum[columns][2];
#pragma GCC unroll 6
        for (int i = 0; i < columns; i++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) sum[i][h] = _mm256_loadu_ps(turned + i * width + 8 * h);
        for (int64_t r = 0; r < rows; r++) {
            const float* at = panel + c * PanelAt<TILES>::column + r * PanelAt<TILES>::row;
            __m256 y0 = _mm256_loadu_ps(dy + r * kTokenLanes), y1 = _mm256_loadu_ps(dy + r * kTokenLanes + 8);
            asm("" : "+x"(y0), "+x"(y1));  // loaded once
#pragma GCC unroll 6
            for (int i = 0; i < columns; i++) {
                const __m256 w = _mm256_broadcast_ss(at + i * PanelAt<TILES>::column);
                sum[i][0] = _mm256_fmadd_ps(w, y0, sum[i][0]);
                sum[i][1] = _mm256_fmadd_ps(w, y1, sum[i][1]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < columns; i++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) _mm256_storeu_ps(turned + i * width + 8 * h, sum[i][h]);
    }
}

template <bool TILES>
MOSS_FMA16 static void turn16(const float* panel, const float* dy, int64_t rows, float* turned, int64_t width) {
    constexpr int columns = 24;
    for (int64_t c = 0; c < kColumnBlock; c += columns, turned += columns * width) {
        __m512 sum[columns];
#pragma GCC unroll 24
        for (int i = 0; i < columns; i++) sum[i] = _mm512_loadu_ps(turned + i * width);
        for (int64_t r = 0; r < rows; r++) {
            const float* at = panel + c * PanelAt<TILES>::column + r * PanelAt<TILES>::row;
            const __m512 y = _mm512_loadu_ps(dy + r * kTokenLanes);
#pragma GCC unroll 24
            for (int i = 0; i < columns; i++)
                sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(at[i * PanelAt<TILES>::column]), y, sum[i]);
        }
#pragma GCC unroll 24
        for (int i = 0; i < columns; i++) _mm512_storeu_ps(turned + i * width, sum[i]);
    }
}
#endif

template <bool TILES>
static inline TurnKernel turn_kernel(int wanted) {
#if defined(__x86_64__)
    const int version = rows_version(wanted);
    if (version == kRowsAvx512) return turn16<TILES>;
    if (version == kRowsAvx2) return turn8<TILES>;
#endif
    return plain_turn<TILES>;
}

static inline int64_t padded_tokens(int64_t tokens) { return (tokens + kTokenLanes - 1) / kTokenLanes * kTokenLanes; }

// Positions [from, to) of a tile's 16 rows, to[position][row].
template <int BITS>
static inline void widen_tile_columns(const LinearShape& s, const uint8_t* tile, int64_t from, int64_t to, float* panel) {
    constexpr int64_t block = 32 / BITS;
    float w[block * kTileRows], zeros[kTileRows], scales[kTileRows];
    for (int64_t p = from, last = -1; p < to; p += block) {
        const int64_t group = p / s.padded_group;
        if (group != last) {
            read_zeros<BITS>(tile + s.zeros_at + group * kTileRows * BITS / 8, zeros);
            widen_half((const uint16_t*)(tile + s.scales_at) + group * kTileRows, scales, kTileRows);
            last = group;
        }
        widen_tile<BITS>(tile + p / block * 64, block, zeros, w);
        for (int64_t i = 0; i < block; i++)
            for (int half = 0; half < kTileRows; half += 8)
                store8(panel + (p - from + i) * kPanelRows + half, load8(w + i * kTileRows + half) * load8(scales + half));
    }
}

// Inputs [from, to) of a row.
static inline void widen_row_columns(const LinearShape& s, WidenKernel widen, const uint8_t* row, int64_t from, int64_t to,
                                     float* panel) {
    const int64_t item = bytes_of((int)s.stored), whole = (to - from) / kLanes, rest = (to - from) % kLanes;
    widen(row + from * item, whole, panel, kLanes);
    if (!rest) return;
    uint8_t bytes[kLanes * 4] = {};
    std::memcpy(bytes, row + (from + whole * kLanes) * item, rest * item);
    widen(bytes, 1, panel + whole * kLanes, kLanes);
}

// Rows [first, first + rows) and inputs [from, to) of a piece as a panel; what lies past `to` is never looked at again.
template <bool TILES>
static inline void widen_block(const LinearShape& s, WidenKernel widen, const uint8_t* blob, int64_t first, int64_t rows,
                               int64_t from, int64_t to, float* panel) {
    if (to - from < kColumnBlock) std::memset(panel, 0, kPanelRows * kColumnBlock * sizeof(float));
    for (int64_t r = 0; r < rows; r += TILES ? kTileRows : 1) {
        if (!TILES) {
            const uint8_t* row = blob + (first + r) * s.in * bytes_of((int)s.stored);
            widen_row_columns(s, widen, row, from, to, panel + r * kColumnBlock);
        } else if (s.stored == kInt4) {
            widen_tile_columns<4>(s, blob + (first + r) / kTileRows * s.tile_bytes, from, to, panel + r);
        } else {
            widen_tile_columns<8>(s, blob + (first + r) / kTileRows * s.tile_bytes, from, to, panel + r);
        }
    }
}

// dy of some rows for all tokens: runs of 16 tokens, (rows, 16) each; zeros where there are no more tokens.
static inline void gather_gradients(const LinearShape& s, const float* dy, int64_t rows, float* to) {
    for (int64_t t = 0; t < padded_tokens(s.tokens); t++) {
        float* lane = to + t / kTokenLanes * kTokenLanes * kPanelRows + t % kTokenLanes;
        for (int64_t r = 0; r < rows; r++) lane[r * kTokenLanes] = t < s.tokens ? dy[t * s.y_stride + r] : 0.0f;
    }
}

// Memory of one thread.
struct TurnScratch {
    float* memory;
    float *panel, *dy;

    explicit TurnScratch(int64_t tokens) {
        memory = new float[kPanelRows * (kColumnBlock + padded_tokens(tokens)) + 16];
        panel = memory + (64 - (uintptr_t)memory % 64) / 4;
        dy = panel + kPanelRows * kColumnBlock;
    }
    ~TurnScratch() { delete[] memory; }
    TurnScratch(const TurnScratch&) = delete;
    TurnScratch& operator=(const TurnScratch&) = delete;
};

// All rows of a piece, inputs [from, to).
template <bool TILES>
static inline void turn_columns(const LinearShape& s, const float* dy, const uint8_t* blob, int64_t from, int64_t to,
                                int version, const TurnScratch& scratch, float* turned) {
    const int64_t width = padded_tokens(s.tokens);
    const TurnKernel turn = turn_kernel<TILES>(version);
    const WidenKernel widen = TILES ? nullptr : rows_kernels(version).widen[s.stored];
    for (int64_t first = 0; first < s.out; first += kPanelRows) {
        const int64_t rows = least(kPanelRows, s.out - first);
        gather_gradients(s, dy + first, rows, scratch.dy);
        for (int64_t c = from; c < to; c += kColumnBlock) {
            widen_block<TILES>(s, widen, blob, first, rows, c, least(to, c + kColumnBlock), scratch.panel);
            for (int64_t t = 0; t < width; t += kTokenLanes)
                turn(scratch.panel, scratch.dy + t * kPanelRows, rows, turned + c * width + t, width);
        }
    }
}

// Inputs of a job: enough for every thread to have a few of them, in whole blocks.
static inline int64_t job_columns(int64_t columns, int64_t threads) {
    const int64_t fair = columns / (2 * threads) / kColumnBlock * kColumnBlock;
    return fair < kColumnBlock ? kColumnBlock : least(fair, kJobColumns);
}

static inline void turn_product(const LinearShape& s, const float* dy, const uint8_t* blob, float* turned,
                                int version = kRowsBest) {
    const bool tiles = s.stored == kInt4 || s.stored == kInt8;
    const int64_t columns = tiles ? s.padded_in : s.in;
    blob += s.blob_at;
    dy += s.first;
#pragma omp parallel if (columns * s.out * s.tokens >= kWorthSharing)
    {
        const TurnScratch scratch(s.tokens);
        const int64_t job = job_columns(columns, omp_get_num_threads()), jobs = (columns + job - 1) / job;
#pragma omp for schedule(dynamic)
        for (int64_t j = 0; j < jobs; j++) {
            const int64_t from = j * job, to = least(columns, from + job);
            if (tiles) {
                turn_columns<true>(s, dy, blob, from, to, version, scratch, turned);
            } else {
                turn_columns<false>(s, dy, blob, from, to, version, scratch, turned);
            }
        }
    }
}

// What turn_product made, as (T, K): `columns` inputs in the order of the matrix, those with perm < 0 left out.
static inline void turn_back(const float* turned, const int32_t* perm, float* dx, int64_t tokens, int64_t columns,
                             int64_t x_stride, bool permuted) {
    const int64_t width = padded_tokens(tokens);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < columns; c++) {
            const int64_t k = permuted ? perm[c] : c;
            if (k >= 0) dx[t * x_stride + k] = turned[c * width + t];
        }
}

}  // namespace moss

#pragma GCC pop_options
