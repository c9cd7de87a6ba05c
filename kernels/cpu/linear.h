// y = x W^T (+ bias), for every way a weight is stored. The byte layouts are those of moss_jt/layout.py.
//
//   x     (T, K) float, row stride x_stride; for int4/int8 in the order of the stored inputs (see permute)
//   blob  a piece of the stored matrix: `out` rows from row `first` on, of float/half/bfloat, or in
//         tiles of 16 rows of int4/int8
//   y     (T, N) float, row stride y_stride; the piece writes its own rows
//
// An output depends on its own token and row only, and is summed in the same order whatever T is, however the
// matrix is cut, and on every machine: prefill and decode give the same bits, and so does every plan.
//
// Rows: rows.h. Tiles: of up to 128 positions of a group (code - zero) * x is summed in two chains of fused
// multiply-adds, one of the even and one of the odd positions; their sum times the scale is added to the total.
#pragma once
#include "matrix.h"
#include "rows.h"

#pragma GCC push_options
#pragma GCC optimize("no-associative-math,no-reciprocal-math,signed-zeros,fp-contract=off")

namespace moss {

constexpr int64_t kPiece = 128;       // positions of a tile that are widened at a time
constexpr int64_t kGatherCost = 600;  // picoseconds a number

// Codes minus zeros of `n` positions (whole blocks of one group) for 16 rows: to[position][row].
template <int BITS>
static inline __attribute__((always_inline)) void widen_tile(const uint8_t* codes, int64_t n, const float* zeros, float* to) {
    constexpr int block = 32 / BITS;
    const f32x8 zero0 = load8(zeros), zero1 = load8(zeros + 8);
    for (int64_t p = 0; p < n; p += block, codes += 64) {
        u32x8 low, high;  // one 32-bit lane a row
        std::memcpy(&low, codes, 32);
        std::memcpy(&high, codes + 32, 32);
        for (int i = 0; i < block; i++) {
            // int4: inputs 0-3 in the low nibbles of bytes 0-3, 4-7 in the high ones; int8: a byte each
            const int shift = BITS == 4 ? 8 * (i & 3) + 4 * (i >> 2) : 8 * i;
            const uint32_t mask = (1u << BITS) - 1u;
            const i32x8 code0 = (i32x8)((low >> shift) & mask), code1 = (i32x8)((high >> shift) & mask);
            store8(to + (p + i) * kTileRows, __builtin_convertvector(code0, f32x8) - zero0);
            store8(to + (p + i) * kTileRows + 8, __builtin_convertvector(code1, f32x8) - zero1);
        }
    }
}

template <int BITS>
static inline __attribute__((always_inline)) void read_zeros(const uint8_t* from, float* zeros) {
    for (int r = 0; r < kTileRows; r++) {
        const int stored = BITS == 8 ? from[r] : r < 8 ? from[r] & 15 : from[r - 8] >> 4;
        zeros[r] = (float)(stored + 1);
    }
}

// sums[token][parity][row] = sum of x w over the positions of one parity, chains of fused multiply-adds; w[n][16 rows]
typedef void (*PieceKernel)(const float* w, int64_t n, const float* x, int64_t stride, float* sums);

constexpr int kPieceTokens = 3;  // at once

template <int TOKENS>
static void plain_piece(const float* w, int64_t n, const float* x, int64_t stride, float* sums) {
    std::memset(sums, 0, TOKENS * 2 * kTileRows * sizeof(float));
    for (int t = 0; t < TOKENS; t++)
        for (int64_t p = 0; p < n; p++) {
            float* to = sums + (t * 2 + p % 2) * kTileRows;
            for (int r = 0; r < kTileRows; r++) to[r] = fused(w[p * kTileRows + r], x[t * stride + p], to[r]);
        }
}

#if defined(__x86_64__)
template <int TOKENS>
MOSS_FMA8 static void piece8(const float* w, int64_t n, const float* x, int64_t stride, float* sums) {
    __m256 sum[TOKENS][4];
#pragma GCC unroll 3
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[t][i] = _mm256_setzero_ps();
    for (int64_t p = 0; p < n; p += 2)  // n is even: blocks hold 4 or 8 positions
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; parity++) {
            __m256 low = _mm256_loadu_ps(w + (p + parity) * kTileRows), high = _mm256_loadu_ps(w + (p + parity) * kTileRows + 8);
            asm volatile("" : "+x"(low), "+x"(high));  // loaded once, see panel8
#pragma GCC unroll 3
            for (int t = 0; t < TOKENS; t++) {
                const __m256 input = _mm256_broadcast_ss(x + t * stride + p + parity);
                sum[t][2 * parity] = _mm256_fmadd_ps(low, input, sum[t][2 * parity]);
                sum[t][2 * parity + 1] = _mm256_fmadd_ps(high, input, sum[t][2 * parity + 1]);
            }
        }
#pragma GCC unroll 3
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) _mm256_storeu_ps(sums + (t * 4 + i) * 8, sum[t][i]);
}
#endif

struct PieceKernels {
    PieceKernel tokens[kPieceTokens];
};

static inline PieceKernels piece_kernels(int wanted) {
#if defined(__x86_64__)
    if (rows_version(wanted) != kRowsPlain) return {{piece8<1>, piece8<2>, piece8<3>}};
#endif
    return {{plain_piece<1>, plain_piece<2>, plain_piece<3>}};
}

// One tile times all tokens, added to total[token][row].
template <int BITS>
static inline void one_tile(const LinearShape& s, const PieceKernels& kernels, const uint8_t* tile, const float* x,
                            float* total) {
    float w[kPiece * kTileRows], zeros[kTileRows], scales[kTileRows], sums[kPieceTokens * 2 * kTileRows];
    for (int64_t start = 0, g = 0; start < s.padded_in; start += s.padded_group, g++) {
        const int64_t end = least(s.padded_in, start + s.padded_group);
        read_zeros<BITS>(tile + s.zeros_at + g * kTileRows * BITS / 8, zeros);
        widen_half((const uint16_t*)(tile + s.scales_at) + g * kTileRows, scales, kTileRows);
        for (int64_t at = start; at < end; at += kPiece) {
            const int64_t n = least(kPiece, end - at);
            widen_tile<BITS>(tile + at / (32 / BITS) * 64, n, zeros, w);
            for (int64_t t = 0; t < s.tokens; t += kPieceTokens) {
                const int64_t count = least(kPieceTokens, s.tokens - t);
                kernels.tokens[count - 1](w, n, x + t * s.x_stride + at, s.x_stride, sums);
                for (int64_t i = 0; i < count; i++) {
                    const float* sum = sums + i * 2 * kTileRows;
                    float* to = total + (t + i) * kTileRows;
                    for (int r = 0; r < kTileRows; r++) to[r] += (sum[r] + sum[kTileRows + r]) * scales[r];
                }
            }
        }
    }
}

template <int BITS>
static inline void linear_tiles(const LinearShape& s, const float* x, const uint8_t* blob, const float* bias, float* y,
                                int version) {
    const int64_t tiles = (s.out + kTileRows - 1) / kTileRows;
    const PieceKernels kernels = piece_kernels(version);
#pragma omp parallel if (s.out * s.in * s.tokens >= kWorthSharing)
    {
        float* total = new float[s.tokens * kTileRows];
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < tiles; i++) {
            std::memset(total, 0, s.tokens * kTileRows * sizeof(float));
            one_tile<BITS>(s, kernels, blob + i * s.tile_bytes, x, total);
            const int64_t first = i * kTileRows, count = least(kTileRows, s.out - first);
            for (int64_t t = 0; t < s.tokens; t++)
                for (int64_t r = 0; r < count; r++) put(s, bias, y, t, first + r, total[t * kTileRows + r]);
        }
        delete[] total;
    }
}

// Inputs in the order in which the tiles hold them; padding gets 0.
static inline void permute(const float* x, const int32_t* perm, float* to, int64_t tokens, int64_t x_stride,
                           int64_t padded_in) {
#pragma omp parallel for schedule(static) if (worth_waking(tokens * padded_in, kGatherCost))
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t p = 0; p < padded_in; p++) to[t * padded_in + p] = perm[p] < 0 ? 0.0f : x[t * x_stride + perm[p]];
}

static inline void linear(const LinearShape& s, const float* x, const uint8_t* blob, const float* bias, float* y,
                          int version = kRowsBest) {
    blob += s.blob_at;
    bias += s.first;
    y += s.first;
    if (s.stored == kInt4) {
        linear_tiles<4>(s, x, blob, bias, y, version);
    } else if (s.stored == kInt8) {
        linear_tiles<8>(s, x, blob, bias, y, version);
    } else {
        linear_rows(s, x, blob, bias, y, version);
    }
}

}  // namespace moss

#pragma GCC pop_options
