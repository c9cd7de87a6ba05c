// The small steps of training, forward and backward: layer norm, GELU, sums, embedding, loss, AdamW.
//
// Activations are (tokens, width) rows of floats. Threads share out rows or columns in a fixed way and sums over
// rows are taken in kParts parts that are added in order, so a result does not depend on the number of threads.
// Unlike the kernels of inference, these may differ in the last bits from one processor to another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace moss_training {

constexpr int64_t kParts = 32;         // of the tokens, for sums over them
constexpr int64_t kStripe = 64;        // columns that a thread takes at a time
constexpr int64_t kFewNumbers = 20000;  // waking the threads takes as long as so many

static inline float fused(float a, float b, float c) {
#if defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x within a few units in the last place, for x from -87 to 88; beyond, the value there. It becomes vector code.
static inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = __builtin_floorf(x * 1.44269504f + 0.5f);
    const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));  // ln 2 in two parts
    float p = 1.98756912e-4f;
    p = fused(p, r, 1.39819994e-3f);
    p = fused(p, r, 8.33345205e-3f);
    p = fused(p, r, 4.16657962e-2f);
    p = fused(p, r, 1.66666657e-1f);
    p = fused(p, r, 0.5f);
    p = fused(p, r * r, r) + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias; shape (T, C). Keeps 1 / sqrt(...) and the mean for backward.
static inline void layer_norm(const float* x, const float* weight, const float* bias, float* y, float* kept,
                              int64_t tokens, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = x + t * width;
        float* to = y + t * width;
        float sum = 0, squares = 0;
        for (int64_t i = 0; i < width; i++) sum += from[i];
        const float mean = sum / (float)width;
        for (int64_t i = 0; i < width; i++) squares += (from[i] - mean) * (from[i] - mean);
        const float factor = 1.0f / std::sqrt(squares / (float)width + eps);
        for (int64_t i = 0; i < width; i++) to[i] = (from[i] - mean) * factor * weight[i] + bias[i];
        kept[2 * t] = mean;
        kept[2 * t + 1] = factor;
    }
}

// y = x turned around: (rows, columns) to (columns, rows), a block at a time.
static inline void turn_around(const float* x, float* y, int64_t rows, int64_t columns) {
    constexpr int64_t kBlock = 32;
#pragma omp parallel for schedule(static) if (rows * columns > kFewNumbers)
    for (int64_t first = 0; first < columns; first += kBlock)
        for (int64_t r = 0; r < rows; r += kBlock) {
            const int64_t last_row = r + kBlock < rows ? r + kBlock : rows;
            const int64_t last = first + kBlock < columns ? first + kBlock : columns;
            for (int64_t c = first; c < last; c++)
                for (int64_t i = r; i < last_row; i++) y[c * rows + i] = x[i * columns + c];
        }
}

// The first token of a part.
static inline int64_t part_start(int64_t part, int64_t tokens) { return part * tokens / kParts; }

// out[width] = the parts' sums, added in order.
static inline void add_parts(const float* parts, float* out, int64_t width) {
    for (int64_t i = 0; i < width; i++) out[i] = 0;
    for (int64_t p = 0; p < kParts; p++)
        for (int64_t i = 0; i < width; i++) out[i] += parts[p * width + i];
}

// Gradients by input, weight and bias.
static inline void layer_norm_back(const float* dy, const float* x, const float* weight, const float* kept, float* dx,
                                   float* dweight, float* dbias, int64_t tokens, int64_t width) {
    std::vector<float> weights(kParts * width), biases(kParts * width);
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t p = 0; p < kParts; p++) {
        float *dw = weights.data() + p * width, *db = biases.data() + p * width;
        for (int64_t t = part_start(p, tokens); t < part_start(p + 1, tokens); t++) {
            const float *from = x + t * width, *g = dy + t * width;
            const float mean = kept[2 * t], factor = kept[2 * t + 1];
            float *to = dx + t * width, sum = 0, along = 0;
            for (int64_t i = 0; i < width; i++) {
                const float scaled = (from[i] - mean) * factor, gw = g[i] * weight[i];
                sum += gw;
                along += gw * scaled;
                dw[i] += g[i] * scaled;
                db[i] += g[i];
            }
            sum /= (float)width;
            along /= (float)width;
            for (int64_t i = 0; i < width; i++)
                to[i] = factor * (g[i] * weight[i] - sum - (from[i] - mean) * factor * along);
        }
    }
    add_parts(weights.data(), dweight, width);
    add_parts(biases.data(), dbias, width);
}

constexpr float kGelu = 1.5957691216f, kCube = 0.044715f;  // 2 sqrt(2 / pi)

// y = gelu_new(x + bias) = u / (1 + e^(-2z)), z = sqrt(2/pi) (u + 0.044715 u^3)
static inline void gelu(const float* x, const float* bias, float* y, int64_t tokens, int64_t width) {
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t t = 0; t < tokens; t++) {
        const float* from = x + t * width;
        float* to = y + t * width;
        for (int64_t i = 0; i < width; i++) {
            const float u = from[i] + bias[i];
            to[i] = u / (1.0f + exp_of(-kGelu * (u + kCube * u * u * u)));
        }
    }
}

// Gradients by x and bias.
static inline void gelu_back(const float* dy, const float* x, const float* bias, float* dx, float* dbias,
                             int64_t tokens, int64_t width) {
    std::vector<float> biases(kParts * width);
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t p = 0; p < kParts; p++) {
        float* db = biases.data() + p * width;
        for (int64_t t = part_start(p, tokens); t < part_start(p + 1, tokens); t++) {
            const float *from = x + t * width, *g = dy + t * width;
            float* to = dx + t * width;
            for (int64_t i = 0; i < width; i++) {
                const float u = from[i] + bias[i];
                const float s = 1.0f / (1.0f + exp_of(-kGelu * (u + kCube * u * u * u)));
                const float d = g[i] * (s + u * s * (1.0f - s) * kGelu * (1.0f + 3.0f * kCube * u * u));
                to[i] = d;
                db[i] += d;
            }
        }
    }
    add_parts(biases.data(), dbias, width);
}

// y = x + a + b + bias
static inline void add_all(const float* x, const float* a, const float* b, const float* bias, float* y, int64_t tokens,
                           int64_t width) {
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = t * width, c = 0; c < width; i++, c++) y[i] = x[i] + a[i] + b[i] + bias[c];
}

// y = x + bias
static inline void add_bias(const float* x, const float* bias, float* y, int64_t tokens, int64_t width) {
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = t * width, c = 0; c < width; i++, c++) y[i] = x[i] + bias[c];
}

// out[width] = the sum of all rows.
static inline void sum_rows(const float* x, float* out, int64_t tokens, int64_t width) {
    std::vector<float> parts(kParts * width);
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t p = 0; p < kParts; p++)
        for (int64_t t = part_start(p, tokens); t < part_start(p + 1, tokens); t++)
            for (int64_t i = 0; i < width; i++) parts[p * width + i] += x[t * width + i];
    add_parts(parts.data(), out, width);
}

// y[t] = table[ids[t]]
static inline void take_rows(const float* table, const int32_t* ids, float* y, int64_t tokens, int64_t width) {
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t t = 0; t < tokens; t++)
        std::memcpy(y + t * width, table + ids[t] * width, width * sizeof(float));
}

// dtable[ids[t]] += dy[t], rows in order; a thread has columns of its own.
static inline void take_rows_back(const float* dy, const int32_t* ids, float* dtable, int64_t tokens, int64_t width,
                                  int64_t rows) {
    std::memset(dtable, 0, rows * width * sizeof(float));
#pragma omp parallel for schedule(static) if (tokens * width > kFewNumbers)
    for (int64_t first = 0; first < width; first += kStripe) {
        const int64_t end = first + kStripe < width ? first + kStripe : width;
        for (int64_t t = 0; t < tokens; t++) {
            float* to = dtable + ids[t] * width;
            const float* from = dy + t * width;
            for (int64_t i = first; i < end; i++) to[i] += from[i];
        }
    }
}

// Cross-entropy of rows of logits, each with a label and a weight.
//   logits  (R, V), becomes the gradient: weight (softmax(logits + bias) - 1 at the label)
//   loss    (R,), not weighted;  right (R,): 1 where the label has the largest logit
static inline void cross_entropy(float* logits, const float* bias, const int32_t* labels, const float* weights,
                                 float* loss, float* right, int64_t rows, int64_t vocabulary) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *row = logits + r * vocabulary, most = -1e30f, sum = 0;
        for (int64_t i = 0; i < vocabulary; i++) {
            row[i] += bias[i];
            most = row[i] > most ? row[i] : most;
        }
        const float wanted = row[labels[r]];
        for (int64_t i = 0; i < vocabulary; i++) {
            row[i] = exp_of(row[i] - most);
            sum += row[i];
        }
        loss[r] = most + std::log(sum) - wanted;
        right[r] = wanted == most ? 1.0f : 0.0f;
        const float factor = weights[r] / sum;
        for (int64_t i = 0; i < vocabulary; i++) row[i] *= factor;
        row[labels[r]] -= weights[r];
    }
}

// The sum of squares, in double; parts of a fixed size, added in order.
static inline double sum_squares(const float* x, int64_t count) {
    constexpr int64_t kSize = 1 << 14;
    const int64_t parts = (count + kSize - 1) / kSize;
    std::vector<double> sums(parts);
#pragma omp parallel for schedule(static) if (count > kFewNumbers)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t end = (p + 1) * kSize < count ? (p + 1) * kSize : count;
        double sum = 0;
        for (int64_t i = p * kSize; i < end; i++) sum += (double)x[i] * x[i];
        sums[p] = sum;
    }
    double all = 0;
    for (const double sum : sums) all += sum;
    return all;
}

// One step of AdamW, in place; Loshchilov and Hutter 2017, arXiv:1711.05101, with decay outside of the moments.
//   scale   of the gradient (clipping);  keep = 1 - rate * decay;  rate = learning rate / (1 - beta1^t)
//   root = 1 / sqrt(1 - beta2^t)
static inline void adamw(const float* gradient, float* value, float* first, float* second, int64_t count, float scale,
                         float keep, float rate, float root, float beta1, float beta2, float eps) {
#pragma omp parallel for schedule(static) if (count > kFewNumbers)
    for (int64_t i = 0; i < count; i++) {
        const float g = gradient[i] * scale;
        const float m = beta1 * first[i] + (1.0f - beta1) * g;
        const float v = beta2 * second[i] + (1.0f - beta2) * g * g;
        first[i] = m;
        second[i] = v;
        value[i] = value[i] * keep - rate * m / (std::sqrt(v) * root + eps);
    }
}

}  // namespace moss_training
