// Rounded products of the 16 rows of a tile in plain C++, for any processor; and what every version takes and gives.
//
//   total[token][row] += float(sum of code * x - zero * sum of x) * (scale * step)      for every block, in order
//
// The sum of integers is exact, and the three float operations are rounded one by one, so every version gives
// the same bits. A version has two ways to them. `sum` and `add` are for few tokens, where memory is what takes
// time: they read tiles from front to back and nothing else, first the codes, then the scales and zeros behind
// them, two tiles side by side where registers allow, so that x is fetched half as often. (Jumping between codes and
// scales, or fetching ahead by instruction, cost a third of the speed where this was measured: docs/kernels.md.)
// `prepare` and `multiply` are for many tokens: a block's weights are unpacked once.
#pragma once
#include "matrix.h"
#include "rounding.h"

namespace moss {

constexpr int kFew = 4;              // tokens at most of `sum` and `add`
constexpr int kPair = 2;             // tokens at most for which they take two tiles
constexpr int kTilesReady = 8;        // tiles at most whose weights of one block are unpacked together
constexpr int64_t kRunBlocks = 192;  // blocks at most between `sum` and `add`

// Some blocks of one size in one or two tiles, for some tokens.
struct BlockRun {
    const uint8_t* codes;    // of the first block: `chunks` times 64 bytes, then those of the next one
    int64_t chunks, count;   // of each block, and how many blocks
    int64_t second;          // bytes to the same place of the second tile
    const uint16_t* scales;  // of the first block's group, then those of the next group
    const uint8_t* zeros;
    int64_t left_in_group, per_group;  // blocks of the first group from the first one on, blocks of every other
    const int8_t* x;         // codes of the first token; from block to block, and from token to token:
    int64_t x_block, x_token;
    const float* steps;      // of the first token
    const int32_t* sums;
    int64_t tokens;          // from block to block in `steps` and `sums`

    // The same blocks of a tile that is so many bytes further.
    void move(int64_t bytes) {
        codes += bytes;
        scales += bytes / 2;
        zeros += bytes;
    }
};

// The sums of code * x, [block][tile][token][row]; totals are [tile][token][row].
typedef void (*SumKernel)(const BlockRun&, int32_t* sums);
typedef void (*AddKernel)(const BlockRun&, const int32_t* sums, float* total);

// Walks through the scales and zeros of a run.
template <int BITS>
struct GroupOf {
    const uint16_t* scales;
    const uint8_t* zeros;
    int64_t left, per_group;

    explicit GroupOf(const BlockRun& run)
        : scales(run.scales), zeros(run.zeros), left(run.left_in_group), per_group(run.per_group) {}
    void next_block() {
        if (--left > 0) return;
        left = per_group;
        scales += kTileRows;
        zeros += kTileRows * BITS / 8;
    }
};

// The weights of one block, unpacked for many tokens.
struct alignas(64) ReadyBlock {
    uint8_t codes[kMaxBlock / 4 * 128];  // 128 bytes a chunk, in an order of the version's own
    float scales[kTileRows];
    int32_t zeros[kTileRows];
    int64_t chunks;
    const uint8_t* next;  // AMX: the codes of the next block as they are stored
    bool centred;         // AMX: zeros have been taken off the codes
};

// Tokens of one block: codes of the first one, bytes to those of the next, steps and sums of each.
struct BlockTokens {
    int64_t count;
    const int8_t* codes;
    int64_t stride;
    const float* steps;
    const int32_t* sums;
};

typedef void (*PrepareKernel)(const BlockRun&, ReadyBlock&);
// Some tiles; the totals of each are [token][row], `apart` floats from one tile's to the next one's.
typedef void (*MultiplyKernel)(const ReadyBlock* tiles, int64_t count, const BlockTokens&, float* totals, int64_t apart);

// The version for one processor and number of bits; [n - 1] is for n tokens.
struct RoundedKernels {
    SumKernel sum[kFew];
    AddKernel add[kFew];
    SumKernel sum_pair[kPair];  // of two tiles
    AddKernel add_pair[kPair];
    int tiles_at_once;      // of `multiply`: they share the codes of x
    int tokens_at_once;     // they share the weights; kRunTokens is a multiple
    PrepareKernel prepare;  // null: there are only those above
    MultiplyKernel multiply;
    void (*begin)();  // what a thread does before and after those; may be null
    void (*end)();
};

typedef int16_t i16x16 __attribute__((vector_size(32)));

// Sums of two products each: of inputs 0 and 1 of every row in the low, of 2 and 3 in the high half of its lane.
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
            const i16x16 none = {};
            sum[half] += add_pairs(pair_products((i16x16)(v & bytes), none, x));
            sum[half] += add_pairs(pair_products(none, (i16x16)((v >> 8) & bytes), x));
        } else {
            sum[half] += add_pairs(pair_products((i16x16)(v & nibbles), (i16x16)((v >> 8) & nibbles), x) +
                                   pair_products((i16x16)((v >> 4) & nibbles), (i16x16)((v >> 12) & nibbles), x + 4));
        }
    }
}

template <int BITS, int TOKENS, int TILES>
static void plain_sum(const BlockRun& run, int32_t* sums) {
    for (int64_t i = 0; i < run.count; i++)
        for (int tile = 0; tile < TILES; tile++)
            for (int t = 0; t < TOKENS; t++, sums += kTileRows) {
                const uint8_t* codes = run.codes + i * run.chunks * 64 + tile * run.second;
                const int8_t* x = run.x + i * run.x_block + t * run.x_token;
                i32x8 sum[2] = {};
                for (int64_t c = 0; c < run.chunks; c++) plain_chunk<BITS>(codes + c * 64, x + c * (32 / BITS), sum);
                std::memcpy(sums, sum, sizeof sum);
            }
}

template <int BITS>
static inline int32_t stored_zero(const uint8_t* zeros, int row) {
    return 1 + (BITS == 8 ? zeros[row] : row < 8 ? zeros[row] & 15 : zeros[row - 8] >> 4);
}

template <int BITS>
static inline void plain_add_block(const uint16_t* scales, const uint8_t* zeros, const int32_t* sums, float step,
                                   int32_t sum, float* total) {
    float factor[kTileRows], part[kTileRows];
    widen_half(scales, factor, kTileRows);
    for (int r = 0; r < kTileRows; r++) factor[r] *= step;
    keep_as_is(factor);
    for (int r = 0; r < kTileRows; r++) part[r] = (float)(sums[r] - stored_zero<BITS>(zeros, r) * sum) * factor[r];
    keep_as_is(part);
    for (int r = 0; r < kTileRows; r++) total[r] += part[r];
}

template <int BITS, int TOKENS, int TILES>
static void plain_add(const BlockRun& run, const int32_t* sums, float* total) {
    GroupOf<BITS> group(run);
    for (int64_t i = 0; i < run.count; i++, group.next_block())
        for (int tile = 0; tile < TILES; tile++)
            for (int t = 0; t < TOKENS; t++, sums += kTileRows)
                plain_add_block<BITS>(group.scales + tile * run.second / 2, group.zeros + tile * run.second, sums,
                                      run.steps[i * run.tokens + t], run.sums[i * run.tokens + t],
                                      total + (tile * TOKENS + t) * kTileRows);
}

template <int BITS>
static inline RoundedKernels plain_kernels() {
    return {{plain_sum<BITS, 1, 1>, plain_sum<BITS, 2, 1>, plain_sum<BITS, 3, 1>, plain_sum<BITS, 4, 1>},
            {plain_add<BITS, 1, 1>, plain_add<BITS, 2, 1>, plain_add<BITS, 3, 1>, plain_add<BITS, 4, 1>},
            {plain_sum<BITS, 1, 2>, plain_sum<BITS, 2, 2>},
            {plain_add<BITS, 1, 2>, plain_add<BITS, 2, 2>},
            1, 1, nullptr, nullptr, nullptr, nullptr};
}

}  // namespace moss
