// Rotary positions, the cache of keys and values, and attention over it.
//
//   qkv    (T, 3C) float: 4 slices, each query, value, key of H/4 heads of width D (the checkpoint's order)
//   cache  blocks of block_bytes; in a block the keys of one layer lie at keys_at, its values at values_at, each
//          (H, block, D) of float or half (moss_jt/kv_layout.py); position p of a slot lies in block
//          table[slot][p / block] at p % block
//   table  (slots, table_width) int32
//   slots, positions  (T,) int32: whose token, and where in its sequence
//   sincos (n_positions, R) float: R/2 sines, then R/2 cosines
#pragma once
#include "numbers.h"

namespace moss {

struct AttentionShape {
    int64_t tokens, heads, width, rotary;  // T, H, D, R
    int64_t block, table_width;
    int64_t block_bytes, keys_at, values_at;
};

static inline void keep(float* to, float x) { *to = x; }
static inline void keep(uint16_t* to, float x) { *to = Half::narrow(x); }
static inline float recall(const float* from) { return *from; }
static inline float recall(const uint16_t* from) { return Half::widen(*from); }

// Where the three parts of head h start in a row of qkv.
static inline void find_head(const AttentionShape& s, int64_t h, int64_t* query, int64_t* value, int64_t* key) {
    const int64_t per_slice = s.heads / 4, part = per_slice * s.width;
    const int64_t base = h / per_slice * 3 * part + h % per_slice * s.width;
    *query = base;
    *value = base + part;
    *key = base + 2 * part;
}

// Pairs are neighbours (0,1), (2,3), ... as in GPT-J.
static inline void rotate(const float* from, const float* sincos, int64_t rotary, int64_t width, float* to) {
    for (int64_t i = 0; i < rotary / 2; i++) {
        const float sin = sincos[i], cos = sincos[rotary / 2 + i];
        const float even = from[2 * i], odd = from[2 * i + 1];
        to[2 * i] = even * cos - odd * sin;
        to[2 * i + 1] = odd * cos + even * sin;
    }
    for (int64_t i = rotary; i < width; i++) to[i] = from[i];
}

template <class T>
static inline T* cached(const AttentionShape& s, const uint8_t* cache, int64_t at, const int32_t* table, int64_t slot,
                        int64_t head, int64_t position) {
    const int64_t block = table[slot * s.table_width + position / s.block];
    return (T*)(cache + block * s.block_bytes + at) + (head * s.block + position % s.block) * s.width;
}

// Rotate queries (into `queries`, (T, H, D)) and keys; write keys and values to the cache.
template <class T>
static inline void rotate_and_append(const AttentionShape& s, const float* qkv, const float* sincos, const int32_t* slots,
                                     const int32_t* positions, const int32_t* table, float* queries, uint8_t* cache) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < s.tokens; t++) {
        float turned[1024];  // one head; the host checks that D fits
        const float* row = qkv + t * 3 * s.heads * s.width;
        const float* angles = sincos + positions[t] * s.rotary;
        for (int64_t h = 0; h < s.heads; h++) {
            int64_t q, v, k;
            find_head(s, h, &q, &v, &k);
            rotate(row + q, angles, s.rotary, s.width, queries + (t * s.heads + h) * s.width);
            rotate(row + k, angles, s.rotary, s.width, turned);
            T* key = cached<T>(s, cache, s.keys_at, table, slots[t], h, positions[t]);
            T* value = cached<T>(s, cache, s.values_at, table, slots[t], h, positions[t]);
            for (int64_t i = 0; i < s.width; i++) {
                keep(key + i, turned[i]);
                keep(value + i, row[v + i]);
            }
        }
    }
}

// One query against the first `length` positions of its slot; `score` holds `length` floats.
template <class T>
static inline void attend_one(const AttentionShape& s, const float* query, const uint8_t* cache, const int32_t* table,
                              int64_t slot, int64_t head, int64_t length, float* score, float* out) {
    const float root = std::sqrt((float)s.width);
    float best = -3.0e38f, total = 0;
    for (int64_t p = 0; p < length; p++) {
        const T* key = cached<const T>(s, cache, s.keys_at, table, slot, head, p);
        float sum = 0;
        for (int64_t i = 0; i < s.width; i++) sum += query[i] * recall(key + i);
        score[p] = sum / root;
        best = score[p] > best ? score[p] : best;
    }
    for (int64_t p = 0; p < length; p++) total += score[p] = std::exp(score[p] - best);
    for (int64_t i = 0; i < s.width; i++) out[i] = 0;
    for (int64_t p = 0; p < length; p++) {
        const T* value = cached<const T>(s, cache, s.values_at, table, slot, head, p);
        const float share = score[p] / total;
        for (int64_t i = 0; i < s.width; i++) out[i] += share * recall(value + i);
    }
}

// Softmax over positions 0 .. own of the slot, in float; out is (T, H, D) = (T, C).
template <class T>
static inline void attend(const AttentionShape& s, const float* queries, const uint8_t* cache, const int32_t* slots,
                          const int32_t* positions, const int32_t* table, float* out) {
    int64_t longest = 1;
    for (int64_t t = 0; t < s.tokens; t++) longest = positions[t] + 1 > longest ? positions[t] + 1 : longest;
#pragma omp parallel
    {
        float* score = new float[longest];
#pragma omp for schedule(dynamic, 1)
        for (int64_t th = 0; th < s.tokens * s.heads; th++) {
            const int64_t t = th / s.heads, h = th % s.heads;
            attend_one<T>(s, queries + th * s.width, cache, table, slots[t], h, positions[t] + 1, score, out + th * s.width);
        }
        delete[] score;
    }
}

}  // namespace moss
