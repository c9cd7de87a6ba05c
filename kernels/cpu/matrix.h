// A piece of a stored matrix, as the kernels are told of it. The byte layouts are those of moss_jt/layout.py.
#pragma once
#include "numbers.h"

namespace moss {

enum Stored { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt4 = 4, kInt8 = 8 };

constexpr int64_t kTileRows = 16;

struct LinearShape {
    int64_t tokens, in, out;      // T, K, rows of this piece
    int64_t blob_at, first;       // byte of the memory where the piece starts; the row of the matrix that it is
    int64_t x_stride, y_stride;   // floats from token to token
    int64_t stored;               // a Stored
    int64_t group, padded_group;  // int4/int8: inputs of a group, and positions it takes up
    int64_t padded_in, groups;    // int4/int8: positions of a row, G
    int64_t scales_at, zeros_at, tile_bytes;  // offsets in bytes, within a tile
    bool has_bias, add;           // add: y += instead of y =
};

static inline void put(const LinearShape& s, const float* bias, float* y, int64_t token, int64_t row, float value) {
    float* to = y + token * s.y_stride + row;
    if (s.has_bias) value += bias[row];
    *to = s.add ? *to + value : value;
}

// Whether to share work among threads. One that still looks for work comes at once, a sleeping one 10 to 40
// microseconds later.
static inline bool worth_waking(int64_t numbers, int64_t picoseconds) { return numbers * picoseconds >= 40000000; }

}  // namespace moss
