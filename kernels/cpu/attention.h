// Rotary positions, the cache of keys and values, and attention over it.
//
//   qkv    (T, 3C) float: 4 slices, each query, value, key of H/4 heads of width D (the checkpoint's order)
//   cache  blocks of block_bytes; in a block the keys of one layer lie at keys_at, its values at values_at, each
//          (H, block) rows of row_bytes (kv_store.h); position p of a slot lies in block table[slot][p / block]
//   table  (slots, table_width) int32
//   slots, positions  (T,) int32: whose token, and where in its sequence
//   sincos (n_positions, R) float: R/2 sines, then R/2 cosines
//   out    (T, H, D) float = softmax(q K^T / sqrt(D)) V over positions 0 .. own, D up to kMaxWidth
//
// Work is cut into stretches of kStretch positions, counted from the start of the sequence. A stretch gives its
// largest score m, the sum of exp(score - m), and the values summed with these weights; stretches are merged in
// order of position. Tokens of one sequence that stand together in the batch share what is read and widened, and
// where there are fewer tokens and heads than threads the stretches are shared out among the threads. None of it
// changes an operation or the order of operations of any one token: its bits depend on its own sequence alone,
// and are the same on every processor (ordered.h).
#pragma once
#include "kv_store_x86.h"

#include <limits>
#include <omp.h>

namespace moss {

constexpr int64_t kMaxWidth = 1024;
constexpr int64_t kStretch = 256;  // positions; a multiple of the cache's blocks
constexpr int64_t kTogether = 32;  // tokens that share what is read
constexpr int64_t kKeyRows = 8;    // read at a time
constexpr int64_t kValueRows = 16;
constexpr int64_t kAhead = 32;     // positions from what is read to what is fetched
constexpr int64_t kItemsPerThread = 4;  // with fewer the stretches are shared out

struct AttentionShape {  // handed over as bytes by moss_jt/ops.py: order and number of its parts are fixed there
    int64_t tokens, heads, width, rotary;  // T, H, D, R
    int64_t block, table_width;
    int64_t block_bytes, row_bytes, keys_at, values_at;
    int64_t kind, steps, step_channels;  // of kv_store.h
    int64_t room;   // floats of the scratch for shared stretches
    int64_t plain;  // not 0: as on a processor without extensions

    int64_t padded() const { return (width + 7) & ~(int64_t)7; }
    KVRows rows() const { return {kind, width, padded(), row_bytes, steps, step_channels}; }
};

static_assert(sizeof(AttentionShape) == 15 * sizeof(int64_t), "moss_jt/launch.py counts them, too");

MOSS_ORDERED

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
    std::memcpy(to + rotary, from + rotary, (width - rotary) * sizeof(float));
}

// A head's row of keys (at keys_at) or values for one position.
static inline uint8_t* row_of(const AttentionShape& s, const uint8_t* cache, int64_t at, const int32_t* blocks,
                              int64_t head, int64_t position) {
    const int64_t row = head * s.block + position % s.block;
    return (uint8_t*)cache + blocks[position / s.block] * s.block_bytes + at + row * s.row_bytes;
}

// Rotate queries (into `queries`, (T, H, D)) and keys; write keys and values to the cache.
static inline void rotate_and_append(const AttentionShape& s, const float* qkv, const float* sincos,
                                     const int32_t* slots, const int32_t* positions, const int32_t* table,
                                     float* queries, uint8_t* cache) {
    const KVRows rows = s.rows();
    const KVStore store = kv_store(rows, s.plain);
#pragma omp parallel for schedule(static) if (s.tokens > 2)
    for (int64_t th = 0; th < s.tokens * s.heads; th++) {
        const int64_t t = th / s.heads, h = th % s.heads;
        const float* row = qkv + t * 3 * s.heads * s.width;
        const float* angles = sincos + positions[t] * s.rotary;
        const int32_t* blocks = table + slots[t] * s.table_width;
        int64_t q, v, k;
        float turned[kMaxWidth];
        find_head(s, h, &q, &v, &k);
        rotate(row + q, angles, s.rotary, s.width, queries + th * s.width);
        rotate(row + k, angles, s.rotary, s.width, turned);
        store.narrow(rows, turned, row_of(s, cache, s.keys_at, blocks, h, positions[t]));
        store.narrow(rows, row + v, row_of(s, cache, s.values_at, blocks, h, positions[t]));
    }
}

MOSS_FORCED float exp1(float x) { return exp8(splat8(x))[0]; }

// A vector that stays in a register: the compiler would rather load it again for each use.
MOSS_FORCED f32x8 load_once(const float* from) {
    f32x8 v = load8(from);
#if defined(__AVX__)
    asm("" : "+x"(v));
#endif
    return v;
}

// Scores of Q queries with eight keys: to[query * stride + key].
template <int Q>
static inline void score_eight(const float* queries, int64_t query_stride, const float* keys, int64_t padded,
                               float* to, int64_t stride) {
    constexpr int at_once = 8 / Q;  // keys; eight sums run side by side
    f32x8 sum[Q][8];
    for (int k = 0; k < 8; k += at_once) {
        f32x8 part[Q][at_once] = {};
        for (int64_t d = 0; d < padded; d += 8) {
            f32x8 key[at_once];
            for (int i = 0; i < at_once; i++) key[i] = load_once(keys + (k + i) * padded + d);
            for (int q = 0; q < Q; q++) {
                const f32x8 query = load_once(queries + q * query_stride + d);
                for (int i = 0; i < at_once; i++) part[q][i] += query * key[i];
            }
        }
        for (int q = 0; q < Q; q++)
            for (int i = 0; i < at_once; i++) sum[q][k + i] = part[q][i];
    }
    for (int q = 0; q < Q; q++) store8(to + q * stride, sum_each(sum[q]));
}

// sums += weights[row] * values[row], row after row, for J vectors of channels and Q queries.
template <int Q, int J>
static inline void add_rows(const float* weights, int64_t weight_stride, const float* values, int64_t padded,
                            int64_t rows, float* sums, int64_t sum_stride) {
    f32x8 sum[Q][J];
    for (int q = 0; q < Q; q++)
        for (int j = 0; j < J; j++) sum[q][j] = load8(sums + q * sum_stride + 8 * j);
    for (int64_t r = 0; r < rows; r++) {
        f32x8 value[J];
        for (int j = 0; j < J; j++) value[j] = load_once(values + r * padded + 8 * j);
        for (int q = 0; q < Q; q++) {
            const f32x8 weight = splat8(weights[q * weight_stride + r]);
            for (int j = 0; j < J; j++) sum[q][j] += weight * value[j];
        }
    }
    for (int q = 0; q < Q; q++)
        for (int j = 0; j < J; j++) store8(sums + q * sum_stride + 8 * j, sum[q][j]);
}

template <int Q>
static inline void add_values(const float* weights, int64_t weight_stride, const float* values, int64_t padded,
                              int64_t rows, float* sums) {
    constexpr int wide = 8 / Q;
    int64_t d = 0;
    for (; d + 8 * wide <= padded; d += 8 * wide)
        add_rows<Q, wide>(weights, weight_stride, values + d, padded, rows, sums + d, padded);
    for (; d < padded; d += 8) add_rows<Q, 1>(weights, weight_stride, values + d, padded, rows, sums + d, padded);
}

struct AttentionInputs {
    const float* queries;
    const uint8_t* cache;
    const int32_t *slots, *positions, *table;
};

// Tokens of one sequence, and what one head keeps while it goes through the stretches.
struct Run {
    int64_t first, count;  // rows of the batch, at most kTogether
    int64_t head, longest; // positions that the last of them sees
    const int32_t* blocks;
};

struct Partial {  // of a stretch, or of all so far
    float best[kTogether], total[kTogether];
    alignas(64) float sums[kTogether * kMaxWidth];  // (count, padded)
};

struct AttentionScratch {
    alignas(64) float queries[kTogether * kMaxWidth];  // scaled
    alignas(64) float scores[kTogether * kStretch];    // then weights
    alignas(64) float rows[kValueRows * kMaxWidth];
    int64_t visible[kTogether];
    Partial stretch, all;
};

class Attention {
  public:
    Attention(const AttentionShape& shape, const AttentionInputs& inputs, float* result)
        : s(shape), in(inputs), out(result), kv(shape.rows()), store(kv_store(kv, shape.plain)) {}

    // Rows [first, end) of the batch, one head, run after run.
    void attend_rows(int64_t first, int64_t end, int64_t head, AttentionScratch& x) const {
        while (first < end) {
            const Run run = find_run(first, end, head);
            take_queries(run, x);
            stretch(run, 0, x, x.all);
            for (int64_t start = kStretch; start < run.longest; start += kStretch) {
                stretch(run, start, x, x.stretch);
                for (int64_t i = 0; i < run.count; i++) {
                    if (x.visible[i] == 0) continue;
                    merge(&x.all.best[i], &x.all.total[i], x.all.sums + i * kv.padded, x.stretch.best[i],
                          x.stretch.total[i], x.stretch.sums + i * kv.padded);
                }
            }
            for (int64_t i = 0; i < run.count; i++) finish(first + i, head, x.all.total[i], x.all.sums + i * kv.padded);
            first += run.count;
        }
    }

    // One stretch of one token by itself. `to` gets best, total, sums.
    void attend_stretch(int64_t t, int64_t head, int64_t start, AttentionScratch& x, float* to) const {
        const Run run = find_run(t, t + 1, head);
        if (start >= run.longest) return;
        take_queries(run, x);
        stretch(run, start, x, x.stretch);
        to[0] = x.stretch.best[0];
        to[1] = x.stretch.total[0];
        std::memcpy(to + 2, x.stretch.sums, kv.padded * sizeof(float));
    }

    // What attend_stretch gave for all stretches of a token, one after the other in `parts`.
    void merge_stretches(int64_t t, int64_t head, float* parts) const {
        for (int64_t start = kStretch; start <= in.positions[t]; start += kStretch) {
            const float* later = parts + start / kStretch * (kv.padded + 2);
            merge(parts, parts + 1, parts + 2, later[0], later[1], later + 2);
        }
        finish(t, head, parts[1], parts + 2);
    }

  private:
    const AttentionShape& s;
    const AttentionInputs& in;
    float* out;
    const KVRows kv;
    const KVStore store;

    // The run that starts at a row, and ends at `end` at the latest.
    Run find_run(int64_t first, int64_t end, int64_t head) const {
        Run run = {first, 0, head, 0, in.table + in.slots[first] * s.table_width};
        const int64_t most = end - first < kTogether ? end : first + kTogether;
        for (int64_t t = first; t < most && in.slots[t] == in.slots[first]; t++, run.count++)
            run.longest = in.positions[t] + 1 > run.longest ? in.positions[t] + 1 : run.longest;
        return run;
    }

    void take_queries(const Run& run, AttentionScratch& x) const {
        const float scale = 1.0f / __builtin_sqrtf((float)s.width);
        for (int64_t i = 0; i < run.count; i++) {
            const float* from = in.queries + ((run.first + i) * s.heads + run.head) * s.width;
            float* to = x.queries + i * kv.padded;
            for (int64_t d = 0; d < s.width; d++) to[d] = from[d] * scale;
            for (int64_t d = s.width; d < kv.padded; d++) to[d] = 0;
        }
    }

    // One stretch of a run, from position `start` on.
    void stretch(const Run& run, int64_t start, AttentionScratch& x, Partial& to) const {
        for (int64_t i = 0; i < run.count; i++) {
            const int64_t seen = in.positions[run.first + i] + 1 - start;
            x.visible[i] = seen < 0 ? 0 : seen < kStretch ? seen : kStretch;
        }
        const int64_t end = run.longest - start < kStretch ? run.longest : start + kStretch;
        score(run, start, end, x);
        for (int64_t i = 0; i < run.count; i++) weigh(x.scores + i * kStretch, x.visible[i], &to.best[i], &to.total[i]);
        gather(run, start, end, x, to.sums);
    }

    const uint8_t* row(const Run& run, int64_t at, int64_t position) const {
        return row_of(s, in.cache, at, run.blocks, run.head, position);
    }

    // What is read kAhead positions later: of a stretch first all keys, then all values.
    const uint8_t* after_keys(const Run& run, int64_t position, int64_t end) const {
        const int64_t after = position + kAhead;
        if (after < end) return row(run, s.keys_at, after);
        return row(run, s.values_at, position / kStretch * kStretch + after - end);
    }

    const uint8_t* after_values(const Run& run, int64_t position, int64_t end) const {
        const int64_t after = position + kAhead;
        if (after >= run.longest) return row(run, s.values_at, position);
        return row(run, after < end ? s.values_at : s.keys_at, after);
    }

    // Scores of all positions up to `end`, those too that a token must not see.
    void score(const Run& run, int64_t start, int64_t end, AttentionScratch& x) const {
        for (int64_t p = start; p < end; p += kKeyRows) {
            const uint8_t *keys = row(run, s.keys_at, p), *ahead = after_keys(run, p, end);
            float* to = x.scores + p - start;
            if (run.count == 1 && store.score) {
                store.score(kv, x.queries, keys, ahead, to);
                continue;
            }
            store.widen(kv, keys, kKeyRows, ahead, x.rows);
            int64_t i = 0;
            for (; i + 4 <= run.count; i += 4)
                score_eight<4>(x.queries + i * kv.padded, kv.padded, x.rows, kv.padded, to + i * kStretch, kStretch);
            for (; i < run.count; i++)
                score_eight<1>(x.queries + i * kv.padded, kv.padded, x.rows, kv.padded, to + i * kStretch, kStretch);
        }
    }

    // Scores of the `count` positions that a token sees become weights.
    static void weigh(float* scores, int64_t count, float* best, float* total) {
        const float nothing = -std::numeric_limits<float>::infinity();
        for (int64_t p = count; p % 8; p++) scores[p] = nothing;
        f32x8 tops = splat8(nothing), sum = {};
        for (int64_t p = 0; p < count; p += 8) tops = max8(load8(scores + p), tops);
        float top = nothing;
        for (int i = 0; i < 8; i++) top = tops[i] > top ? tops[i] : top;
        const f32x8 base = splat8(top == nothing ? 0.0f : top);
        for (int64_t p = 0; p < count; p += 8) {
            const f32x8 weight = exp8(load8(scores + p) - base);
            store8(scores + p, weight);
            sum += weight;
        }
        *best = top;
        *total = sum_lanes(sum);
    }

    // Values summed with the weights, of each token those that it sees.
    void gather(const Run& run, int64_t start, int64_t end, AttentionScratch& x, float* sums) const {
        std::memset(sums, 0, run.count * kv.padded * sizeof(float));
        for (int64_t p = start; p < end; p += kValueRows) {
            const int64_t count = end - p < kValueRows ? end - p : kValueRows;
            const uint8_t *values = row(run, s.values_at, p), *ahead = after_values(run, p, end);
            const float* weights = x.scores + p - start;
            if (run.count == 1 && store.add) {
                store.add(kv, weights, values, count, ahead, sums);
                continue;
            }
            store.widen(kv, values, count, ahead, x.rows);
            for (int64_t i = 0; i < run.count;) {
                const int64_t seen = x.visible[i] - (p - start);
                if (i + 4 <= run.count && sees_all(x, i, p - start + count)) {
                    add_values<4>(weights + i * kStretch, kStretch, x.rows, kv.padded, count, sums + i * kv.padded);
                    i += 4;
                } else {
                    add_values<1>(weights + i * kStretch, kStretch, x.rows, kv.padded, seen < count ? seen : count,
                                  sums + i * kv.padded);
                    i++;
                }
            }
        }
    }

    static bool sees_all(const AttentionScratch& x, int64_t first, int64_t end) {
        for (int64_t i = first; i < first + 4; i++)
            if (x.visible[i] < end) return false;
        return true;
    }

    // What came before and a later stretch become one.
    void merge(float* best, float* total, float* sums, float later_best, float later_total, const float* later) const {
        const float top = *best > later_best ? *best : later_best;
        const float base = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
        const float keep = exp1(*best - base), take = exp1(later_best - base);
        *best = top;
        *total = *total * keep + later_total * take;
        for (int64_t d = 0; d < kv.padded; d += 8)
            store8(sums + d, load8(sums + d) * splat8(keep) + load8(later + d) * splat8(take));
    }

    void finish(int64_t t, int64_t head, float total, const float* sums) const {
        float* to = out + (t * s.heads + head) * s.width;
        const float inverse = 1.0f / total;
        for (int64_t d = 0; d < s.width; d++) to[d] = sums[d] * inverse;
    }
};

// How the work of a pass is cut; it changes no bit of what comes out.
struct Cut {
    int64_t together, windows;  // rows of the batch that go together, and how many times that
    int64_t stretches;          // of the longest sequence
    bool share;                 // each stretch of each token and head by itself

    Cut(const AttentionShape& s, const int32_t* slots, const int32_t* positions) {
        int64_t longest = 0, runs = 0;
        for (int64_t t = 0; t < s.tokens; t++) {
            longest = positions[t] + 1 > longest ? positions[t] + 1 : longest;
            runs += t == 0 || slots[t] != slots[t - 1];
        }
        const int64_t wanted = kItemsPerThread * omp_get_max_threads(), items = s.tokens * s.heads;
        together = s.tokens < 2 * runs ? 1 : kTogether;
        while (together > 1 && (s.tokens + together - 1) / together * s.heads < wanted) together /= 2;
        windows = (s.tokens + together - 1) / together;
        stretches = (longest + kStretch - 1) / kStretch;
        share = items < wanted && stretches > 1 && items * stretches * (s.padded() + 2) <= s.room;
    }
};

static inline void attend(const AttentionShape& s, const float* queries, const uint8_t* cache, const int32_t* slots,
                          const int32_t* positions, const int32_t* table, float* out, float* shared) {
    const AttentionInputs in = {queries, cache, slots, positions, table};
    const Attention attention(s, in, out);
    const Cut cut(s, slots, positions);
    const int64_t each = s.padded() + 2, items = s.tokens * s.heads;
#pragma omp parallel
    {
        AttentionScratch x;
        if (cut.share) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < items * cut.stretches; i++) {
                const int64_t th = i / cut.stretches, start = i % cut.stretches * kStretch;
                attention.attend_stretch(th / s.heads, th % s.heads, start, x, shared + i * each);
            }
#pragma omp for schedule(static)
            for (int64_t th = 0; th < items; th++)
                attention.merge_stretches(th / s.heads, th % s.heads, shared + th * cut.stretches * each);
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < cut.windows * s.heads; i++) {  // one head after the other: they share its cache
                const int64_t first = (cut.windows - 1 - i % cut.windows) * cut.together;  // long ones first
                const int64_t end = first + cut.together < s.tokens ? first + cut.together : s.tokens;
                attention.attend_rows(first, end, i / cut.windows, x);
            }
        }
    }
}

MOSS_ORDERED_END

}  // namespace moss
