// dx = dy W, what y = x W^T passes back to x: W in int4 or int8 tiles or in rows of 16-bit numbers (moss_jt/layout.py), dy
// rounded to half with a power of two of its own for each token. For training, so there are many tokens.
//
//   dx[t, k] = step[t] * sum over n of half(dy[t, n] / step[t]) * half(W[n, k])
//
// The rows of a tile are what a tensor core sums over; its rows are inputs. A lane reads 8 bytes of a chunk of inputs twice,
// which are four rows of the tile, and makes of them what it gives to the product: two halves of neighbouring rows at
// each of its inputs, exactly (code - zero) times the scale, rounded once. So a warp covers the inputs of 8 chunks. The
// warps of a thread block take the same tokens, whose codes they share.
//
// A piece of W gives its part of dx, which is added from the second piece on: cuts change the last bits.

constexpr i32 kTileRows = 16;
constexpr i32 kWarps = 8;
constexpr i32 kChunks = 8;  // of a warp, one for each row of its lanes
constexpr i32 kEights = 8, kTokens = 8 * kEights;  // of a thread block
constexpr i32 kTiles = 4, kRows = kTiles * kTileRows;  // whose part of dy is shared at once
constexpr i32 kStride = kRows + 8;  // halves from token to token: no two lanes meet in a bank
constexpr i32 kLargestHalf = 14;  // exponent of the largest magnitude as half

// codes (T, width) half; steps (T,) the power of two that leaves magnitudes of 2^15 at most, NaN where one is not finite.
// Grid: T. Thread block: kWarps warps.
MOSS_KERNEL(halve_tokens)(const float* dy, u16* codes, float* steps, i32 width) {
    __shared__ i32 of_warp[kWarps];
    const i32 lane = (i32)threadIdx.x % kWarp;
    const i64 row = (i64)blockIdx.x * width;
    i32 largest = 0;  // magnitude, as bits: in the order of the magnitudes, NaN on top
    for (i32 i = (i32)threadIdx.x; i < width; i += kWarps * kWarp) {
        const i32 magnitude = __float_as_int(dy[row + i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    largest = warp_max(largest);
    if (lane == 0) of_warp[threadIdx.x / kWarp] = largest;
    __syncthreads();
    for (i32 warp = 0; warp < kWarps; warp++) largest = of_warp[warp] > largest ? of_warp[warp] : largest;
    const bool finite = largest < 0x7f800000;
    const i32 wanted = (largest >> 23) - kLargestHalf, exponent = wanted < 1 ? 1 : wanted;  // as it is stored
    const float inverse = __int_as_float((254 - exponent) << 23);
    for (i32 i = (i32)threadIdx.x; i < width; i += kWarps * kWarp)
        codes[row + i] = finite ? float_to_half(__fmul_rn(dy[row + i], inverse)) : 0;
    if (threadIdx.x == 0) steps[blockIdx.x] = __int_as_float(finite ? exponent << 23 : 0x7fc00000);
}

struct Pair {
    u32 x, y;
};

MOSS_INLINE Pair load_pair(const u8* from) {
    const uint2 words = *(const uint2*)from;
    return {words.x, words.y};
}

enum Kept { kInt4 = 4, kInt8 = 8, kHalf, kBrain };

struct Matrix {
    const u8* blob;
    i32 rows, tile_bytes, scales_at, zeros_at;
    i32 chunks, group_chunks;  // of a row, of a group
};

// What a lane has of a tile: of its chunk the rows 2 * column and the next, and those 8 further.
template <i32 KEPT>
struct Weights {
    static constexpr i32 kInputs = 32 / KEPT;  // of a chunk
    Pair words[2];
    u32 scales[2], zeros;

    __device__ void load(const Matrix& matrix, i32 tile, i32 chunk, i32 column) {
        const u8* from = matrix.blob + (i64)tile * matrix.tile_bytes;
        const i32 group = chunk / matrix.group_chunks;
        const u8* zeros_of = from + matrix.zeros_at + group * 2 * KEPT + 2 * column;
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            words[half] = load_pair(from + (i64)chunk * 64 + 32 * half + 8 * column);
            scales[half] = *(const u32*)(from + matrix.scales_at + group * 32 + 16 * half + 4 * column);
        }
        zeros = *(const u16*)zeros_of;
        if (KEPT == kInt8) zeros |= (u32)(*(const u16*)(zeros_of + 8)) << 16;
    }

    // Two neighbouring rows at an input, as halves.
    __device__ u32 at(i32 half, i32 input) const {
        constexpr u32 kBase = 0x64006400u;  // 1024.0, twice: a code in the low bits makes 1024 + code
        const u32 byte = (u32)input % 4;
        u32 codes = __byte_perm(words[half].x, words[half].y, byte | (4 + byte) << 8);
        u32 zero;  // one in each of the lower bytes
        if (KEPT == kInt4) {
            codes = (input < 4 ? codes : codes >> 4) & 0x000f000fu;
            zero = (half == 0 ? zeros : zeros >> 4) & 0x0f0fu;
        } else {
            codes &= 0x00ff00ffu;
            zero = half == 0 ? zeros & 0xffffu : zeros >> 16;
        }
        const u32 offset = kBase + (zero & 0xffu) + (zero >> 8 << 16) + 0x00010001u;  // zeros are stored less one
        return multiply_pairs(subtract_halves(codes | kBase, offset), scales[half]);
    }
};

// Four inputs of four rows.
template <bool BRAIN>
struct RowWeights {
    static constexpr i32 kInputs = 4;
    Pair words[2][2];

    __device__ void load(const Matrix& matrix, i32 tile, i32 chunk, i32 column) {
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            const i32 n = least(tile * kTileRows + 2 * column + i % 2 + 8 * (i / 2), matrix.rows - 1);  // dy is 0 behind
            words[i / 2][i % 2] = load_pair(matrix.blob + (i64)n * (matrix.tile_bytes / kTileRows) + 8 * (i64)chunk);
        }
    }

    __device__ u32 at(i32 half, i32 input) const {
        const Pair(&both)[2] = words[half];
        const u32 one = input < 2 ? both[0].x : both[0].y, other = input < 2 ? both[1].x : both[1].y;
        const u32 bits = __byte_perm(one, other, input % 2 ? 0x7632 : 0x5410);
        if (!BRAIN) return bits;
        return (u32)float_to_half(brain_to_float((u16)bits)) | (u32)float_to_half(brain_to_float((u16)(bits >> 16))) << 16;
    }
};

template <>
struct Weights<kHalf> : RowWeights<false> {};
template <>
struct Weights<kBrain> : RowWeights<true> {};

// Grid: (chunks / (kWarps * kChunks), T / kTokens). Thread block: kWarps warps.
template <i32 KEPT>
MOSS_INLINE void transposed(const Matrix& matrix, const u16* codes, const float* steps, const i32* perm, float* dx,
                            i32 tokens, i32 first, i32 dy_width, i32 dx_width, i32 add) {
    constexpr i32 kInputs = Weights<KEPT>::kInputs, kPairs = kInputs / 2;
    __shared__ __align__(16) u16 dy_codes[2][kTokens * kStride];
    const i32 warp = (i32)threadIdx.x / kWarp, lane = (i32)threadIdx.x % kWarp, row = lane / 4, column = lane % 4;
    const i32 mine = ((i32)blockIdx.x * kWarps + warp) * kChunks + row, start = (i32)blockIdx.y * kTokens;
    const bool has_chunk = mine < matrix.chunks;
    const i32 chunk = has_chunk ? mine : 0, here = least(kTokens, tokens - start);
    const i32 tiles = (matrix.rows + kTileRows - 1) / kTileRows;

    const auto fetch = [&](i32 tile, i32 side) {
        for (i32 i = (i32)threadIdx.x; i < kTokens * kRows; i += kWarps * kWarp) {
            const i32 token = i / kRows, n = tile * kTileRows + i % kRows;
            const bool is_there = token < here && n < matrix.rows;
            dy_codes[side][token * kStride + i % kRows] =
                is_there ? codes[(i64)(start + token) * dy_width + first + n] : (u16)0;
        }
    };

    float total[kPairs][kEights][4] = {};
    Weights<KEPT> now, next;
    next.load(matrix, 0, chunk, column);
    fetch(0, 0);
    __syncthreads();
    for (i32 tile = 0, side = 0; tile < tiles; tile += kTiles, side ^= 1) {
        if (tile + kTiles < tiles) fetch(tile + kTiles, side ^ 1);
        for (i32 at = 0; at < least(kTiles, tiles - tile); at++) {
            now = next;
            if (tile + at + 1 < tiles) next.load(matrix, tile + at + 1, chunk, column);
#pragma unroll
            for (i32 pair = 0; pair < kPairs; pair++) {
                const u32 left[4] = {now.at(0, 2 * pair), now.at(0, 2 * pair + 1), now.at(1, 2 * pair),
                                     now.at(1, 2 * pair + 1)};
#pragma unroll
                for (i32 eight = 0; eight < kEights; eight++) {
                    const u16* from = dy_codes[side] + (8 * eight + row) * kStride + at * kTileRows + 2 * column;
                    const u32 right[2] = {*(const u32*)from, *(const u32*)(from + 8)};
                    multiply_halves(total[pair][eight], left, right);
                }
            }
        }
        __syncthreads();
    }
    if (!has_chunk) return;
#pragma unroll
    for (i32 pair = 0; pair < kPairs; pair++)
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            const i32 p = chunk * kInputs + 2 * pair + i / 2, k = perm ? perm[p] : p;
            if (k < 0) continue;
#pragma unroll
            for (i32 eight = 0; eight < kEights; eight++) {
                const i32 token = 8 * eight + 2 * column + i % 2;
                if (token >= here) continue;
                const float value = total[pair][eight][i] * steps[start + token];
                float* to = dx + (i64)(start + token) * dx_width + k;
                *to = add ? *to + value : value;
            }
        }
}

// blob: from the first tile or row on, rows [first, first + rows) of the matrix. codes, steps: of dy, (T, dy_width), as
// halve_tokens leaves them. perm: which input a position is, -1 for none; null where they are in order.
#define MOSS_TRANSPOSED(name, KEPT)                                                                                    \
    MOSS_KERNEL(name)                                                                                                  \
    (const u8* blob, const u16* codes, const float* steps, const i32* perm, float* dx, i32 tokens, i32 rows, i32 first, \
     i32 tile_bytes, i32 scales_at, i32 zeros_at, i32 chunks, i32 group_chunks, i32 dy_width, i32 dx_width, i32 add) { \
        transposed<KEPT>(Matrix{blob, rows, tile_bytes, scales_at, zeros_at, chunks, group_chunks}, codes, steps,      \
                         perm, dx, tokens, first, dy_width, dx_width, add);                                            \
    }
MOSS_TRANSPOSED(transposed_int4, kInt4)
MOSS_TRANSPOSED(transposed_int8, kInt8)
MOSS_TRANSPOSED(transposed_float16, kHalf)
MOSS_TRANSPOSED(transposed_bfloat16, kBrain)
