// Causal attention over whole sequences, forward and backward, for training.
//
//   qkv     (T, 3C): 4 slices, each query, value, key of H/4 heads of width D (the checkpoint's order)
//   starts  (S + 1,) int32: where each sequence begins among the T tokens; the last is T
//   shared  0, or the length of the first sequence, after which all others go on: what conversations have in
//           common is computed once
//   sincos  (positions, R): R/2 sines, then R/2 cosines; a token's position is its place in its sequence
//   out     (T, C): heads one after the other
//   logsum  (H, T): log of the sum of exp(score), kept for backward
//
// A task works on rows of its own, so results do not depend on the threads. Scores
// of kQueries rows at a time are computed, used and forgotten, in backward once more. The products are small: both
// matrices lie in the cache of a core, rows padded with zeros to whole pairs of vectors.
#pragma once
#include "training.h"

#include <algorithm>

namespace moss_training {

#if defined(__AVX512F__)
typedef float vector_t __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16, kTileRows = 8;
#else
typedef float vector_t __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8, kTileRows = 6;
#endif
constexpr int64_t kTileColumns = 2 * kLanes;
constexpr int64_t kQueries = 48;  // a multiple of kTileRows

static inline int64_t padded(int64_t n) { return (n + kTileColumns - 1) / kTileColumns * kTileColumns; }

// c[R][kTileColumns] = or += a b over `depth`; a[i, k] lies at a[i * row + k * column], b and c are rows.
template <int R>
static inline void tile(const float* a, int64_t row, int64_t column, const float* b, int64_t b_stride, float* c,
                        int64_t c_stride, int64_t depth, bool add) {
    vector_t sum[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
        for (int h = 0; h < 2; h++) {
            if (add)
                std::memcpy(&sum[i][h], c + i * c_stride + h * kLanes, sizeof(vector_t));
            else
                sum[i][h] = vector_t{};
        }
    for (int64_t k = 0; k < depth; k++) {
        vector_t b0, b1;
        std::memcpy(&b0, b + k * b_stride, sizeof b0);
        std::memcpy(&b1, b + k * b_stride + kLanes, sizeof b1);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const float value = a[i * row + k * column];
            sum[i][0] += value * b0;
            sum[i][1] += value * b1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
        for (int h = 0; h < 2; h++) std::memcpy(c + i * c_stride + h * kLanes, &sum[i][h], sizeof(vector_t));
}

// c (rows, columns) = or += a b; `columns` is a multiple of kTileColumns.
static inline void multiply(const float* a, int64_t row, int64_t column, const float* b, int64_t b_stride, float* c,
                            int64_t c_stride, int64_t rows, int64_t columns, int64_t depth, bool add) {
    for (int64_t j = 0; j < columns; j += kTileColumns) {
        int64_t i = 0;
        for (; i + kTileRows <= rows; i += kTileRows)
            tile<kTileRows>(a + i * row, row, column, b + j, b_stride, c + i * c_stride + j, c_stride, depth, add);
        for (; i + 2 <= rows; i += 2)
            tile<2>(a + i * row, row, column, b + j, b_stride, c + i * c_stride + j, c_stride, depth, add);
        if (i < rows) tile<1>(a + i * row, row, column, b + j, b_stride, c + i * c_stride + j, c_stride, depth, add);
    }
}

struct Heads {
    int64_t heads, width, rotary;  // H, D, R

    int64_t embedding() const { return heads * width; }
    // Where the query of a head starts in a row of qkv; its value and its key follow in steps of `step`.
    int64_t query(int64_t head) const { return head / per_slice() * 3 * step() + head % per_slice() * width; }
    int64_t step() const { return per_slice() * width; }
    int64_t per_slice() const { return heads / 4; }
};

// Turn neighbouring pairs of the first R channels by the angle of a position; `back` turns the other way round.
static inline void turn(const float* from, const float* sincos, int64_t rotary, int64_t width, float factor, bool back,
                        float* to) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        const float sin = back ? -sincos[i] : sincos[i], cos = sincos[half + i];
        const float even = from[2 * i], odd = from[2 * i + 1];
        to[2 * i] = (even * cos - odd * sin) * factor;
        to[2 * i + 1] = (odd * cos + even * sin) * factor;
    }
    for (int64_t i = rotary; i < width; i++) to[i] = from[i] * factor;
}

// The rows of one head, padded: k (rotated), v, and both turned around, by position; q (rotated, divided by sqrt(D)) of
// the tokens that were taken last.
struct HeadRows {
    const Heads s;
    int64_t head, width, columns, keys;  // D, padded D, padded positions
    std::vector<float> q, k, v, k_turned, v_turned;

    HeadRows(const Heads& s_, int64_t head_, int64_t positions, bool turn_values)
        : s(s_), head(head_), width(s_.width), columns(padded(s_.width)), keys(padded(positions)) {
        k.assign(positions * columns, 0);
        v.assign(positions * columns, 0);
        q.assign(positions * columns, 0);
        k_turned.assign(width * keys, 0);
        if (turn_values) v_turned.assign(width * keys, 0);
    }

    // Take tokens that stand at positions from `first` on.
    void take(const float* qkv, const float* sincos, int64_t length, int64_t first) {
        const float factor = 1.0f / std::sqrt((float)width);
        for (int64_t t = 0; t < length; t++) {
            const float *row = qkv + t * 3 * s.embedding() + s.query(head), *angles = sincos + (first + t) * s.rotary;
            turn(row, angles, s.rotary, width, factor, false, q.data() + t * columns);
            turn(row + 2 * s.step(), angles, s.rotary, width, 1.0f, false, k.data() + (first + t) * columns);
            std::memcpy(v.data() + (first + t) * columns, row + s.step(), width * sizeof(float));
        }
        turn_around(k, k_turned, length, first);
        if (!v_turned.empty()) turn_around(v, v_turned, length, first);
    }

    void turn_around(const std::vector<float>& rows, std::vector<float>& turned, int64_t length, int64_t first) const {
        for (int64_t t = first; t < first + length; t++)
            for (int64_t d = 0; d < width; d++) turned[d * keys + t] = rows[t * columns + d];
    }
};

// The sequences of a batch. With `shared` > 0 the first one has that many tokens, and every other goes on after it.
struct Sequences {
    const int32_t* starts;
    int64_t count, shared;

    int64_t at(int64_t i) const { return starts[i]; }
    int64_t length(int64_t i) const { return starts[i + 1] - starts[i]; }
    int64_t before(int64_t i) const { return i ? shared : 0; }  // positions before its own
    int64_t tokens() const { return starts[count]; }
    int64_t longest() const {
        int64_t found = 0;
        for (int64_t i = 0; i < count; i++) found = std::max(found, before(i) + length(i));
        return found;
    }
};

typedef std::vector<std::pair<int64_t, int64_t>> Tasks;  // sequence, head

// The longest first, so that no thread is left with a long one.
static inline Tasks tasks_of(const Sequences& all, int64_t heads) {
    Tasks tasks;
    for (int64_t i = 0; i < all.count; i++)
        for (int64_t h = 0; h < heads; h++) tasks.emplace_back(i, h);
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&](const auto& a, const auto& b) { return all.length(a.first) > all.length(b.first); });
    return tasks;
}

static inline void attend_head(const Heads& s, const Sequences& all, int64_t which, int64_t head, const float* qkv,
                               const float* sincos, float* out, float* logsum) {
    const int64_t before = all.before(which), length = all.length(which), at = all.at(which), c = s.embedding();
    HeadRows rows(s, head, before + length, false);
    if (before) rows.take(qkv, sincos, before, 0);
    rows.take(qkv + at * 3 * c, sincos, length, before);
    const int64_t columns = rows.columns, keys = rows.keys;
    std::vector<float> scores(kQueries * keys), sums(kQueries * columns);
    for (int64_t first = 0; first < length; first += kQueries) {
        const int64_t count = std::min(kQueries, length - first), past = before + first, seen = padded(past + count);
        multiply(rows.q.data() + first * columns, columns, 1, rows.k_turned.data(), keys, scores.data(), keys, count,
                 seen, rows.width, false);
        for (int64_t i = 0; i < count; i++) {
            float *row = scores.data() + i * keys, most = -1e30f, sum = 0;
            const int64_t own = past + i + 1;
            for (int64_t j = 0; j < own; j++) most = row[j] > most ? row[j] : most;
            for (int64_t j = 0; j < own; j++) {
                row[j] = exp_of(row[j] - most);
                sum += row[j];
            }
            for (int64_t j = 0; j < own; j++) row[j] /= sum;
            for (int64_t j = own; j < seen; j++) row[j] = 0;
            logsum[head * all.tokens() + at + first + i] = most + std::log(sum);
        }
        multiply(scores.data(), keys, 1, rows.v.data(), columns, sums.data(), columns, count, columns, past + count,
                 false);
        for (int64_t i = 0; i < count; i++)
            std::memcpy(out + (at + first + i) * c + head * s.width, sums.data() + i * columns,
                        s.width * sizeof(float));
    }
}

// What backward reads and writes, all tokens.
struct BackwardRows {
    const float *dout, *qkv, *out, *logsum, *sincos;
    float* dqkv;
};

// Gradients of one head of one sequence: those by queries are written, those by keys and values added to dk, dv, which
// are by position.
static inline void add_back(const Heads& s, const Sequences& all, int64_t which, const HeadRows& rows,
                            const BackwardRows& b, float* dk, float* dv) {
    const int64_t before = all.before(which), length = all.length(which), at = all.at(which), c = s.embedding();
    const int64_t columns = rows.columns, keys = rows.keys, width = rows.width, head = rows.head;
    std::vector<float> g(length * columns), dq(kQueries * columns), p(kQueries * keys), ds(kQueries * keys);
    const float factor = 1.0f / std::sqrt((float)width);
    for (int64_t t = 0; t < length; t++)
        std::memcpy(g.data() + t * columns, b.dout + (at + t) * c + head * width, width * sizeof(float));
    for (int64_t first = 0; first < length; first += kQueries) {
        const int64_t count = std::min(kQueries, length - first), past = before + first, end = past + count;
        const float *q = rows.q.data() + first * columns, *dy = g.data() + first * columns;
        multiply(q, columns, 1, rows.k_turned.data(), keys, p.data(), keys, count, padded(end), width, false);
        multiply(dy, columns, 1, rows.v_turned.data(), keys, ds.data(), keys, count, padded(end), width, false);
        for (int64_t i = 0; i < count; i++) {
            float *row = p.data() + i * keys, *drow = ds.data() + i * keys, along = 0;
            const float* y = b.out + (at + first + i) * c + head * width;
            for (int64_t d = 0; d < width; d++) along += dy[i * columns + d] * y[d];
            const int64_t own = past + i + 1;
            const float log = b.logsum[head * all.tokens() + at + first + i];
            for (int64_t j = 0; j < own; j++) {
                row[j] = exp_of(row[j] - log);
                drow[j] = row[j] * (drow[j] - along);
            }
            for (int64_t j = own; j < padded(end); j++) row[j] = drow[j] = 0;
        }
        multiply(ds.data(), keys, 1, rows.k.data(), columns, dq.data(), columns, count, columns, end, false);
        multiply(p.data(), 1, keys, dy, columns, dv, columns, end, columns, count, true);
        multiply(ds.data(), 1, keys, q, columns, dk, columns, end, columns, count, true);
        for (int64_t i = 0; i < count; i++)
            turn(dq.data() + i * columns, b.sincos + (past + i) * s.rotary, s.rotary, width, factor, true,
                 b.dqkv + (at + first + i) * 3 * c + s.query(head));
    }
}

// Write the gradients by keys and values of a sequence's own positions, and forget them.
static inline void write_back(const Heads& s, const Sequences& all, int64_t which, const HeadRows& rows,
                              const BackwardRows& b, float* dk, float* dv) {
    const int64_t before = all.before(which), columns = rows.columns;
    for (int64_t t = 0; t < all.length(which); t++) {
        float *to = b.dqkv + (all.at(which) + t) * 3 * s.embedding() + s.query(rows.head);
        float *k = dk + (before + t) * columns, *v = dv + (before + t) * columns;
        std::memcpy(to + s.step(), v, s.width * sizeof(float));
        turn(k, b.sincos + (before + t) * s.rotary, s.rotary, s.width, 1.0f, true, to + 2 * s.step());
        std::fill(k, k + columns, 0.0f);
        std::fill(v, v + columns, 0.0f);
    }
}

static inline void attend(const Heads& s, const Sequences& all, const float* qkv, const float* sincos, float* out,
                          float* logsum) {
    const Tasks tasks = tasks_of(all, s.heads);
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++)
        attend_head(s, all, tasks[i].first, tasks[i].second, qkv, sincos, out, logsum);
}

// A task is one head of one sequence; with a shared beginning of all, whose gradients all add to, one after the other.
static inline void attend_back(const Heads& s, const Sequences& all, const BackwardRows& b) {
    const Tasks tasks = all.shared ? tasks_of({all.starts, 1, 0}, s.heads) : tasks_of(all, s.heads);
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++) {
        const int64_t first = tasks[i].first, end = all.shared ? all.count : first + 1;
        const int64_t positions = all.shared ? all.longest() : all.length(first);
        HeadRows rows(s, tasks[i].second, positions, true);
        std::vector<float> dk(positions * rows.columns), dv(positions * rows.columns);
        for (int64_t which = first; which < end; which++) {
            rows.take(b.qkv + all.at(which) * 3 * s.embedding(), b.sincos, all.length(which), all.before(which));
            add_back(s, all, which, rows, b, dk.data(), dv.data());
            if (which || !all.shared) write_back(s, all, which, rows, b, dk.data(), dv.data());
        }
        if (all.shared) write_back(s, all, 0, rows, b, dk.data(), dv.data());
    }
}

}  // namespace moss_training
