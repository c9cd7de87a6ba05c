// y = x W^T + bias for 1 to 16 tokens, W in int4 or int8 tiles (moss_jt/layout.py), x rounded to int8 (rounding.cu):
//
//   y[t, n] = sum over blocks of float(sum of code * x - zero * sum of x) * (scale * step)
//
// The codes as they lie in a tile are the left side of a tensor core's product of bytes: four bytes of a row belong
// to neighbouring inputs. A lane reads 8 bytes, which are two rows of one chunk, so the rows of the product are not
// in the order of the tile: row r of the product is row 2r, row r + 8 is row 2r + 1. Tokens are its columns, and 8
// of them cost what one costs.
//
// A thread block makes one tile. Its warps take the rounding blocks in turn, the weights of the next one on their way
// while one is multiplied, and are added up in their order: the bits depend on nothing but the matrix and the input.
// Grid: tiles. Thread block: kWarps warps.

constexpr i32 kTileRows = 16;
constexpr i32 kWarps = 8;
constexpr i32 kSteps8 = 8;  // loads of 8 bytes that a lane has under way for a block of 128 inputs: int8; int4 half

struct Pair {
    u32 x, y;
};

MOSS_INLINE Pair load_pair(const u8* from) {
    const uint2 words = *(const uint2*)from;
    return {words.x, words.y};
}

// What a warp needs of one block of a tile.
template <i32 BITS>
struct Weights {
    static constexpr i32 kSteps = BITS == 8 ? kSteps8 : kSteps8 / 2;
    Pair words[kSteps];  // of chunk (4 * step + column): rows 2 * row and the next
    u32 scales;          // of these rows, two halves
    u32 zeros;           // as stored, one in each of the lower bytes

    __device__ void load(const u8* tile, const Block& b, i32 scales_at, i32 zeros_at, i32 row, i32 column) {
        const i32 first = b.start * BITS / 32, end = (b.start + b.size) * BITS / 32;
#pragma unroll
        for (i32 step = 0; step < kSteps; step++) {
            const i32 chunk = first + 4 * step + column;
            words[step] = Pair{0, 0};
            if (chunk < end) words[step] = load_pair(tile + (i64)chunk * 64 + row * 8);
        }
        scales = *(const u32*)(tile + scales_at + b.group * 32 + row * 4);
        if (BITS == 8) {
            zeros = *(const u16*)(tile + zeros_at + b.group * 16 + row * 2);
        } else {
            const u32 both = *(const u16*)(tile + zeros_at + b.group * 8 + row % 4 * 2);
            zeros = (row < 4 ? both : both >> 4) & 0x0f0fu;
        }
    }
};

// The sums of code * x of a block, for 8 tokens.
template <i32 BITS>
MOSS_INLINE void multiply_block(const Weights<BITS>& w, const i8* x, const Block& b, i32 column, i32 (&sum)[4]) {
    const i32 inputs = 32 / BITS, end = b.start + b.size;
    if (BITS == 4) {
#pragma unroll
        for (i32 step = 0; step < Weights<BITS>::kSteps; step++) {
            const i32 at = b.start + (4 * step + column) * inputs;
            const u32 low = 0x0f0f0f0fu;
            const u32 left[4] = {w.words[step].x & low, w.words[step].y & low, w.words[step].x >> 4 & low,
                                 w.words[step].y >> 4 & low};
            Pair here = {0, 0};
            if (x && at < end) here = load_pair((const u8*)(x + at));
            const u32 right[2] = {here.x, here.y};
            multiply_bytes(sum, left, right);
        }
    } else {
#pragma unroll
        for (i32 step = 0; step < Weights<BITS>::kSteps; step += 2) {
            const i32 at = b.start + (4 * step + column) * inputs, later = at + 4 * inputs;
            const u32 left[4] = {w.words[step].x, w.words[step].y, w.words[step + 1].x, w.words[step + 1].y};
            const u32 right[2] = {x && at < end ? *(const u32*)(x + at) : 0,
                                  x && later < end ? *(const u32*)(x + later) : 0};
            multiply_bytes(sum, left, right);
        }
    }
}

template <i32 BITS, i32 EIGHTS>
MOSS_INLINE void linear_few(const u8* blob, const i8* codes, const float* steps, const i32* sums, const float* bias,
                            float* y, i32 tokens, i32 rows, i32 first, i32 tile_bytes, i32 scales_at, i32 zeros_at,
                            const Blocks& blocks, i32 y_stride, i32 add) {
    const i32 warp = (i32)threadIdx.x / kWarp, lane = (i32)threadIdx.x % kWarp, row = lane / 4, column = lane % 4;
    const u8* tile = blob + (i64)blockIdx.x * tile_bytes;
    const i32 count = blocks.count();
    float total[EIGHTS][4] = {};
    Weights<BITS> now, next;
    if (warp < count) next.load(tile, blocks.at(warp), scales_at, zeros_at, row, column);
    for (i32 index = warp; index < count; index += kWarps) {
        const Block b = blocks.at(index);
        now = next;
        if (index + kWarps < count) next.load(tile, blocks.at(index + kWarps), scales_at, zeros_at, row, column);
        const float scale[2] = {half_to_float((u16)now.scales), half_to_float((u16)(now.scales >> 16))};
        const i32 zero[2] = {(i32)(now.zeros & 0xffu) + 1, (i32)(now.zeros >> 8 & 0xffu) + 1};
#pragma unroll
        for (i32 eight = 0; eight < EIGHTS; eight++) {
            const i32 token = 8 * eight + row;
            i32 sum[4] = {};
            multiply_block<BITS>(now, token < tokens ? codes + (i64)token * blocks.padded_in : nullptr, b, column, sum);
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
                const i32 of = least(8 * eight + 2 * column + i % 2, tokens - 1);
                const i32 whole = sum[i] - zero[i / 2] * sums[(i64)index * tokens + of];
                total[eight][i] += __fmul_rn((float)whole, __fmul_rn(scale[i / 2], steps[(i64)index * tokens + of]));
            }
        }
    }
    __shared__ float part[kWarps][8 * EIGHTS][kTileRows];
#pragma unroll
    for (i32 eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (i32 i = 0; i < 4; i++) part[warp][8 * eight + 2 * column + i % 2][2 * row + i / 2] = total[eight][i];
    __syncthreads();
    for (i32 i = (i32)threadIdx.x; i < tokens * kTileRows; i += kWarps * kWarp) {
        const i32 token = i / kTileRows, r = i % kTileRows, n = (i32)blockIdx.x * kTileRows + r;
        if (n >= rows) continue;
        float value = 0.0f;
        for (i32 from = 0; from < least(kWarps, count); from++) value += part[from][token][r];
        if (bias) value += bias[first + n];
        float* to = y + (i64)token * y_stride + first + n;
        *to = add ? *to + value : value;
    }
}

// blob: from the first tile on. y, (T, y_stride), and bias: of the whole matrix; rows [first, first + rows) are made.
#define MOSS_LINEAR_FEW(name, BITS, EIGHTS)                                                                            \
    MOSS_KERNEL(name)                                                                                                  \
    (const u8* blob, const i8* codes, const float* steps, const i32* sums, const float* bias, float* y, i32 tokens,    \
     i32 rows, i32 first, i32 tile_bytes, i32 scales_at, i32 zeros_at, i32 padded_in, i32 padded_group, i32 block,     \
     i32 y_stride, i32 add) {                                                                                          \
        linear_few<BITS, EIGHTS>(blob, codes, steps, sums, bias, y, tokens, rows, first, tile_bytes, scales_at,        \
                                 zeros_at, Blocks{padded_in, padded_group, block}, y_stride, add);                     \
    }
MOSS_LINEAR_FEW(linear_int4_8, 4, 1)
MOSS_LINEAR_FEW(linear_int4_16, 4, 2)
MOSS_LINEAR_FEW(linear_int8_8, 8, 1)
MOSS_LINEAR_FEW(linear_int8_16, 8, 2)
