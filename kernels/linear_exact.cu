// y = x W^T + bias in float32, for exact compute and for rows that linear_rounded.cu does not take. Activations are not
// rounded.
//
// Quantised tiles (moss_jt/layout.py): W[n, p] = (code - zero) * scale; of each block of up to 128 positions in a group
// the sum of (code - zero) * x is taken, then multiplied by the scale. A thread block makes the 16 rows of a tile:
// thread (row, class) takes the blocks of its class in their order, and the classes are added up in theirs.
//
// Rows of float, half or bfloat16: a warp makes a row; a lane takes eight neighbours, then the eight that are kWarp * 8
// further, and the lanes are added up.
//
// kTogether tokens go together. None of it depends on how many there are, so neither do the bits of one.

constexpr i32 kTileRows = 16, kClasses = 16;
constexpr i32 kTogether = 4;  // tokens
constexpr i32 kRowWarps = 8;  // rows of a thread block
constexpr i32 kEach = 8;

template <i32 BITS>
MOSS_INLINE i32 zero_of(const u8* zeros, i32 row) {
    return 1 + (BITS == 8 ? zeros[row] : row < 8 ? zeros[row] & 15 : zeros[row - 8] >> 4);
}

// Grid: (tiles, tokens / kTogether). Thread block: kTileRows * kClasses threads.
template <i32 BITS>
MOSS_INLINE void tiles(const float* x, const i32* perm, const u8* blob, const float* bias, float* y, i32 tokens, i32 rows,
                       i32 first, i32 tile_bytes, i32 scales_at, i32 zeros_at, const Blocks& blocks, i32 x_stride,
                       i32 y_stride, i32 add) {
    constexpr i32 kCodes = 32 / BITS;  // in a word
    const i32 row = (i32)threadIdx.x % kTileRows, mine = (i32)threadIdx.x / kTileRows;
    const i32 start = (i32)blockIdx.y * kTogether, here = least(kTogether, tokens - start), count = blocks.count();
    const u8* tile = blob + (i64)blockIdx.x * tile_bytes;
    float total[kTogether] = {};
    for (i32 index = mine; index < count; index += kClasses) {
        const Block b = blocks.at(index);
        const float scale = half_to_float(*(const u16*)(tile + scales_at + (b.group * kTileRows + row) * 2));
        const i32 zero = zero_of<BITS>(tile + zeros_at + b.group * kTileRows * BITS / 8, row);
        float sum[kTogether] = {};
        for (i32 p = b.start; p < b.start + b.size; p += kCodes) {
            const u32 word = *(const u32*)(tile + (i64)(p / kCodes) * 64 + row * 4);
            for (i32 i = 0; i < kCodes; i++) {
                const u32 code = BITS == 8 ? word >> 8 * i & 255u : word >> (8 * (i % 4) + i / 4 * 4) & 15u;
                const i32 from = perm ? perm[p + i] : p + i;
                const float weight = (float)((i32)code - zero);
#pragma unroll
                for (i32 t = 0; t < kTogether; t++)
                    if (from >= 0 && t < here) sum[t] += weight * x[(i64)(start + t) * x_stride + from];
            }
        }
#pragma unroll
        for (i32 t = 0; t < kTogether; t++) total[t] += sum[t] * scale;
    }
    __shared__ float part[kClasses][kTogether][kTileRows];
#pragma unroll
    for (i32 t = 0; t < kTogether; t++) part[mine][t][row] = total[t];
    __syncthreads();
    const i32 token = mine, n = (i32)blockIdx.x * kTileRows + row;
    if (token >= here || n >= rows) return;
    float value = bias ? bias[first + n] : 0.0f;
    for (i32 from = 0; from < kClasses; from++) value += part[from][token][row];
    float* to = y + (i64)(start + token) * y_stride + first + n;
    *to = add ? *to + value : value;
}

struct Float {
    static constexpr i32 kBytes = 4;
    static __device__ float at(const u8* row, i32 k) { return ((const float*)row)[k]; }
};
struct Half {
    static constexpr i32 kBytes = 2;
    static __device__ float at(const u8* row, i32 k) { return half_to_float(((const u16*)row)[k]); }
};
struct Brain {
    static constexpr i32 kBytes = 2;
    static __device__ float at(const u8* row, i32 k) { return brain_to_float(((const u16*)row)[k]); }
};

// Grid: (rows / kRowWarps, tokens / kTogether). Thread block: kRowWarps warps.
template <class Stored>
MOSS_INLINE void rows_of(const float* x, const u8* blob, const float* bias, float* y, i32 tokens, i32 rows, i32 first,
                         i32 inputs, i32 x_stride, i32 y_stride, i32 add) {
    const i32 n = (i32)blockIdx.x * kRowWarps + (i32)threadIdx.x / kWarp, lane = (i32)threadIdx.x % kWarp;
    const i32 start = (i32)blockIdx.y * kTogether, here = least(kTogether, tokens - start);
    if (n >= rows) return;
    const u8* row = blob + (i64)n * inputs * Stored::kBytes;
    float total[kTogether] = {};
    for (i32 k = lane * kEach; k < inputs; k += kWarp * kEach) {
        float weight[kEach];
#pragma unroll
        for (i32 i = 0; i < kEach; i++) weight[i] = k + i < inputs ? Stored::at(row, k + i) : 0.0f;
#pragma unroll
        for (i32 t = 0; t < kTogether; t++) {
            if (t >= here) break;
            const float* from = x + (i64)(start + t) * x_stride + k;
#pragma unroll
            for (i32 i = 0; i < kEach; i++)
                if (k + i < inputs) total[t] += weight[i] * from[i];
        }
    }
#pragma unroll
    for (i32 t = 0; t < kTogether; t++) {
        if (t >= here) break;
        float value = warp_sum(total[t]);
        if (lane != 0) continue;
        if (bias) value += bias[first + n];
        float* to = y + (i64)(start + t) * y_stride + first + n;
        *to = add ? *to + value : value;
    }
}

// dx = dy W of such rows, for training. A thread makes an input; rows are added up in their order.
// Grid: (inputs / threads, tokens / kTogether).
template <class Stored>
MOSS_INLINE void transposed_rows_of(const float* dy, const u8* blob, float* dx, i32 tokens, i32 rows, i32 first,
                                    i32 inputs, i32 dy_stride, i32 dx_stride, i32 add) {
    const i32 k = (i32)(blockIdx.x * blockDim.x + threadIdx.x);
    const i32 start = (i32)blockIdx.y * kTogether, here = least(kTogether, tokens - start);
    if (k >= inputs) return;
    float total[kTogether] = {};
    for (i32 n = 0; n < rows; n++) {
        const float weight = Stored::at(blob + (i64)n * inputs * Stored::kBytes, k);
#pragma unroll
        for (i32 t = 0; t < kTogether; t++)
            if (t < here) total[t] += weight * dy[(i64)(start + t) * dy_stride + first + n];
    }
#pragma unroll
    for (i32 t = 0; t < kTogether; t++) {
        if (t >= here) break;
        float* to = dx + (i64)(start + t) * dx_stride + k;
        *to = add ? *to + total[t] : total[t];
    }
}

// blob: from the first tile or row on. y, (T, y_stride), and bias: of the whole matrix; rows [first, first + rows) are made.
#define MOSS_TILES(name, BITS)                                                                                         \
    MOSS_KERNEL(name)                                                                                                  \
    (const float* x, const i32* perm, const u8* blob, const float* bias, float* y, i32 tokens, i32 rows, i32 first,    \
     i32 tile_bytes, i32 scales_at, i32 zeros_at, i32 padded_in, i32 padded_group, i32 block, i32 x_stride,            \
     i32 y_stride, i32 add) {                                                                                          \
        tiles<BITS>(x, perm, blob, bias, y, tokens, rows, first, tile_bytes, scales_at, zeros_at,                      \
                    Blocks{padded_in, padded_group, block}, x_stride, y_stride, add);                                  \
    }
#define MOSS_ROWS(name, STORED)                                                                                        \
    MOSS_KERNEL(name)                                                                                                  \
    (const float* x, const u8* blob, const float* bias, float* y, i32 tokens, i32 rows, i32 first, i32 inputs,         \
     i32 x_stride, i32 y_stride, i32 add) {                                                                            \
        rows_of<STORED>(x, blob, bias, y, tokens, rows, first, inputs, x_stride, y_stride, add);                       \
    }
MOSS_TILES(exact_int4, 4)
MOSS_TILES(exact_int8, 8)
MOSS_ROWS(rows_float32, Float)
MOSS_ROWS(rows_float16, Half)
MOSS_ROWS(rows_bfloat16, Brain)
#define MOSS_TRANSPOSED_ROWS(name, STORED)                                                                             \
    MOSS_KERNEL(name)                                                                                                  \
    (const float* dy, const u8* blob, float* dx, i32 tokens, i32 rows, i32 first, i32 inputs, i32 dy_stride,           \
     i32 dx_stride, i32 add) {                                                                                         \
        transposed_rows_of<STORED>(dy, blob, dx, tokens, rows, first, inputs, dy_stride, dx_stride, add);              \
    }
MOSS_TRANSPOSED_ROWS(transposed_rows_float32, Float)
MOSS_TRANSPOSED_ROWS(transposed_rows_float16, Half)
MOSS_TRANSPOSED_ROWS(transposed_rows_bfloat16, Brain)
