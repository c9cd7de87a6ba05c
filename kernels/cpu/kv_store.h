// Numbers as the KV cache keeps them (moss_jt/kv_layout.py), there and back, rows of one head at a time.
//
//   float   as it is
//   half    rounded to nearest, ties to even; what is too large becomes infinity
//   int8    code * step; neighbours share a step, and the steps of a row stand behind its codes. They are
//           bfloat16: with the range of a float no group is too small or too large. A group that holds a NaN
//           or an infinity gets NaN for a step.
//
// A row comes back as floats with zeros up to a multiple of 8. Every version gives the same bits: widening
// is exact, and code * step is rounded once.
#pragma once
#include "ordered.h"

namespace moss {

enum CacheKind { kCacheFloat = 0, kCacheHalf = 1, kCacheInt8 = 2 };

// The rows of one head's keys or values in a block.
struct KVRows {
    int64_t kind;                  // a CacheKind
    int64_t width, padded;         // D, and D rounded up to 8
    int64_t row_bytes;             // numbers and steps
    int64_t steps, step_channels;  // int8: steps of a row, and channels that share one
};

// How a kind is read and written. `ahead` is what will be read later: as many bytes of it as are read now are
// fetched on the way, a line at a time, since more at once keep the processor waiting.
struct KVStore {
    void (*widen)(const KVRows& s, const uint8_t* rows, int64_t count, const uint8_t* ahead, float* to);
    void (*narrow)(const KVRows& s, const float* from, uint8_t* row);
    // Straight from the stored numbers, for one query; the same operations as widen, then score_eight or
    // add_values (attention.h). Null where there is no such version.
    void (*score)(const KVRows& s, const float* query, const uint8_t* rows, const uint8_t* ahead, float* to);
    void (*add)(const KVRows& s, const float* weights, const uint8_t* rows, int64_t count, const uint8_t* ahead,
                float* sums);
};

MOSS_FORCED void fetch(const uint8_t* from) { __builtin_prefetch(from, 0, 2); }  // not into the first, smallest cache

MOSS_ORDERED

static inline void widen_floats(const KVRows& s, const uint8_t* rows, int64_t count, const uint8_t* ahead, float* to) {
    for (int64_t r = 0; r < count; r++, rows += s.row_bytes, to += s.padded) {
        for (int64_t i = 0; i < s.row_bytes; i += 64) fetch(ahead + r * s.row_bytes + i);
        std::memcpy(to, rows, s.width * 4);
        for (int64_t i = s.width; i < s.padded; i++) to[i] = 0;
    }
}

static inline void narrow_floats(const KVRows& s, const float* from, uint8_t* row) {
    std::memcpy(row, from, s.width * 4);
}

static inline void widen_halves(const KVRows& s, const uint8_t* rows, int64_t count, const uint8_t* ahead, float* to) {
    for (int64_t r = 0; r < count; r++, rows += s.row_bytes, to += s.padded) {
        for (int64_t i = 0; i < s.row_bytes; i += 64) fetch(ahead + r * s.row_bytes + i);
        widen_half((const uint16_t*)rows, to, s.width);
        for (int64_t i = s.width; i < s.padded; i++) to[i] = 0;
    }
}

static inline void narrow_halves(const KVRows& s, const float* from, uint8_t* row) {
    for (int64_t i = 0; i < s.width; i++) ((uint16_t*)row)[i] = Half::narrow(from[i]);
}

// Channels [start, end) of a row share step g.
struct StepGroup {
    int64_t start, end;
    StepGroup(const KVRows& s, int64_t g)
        : start(g * s.step_channels), end(s.width - start < s.step_channels ? s.width : start + s.step_channels) {}
};

static inline float read_step(const uint8_t* steps, int64_t g) {
    uint16_t bits;  // at any address: a row may be an odd number of bytes long
    std::memcpy(&bits, steps + 2 * g, sizeof bits);
    return BFloat::widen(bits);
}

static inline void widen_codes(const KVRows& s, const uint8_t* rows, int64_t count, const uint8_t* ahead, float* to) {
    for (int64_t r = 0; r < count; r++, rows += s.row_bytes, to += s.padded) {
        for (int64_t i = 0; i < s.row_bytes; i += 64) fetch(ahead + r * s.row_bytes + i);
        for (int64_t g = 0; g < s.steps; g++) {
            const StepGroup group(s, g);
            const float step = read_step(rows + s.width, g);
            for (int64_t i = group.start; i < group.end; i++) to[i] = (float)((const int8_t*)rows)[i] * step;
        }
        for (int64_t i = s.width; i < s.padded; i++) to[i] = 0;
    }
}

// A step that makes the largest magnitude 127, rounded by one part in 512 at most, so that no code passes 127.
static inline uint16_t round_group(const float* from, int64_t count, int8_t* to) {
    uint32_t largest = 0;  // bits of magnitudes are in the order of the magnitudes, NaN on top
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = float_to_bits(from[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7f800000u) {
        std::memset(to, 0, count);
        return 0x7fc0u;
    }
    uint32_t bits = float_to_bits(bits_to_float(largest) * (1.0f / 127.0f));
    bits = bits < 0x00800000u ? 0x00800000u : bits;  // a normal number, so that it has an inverse
    const uint16_t step = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    const float inverse = 1.0f / BFloat::widen(step);
    const float shift = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the nearest whole number, ties to even
    for (int64_t i = 0; i < count; i++) to[i] = (int8_t)((int32_t)float_to_bits(from[i] * inverse + shift) - 0x4b400000);
    return step;
}

static inline void narrow_codes(const KVRows& s, const float* from, uint8_t* row) {
    for (int64_t g = 0; g < s.steps; g++) {
        const StepGroup group(s, g);
        const uint16_t step = round_group(from + group.start, group.end - group.start, (int8_t*)row + group.start);
        std::memcpy(row + s.width + 2 * g, &step, sizeof step);
    }
}

MOSS_ORDERED_END

static inline KVStore plain_kv_store(int64_t kind) {
    if (kind == kCacheHalf) return {widen_halves, narrow_halves, nullptr, nullptr};
    if (kind == kCacheInt8) return {widen_codes, narrow_codes, nullptr, nullptr};
    return {widen_floats, narrow_floats, nullptr, nullptr};
}

}  // namespace moss
