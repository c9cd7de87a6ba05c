// One stretch of attention for up to 32 tokens of a sequence at once, on tensor cores: for keys and values in half or int8.
// It does what `attend` of attention.cu does, with queries and weights rounded to half, and leaves the same parts for
// `merge`; a pass of many tokens reads keys and values once a tile instead of once a token.
//
//   tiles  (tiles, 2) int32: the first token of a tile and how many there are; tokens of one slot at neighbouring positions
//   the rest as in attention.cu
//
// Scores: keys are the left side of the product, 16 positions of a warp, and queries its columns, 8 tokens. Values: a warp
// takes 32 channels, which are the rows of the product, over all positions; weights are its columns. Both read the cache
// straight into registers, 64 neighbouring bytes of a row together, as positions and channels may stand in a product in
// any order, if only both sides have the same. Queries and weights lie in shared memory, in half.
//
// Rounding: queries by a power of two for each token and head, the largest magnitude to 2^14; weights, 1 at most, times
// 2^14. int8: 32 channels share a step. For keys it multiplies the sum over these channels. For values it goes to the
// weights, with a power of two that brings the largest step which the token sees to 1, so nothing is lost of small ones.
//
// Columns of a product do not meet, sums go over the warps in their order, and what a token may not see has the weight 0
// and reaches nothing else of it. So the bits depend on nothing but the token's own sequence: not on the tile it is in,
// nor on how many go together. What is not finite in a value is left out of the product where some token of the tile must
// not see it, since 0 times that is no number, and told to the others afterwards.
//
// Widths: up to 256, a multiple of 8; rows of int8 must be a multiple of 4 bytes long.

constexpr i32 kWarps = 8;
constexpr i32 kBlock = Cache::kBlock, kStretch = Cache::kStretch;
constexpr i32 kUnit = 32;                           // channels that are read together; of int8 they share a step
constexpr i32 kGroups = kStretch / (16 * kWarps);  // of 16 positions, whose scores a warp makes
constexpr i32 kStride = 288;                        // halves from token to token in shared memory: no two lanes meet in a bank
constexpr i32 kLargestHalf = 14;                    // exponent of the largest magnitude as half
constexpr float kWeightSize = 16384.0f, kWeightStep = 1.0f / 16384.0f;
constexpr i32 kNever = 1 << 30;  // a position

MOSS_INLINE float infinity() { return __int_as_float(0x7f800000); }
MOSS_INLINE float not_a_number() { return __int_as_float(0x7fc00000); }

MOSS_INLINE u32 two_halves(float low, float high) { return (u32)float_to_half(low) | (u32)float_to_half(high) << 16; }

MOSS_INLINE i32 magnitude(float value) { return __float_as_int(value) & 0x7fffffff; }

// Four signed bytes as halves, exactly: a code and 128 in the low bits of 1024.0, then 1152 taken off.
MOSS_INLINE void widen(u32 codes, u32& first, u32& second) {
    const u32 offset = 0x64806480u;
    first = subtract_halves(__byte_perm(codes ^ 0x80808080u, 0x64646464u, 0x4140), offset);
    second = subtract_halves(__byte_perm(codes ^ 0x80808080u, 0x64646464u, 0x4342), offset);
}

// Where a tile stands, and what its tokens see of the stretch.
struct Tile {
    i32 start, here, first, at;  // first token, how many; first position of the stretch, position of the first token

    // Positions of the stretch that a token of the tile sees: none if not above 0, all from kStretch on.
    __device__ i32 seen(i32 token) const { return token < here ? at + token + 1 - first : 0; }
    __device__ i32 count() const { return least(seen(here - 1), kStretch); }
};

// Of each warp's part of a tile, for all its tokens.
template <i32 EIGHTS>
struct Near {
    u16 queries[8 * EIGHTS][kStride];
    u16 weights[8 * EIGHTS][kStride];
    float scales[8 * EIGHTS];  // of scores
    float tops[kWarps][8 * EIGHTS];
    float totals[kWarps][8 * EIGHTS];
    i32 steps[kWarps][8 * EIGHTS];  // exponent of the largest step of int8 values, of the warp's channels
};

// Queries to half, zeros behind their end; a warp takes every kWarps-th token, a lane eight channels.
template <i32 EIGHTS>
MOSS_INLINE void round_queries(Near<EIGHTS>& near, const float* queries, const Tile& tile, i32 head, i32 heads, i32 width,
                               i32 warp, i32 lane) {
    for (i32 token = warp; token < 8 * EIGHTS; token += kWarps) {
        float each[8] = {};
        i32 largest = 0;
        if (token < tile.here && 8 * lane < width) {
            const float4* from = (const float4*)(queries + ((i64)(tile.start + token) * heads + head) * width + 8 * lane);
            const float4 low = from[0], high = from[1];
            const float read[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (i32 i = 0; i < 8; i++) {
                each[i] = read[i];
                largest = magnitude(read[i]) > largest ? magnitude(read[i]) : largest;
            }
        }
        largest = warp_max(largest);
        const bool finite = largest < 0x7f800000;
        const i32 wanted = (largest >> 23) - kLargestHalf, exponent = wanted < 1 ? 1 : wanted;  // as it is stored
        const float inverse = finite ? __int_as_float((254 - exponent) << 23) : 0.0f;
        u32 words[4];
#pragma unroll
        for (i32 i = 0; i < 4; i++)
            words[i] = finite ? two_halves(__fmul_rn(each[2 * i], inverse), __fmul_rn(each[2 * i + 1], inverse)) : 0;
        *(uint4*)(near.queries[token] + 8 * lane) = {words[0], words[1], words[2], words[3]};
        if (lane == 0) {
            const float step = finite ? __int_as_float(exponent << 23) : not_a_number();
            near.scales[token] = __fdiv_rn(step, sqrtf((float)width));
        }
    }
}

// Eight neighbouring channels of two key rows for each group of a warp; zeros where there is nothing. Steps go to sums, so
// a lane needs them also where it has no channels.
template <bool CODES>
struct Keys {
    u32 words[kGroups][2][4];
    float steps[kGroups][2];

    __device__ void load(const u8* const (&rows)[kGroups][2], i32 unit, i32 column, i32 width, i32 row_bytes) {
        const i32 d = kUnit * unit + 8 * column;
#pragma unroll
        for (i32 group = 0; group < kGroups; group++)
#pragma unroll
            for (i32 i = 0; i < 2; i++) {
                const u8* row = rows[group][i];
                const bool has_channels = row && d < width;
                u32(&to)[4] = words[group][i];
                if constexpr (!CODES) {
                    uint4 read = {0, 0, 0, 0};
                    if (has_channels) read = *(const uint4*)(row + 2 * d);
                    to[0] = read.x, to[1] = read.y, to[2] = read.z, to[3] = read.w;
                } else {
                    uint2 read = {0, 0};
                    if (has_channels && row_bytes % 8 == 0) {
                        read = *(const uint2*)(row + d);
                    } else if (has_channels) {
                        read = {*(const u32*)(row + d), *(const u32*)(row + d + 4)};
                    }
                    to[0] = read.x, to[1] = read.y;
                    steps[group][i] = row ? brain_to_float(*(const u16*)(row + width + 2 * unit)) : 0.0f;
                }
            }
    }

    // As halves, where they are codes.
    __device__ void settle() {
        if constexpr (CODES) {
#pragma unroll
            for (i32 group = 0; group < kGroups; group++)
#pragma unroll
                for (i32 i = 0; i < 2; i++) {
                    u32(&to)[4] = words[group][i];
                    const u32 low = to[0], high = to[1];
                    widen(low, to[0], to[1]);
                    widen(high, to[2], to[3]);
                }
        }
    }
};

// The lane's scores: of positions 16 * (warp + kWarps * group) + 2 * row and the next, for tokens 8 * eight + 2 * column
// and the next; d[0] and d[1] belong to the first position.
template <i32 EIGHTS, bool CODES>
MOSS_INLINE void make_scores(float (&scores)[kGroups][EIGHTS][4], const Near<EIGHTS>& near, const Cache& cache,
                             const Tile& tile, i32 keys_at, i32 slot, i32 head, i32 warp, i32 row, i32 column) {
    const u8* rows[kGroups][2];
#pragma unroll
    for (i32 group = 0; group < kGroups; group++)
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            const i32 p = 16 * (warp + kWarps * group) + 2 * row + i;
            rows[group][i] = p < tile.count() ? cache.row(keys_at, slot, head, tile.first + p) : nullptr;
        }
    const i32 units = (cache.width + kUnit - 1) / kUnit;
    Keys<CODES> now, next;
    next.load(rows, 0, column, cache.width, cache.row_bytes);
    for (i32 unit = 0; unit < units; unit++) {
        now = next;
        if (unit + 1 < units) next.load(rows, unit + 1, column, cache.width, cache.row_bytes);
        now.settle();
#pragma unroll
        for (i32 eight = 0; eight < EIGHTS; eight++) {
            if (8 * eight >= tile.here) break;
            const uint4 query = *(const uint4*)(near.queries[8 * eight + row] + kUnit * unit + 8 * column);
            const u32 right[2][2] = {{query.x, query.y}, {query.z, query.w}};
#pragma unroll
            for (i32 group = 0; group < kGroups; group++) {
                if (16 * (warp + kWarps * group) >= tile.count()) break;
                float sums[4] = {};
                float(&score)[4] = scores[group][eight];
#pragma unroll
                for (i32 part = 0; part < 2; part++) {
                    const u32(&upper)[4] = now.words[group][0];
                    const u32(&lower)[4] = now.words[group][1];
                    const u32 left[4] = {upper[2 * part], lower[2 * part], upper[2 * part + 1], lower[2 * part + 1]};
                    multiply_halves(CODES ? sums : score, left, right[part]);
                }
                if constexpr (CODES) {
#pragma unroll
                    for (i32 i = 0; i < 4; i++)
                        score[i] = __fadd_rn(score[i], __fmul_rn(sums[i], now.steps[group][i / 2]));
                }
            }
        }
    }
}

// Scores become weights: halves in shared memory; their largest score and their sum of a warp for every token.
template <i32 EIGHTS>
MOSS_INLINE void make_weights(float (&scores)[kGroups][EIGHTS][4], Near<EIGHTS>& near, const Tile& tile, i32 warp, i32 row,
                              i32 column) {
#pragma unroll
    for (i32 eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            const i32 token = 8 * eight + 2 * column + i;
            float top = -infinity();
#pragma unroll
            for (i32 group = 0; group < kGroups; group++)
#pragma unroll
                for (i32 j = 0; j < 2; j++) {
                    const i32 p = 16 * (warp + kWarps * group) + 2 * row + j;
                    float& score = scores[group][eight][2 * j + i];
                    score = __fmul_rn(score, near.scales[token]);
                    if (p < tile.seen(token)) top = fmaxf(top, score);
                }
            for (i32 apart = 4; apart < kWarp; apart *= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, apart));
            if (row == 0) near.tops[warp][token] = top;
        }
    __syncthreads();
#pragma unroll
    for (i32 eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            const i32 token = 8 * eight + 2 * column + i;
            float top = near.tops[0][token], total = 0.0f;
            for (i32 from = 1; from < kWarps; from++) top = fmaxf(top, near.tops[from][token]);
#pragma unroll
            for (i32 group = 0; group < kGroups; group++) {
                const i32 p = 16 * (warp + kWarps * group) + 2 * row;
                float weight[2];
#pragma unroll
                for (i32 j = 0; j < 2; j++) {
                    weight[j] = p + j < tile.seen(token) ? __expf(scores[group][eight][2 * j + i] - top) : 0.0f;
                    total += weight[j];
                }
                *(u32*)(near.weights[token] + p) = two_halves(weight[0] * kWeightSize, weight[1] * kWeightSize);
            }
            for (i32 apart = 4; apart < kWarp; apart *= 2) total += __shfl_xor_sync(kAll, total, apart);
            if (row == 0) near.totals[warp][token] = total;
        }
    __syncthreads();
}

// Four neighbouring channels at eight neighbouring positions; zeros where there is nothing. Steps go to weights, so a lane
// needs them also where it has no channels.
template <bool CODES>
struct Values {
    u32 words[8][2];
    float steps[8];

    __device__ void load(const Cache& cache, const u8* block, i32 p, i32 count, i32 d) {
#pragma unroll
        for (i32 i = 0; i < 8; i++) {
            const u8* row = block + (i64)(p + i) % kBlock * cache.row_bytes;
            const bool is_there = p + i < count, has_channels = is_there && d < cache.width;
            words[i][0] = words[i][1] = 0;
            if constexpr (!CODES) {
                uint2 read = {0, 0};
                if (has_channels) read = *(const uint2*)(row + 2 * d);
                words[i][0] = read.x, words[i][1] = read.y;
            } else {
                if (has_channels) words[i][0] = *(const u32*)(row + d);
                steps[i] = is_there ? brain_to_float(*(const u16*)(row + cache.width + d / kUnit * 2)) : 0.0f;
            }
        }
    }

    // Halves that are no finite numbers become 0; `lost` keeps the first position of one, for each channel.
    __device__ void drop_lost(i32 p, i32 (&lost)[4]) {
#pragma unroll
        for (i32 i = 0; i < 8; i++)
#pragma unroll
            for (i32 j = 0; j < 4; j++) {
                const u32 exponent = j % 2 ? 0x7c000000u : 0x7c00u, others = j % 2 ? 0xffffu : 0xffff0000u;
                if ((words[i][j / 2] & exponent) != exponent) continue;
                words[i][j / 2] &= others;
                lost[j] = least(lost[j], p + i);
            }
    }

    // The left side for two of the channels, [2 * pair, 2 * pair + 1], at positions 4 * part to 4 * part + 3.
    __device__ void left(i32 part, i32 pair, u32 (&to)[4]) const {
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            const u32(&one)[2] = words[4 * part + 2 * i];
            const u32(&other)[2] = words[4 * part + 2 * i + 1];
            if constexpr (CODES) {
                widen(__byte_perm(one[0], other[0], pair ? 0x7362 : 0x5140), to[2 * i], to[2 * i + 1]);
            } else {
                to[2 * i] = __byte_perm(one[pair], other[pair], 0x5410);
                to[2 * i + 1] = __byte_perm(one[pair], other[pair], 0x7632);
            }
        }
    }
};

// The exponent of the largest step of a warp's channels that each token sees, at least 1, below that of infinity.
template <i32 EIGHTS>
MOSS_INLINE void find_steps(Near<EIGHTS>& near, const Cache& cache, const Tile& tile, i32 values_at, i32 slot, i32 head,
                            i32 warp, i32 lane) {
    i32 mine[kStretch / kWarp];
#pragma unroll
    for (i32 i = 0; i < kStretch / kWarp; i++) {
        const i32 p = i * kWarp + lane;
        mine[i] = 0;
        if (p < tile.count())
            mine[i] = *(const u16*)(cache.row(values_at, slot, head, tile.first + p) + cache.width + 2 * warp);
    }
    i32 before = -1, largest = 0;
    for (i32 token = 0; token < tile.here; token++) {
        const i32 sees = least(tile.seen(token), kStretch);
        if (sees != before) {
            largest = 0;
#pragma unroll
            for (i32 i = 0; i < kStretch / kWarp; i++)
                if (i * kWarp + lane < sees && mine[i] > largest) largest = mine[i];
            largest = warp_max(largest) >> 7;
            before = sees;
        }
        if (lane == 0) near.steps[warp][token] = largest < 1 ? 1 : least(largest, 253);
    }
    __syncwarp();
}

// Weights of a lane's token at eight positions, the right side of two products; for int8 times the steps of the values.
template <i32 EIGHTS, bool CODES>
MOSS_INLINE void load_weights(u32 (&to)[4], const Near<EIGHTS>& near, const Values<CODES>& values, const Tile& tile,
                              i32 token, i32 p, float power) {
    const uint4 read = *(const uint4*)(near.weights[token] + p);
    to[0] = read.x, to[1] = read.y, to[2] = read.z, to[3] = read.w;
    if constexpr (CODES) {
        const i32 seen = tile.seen(token);
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            float weight[2];
#pragma unroll
            for (i32 j = 0; j < 2; j++) {
                const float size = half_to_float((u16)(to[i] >> 16 * j));
                const float step = __fmul_rn(values.steps[2 * i + j], power);
                weight[j] = p + 2 * i + j < seen ? __fmul_rn(size, step) : 0.0f;
            }
            to[i] = two_halves(weight[0], weight[1]);
        }
    }
}

// Channels [32 * warp, ...) of the sums, for all tokens of the tile, to its parts.
template <i32 EIGHTS, bool CODES>
MOSS_INLINE void sum_values(float* parts, Near<EIGHTS>& near, const Cache& cache, const Tile& tile, i32 values_at, i32 slot,
                            i32 head, i32 warp, i32 row, i32 column) {
    const i32 d = kUnit * warp + 4 * row, count = tile.count();
    float out[2][EIGHTS][4] = {};
    i32 lost[4] = {kNever, kNever, kNever, kNever};
    Values<CODES> now, next;
    if constexpr (CODES) find_steps(near, cache, tile, values_at, slot, head, warp, 4 * row + column);
    next.load(cache, cache.row(values_at, slot, head, tile.first), 8 * column, count, d);
    for (i32 p = 8 * column; p - 8 * column < count; p += kBlock) {
        const i32 later = p - 8 * column + kBlock;
        now = next;
        if (later < count)
            next.load(cache, cache.row(values_at, slot, head, tile.first + later), p + kBlock, count, d);
        if (!CODES && count > tile.seen(0) && later > tile.seen(0)) now.drop_lost(p, lost);
        u32 left[2][2][4];
#pragma unroll
        for (i32 part = 0; part < 2; part++)
#pragma unroll
            for (i32 pair = 0; pair < 2; pair++) now.left(part, pair, left[part][pair]);
#pragma unroll
        for (i32 eight = 0; eight < EIGHTS; eight++) {
            if (8 * eight >= tile.here) break;
            const i32 token = 8 * eight + row;
            float power = 1.0f;
            if (CODES && token < tile.here) power = __int_as_float((254 - near.steps[warp][token]) << 23);
            u32 words[4];
            load_weights(words, near, now, tile, token, p, power);
#pragma unroll
            for (i32 part = 0; part < 2; part++) {
                const u32 right[2] = {words[2 * part], words[2 * part + 1]};
#pragma unroll
                for (i32 pair = 0; pair < 2; pair++) multiply_halves(out[pair][eight], left[part][pair], right);
            }
        }
    }
#pragma unroll
    for (i32 j = 0; j < 4; j++)
        for (i32 apart = 1; apart < 4; apart *= 2) lost[j] = least(lost[j], __shfl_xor_sync(kAll, lost[j], apart));
#pragma unroll
    for (i32 eight = 0; eight < EIGHTS; eight++)
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            const i32 token = 8 * eight + 2 * column + i, seen = tile.seen(token);
            if (seen <= 0 || d >= cache.width) continue;
            const float power = CODES ? __int_as_float(near.steps[warp][token] << 23) : 1.0f;
#pragma unroll
            for (i32 pair = 0; pair < 2; pair++) {
                float sums[2];
#pragma unroll
                for (i32 j = 0; j < 2; j++) {
                    sums[j] = __fmul_rn(__fmul_rn(out[pair][eight][2 * j + i], kWeightStep), power);
                    if (!CODES && lost[2 * pair + j] < seen) sums[j] = not_a_number();
                }
                float* part = parts + ((i64)(tile.start + token) * gridDim.y + head) * gridDim.x * (2 + cache.width);
                *(float2*)(part + (i64)blockIdx.x * (2 + cache.width) + 2 + d + 2 * pair) = {sums[0], sums[1]};
            }
        }
}

// Grid: (stretches, H, tiles). Thread block: kWarps warps. A tile has up to 8 * EIGHTS tokens.
template <i32 EIGHTS, bool CODES>
MOSS_INLINE void attend_tile(const float* queries, const Cache& cache, const i32* slots, const i32* positions,
                             const i32* tiles, float* parts, i32 keys_at, i32 values_at) {
    __shared__ __align__(16) Near<EIGHTS> near;
    const i32 warp = (i32)threadIdx.x / kWarp, lane = (i32)threadIdx.x % kWarp, row = lane / 4, column = lane % 4;
    const i32 start = tiles[2 * blockIdx.z], head = (i32)blockIdx.y, heads = (i32)gridDim.y, slot = slots[start];
    const Tile tile = {start, tiles[2 * blockIdx.z + 1], (i32)blockIdx.x * kStretch, positions[start]};
    if (tile.count() <= 0) return;
    round_queries(near, queries, tile, head, heads, cache.width, warp, lane);
    __syncthreads();
    float scores[kGroups][EIGHTS][4] = {};
    make_scores<EIGHTS, CODES>(scores, near, cache, tile, keys_at, slot, head, warp, row, column);
    make_weights(scores, near, tile, warp, row, column);
    if (kUnit * warp < cache.width)
        sum_values<EIGHTS, CODES>(parts, near, cache, tile, values_at, slot, head, warp, row, column);
    const i32 token = (i32)threadIdx.x;
    if (tile.seen(token) <= 0) return;
    float top = near.tops[0][token], total = near.totals[0][token];
    for (i32 from = 1; from < kWarps; from++) {
        top = fmaxf(top, near.tops[from][token]);
        total += near.totals[from][token];
    }
    float* part = parts + (((i64)(start + token) * heads + head) * gridDim.x + blockIdx.x) * (2 + cache.width);
    part[0] = top;
    part[1] = total;
}

#define MOSS_ATTEND(name, EIGHTS, CODES)                                                                               \
    MOSS_KERNEL(name)                                                                                                  \
    (const float* queries, const u8* memory, const i32* slots, const i32* positions, const i32* table,                 \
     const i32* tiles, float* parts, i64 block_bytes, i32 table_width, i32 row_bytes, i32 kind, i32 width,             \
     i32 keys_at, i32 values_at) {                                                                                     \
        const Cache cache = {(u8*)memory, table, block_bytes, table_width, row_bytes, kind, width};                    \
        attend_tile<EIGHTS, CODES>(queries, cache, slots, positions, tiles, parts, keys_at, values_at);                \
    }
MOSS_ATTEND(attend_half_8, 1, false)
MOSS_ATTEND(attend_half_32, 4, false)
MOSS_ATTEND(attend_int8_8, 1, true)
MOSS_ATTEND(attend_int8_32, 4, true)
