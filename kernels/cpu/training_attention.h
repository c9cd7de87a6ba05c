// Causal attention over whole sequences, forward and backward, for training.
//
//   qkv     (T, 3C): 4 slices, each query, value, key of H/4 heads of width D (the checkpoint's order)
//   starts  (S + 1,) int32: where each sequence begins among the T tokens; the last is T
//   sincos  (positions, R): R/2 sines, then R/2 cosines; a token's position is its place in its sequence
//   out     (T, C): heads one after the other
//   logsum  (H, T): log of the sum of exp(score), kept for backward
//
// A task is one head of one sequence; it works on rows of its own, so results do not depend on the threads. Scores
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
constexpr int64_t kQueries = 32;

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

// One head of one sequence, its rows padded: q (rotated, divided by sqrt(D)), k (rotated), v, and the latter turned around.
struct HeadRows {
    int64_t length, width, columns, keys;  // T of the sequence, D, padded D, padded T
    std::vector<float> q, k, v, k_turned, v_turned;

    HeadRows(const Heads& s, const float* qkv, const float* sincos, int64_t head, int64_t length_, bool turn_values)
        : length(length_), width(s.width), columns(padded(s.width)), keys(padded(length_)) {
        q.assign(length * columns, 0);
        k.assign(length * columns, 0);
        v.assign(length * columns, 0);
        const float factor = 1.0f / std::sqrt((float)width);
        for (int64_t t = 0; t < length; t++) {
            const float *row = qkv + t * 3 * s.embedding() + s.query(head), *angles = sincos + t * s.rotary;
            turn(row, angles, s.rotary, width, factor, false, q.data() + t * columns);
            turn(row + 2 * s.step(), angles, s.rotary, width, 1.0f, false, k.data() + t * columns);
            std::memcpy(v.data() + t * columns, row + s.step(), width * sizeof(float));
        }
        turn_around(k, k_turned);
        if (turn_values) turn_around(v, v_turned);
    }

    void turn_around(const std::vector<float>& rows, std::vector<float>& turned) const {
        turned.assign(width * keys, 0);
        for (int64_t t = 0; t < length; t++)
            for (int64_t d = 0; d < width; d++) turned[d * keys + t] = rows[t * columns + d];
    }
};

// The tasks, the longest first so that no thread is left with a long one.
static inline std::vector<std::pair<int64_t, int64_t>> tasks_of(const int32_t* starts, int64_t sequences,
                                                                 int64_t heads) {
    std::vector<std::pair<int64_t, int64_t>> tasks;  // sequence, head
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t h = 0; h < heads; h++) tasks.emplace_back(s, h);
    std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) {
        return starts[a.first + 1] - starts[a.first] > starts[b.first + 1] - starts[b.first];
    });
    return tasks;
}

static inline void attend_head(const Heads& s, const float* qkv, const float* sincos, int64_t head, int64_t length,
                               float* out, float* logsum) {
    const HeadRows rows(s, qkv, sincos, head, length, false);
    const int64_t columns = rows.columns, keys = rows.keys;
    std::vector<float> scores(kQueries * keys), sums(kQueries * columns);
    for (int64_t first = 0; first < length; first += kQueries) {
        const int64_t count = std::min(kQueries, length - first), seen = padded(first + count);
        multiply(rows.q.data() + first * columns, columns, 1, rows.k_turned.data(), keys, scores.data(), keys, count,
                 seen, rows.width, false);
        for (int64_t i = 0; i < count; i++) {
            float *row = scores.data() + i * keys, most = -1e30f, sum = 0;
            const int64_t own = first + i + 1;
            for (int64_t j = 0; j < own; j++) most = row[j] > most ? row[j] : most;
            for (int64_t j = 0; j < own; j++) {
                row[j] = exp_of(row[j] - most);
                sum += row[j];
            }
            for (int64_t j = 0; j < own; j++) row[j] /= sum;
            for (int64_t j = own; j < seen; j++) row[j] = 0;
            logsum[first + i] = most + std::log(sum);
        }
        multiply(scores.data(), keys, 1, rows.v.data(), columns, sums.data(), columns, count, columns, first + count,
                 false);
        for (int64_t i = 0; i < count; i++)
            std::memcpy(out + (first + i) * s.embedding() + head * s.width, sums.data() + i * columns,
                        s.width * sizeof(float));
    }
}

static inline void attend_head_back(const Heads& s, const float* dout, const float* qkv, const float* out,
                                    const float* logsum, const float* sincos, int64_t head, int64_t length,
                                    float* dqkv) {
    const HeadRows rows(s, qkv, sincos, head, length, true);
    const int64_t columns = rows.columns, keys = rows.keys, width = rows.width;
    std::vector<float> g(length * columns), dq(kQueries * columns), dk(length * columns), dv(length * columns);
    std::vector<float> p(kQueries * keys), ds(kQueries * keys);
    const float factor = 1.0f / std::sqrt((float)width);
    for (int64_t t = 0; t < length; t++)
        std::memcpy(g.data() + t * columns, dout + t * s.embedding() + head * width, width * sizeof(float));
    for (int64_t first = 0; first < length; first += kQueries) {
        const int64_t count = std::min(kQueries, length - first), all = first + count, seen = padded(all);
        const float *q = rows.q.data() + first * columns, *dy = g.data() + first * columns;
        multiply(q, columns, 1, rows.k_turned.data(), keys, p.data(), keys, count, seen, width, false);
        multiply(dy, columns, 1, rows.v_turned.data(), keys, ds.data(), keys, count, seen, width, false);
        for (int64_t i = 0; i < count; i++) {
            float *row = p.data() + i * keys, *drow = ds.data() + i * keys, along = 0;
            const float* y = out + (first + i) * s.embedding() + head * width;
            for (int64_t d = 0; d < width; d++) along += dy[i * columns + d] * y[d];
            const int64_t own = first + i + 1;
            const float log = logsum[first + i];
            for (int64_t j = 0; j < own; j++) {
                row[j] = exp_of(row[j] - log);
                drow[j] = row[j] * (drow[j] - along);
            }
            for (int64_t j = own; j < seen; j++) row[j] = drow[j] = 0;
        }
        multiply(ds.data(), keys, 1, rows.k.data(), columns, dq.data(), columns, count, columns, all, false);
        multiply(p.data(), 1, keys, dy, columns, dv.data(), columns, all, columns, count, true);
        multiply(ds.data(), 1, keys, q, columns, dk.data(), columns, all, columns, count, true);
        for (int64_t i = 0; i < count; i++)
            turn(dq.data() + i * columns, sincos + (first + i) * s.rotary, s.rotary, width, factor, true,
                 dqkv + (first + i) * 3 * s.embedding() + s.query(head));
    }
    for (int64_t t = 0; t < length; t++) {
        float* to = dqkv + t * 3 * s.embedding() + s.query(head);
        std::memcpy(to + s.step(), dv.data() + t * columns, width * sizeof(float));
        turn(dk.data() + t * columns, sincos + t * s.rotary, s.rotary, width, 1.0f, true, to + 2 * s.step());
    }
}

static inline void attend(const Heads& s, const float* qkv, const int32_t* starts, const float* sincos, float* out,
                          float* logsum, int64_t sequences) {
    const auto tasks = tasks_of(starts, sequences, s.heads);
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++) {
        const int64_t at = starts[tasks[i].first], length = starts[tasks[i].first + 1] - at, head = tasks[i].second;
        attend_head(s, qkv + at * 3 * s.embedding(), sincos, head, length, out + at * s.embedding(),
                    logsum + head * starts[sequences] + at);
    }
}

static inline void attend_back(const Heads& s, const float* dout, const float* qkv, const float* out,
                               const float* logsum, const int32_t* starts, const float* sincos, float* dqkv,
                               int64_t sequences) {
    const auto tasks = tasks_of(starts, sequences, s.heads);
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); i++) {
        const int64_t at = starts[tasks[i].first], length = starts[tasks[i].first + 1] - at, head = tasks[i].second;
        const int64_t c = s.embedding();
        attend_head_back(s, dout + at * c, qkv + at * 3 * c, out + at * c, logsum + head * starts[sequences] + at,
                         sincos, head, length, dqkv + at * 3 * c);
    }
}

}  // namespace moss_training
