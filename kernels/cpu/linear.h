// y = x W^T (+ bias), for every way a weight is stored. The byte layouts are those of moss_jt/layout.py.
//
//   x     (T, K) float, row stride x_stride; for int4/int8 in the order of the stored inputs (see permute)
//   blob  a piece of the stored matrix: `out` rows from row `first` on, of float/half/bfloat, or in
//         tiles of 16 rows of int4/int8
//   y     (T, N) float, row stride y_stride; the piece writes its own rows
//
// An output depends on its own token and row only, and is summed in the same order whatever T is and
// however the matrix is cut: prefill and decode give the same bits, and so does every plan. This is the plain version: float arithmetic throughout.
#pragma once
#include "matrix.h"
#include "rows.h"

namespace moss {

constexpr int64_t kPiece = 128;      // positions of a tile that are widened at a time

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

// sum[0..1] += x[0..n) * w[0..n)[16 rows], two positions apart so that additions overlap.
template <int TOKENS>
static inline void add_piece(const float* w, int64_t n, const float* x, int64_t stride, f32x8 (*sum)[4]) {
    f32x8 s[TOKENS][4];
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < 4; i++) s[t][i] = sum[t][i];
    for (int64_t p = 0; p < n; p += 2) {  // n is even: blocks hold 4 or 8 positions
        const f32x8 a0 = load8(w + p * 16), a1 = load8(w + p * 16 + 8);
        const f32x8 b0 = load8(w + p * 16 + 16), b1 = load8(w + p * 16 + 24);
        for (int t = 0; t < TOKENS; t++) {
            const f32x8 xa = splat8(x[t * stride + p]), xb = splat8(x[t * stride + p + 1]);
            s[t][0] += a0 * xa;
            s[t][1] += a1 * xa;
            s[t][2] += b0 * xb;
            s[t][3] += b1 * xb;
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < 4; i++) sum[t][i] = s[t][i];
}

template <int BITS>
static inline void one_tile(const LinearShape& s, const uint8_t* tile, const float* x, int64_t stride, float* total) {
    float w[kPiece * kTileRows], zeros[kTileRows], scales[kTileRows];
    f32x8 sum[2][4];
    int64_t start = 0;
    for (int64_t g = 0; g < s.groups; g++) {
        const int64_t size = s.padded_in - start < s.padded_group ? s.padded_in - start : s.padded_group;
        read_zeros<BITS>(tile + s.zeros_at + g * kTileRows * BITS / 8, zeros);
        widen_half((const uint16_t*)(tile + s.scales_at) + g * kTileRows, scales, kTileRows);
        const f32x8 scale0 = load8(scales), scale1 = load8(scales + 8);
        for (int64_t at = 0; at < size; at += kPiece) {
            const int64_t n = size - at < kPiece ? size - at : kPiece;
            widen_tile<BITS>(tile + (start + at) / (32 / BITS) * 64, n, zeros, w);
            for (int64_t t = 0; t < s.tokens; t += 2) {
                const int64_t pair = s.tokens - t < 2 ? 1 : 2;
                std::memset(sum, 0, sizeof sum);
                const float* from = x + t * stride + start + at;
                if (pair == 2) {
                    add_piece<2>(w, n, from, stride, sum);
                } else {
                    add_piece<1>(w, n, from, stride, sum);
                }
                for (int64_t i = 0; i < pair; i++) {
                    float* to = total + (t + i) * kTileRows;
                    store8(to, load8(to) + (sum[i][0] + sum[i][2]) * scale0);
                    store8(to + 8, load8(to + 8) + (sum[i][1] + sum[i][3]) * scale1);
                }
            }
        }
        start += size;
    }
}

template <int BITS>
static inline void linear_tiles(const LinearShape& s, const float* x, int64_t stride, const uint8_t* blob,
                                const float* bias, float* y) {
    const int64_t tiles = (s.out + kTileRows - 1) / kTileRows;
#pragma omp parallel
    {
        float* total = new float[s.tokens * kTileRows];
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < tiles; i++) {
            std::memset(total, 0, s.tokens * kTileRows * sizeof(float));
            one_tile<BITS>(s, blob + i * s.tile_bytes, x, stride, total);
            const int64_t first = i * kTileRows;
            const int64_t count = s.out - first < kTileRows ? s.out - first : kTileRows;
            for (int64_t t = 0; t < s.tokens; t++)
                for (int64_t r = 0; r < count; r++) put(s, bias, y, t, first + r, total[t * kTileRows + r]);
        }
        delete[] total;
    }
}

// Inputs in the order in which the tiles hold them; padding gets 0.
static inline void permute(const float* x, const int32_t* perm, float* to, int64_t tokens, int64_t x_stride,
                           int64_t padded_in) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t p = 0; p < padded_in; p++) to[t * padded_in + p] = perm[p] < 0 ? 0.0f : x[t * x_stride + perm[p]];
}

static inline void linear(const LinearShape& s, const float* x, const uint8_t* blob, const float* bias, float* y) {
    blob += s.blob_at;
    bias += s.first;
    y += s.first;
    if (s.stored == kInt4) {
        linear_tiles<4>(s, x, s.x_stride, blob, bias, y);
    } else if (s.stored == kInt8) {
        linear_tiles<8>(s, x, s.x_stride, blob, bias, y);
    } else {
        linear_rows(s, x, blob, bias, y);
    }
}

}  // namespace moss
