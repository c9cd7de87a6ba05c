// y = x W^T (+ bias) with activations rounded to int8 (rounding.h) and weights in tiles of int4/int8.
//
// A few tokens take the weights as they are stored. For more, one block of some tiles is made ready at a
// time and used for a run of tokens. Tiles are handed out to the threads while there are any, in ever
// smaller runs, so a slow core does not hold up the others. Which processor's version runs, how many
// threads, how many tokens at once and how the matrix is cut change no bit of a result.
#pragma once
#include <omp.h>

#include <atomic>

#include "rounded_amx.h"
#include "rounded_plain.h"
#include "rounded_vnni.h"

namespace moss {

enum Processor { kBest = 0, kPlain = 1, kAvx2 = 2, kAvxVnni = 3, kAvx512Vnni = 4, kAmxInt8 = 5 };

constexpr int64_t kTilesKept = 32;  // tiles whose results are written together

static inline bool can_run(int processor) {
    if (processor == kPlain) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2");
    if (processor == kAvx2) return avx2;
#if MOSS_HAS_AVXVNNI
    if (processor == kAvxVnni) return avx2 && has_avxvnni();
#endif
#if MOSS_HAS_AMX
    if (processor == kAmxInt8) return can_run(kAvx512Vnni) && can_run_amx();
#endif
    if (processor == kAvx512Vnni)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return false;
}

// The wanted version, or what comes next where this processor cannot run it.
static inline int choose_processor(int wanted) {
    for (int p = wanted == kBest ? kAmxInt8 : wanted; p > kPlain; p--)
        if (can_run(p)) return p;
    return kPlain;
}

template <int BITS>
static inline RoundedKernels rounded_kernels(int processor) {
    switch (choose_processor(processor)) {
#if defined(__x86_64__)
#if MOSS_HAS_AMX
        case kAmxInt8: return amx_kernels<BITS>();
#endif
        case kAvx512Vnni: return avx512_kernels<BITS>();
#if MOSS_HAS_AVXVNNI
        case kAvxVnni: return avxvnni_kernels<BITS>();
#endif
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

// `count` blocks of a tile from `b` on, for the tokens from `t` on.
static inline BlockRun run_of(const RoundedCall& call, int64_t tile, const Blocks& b, int64_t count, int64_t t) {
    const LinearShape& s = call.s;
    const uint8_t* from = call.blob + tile * s.tile_bytes;
    const int64_t per_chunk = 32 / s.stored;
    BlockRun run;
    run.codes = from + b.start / per_chunk * 64;
    run.chunks = b.size / per_chunk;
    run.count = count;
    run.second = 0;
    run.scales = (const uint16_t*)(from + s.scales_at) + b.group * kTileRows;
    run.zeros = from + s.zeros_at + b.group * kTileRows * s.stored / 8;
    run.left_in_group = b.left_in_group();
    run.per_group = b.per_group();
    const CodesAt codes(s.tokens, s.padded_in, b, t);
    run.x = call.codes + codes.at;
    run.x_block = codes.run_tokens * b.size;
    run.x_token = b.size;
    run.steps = call.steps + b.index * s.tokens + t;
    run.sums = call.sums + b.index * s.tokens + t;
    run.tokens = s.tokens;
    return run;
}

static inline void write_totals(const RoundedCall& call, int64_t tile, int64_t t, int64_t tokens, const float* total) {
    const int64_t first = tile * kTileRows, left = call.s.out - first, rows = left < kTileRows ? left : kTileRows;
    const bool has_bias = call.s.has_bias, add = call.s.add;
    for (int64_t i = 0; i < tokens; i++, total += kTileRows) {
        float* y = call.y + (t + i) * call.s.y_stride + first;
        float values[kTileRows];
        for (int64_t r = 0; r < kTileRows; r++) values[r] = total[r];
        if (has_bias) {
            for (int64_t r = 0; r < rows; r++) values[r] += call.bias[first + r];
        }
        keep_as_is(values);
        if (add) {
            for (int64_t r = 0; r < rows; r++) values[r] += y[r];
        }
        std::memcpy(y, values, rows * sizeof(float));
    }
}

// Some tokens, at most kFew, of one tile, or (at most kPair) of two that are `apart`: to total[tile][token][row].
static inline void few_tokens(const RoundedCall& call, int64_t tile, int64_t apart, int64_t t, int64_t tokens,
                              float* total) {
    int32_t sums[kRunBlocks * kFew * kTileRows];
    std::memset(total, 0, (apart > 0 ? 2 : 1) * tokens * kTileRows * sizeof(float));
    const SumKernel sum = apart > 0 ? call.kernels.sum_pair[tokens - 1] : call.kernels.sum[tokens - 1];
    const AddKernel add = apart > 0 ? call.kernels.add_pair[tokens - 1] : call.kernels.add[tokens - 1];
    int64_t count;
    for (Blocks b(call.s.padded_in, call.s.padded_group, call.block); b.more(); b.next(count)) {
        const int64_t alike = b.alike();
        count = alike < kRunBlocks ? alike : kRunBlocks;
        BlockRun run = run_of(call, tile, b, count, t);
        run.second = apart * call.s.tile_bytes;
        sum(run, sums);
        add(run, sums, total);
    }
}

// Some tokens, at most kFew, of some tiles. Where two tiles are taken at a time they are one of each half, so both
// are read from front to back. Results are kept back and written together: a write now and then would disturb that.
static inline void few_tokens_of(const RoundedCall& call, int64_t tile, int64_t tiles, int64_t t, int64_t tokens) {
    float total[kTilesKept][2 * kPair * kTileRows];
    static_assert(kFew <= 2 * kPair, "room for one tile of kFew tokens or two of kPair");
    const int64_t apart = tokens <= kPair ? tiles / 2 : 0, steps = apart > 0 ? apart : tiles;
    for (int64_t first = 0; first < steps; first += kTilesKept) {
        const int64_t count = steps - first < kTilesKept ? steps - first : kTilesKept;
        for (int64_t i = 0; i < count; i++) few_tokens(call, tile + first + i, apart, t, tokens, total[i]);
        for (int64_t i = 0; i < count; i++) {
            write_totals(call, tile + first + i, t, tokens, total[i]);
            if (apart > 0) write_totals(call, tile + apart + first + i, t, tokens, total[i] + tokens * kTileRows);
        }
    }
    if (apart > 0 && tiles % 2 == 1) {
        few_tokens(call, tile + tiles - 1, 0, t, tokens, total[0]);
        write_totals(call, tile + tiles - 1, t, tokens, total[0]);
    }
}

// Some tokens of some tiles, both at most those that the version takes at once.
static inline void many_tokens(const RoundedCall& call, int64_t tile, int64_t tiles, int64_t t, int64_t tokens) {
    float total[kTilesReady][kRunTokens * kTileRows];
    ReadyBlock ready[kTilesReady];
    std::memset(total, 0, tiles * sizeof total[0]);
    for (Blocks b(call.s.padded_in, call.s.padded_group, call.block); b.more(); b.next()) {
        BlockRun run = run_of(call, tile, b, 1, t);
        for (int64_t i = 0; i < tiles; i++, run.move(call.s.tile_bytes)) call.kernels.prepare(run, ready[i]);
        const BlockTokens x{tokens, run.x, run.x_token, run.steps, run.sums};
        call.kernels.multiply(ready, tiles, x, total[0], kRunTokens * kTileRows);
    }
    for (int64_t i = 0; i < tiles; i++) write_totals(call, tile + i, t, tokens, total[i]);
}

static inline void rounded_tiles(const RoundedCall& call, int64_t tile, int64_t tiles) {
    const int64_t tokens = call.s.tokens;
    const bool few = tokens <= kFew || call.kernels.prepare == nullptr;
    const int64_t tiles_at_once = few ? tiles : call.kernels.tiles_at_once;
    const int64_t tokens_at_once = few ? kFew : call.kernels.tokens_at_once;
    for (int64_t i = 0; i < tiles; i += tiles_at_once) {
        const int64_t count = tiles - i < tiles_at_once ? tiles - i : tiles_at_once;
        for (int64_t t = 0; t < tokens; t += tokens_at_once) {
            const int64_t here = tokens - t < tokens_at_once ? tokens - t : tokens_at_once;
            if (few) {
                few_tokens_of(call, tile + i, count, t, here);
            } else {
                many_tokens(call, tile + i, count, t, here);
            }
        }
    }
}

// The next run of tiles for a thread, whole `unit`s: half of its share of what is left.
static inline int64_t take_tiles(std::atomic<int64_t>& next, int64_t tiles, int64_t unit, int64_t threads,
                                 int64_t* count) {
    int64_t first = next.load(std::memory_order_relaxed);
    do {
        const int64_t run = (tiles - first) / (2 * threads) / unit * unit;
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
    const int64_t unit = s.tokens <= kPair ? 2 : s.tokens <= kFew ? 1 : call.kernels.tiles_at_once;
    std::atomic<int64_t> next(0);
#pragma omp parallel if (worth_waking(s.out * s.padded_in, 8 * (1 + s.tokens)))
    {
        const int64_t threads = omp_get_num_threads();
        int64_t count = 0;
        const bool prepared = s.tokens > kFew && call.kernels.begin != nullptr;
        if (prepared) call.kernels.begin();
        for (;;) {
            const int64_t first = take_tiles(next, tiles, unit, threads, &count);
            if (first >= tiles) break;
            rounded_tiles(call, first, count);
        }
        if (prepared) call.kernels.end();
    }
}

}  // namespace moss
