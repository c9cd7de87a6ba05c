// The small per-token steps: layer normalisation, GELU, the residual sum.
//
// Threads are woken only for work that outlasts the waking: a decode step calls these a hundred times.
// Every operation is rounded for itself and sums are taken in one order (see the pragma in rows.h), so
// the bits are the same on every machine, whatever T and however many threads.
#pragma once
#include "matrix.h"

#pragma GCC push_options
#pragma GCC optimize("no-associative-math,no-reciprocal-math,signed-zeros,fp-contract=off")

namespace moss {

constexpr int64_t kNormCost = 700, kGeluCost = 2500, kSumCost = 350;  // picoseconds a number on one core

// Sum of f(x[i]) in double: 8 partial sums of every eighth, then pairs.
template <class F>
static inline double sum_of(const float* x, int64_t n, const F& f) {
    double part[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) part[l] += f((double)x[i + l]);
    for (int l = 0; i + l < n; l++) part[l] += f((double)x[i + l]);
    return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis; population variance.
static inline void layer_norm(const float* x, const float* weight, const float* bias, float* y, int64_t tokens,
                              int64_t width, double eps) {
#pragma omp parallel for schedule(static) if (worth_waking(tokens * width, kNormCost))
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = x + t * width;
        float* to = y + t * width;
        const double mean = sum_of(from, width, [](double v) { return v; }) / width;
        const double squares = sum_of(from, width, [mean](double v) { return (v - mean) * (v - mean); });
        const float shift = (float)mean, factor = (float)(1.0 / std::sqrt(squares / width + eps));
        for (int64_t i = 0; i < width; i++) to[i] = (from[i] - shift) * factor * weight[i] + bias[i];
    }
}

// e^x for |x| <= 700 in double, off by less than 1e-10 of it: 2^n e^r, with |r| <= ln(2) / 2 and Taylor's series.
static inline __attribute__((always_inline)) double exp_of(double x) {
    const double shifter = 6755399441055744.0;  // 1.5 * 2^52: what is added to it is rounded to a whole number
    const double shifted = x * 1.4426950408889634 + shifter, n = shifted - shifter;
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;  // ln(2) in two parts
    double e = 1.0 / 362880;
    e = e * r + 1.0 / 40320;
    e = e * r + 1.0 / 5040;
    e = e * r + 1.0 / 720;
    e = e * r + 1.0 / 120;
    e = e * r + 1.0 / 24;
    e = e * r + 1.0 / 6;
    e = e * r + 0.5;
    e = e * r + 1.0;
    e = e * r + 1.0;
    int64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (int64_t)(((uint64_t)bits << 52) + ((uint64_t)1023 << 52));  // the low bits of `shifted` are n
    double power;
    std::memcpy(&power, &bits, sizeof power);
    return e * power;
}

// gelu_new: 0.5 u (1 + tanh(z)) = u / (1 + e^(-2z)), z = sqrt(2/pi) (u + 0.044715 u^3); rounded once, at the end.
static inline __attribute__((always_inline)) float gelu_of(float x) {
    const double u = x, exponent = -1.5957691216057308 * (u + 0.044715 * u * u * u);
    const double held = exponent > 700 ? 700 : exponent < -700 ? -700 : exponent;
    return (float)(exponent > 700 ? u * 0.0 : u / (1.0 + exp_of(held)));
}

// In place.
static inline void gelu(float* x, int64_t count) {
#pragma omp parallel for schedule(static) if (worth_waking(count, kGeluCost))
    for (int64_t i = 0; i < count; i++) x[i] = gelu_of(x[i]);
}

// x += a + b
static inline void add_both(float* x, const float* a, const float* b, int64_t count) {
#pragma omp parallel for schedule(static) if (worth_waking(count, kSumCost))
    for (int64_t i = 0; i < count; i++) x[i] += a[i] + b[i];
}

}  // namespace moss

#pragma GCC pop_options
