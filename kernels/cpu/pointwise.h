// The small per-token steps: layer normalisation, GELU, the residual sum.
#pragma once
#include "numbers.h"

namespace moss {

// y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis; population variance.
static inline void layer_norm(const float* x, const float* weight, const float* bias, float* y, int64_t tokens,
                              int64_t width, double eps) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = x + t * width;
        float* to = y + t * width;
        double sum = 0, squares = 0;
        for (int64_t i = 0; i < width; i++) sum += from[i];
        const double mean = sum / width;
        for (int64_t i = 0; i < width; i++) squares += (from[i] - mean) * (from[i] - mean);
        const float shift = (float)mean, factor = (float)(1.0 / std::sqrt(squares / width + eps));
        for (int64_t i = 0; i < width; i++) to[i] = (from[i] - shift) * factor * weight[i] + bias[i];
    }
}

// gelu_new, in place: 0.5 u (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))
static inline void gelu(float* x, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const float u = x[i];
        x[i] = 0.5f * u * (1.0f + std::tanh(0.7978845608028654f * (u + 0.044715f * u * u * u)));
    }
}

// x += a + b
static inline void add_both(float* x, const float* a, const float* b, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) x[i] += a[i] + b[i];
}

}  // namespace moss
