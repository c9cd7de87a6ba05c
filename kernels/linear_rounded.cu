// y = x W^T + bias, W in int4 or int8 tiles or in rows of 16-bit numbers (moss_jt/layout.py), x rounded to int8 or to half
// (rounding.cu); rows with x in half only:
//
//   int8: y[t, n] = sum over blocks of float(sum of code * x - zero * sum of x) * (scale * step)
//   half: y[t, n] = sum over blocks of (sum of (code - zero) * x) * (scale * step)
//   rows: y[t, n] = sum over blocks of (sum of w * x) * step; inputs must be a multiple of 8
//
// The codes as they lie in a tile are the left side of a tensor core's product of bytes: four bytes of a row belong
// to neighbouring inputs. For halves they become halves: a code in the low bits of 1024.0 makes 1024 + code, and the zero
// point is taken off with the 1024, exactly. A lane reads 8 bytes, which are two rows of one chunk, so the rows of the
// product are not in the order of the tile: row r of the product is row 2r, row r + 8 is row 2r + 1; 16 rows of 16-bit
// numbers make a tile likewise, of which a lane reads 16 bytes of each. Tokens are the columns of the product, and 8 of
// them cost what one costs.
//
// The blocks fall into kWarps classes, by their number; those of a class are added up in their order, and then the
// classes. For up to 16 tokens a warp takes a class of one tile; for more it takes all, one after the other. So the bits
// depend on nothing but the matrix and the token's own input. Weights of the next block are on their way while one is
// multiplied.

constexpr i32 kTileRows = 16;
constexpr i32 kWarps = 8;
constexpr i32 kLargestHalf = 14;  // exponent of the largest magnitude as half
constexpr i32 kSteps8 = 8;  // loads of 8 bytes that a lane has under way for a block of 128 inputs: int8; int4 half

struct Pair {
    u32 x, y;
};

MOSS_INLINE Pair load_pair(const u8* from) {
    const uint2 words = *(const uint2*)from;
    return {words.x, words.y};
}

// How a matrix is kept: by its bits in tiles, or in rows of floating-point numbers.
enum Kept { kInt4 = 4, kInt8 = 8, kHalf, kBrain };

// Rows that a kernel makes: a tile after the other, and 16 rows of floating-point numbers likewise.
struct Matrix {
    const u8* blob;
    i32 rows, tile_bytes, scales_at, zeros_at;
};

// What a warp needs of one block of 16 rows, and what it makes of that.
template <i32 KEPT>
struct Weights {
    static constexpr i32 kSteps = KEPT == kInt8 ? kSteps8 : kSteps8 / 2;
    Pair words[kSteps];  // of chunk (4 * step + column): rows 2 * row and the next
    u32 scales;          // of these rows, two halves
    u32 zeros;           // as stored, one in each of the lower bytes

    __device__ void load(const Matrix& matrix, i32 index, const Block& b, i32 row, i32 column) {
        const u8* tile = matrix.blob + (i64)index * matrix.tile_bytes;
        const i32 first = b.start * KEPT / 32, end = (b.start + b.size) * KEPT / 32;
#pragma unroll
        for (i32 step = 0; step < kSteps; step++) {
            const i32 chunk = first + 4 * step + column;
            words[step] = Pair{0, 0};
            if (chunk < end) words[step] = load_pair(tile + (i64)chunk * 64 + row * 8);
        }
        scales = *(const u32*)(tile + matrix.scales_at + b.group * 32 + row * 4);
        if (KEPT == kInt8) {
            zeros = *(const u16*)(tile + matrix.zeros_at + b.group * 16 + row * 2);
        } else {
            const u32 both = *(const u16*)(tile + matrix.zeros_at + b.group * 8 + row % 4 * 2);
            zeros = (row < 4 ? both : both >> 4) & 0x0f0fu;
        }
    }

    __device__ void settle() {}
};

// Eight inputs of two rows for each 32 of a block, which has up to 64 here: they are twice as large as int8. In `settle` they take the order in which rounding.cu leaves its codes.
// bfloat16 becomes half by a power of two for each row and block, its largest magnitude to 2^14: exact for all that is not
// smaller than this by 2^31, where a half has fewer bits and the sum no use for them.
template <bool BRAIN>
struct RowWeights {
    static constexpr i32 kSteps = 2;
    u32 words[kSteps][2][4];
    float scale[2];

    __device__ void load(const Matrix& matrix, i32 index, const Block& b, i32 row, i32 column) {
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            const i32 n = least(index * kTileRows + 2 * row + i, matrix.rows - 1);  // the last one again past the end
            const u8* from = matrix.blob + (i64)n * (matrix.tile_bytes / kTileRows) + 2 * b.start;
#pragma unroll
            for (i32 step = 0; step < kSteps; step++) {
                const i32 at = 32 * step + 8 * column;
                uint4 read = {0, 0, 0, 0};
                if (at < b.size) read = *(const uint4*)(from + 2 * at);
                words[step][i][0] = read.x, words[step][i][1] = read.y;
                words[step][i][2] = read.z, words[step][i][3] = read.w;
            }
        }
    }

    __device__ void settle() {
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            scale[i] = 1.0f;
            if constexpr (BRAIN) make_halves(i);
#pragma unroll
            for (i32 step = 0; step < kSteps; step++)
#pragma unroll
                for (i32 at = 0; at < 4; at += 2) {
                    const u32 one = words[step][i][at], other = words[step][i][at + 1];
                    words[step][i][at] = __byte_perm(one, other, 0x5410);
                    words[step][i][at + 1] = __byte_perm(one, other, 0x7632);
                }
        }
    }

    __device__ void make_halves(i32 i) {
        i32 largest = 0;  // magnitude, as bits: in the order of the magnitudes
#pragma unroll
        for (i32 at = 0; at < 4 * kSteps; at++) {
            const u32 word = words[at / 4][i][at % 4];
            const i32 low = (i32)(word & 0x7fffu), high = (i32)(word >> 16 & 0x7fffu), more = low > high ? low : high;
            largest = more > largest ? more : largest;
        }
#pragma unroll
        for (i32 apart = 1; apart < 4; apart *= 2) {
            const i32 other = __shfl_xor_sync(kAll, largest, apart);
            largest = other > largest ? other : largest;
        }
        const bool finite = largest < 0x7f80;
        const i32 wanted = (largest >> 7) - kLargestHalf, exponent = wanted < 1 ? 1 : wanted;  // as it is stored
        const float inverse = __int_as_float((254 - exponent) << 23);
        scale[i] = finite ? __int_as_float(exponent << 23) : __int_as_float(0x7fc00000);
#pragma unroll
        for (i32 at = 0; at < 4 * kSteps; at++) {
            u32& word = words[at / 4][i][at % 4];
            const float low = brain_to_float((u16)word), high = brain_to_float((u16)(word >> 16));
            const u32 first = float_to_half(__fmul_rn(low, inverse)), second = float_to_half(__fmul_rn(high, inverse));
            word = finite ? first | second << 16 : 0;
        }
    }
};

template <>
struct Weights<kHalf> : RowWeights<false> {};
template <>
struct Weights<kBrain> : RowWeights<true> {};

// Scales and zero points of a lane's two rows.
template <i32 KEPT>
struct Steps {
    float scale[2];
    i32 zero[2];

    __device__ explicit Steps(const Weights<KEPT>& w)
        : scale{half_to_float((u16)w.scales), half_to_float((u16)(w.scales >> 16))},
          zero{(i32)(w.zeros & 0xffu) + 1, (i32)(w.zeros >> 8 & 0xffu) + 1} {}
};

struct RowSteps {
    float scale[2];
    i32 zero[2];

    template <bool BRAIN>
    __device__ explicit RowSteps(const RowWeights<BRAIN>& w) : scale{w.scale[0], w.scale[1]}, zero{0, 0} {}
};

template <>
struct Steps<kHalf> : RowSteps {
    using RowSteps::RowSteps;
};
template <>
struct Steps<kBrain> : RowSteps {
    using RowSteps::RowSteps;
};

// What the two ways to round x do with a block: the sums of a lane for 8 tokens, and what a sum adds to the total.
// `x` are the block's codes of the lane's token, null for none.
template <i32 KEPT>
struct Bytes {
    static constexpr i32 kEach = 1;                         // bytes of an input
    static constexpr i32 kWords = 32;                       // of the inputs of a block
    static constexpr i32 kStride = KEPT == 4 ? 160 : 144;  // bytes from token to token: no two lanes meet in a bank
    typedef i32 Sum;

    static __device__ void multiply(const Weights<KEPT>& w, const Steps<KEPT>&, const u8* x, i32 size, i32 column,
                                    Sum (&sum)[4]) {
        constexpr i32 kInputs = 32 / KEPT;
        if (KEPT == 4) {
#pragma unroll
            for (i32 step = 0; step < Weights<KEPT>::kSteps; step++) {
                const i32 at = (4 * step + column) * kInputs;
                const u32 low = 0x0f0f0f0fu;
                const u32 left[4] = {w.words[step].x & low, w.words[step].y & low, w.words[step].x >> 4 & low,
                                     w.words[step].y >> 4 & low};
                Pair here = {0, 0};
                if (x && at < size) here = load_pair(x + at);
                const u32 right[2] = {here.x, here.y};
                multiply_bytes(sum, left, right);
            }
        } else {
#pragma unroll
            for (i32 step = 0; step < Weights<KEPT>::kSteps; step += 2) {
                const i32 at = (4 * step + column) * kInputs, later = at + 4 * kInputs;
                const u32 left[4] = {w.words[step].x, w.words[step].y, w.words[step + 1].x, w.words[step + 1].y};
                const u32 right[2] = {x && at < size ? *(const u32*)(x + at) : 0,
                                      x && later < size ? *(const u32*)(x + later) : 0};
                multiply_bytes(sum, left, right);
            }
        }
    }

    static __device__ float part(Sum sum, i32 zero, float scale, i32 sum_of_x, float step) {
        return __fmul_rn((float)(sum - zero * sum_of_x), __fmul_rn(scale, step));
    }
};

template <i32 KEPT>
struct Halves {
    static constexpr i32 kEach = 2, kWords = 64;
    static constexpr i32 kStride = KEPT == 4 ? 320 : 288;
    static constexpr u32 kBase = 0x64006400u;  // 1024.0, twice
    typedef float Sum;

    // Four codes of a word as halves: the first and the third, the second and the fourth.
    static __device__ Pair widen(u32 word, i32 half, u32 offset) {
        const u32 first = KEPT == 4 ? word >> 4 * half & 0x000f000fu | kBase : __byte_perm(word, kBase, 0x5250);
        const u32 second = KEPT == 4 ? word >> (8 + 4 * half) & 0x000f000fu | kBase : __byte_perm(word, kBase, 0x5351);
        return {subtract_halves(first, offset), subtract_halves(second, offset)};
    }

    static __device__ void load_inputs(const u8* from, Pair (&inputs)[2]) {  // as many as a word has codes
        if (KEPT == 4) {
            const uint4 words = *(const uint4*)from;
            inputs[0] = {words.x, words.y};
            inputs[1] = {words.z, words.w};
        } else {
            inputs[0] = load_pair(from);
        }
    }

    static __device__ void multiply(const Weights<KEPT>& w, const Steps<KEPT>& s, const u8* x, i32 size, i32 column,
                                    Sum (&sum)[4]) {
        constexpr i32 kInputs = 32 / KEPT;
        const u32 offset[2] = {kBase + (u32)s.zero[0] * 0x00010001u, kBase + (u32)s.zero[1] * 0x00010001u};
#pragma unroll
        for (i32 step = 0; step < Weights<KEPT>::kSteps; step++) {
            const i32 at = (4 * step + column) * kInputs;
            Pair here[2] = {};
            if (x && at < size) load_inputs(x + 2 * at, here);
#pragma unroll
            for (i32 half = 0; half < kInputs / 4; half++) {
                const Pair upper = widen(w.words[step].x, half, offset[0]), lower = widen(w.words[step].y, half, offset[1]);
                const u32 left[4] = {upper.x, lower.x, upper.y, lower.y}, right[2] = {here[half].x, here[half].y};
                multiply_halves(sum, left, right);
            }
        }
    }

    static __device__ float part(Sum sum, i32, float scale, i32, float step) {
        return __fmul_rn(sum, __fmul_rn(scale, step));
    }
};

// Rows of floating-point numbers that are halves by now, with inputs that are halves.
template <i32 KEPT>
struct RowHalves {
    static constexpr i32 kEach = 2, kWords = 32;
    static constexpr i32 kStride = 192;
    typedef float Sum;

    static __device__ void multiply(const Weights<KEPT>& w, const Steps<KEPT>&, const u8* x, i32 size, i32 column,
                                    Sum (&sum)[4]) {
#pragma unroll
        for (i32 step = 0; step < Weights<KEPT>::kSteps; step++) {
            const i32 at = 32 * step + 8 * column;
            uint4 here = {0, 0, 0, 0};
            if (x && at < size) here = *(const uint4*)(x + 2 * at);
            const u32 right[2][2] = {{here.x, here.y}, {here.z, here.w}};
            const u32(&upper)[4] = w.words[step][0];
            const u32(&lower)[4] = w.words[step][1];
#pragma unroll
            for (i32 i = 0; i < 2; i++) {
                const u32 left[4] = {upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]};
                multiply_halves(sum, left, right[i]);
            }
        }
    }

    static __device__ float part(Sum sum, i32, float scale, i32, float step) {
        return __fmul_rn(sum, __fmul_rn(scale, step));
    }
};

// Few tokens. Grid: tiles. Thread block: kWarps warps.
template <i32 KEPT, template <i32> class Inputs, i32 EIGHTS>
MOSS_INLINE void linear_few(const Matrix& matrix, const u8* codes, const float* steps, const i32* sums, const float* bias,
                            float* y, i32 tokens, i32 first, const Blocks& blocks, i32 y_stride, i32 add) {
    const i32 warp = (i32)threadIdx.x / kWarp, lane = (i32)threadIdx.x % kWarp, row = lane / 4, column = lane % 4;
    const i32 tile = (i32)blockIdx.x, count = blocks.count();
    float total[EIGHTS][4] = {};
    Weights<KEPT> now, next;
    if (warp < count) next.load(matrix, tile, blocks.at(warp), row, column);
    for (i32 index = warp; index < count; index += kWarps) {
        const Block b = blocks.at(index);
        now = next;
        if (index + kWarps < count) next.load(matrix, tile, blocks.at(index + kWarps), row, column);
        now.settle();
        const Steps<KEPT> w(now);
#pragma unroll
        for (i32 eight = 0; eight < EIGHTS; eight++) {
            const i32 token = 8 * eight + row;
            const u8* x = codes + ((i64)token * blocks.padded_in + b.start) * Inputs<KEPT>::kEach;
            typename Inputs<KEPT>::Sum sum[4] = {};
            Inputs<KEPT>::multiply(now, w, token < tokens ? x : nullptr, b.size, column, sum);
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
                const i32 of = least(8 * eight + 2 * column + i % 2, tokens - 1);
                const i64 at = (i64)index * tokens + of;
                const i32 sum_of_x = Inputs<KEPT>::kEach == 1 ? sums[at] : 0;
                total[eight][i] += Inputs<KEPT>::part(sum[i], w.zero[i / 2], w.scale[i / 2], sum_of_x, steps[at]);
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
        const i32 token = i / kTileRows, r = i % kTileRows, n = tile * kTileRows + r;
        if (n >= matrix.rows) continue;
        float value = 0.0f;
        for (i32 from = 0; from < least(kWarps, count); from++) value += part[from][token][r];
        if (bias) value += bias[first + n];
        float* to = y + (i64)token * y_stride + first + n;
        *to = add ? *to + value : value;
    }
}

constexpr i32 kManyEights = 8, kMany = 8 * kManyEights;  // tokens of a thread block

// Many tokens. Grid: (tokens / kMany, tiles / kWarps), so that those who read the same weights run at the same time. Thread
// block: kWarps warps, a tile each; they share the codes of x.
template <i32 KEPT, template <i32> class Inputs>
MOSS_INLINE void linear_many(const Matrix& matrix, const u8* codes, const float* steps, const i32* sums, const float* bias,
                             float* y, i32 tokens, i32 first, const Blocks& blocks, i32 y_stride, i32 add) {
    constexpr i32 kStride = Inputs<KEPT>::kStride, kEach = Inputs<KEPT>::kEach;
    __shared__ __align__(16) u8 near_codes[2][kMany * kStride];
    __shared__ float near_steps[2][kMany];
    __shared__ i32 near_sums[2][kMany];
    const i32 warp = (i32)threadIdx.x / kWarp, lane = (i32)threadIdx.x % kWarp, row = lane / 4, column = lane % 4;
    const i32 tile_index = (i32)blockIdx.y * kWarps + warp, start = (i32)blockIdx.x * kMany;
    const bool has_tile = tile_index * kTileRows < matrix.rows;
    const i32 tile = has_tile ? tile_index : 0;
    const i32 here = least(kMany, tokens - start), count = blocks.count(), classes = least(kWarps, count);

    const auto fetch = [&](i32 index, i32 to) {
        const Block b = blocks.at(index);
        constexpr i32 kWords = Inputs<KEPT>::kWords;
        for (i32 i = (i32)threadIdx.x; i < kMany * kWords; i += kWarps * kWarp) {
            const i32 token = i / kWords, at = i % kWords * 4;
            const bool is_there = token < here && at < b.size * kEach;
            const u8* from = codes + ((i64)(start + token) * blocks.padded_in + b.start) * kEach + at;
            *(u32*)(near_codes[to] + token * kStride + at) = is_there ? *(const u32*)from : 0;
        }
        for (i32 token = (i32)threadIdx.x; token < kMany; token += kWarps * kWarp) {
            const i64 at = (i64)index * tokens + start + token;
            near_steps[to][token] = token < here ? steps[at] : 0.0f;
            near_sums[to][token] = kEach == 1 && token < here ? sums[at] : 0;
        }
    };
    const auto after = [&](i32 index) {  // block by block of a class, then the next class; -1 at the end
        if (index + kWarps < count) return index + kWarps;
        return index % kWarps + 1 < classes ? index % kWarps + 1 : -1;
    };

    float total[kManyEights][4] = {}, part[kManyEights][4] = {};
    Weights<KEPT> now, next;
    next.load(matrix, tile, blocks.at(0), row, column);
    fetch(0, 0);
    __syncthreads();
    i32 side = 0;
    for (i32 index = 0; index >= 0; side ^= 1) {
        const i32 later = after(index);
        now = next;
        if (later >= 0) {
            next.load(matrix, tile, blocks.at(later), row, column);
            fetch(later, side ^ 1);
        }
        now.settle();
        const Steps<KEPT> w(now);
        const i32 size = blocks.at(index).size;
#pragma unroll
        for (i32 eight = 0; eight < kManyEights; eight++) {
            typename Inputs<KEPT>::Sum sum[4] = {};
            Inputs<KEPT>::multiply(now, w, near_codes[side] + (8 * eight + row) * kStride, size, column, sum);
#pragma unroll
            for (i32 i = 0; i < 4; i++) {
                const i32 of = 8 * eight + 2 * column + i % 2;
                part[eight][i] += Inputs<KEPT>::part(sum[i], w.zero[i / 2], w.scale[i / 2], near_sums[side][of],
                                                     near_steps[side][of]);
            }
        }
        if (later < 0 || later % kWarps != index % kWarps) {  // the class is through
#pragma unroll
            for (i32 eight = 0; eight < kManyEights; eight++)
#pragma unroll
                for (i32 i = 0; i < 4; i++) {
                    total[eight][i] += part[eight][i];
                    part[eight][i] = 0.0f;
                }
        }
        index = later;
        __syncthreads();
    }
#pragma unroll
    for (i32 eight = 0; eight < kManyEights; eight++)
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            const i32 token = 8 * eight + 2 * column + i % 2, n = tile_index * kTileRows + 2 * row + i / 2;
            if (!has_tile || token >= here || n >= matrix.rows) continue;
            const float value = bias ? total[eight][i] + bias[first + n] : total[eight][i];
            float* to = y + (i64)(start + token) * y_stride + first + n;
            *to = add ? *to + value : value;
        }
}

// blob: from the first tile on. y, (T, y_stride), and bias: of the whole matrix; rows [first, first + rows) are made.
#define MOSS_LINEAR(name, CALL)                                                                                        \
    MOSS_KERNEL(name)                                                                                                  \
    (const u8* blob, const u8* codes, const float* steps, const i32* sums, const float* bias, float* y, i32 tokens,    \
     i32 rows, i32 first, i32 tile_bytes, i32 scales_at, i32 zeros_at, i32 padded_in, i32 padded_group, i32 block,     \
     i32 y_stride, i32 add) {                                                                                          \
        CALL(Matrix{blob, rows, tile_bytes, scales_at, zeros_at}, codes, steps, sums, bias, y, tokens, first,          \
             Blocks{padded_in, padded_group, block}, y_stride, add);                                                   \
    }
MOSS_LINEAR(bytes_int4_8, (linear_few<kInt4, Bytes, 1>))
MOSS_LINEAR(bytes_int4_16, (linear_few<kInt4, Bytes, 2>))
MOSS_LINEAR(bytes_int4_many, (linear_many<kInt4, Bytes>))
MOSS_LINEAR(bytes_int8_8, (linear_few<kInt8, Bytes, 1>))
MOSS_LINEAR(bytes_int8_16, (linear_few<kInt8, Bytes, 2>))
MOSS_LINEAR(bytes_int8_many, (linear_many<kInt8, Bytes>))
MOSS_LINEAR(halves_int4_8, (linear_few<kInt4, Halves, 1>))
MOSS_LINEAR(halves_int4_16, (linear_few<kInt4, Halves, 2>))
MOSS_LINEAR(halves_int4_many, (linear_many<kInt4, Halves>))
MOSS_LINEAR(halves_int8_8, (linear_few<kInt8, Halves, 1>))
MOSS_LINEAR(halves_int8_16, (linear_few<kInt8, Halves, 2>))
MOSS_LINEAR(halves_int8_many, (linear_many<kInt8, Halves>))
MOSS_LINEAR(halves_float16_8, (linear_few<kHalf, RowHalves, 1>))
MOSS_LINEAR(halves_float16_16, (linear_few<kHalf, RowHalves, 2>))
MOSS_LINEAR(halves_float16_many, (linear_many<kHalf, RowHalves>))
MOSS_LINEAR(halves_bfloat16_8, (linear_few<kBrain, RowHalves, 1>))
MOSS_LINEAR(halves_bfloat16_16, (linear_few<kBrain, RowHalves, 2>))
MOSS_LINEAR(halves_bfloat16_many, (linear_many<kBrain, RowHalves>))
