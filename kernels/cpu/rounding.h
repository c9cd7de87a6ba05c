// Activations rounded to int8, a block of positions at a time, for the products in rounded.h.
//
// A block is at most `block` (up to kMaxBlock) positions of one group, in the order in which a matrix
// holds its inputs. Of each token and block there are int8 codes, the step between them and their sum:
//
//   step = max(max |x| / 127, smallest normal float)      x is about step * code, off by step / 2 at most
//   codes  for every run of kRunTokens tokens (fewer in the last), for every block, for every token, the block's codes
//   steps  (blocks, T) float, NaN where the block holds a NaN or an infinity: it reaches every output
//   sums   (blocks, T) int32
//
// What a product needs of a run lies in one piece: blocks of all tokens would stand at distances that are high powers of
// two for common lengths of prompts, and throw each other out of the caches.
#pragma once
#include "matrix.h"

namespace moss {

constexpr int64_t kMaxBlock = 128;  // more would overflow sixteen bits, in sums of codes and of products
constexpr int64_t kRunTokens = 128;
constexpr float kCodes = 127.0f;    // codes lie between -127 and 127
constexpr float kSmallestNormal = 1.17549435e-38f;

// The blocks of a row of stored inputs, one after the other, or `alike` at a time:
//     for (Blocks b(...); b.more(); b.next()) { b.index, b.group, b.start, b.size }
struct Blocks {
    int64_t padded_in, padded_group, block;
    int64_t index = 0, group = 0, start = 0, size = 0, group_end = 0;

    Blocks(int64_t padded_in, int64_t padded_group, int64_t block)
        : padded_in(padded_in), padded_group(padded_group), block(block) {
        fit();
    }
    bool more() const { return start < padded_in; }
    // How many follow that have the same size, this one included.
    int64_t alike() const {
        const int64_t whole = padded_in / padded_group * padded_group;
        const bool same_groups = padded_group <= block || padded_group % block == 0;
        return ((same_groups && start < whole ? whole : group_end) - start) / size;
    }
    // How many of this size are left in the group, this one included, and how many there are in a whole one.
    int64_t left_in_group() const { return (group_end - start) / size; }
    int64_t per_group() const { return padded_group / size; }
    void next(int64_t count = 1) {
        index += count;
        start += count * size;
        fit();
    }
    void fit() {
        group = start / padded_group;
        group_end = (group + 1) * padded_group < padded_in ? (group + 1) * padded_group : padded_in;
        size = group_end - start < block ? group_end - start : block;
    }
};

// Where the codes of a block of a token are; the same block of the next token in its run follows.
struct CodesAt {
    int64_t run_tokens, at;

    CodesAt(int64_t tokens, int64_t padded_in, const Blocks& b, int64_t t) {
        const int64_t first = t / kRunTokens * kRunTokens;
        run_tokens = tokens - first < kRunTokens ? tokens - first : kRunTokens;
        at = first * padded_in + b.start * run_tokens + (t - first) * b.size;
    }
};

// A number that the compiler must take as it is: keeps it from joining a product and a sum, or from
// putting a sum into another order, which would give each processor bits of its own.
template <typename T>
static inline void keep_as_is(T& value) {
    asm("" : "+m"(value));
}

struct RoundedCodes {
    float step;
    int32_t sum;
};

// `x` holds kMaxBlock floats, zeros from `size` on.
static inline RoundedCodes round_block(const float (&x)[kMaxBlock], int64_t size, int8_t* to) {
    float scaled[kMaxBlock];
    int32_t codes[kMaxBlock], largest = 0, sum = 0;
    for (int64_t i = 0; i < kMaxBlock; i++) {  // bits of magnitudes are in the order of the magnitudes, NaN on top
        const int32_t magnitude = (int32_t)(float_to_bits(x[i]) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= 0x7f800000) {
        std::memset(to, 0, size);
        return {bits_to_float(0x7fc00000u), 0};
    }
    const float wide = bits_to_float((uint32_t)largest) * (1.0f / kCodes);
    float step = wide < kSmallestNormal ? kSmallestNormal : wide;
    keep_as_is(step);
    float inverse = 1.0f / step;
    keep_as_is(inverse);
    for (int64_t i = 0; i < kMaxBlock; i++) scaled[i] = x[i] * inverse;
    keep_as_is(scaled);
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: the sum ends in the nearest whole number, ties to even
    for (int64_t i = 0; i < kMaxBlock; i++) {
        codes[i] = (int32_t)float_to_bits(scaled[i] + shift) - 0x4b400000;
        sum += codes[i];
    }
    for (int64_t i = 0; i < size; i++) to[i] = (int8_t)codes[i];
    return {step, sum};
}

struct RoundingShape {
    int64_t tokens, x_stride, padded_in, padded_group, block;
    bool permuted;
};

static inline void round_token(const RoundingShape& s, int64_t t, const float* x, const int32_t* perm, int8_t* codes,
                               float* steps, int32_t* sums) {
    x += t * s.x_stride;
    for (Blocks b(s.padded_in, s.padded_group, s.block); b.more(); b.next()) {
        float values[kMaxBlock] = {};
        if (s.permuted) {
            const int32_t* from = perm + b.start;
            for (int64_t i = 0; i < b.size; i++) values[i] = from[i] < 0 ? 0.0f : x[from[i]];
        } else {
            std::memcpy(values, x + b.start, b.size * sizeof(float));
        }
        const RoundedCodes got = round_block(values, b.size, codes + CodesAt(s.tokens, s.padded_in, b, t).at);
        steps[b.index * s.tokens + t] = got.step;
        sums[b.index * s.tokens + t] = got.sum;
    }
}

static inline void round_activations(const RoundingShape& s, const float* x, const int32_t* perm, int8_t* codes,
                                     float* steps, int32_t* sums) {
#pragma omp parallel for schedule(static) if (worth_waking(s.tokens * s.padded_in, s.permuted ? 1000 : 500))
    for (int64_t t = 0; t < s.tokens; t++) round_token(s, t, x, perm, codes, steps, sums);
}

}  // namespace moss
