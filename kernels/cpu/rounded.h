// y = x W^T (+ bias) with activations rounded to int8 (rounding.h) and weights in tiles of int4/int8.
//
// A few tokens take the weights as they are stored. For more, one block of some tiles is made ready at a
// time and used for a run of tokens. Tiles are handed out to the threads while there are any, in ever
// smaller runs, so a slow core does not hold up the others. Which processor's version runs, how many
// threads, how many tokens at once and how the matrix is cut change no bit of a result.
#pragma once
#include <omp.h>

#include <atomic>

#include "rounded_plain.h"
#include "rounded_x86.h"

namespace moss {

enum Processor { kBest = 0, kPlain = 1, kAvx2 = 2, kAvxVnni = 3, kAvx512Vnni = 4 };

constexpr int64_t kTilesAtOnce = 4;   // tiles that share the codes of a run of tokens
constexpr int64_t kTokensAtOnce = 32; // a run of tokens: its codes and sums stay in the first cache

static inline bool can_run(int processor) {
    if (processor == kPlain) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (processor == kAvx2) return __builtin_cpu_supports("avx2");
#endif
    return false;
}

// The wanted version, or what comes next where this processor cannot run it.
static inline int choose_processor(int wanted) {
    for (int p = wanted == kBest ? kAvx512Vnni : wanted; p > kPlain; p--)
        if (can_run(p)) return p;
    return kPlain;
}

template <int BITS>
static inline RoundedKernels rounded_kernels(int processor) {
    switch (choose_processor(processor)) {
#if defined(__x86_64__)
        case kAvx2: return avx2_kernels<BITS>();
#endif
        default: return plain_kernels<BITS>();
    }
}

// Everything of one call that its threads share.
struct RoundedCall {
    const LinearShape& s;
    int64_t block;
    const int8_t* codes;
    const uint8_t* blob;
    const float* bias;
    const float* steps;
    const int32_t* sums;
    float* y;
    RoundedKernels kernels;
};

// What a kernel must know of one block of a tile, for the tokens from `t` on.
static inline RoundedBlock block_of(const RoundedCall& call, const Blocks& b, const uint8_t* tile, int64_t t) {
    const LinearShape& s = call.s;
    const int64_t per_chunk = 32 / s.stored, scale_bytes = kTileRows * 2, zero_bytes = kTileRows * s.stored / 8;
    RoundedBlock to;
    to.codes = tile + b.start / per_chunk * 64;
    to.scales = (const uint16_t*)(tile + s.scales_at + b.group * scale_bytes);
    to.zeros = tile + s.zeros_at + b.group * zero_bytes;
    to.chunks = b.size / per_chunk;
    to.ahead = s.tile_bytes;
    to.x = call.codes + b.start * s.tokens + t * b.size;
    to.stride = b.size;
    to.steps = call.steps + b.index * s.tokens + t;
    to.sums = call.sums + b.index * s.tokens + t;
    return to;
}

static inline void write_totals(const RoundedCall& call, int64_t tile, int64_t t, int64_t tokens, const float* total) {
    const int64_t first = tile * kTileRows, left = call.s.out - first, rows = left < kTileRows ? left : kTileRows;
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t r = 0; r < rows; r++) put(call.s, call.bias, call.y, t + i, first + r, total[i * kTileRows + r]);
}

// Some tokens, at most kFew, of one tile.
static inline void few_tokens(const RoundedCall& call, int64_t tile, int64_t t, int64_t tokens) {
    float total[kFew * kTileRows] = {};
    const LinearShape& s = call.s;
    const BlockKernel kernel = call.kernels.few[tokens - 1];
    for (Blocks b(s.padded_in, s.padded_group, call.block); b.more(); b.next()) {
        RoundedBlock block = block_of(call, b, call.blob + tile * s.tile_bytes, t);
        block.total = total;
        kernel(block);
    }
    write_totals(call, tile, t, tokens, total);
}

// Some tokens, at most kTokensAtOnce, of some tiles, at most kTilesAtOnce.
static inline void many_tokens(const RoundedCall& call, int64_t tile, int64_t tiles, int64_t t, int64_t tokens) {
    float total[kTilesAtOnce][kTokensAtOnce * kTileRows] = {};
    ReadyBlock ready[kTilesAtOnce];
    const LinearShape& s = call.s;
    for (Blocks b(s.padded_in, s.padded_group, call.block); b.more(); b.next()) {
        RoundedBlock block;
        for (int64_t i = 0; i < tiles; i++) {
            block = block_of(call, b, call.blob + (tile + i) * s.tile_bytes, t);
            call.kernels.prepare(block, ready[i]);
        }
        for (int64_t at = 0; at < tokens;) {
            const int64_t count = tokens - at < call.kernels.width ? tokens - at : call.kernels.width;
            const ReadyKernel kernel = call.kernels.ready[count - 1];
            for (int64_t i = 0; i < tiles; i++) {
                block.total = total[i] + at * kTileRows;
                kernel(block, ready[i]);
            }
            at += count;
            block.x += count * block.stride;
            block.steps += count;
            block.sums += count;
        }
    }
    for (int64_t i = 0; i < tiles; i++) write_totals(call, tile + i, t, tokens, total[i]);
}

static inline void rounded_tiles(const RoundedCall& call, int64_t tile, int64_t tiles) {
    const int64_t tokens = call.s.tokens;
    if (tokens <= kFew || call.kernels.prepare == nullptr) {
        for (int64_t i = tile; i < tile + tiles; i++)
            for (int64_t t = 0; t < tokens; t += kFew)
                few_tokens(call, i, t, tokens - t < kFew ? tokens - t : kFew);
        return;
    }
    for (int64_t i = tile; i < tile + tiles; i += kTilesAtOnce)
        for (int64_t t = 0; t < tokens; t += kTokensAtOnce)
            many_tokens(call, i, tile + tiles - i < kTilesAtOnce ? tile + tiles - i : kTilesAtOnce, t,
                        tokens - t < kTokensAtOnce ? tokens - t : kTokensAtOnce);
}

// The next run of `unit` tiles for a thread: an eighth of its share of what is left.
static inline int64_t take_tiles(std::atomic<int64_t>& next, int64_t tiles, int64_t unit, int64_t threads, int64_t* count) {
    int64_t first = next.load(std::memory_order_relaxed);
    do {
        const int64_t run = (tiles - first) / (8 * threads) / unit * unit;
        *count = run > unit ? run : unit;
        if (*count > tiles - first) *count = tiles - first;
        if (*count <= 0) return tiles;
    } while (!next.compare_exchange_weak(first, first + *count, std::memory_order_relaxed));
    return first;
}

static inline void linear_rounded(const LinearShape& s, const int8_t* codes, const uint8_t* blob, const float* bias,
                                  const float* steps, const int32_t* sums, float* y, int64_t block, int processor) {
    const RoundedCall call{s, block, codes, blob + s.blob_at, bias + s.first, steps, sums, y + s.first,
                           s.stored == kInt4 ? rounded_kernels<4>(processor) : rounded_kernels<8>(processor)};
    const int64_t tiles = (s.out + kTileRows - 1) / kTileRows;
    const int64_t unit = s.tokens <= kFew ? 1 : kTilesAtOnce;
    std::atomic<int64_t> next(0);
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads();
        int64_t count = 0;
        for (;;) {
            const int64_t first = take_tiles(next, tiles, unit, threads, &count);
            if (first >= tiles) break;
            rounded_tiles(call, first, count);
        }
    }
}

}  // namespace moss
