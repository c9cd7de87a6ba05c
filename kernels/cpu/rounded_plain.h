// One block of a rounded product in plain C++, for any processor; and what every version of it takes and gives.
//
// For the 16 rows of a tile and some tokens:
//
//   total[token][row] += float(sum of code * x - zero * sum of x) * (scale * step)
//
// The sum of integers is exact, and the three float operations are rounded one by one, so every
// version gives the same bits.
#pragma once
#include "linear.h"
#include "rounding.h"

namespace moss {

struct RoundedBlock {
    const uint8_t* codes;    // of the tile: `chunks` times 64 bytes, as stored (or as a version's unpack left them)
    const uint16_t* scales;  // of the group: 16 halves
    const uint8_t* zeros;    // of the group, as stored
    int64_t chunks;
    int64_t ahead;           // bytes to the same place of the next tile, to fetch it early
    const int8_t* x;         // codes of the first token
    int64_t stride;          // bytes to those of the next one
    const float* steps;      // of each token
    const int32_t* sums;
    float* total;            // 16 floats a token
};

typedef int16_t i16x16 __attribute__((vector_size(32)));

constexpr int64_t kUnpacked = 128;  // bytes at most of one chunk when unpacked

// The weights of one block made ready for many tokens.
struct alignas(64) ReadyBlock {
    uint8_t codes[kMaxBlock / 4 * 64 * 2];
    float scales[kTileRows];
    int32_t zeros[kTileRows];
};

typedef void (*BlockKernel)(const RoundedBlock&);
typedef void (*PrepareKernel)(const RoundedBlock&, ReadyBlock&);
typedef void (*ReadyKernel)(const RoundedBlock&, const ReadyBlock&);

constexpr int kFew = 4;    // tokens at most that take the weights as stored
constexpr int kWidest = 8;

// The version for one processor and number of bits. `few[n - 1]` and `ready[n - 1]` take n tokens.
struct RoundedKernels {
    BlockKernel few[kFew];
    PrepareKernel prepare;
    int width;  // tokens at once of `ready`
    ReadyKernel ready[kWidest];
};

// Sums of the 4 products of every row: as 16-bit lanes, inputs 0 and 2 of the row in `even`, 1 and 3 in `odd`.
static inline i16x16 pair_products(i16x16 even, i16x16 odd, const int8_t* x) {
    const int32_t x02 = (int32_t)((uint32_t)(uint16_t)x[0] | (uint32_t)(uint16_t)x[2] << 16);
    const int32_t x13 = (int32_t)((uint32_t)(uint16_t)x[1] | (uint32_t)(uint16_t)x[3] << 16);
    const i32x8 a = {x02, x02, x02, x02, x02, x02, x02, x02}, b = {x13, x13, x13, x13, x13, x13, x13, x13};
    return even * (i16x16)a + odd * (i16x16)b;
}

static inline i32x8 add_pairs(i16x16 v) { return ((i32x8)((u32x8)v << 16) >> 16) + ((i32x8)v >> 16); }

// Code times x of one chunk, added to `sum`: 8 rows in each of the two halves of the chunk.
template <int BITS>
static inline void plain_chunk(const uint8_t* codes, const int8_t* x, i32x8* sum) {
    const u32x8 bytes = (u32x8){} + 0x00ff00ffu, nibbles = (u32x8){} + 0x000f000fu;
    for (int half = 0; half < 2; half++) {
        u32x8 v;
        std::memcpy(&v, codes + 32 * half, 32);
        if (BITS == 8) {  // a product takes 16 bits, so two are added in 32
            const i16x16 zero = {};
            sum[half] += add_pairs(pair_products((i16x16)(v & bytes), zero, x));
            sum[half] += add_pairs(pair_products(zero, (i16x16)((v >> 8) & bytes), x));
        } else {
            sum[half] += add_pairs(pair_products((i16x16)(v & nibbles), (i16x16)((v >> 8) & nibbles), x) +
                                   pair_products((i16x16)((v >> 4) & nibbles), (i16x16)((v >> 12) & nibbles), x + 4));
        }
    }
}

template <int BITS>
static inline int32_t stored_zero(const uint8_t* zeros, int row) {
    return 1 + (BITS == 8 ? zeros[row] : row < 8 ? zeros[row] & 15 : zeros[row - 8] >> 4);
}

template <int BITS, int TOKENS>
static void plain_block(const RoundedBlock& b) {
    float scales[kTileRows];
    widen_half(b.scales, scales, kTileRows);
    for (int t = 0; t < TOKENS; t++) {
        i32x8 sum[2] = {};
        for (int64_t c = 0; c < b.chunks; c++)
            plain_chunk<BITS>(b.codes + c * 64, b.x + t * b.stride + c * (32 / BITS), sum);
        int32_t whole[kTileRows];
        float factor[kTileRows], part[kTileRows];
        std::memcpy(whole, sum, sizeof whole);
        for (int r = 0; r < kTileRows; r++) {
            whole[r] -= stored_zero<BITS>(b.zeros, r) * b.sums[t];
            factor[r] = scales[r] * b.steps[t];
        }
        keep_as_is(factor);
        for (int r = 0; r < kTileRows; r++) part[r] = (float)whole[r] * factor[r];
        keep_as_is(part);
        for (int r = 0; r < kTileRows; r++) b.total[t * kTileRows + r] += part[r];
    }
}

template <int BITS>
static inline RoundedKernels plain_kernels() {
    return {{plain_block<BITS, 1>, plain_block<BITS, 2>, plain_block<BITS, 3>, plain_block<BITS, 4>},
            nullptr, 4, {}};  // as stored for any number of tokens
}

}  // namespace moss
