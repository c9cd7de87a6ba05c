// Rotary positions, the cache of keys and values, and attention over it.
//
//   qkv    (T, 3C) float: 4 slices, each query, value, key of H/4 heads of width D (the checkpoint's order)
//   cache  blocks of keys and values, see Cache in cuda.h
//   table  (slots, table_width) int32; slots, positions (T,) int32: whose token, and where in its sequence
//   sincos (n_positions, R) float: R/2 sines, then R/2 cosines
//
// A stretch of kStretch positions, counted from the start of the sequence, gives its largest score, the sum of
// exp(score - largest) and the values summed with these weights; `merge` adds the stretches of a token and head up in
// their order. So the bits of a token depend on its own sequence alone. What is written to the cache has the bits that
// the CPU would write. Fast compute has `attend` replaced by attention_rounded.cu, for keys and values in half or int8.

constexpr i32 kStretch = Cache::kStretch;
constexpr i32 kReaders = 4;     // warps of `attend`
constexpr i32 kMostWidth = 1024;
constexpr i32 kLaneWidth = 8;   // neighbouring channels of a lane
constexpr i32 kWide = kWarp * kLaneWidth;
enum Kind { kFloat = 0, kHalf = 1, kInt8 = 2 };

// Channel `i` of a row, `value` of each lane; lanes of one warp hold a group of channels that share a step.
MOSS_INLINE void store(const Cache& cache, u8* row, i32 i, float value) {
    const bool mine = i < cache.width;
    if (cache.kind == kFloat) {
        if (mine) ((float*)row)[i] = value;
    } else if (cache.kind == kHalf) {
        if (mine) ((u16*)row)[i] = float_to_half(value);
    } else {
        const i32 largest = warp_max(mine ? __float_as_int(value) & 0x7fffffff : 0);
        i32 bits = __float_as_int(__fmul_rn(__int_as_float(largest), 1.0f / 127.0f));
        bits = bits < 0x00800000 ? 0x00800000 : bits;  // a normal number, so that it has an inverse
        const bool finite = largest < 0x7f800000;
        const u16 step = finite ? (u16)((u32)(bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (u16)0x7fc0;
        const float inverse = __fdiv_rn(1.0f, brain_to_float(step));
        if (mine) ((i8*)row)[i] = finite ? (i8)__float2int_rn(__fmul_rn(value, inverse)) : (i8)0;
        if (mine && i % kWarp == 0) {  // at any address: a row may be an odd number of bytes long
            u8* to = row + cache.width + i / kWarp * 2;
            to[0] = (u8)step;
            to[1] = (u8)(step >> 8);
        }
    }
}

// Rotate queries and keys; write the queries, and keys and values to the cache.
// Grid: (H, T). Thread block: D threads, rounded up to whole warps.
MOSS_WIDE_KERNEL(rotate_and_append)
(const float* qkv, const float* sincos, const i32* slots, const i32* positions, const i32* table, float* queries,
 u8* memory, i64 block_bytes, i32 table_width, i32 row_bytes, i32 kind, i32 width, i32 rotary, i32 keys_at,
 i32 values_at) {
    const i32 head = (i32)blockIdx.x, heads = (i32)gridDim.x, i = (i32)threadIdx.x, position = positions[blockIdx.y];
    const i64 token = blockIdx.y;
    const i32 part = heads / 4 * width;
    const float* query = qkv + token * 3 * heads * width + head / (heads / 4) * 3 * part + head % (heads / 4) * width;
    const float *value = query + part, *key = query + 2 * part;
    const Cache cache = {memory, table, block_bytes, table_width, row_bytes, kind, width};
    float q = 0.0f, k = 0.0f, v = 0.0f;
    if (i < width) {
        q = query[i];
        k = key[i];
        v = value[i];
    }
    if (i < rotary) {  // pairs are neighbours (0,1), (2,3), ... as in GPT-J
        const float sin = sincos[(i64)position * rotary + i / 2], cos = sincos[(i64)position * rotary + rotary / 2 + i / 2];
        const float other_q = query[i ^ 1], other_k = key[i ^ 1];
        if (i % 2 == 0) {
            q = __fsub_rn(__fmul_rn(q, cos), __fmul_rn(other_q, sin));
            k = __fsub_rn(__fmul_rn(k, cos), __fmul_rn(other_k, sin));
        } else {
            q = __fadd_rn(__fmul_rn(q, cos), __fmul_rn(other_q, sin));
            k = __fadd_rn(__fmul_rn(k, cos), __fmul_rn(other_k, sin));
        }
    }
    if (i < width) queries[(token * heads + head) * width + i] = q;
    store(cache, cache.row(keys_at, slots[token], head, position), i, k);
    store(cache, cache.row(values_at, slots[token], head, position), i, v);
}

// Channels [d, d + 8) of a row, zeros past its end.
MOSS_INLINE void load_eight(const Cache& cache, const u8* row, i32 d, float (&to)[kLaneWidth]) {
    const bool whole = cache.width % kLaneWidth == 0 && cache.row_bytes % 8 == 0;
    if (whole && cache.kind == kHalf && d < cache.width) {
        const uint4 words = *(const uint4*)(row + 2 * d);
        const u32 each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            to[2 * i] = half_to_float((u16)each[i]);
            to[2 * i + 1] = half_to_float((u16)(each[i] >> 16));
        }
    } else if (whole && cache.kind == kInt8 && d < cache.width) {
        const uint2 words = *(const uint2*)(row + d);
        const float step = brain_to_float(*(const u16*)(row + cache.width + d / kWarp * 2));
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            to[i] = (float)(i8)(words.x >> 8 * i) * step;
            to[4 + i] = (float)(i8)(words.y >> 8 * i) * step;
        }
    } else {
        for (i32 i = 0; i < kLaneWidth; i++) {
            const i32 c = d + i;
            to[i] = 0.0f;
            if (c >= cache.width) continue;
            if (cache.kind == kFloat) {
                to[i] = ((const float*)row)[c];
            } else if (cache.kind == kHalf) {
                to[i] = half_to_float(((const u16*)row)[c]);
            } else {
                const u8* step = row + cache.width + c / kWarp * 2;
                to[i] = (float)((const i8*)row)[c] * brain_to_float((u16)(step[0] | step[1] << 8));
            }
        }
    }
}

// One stretch of one token and head: `parts` gets largest score, sum of weights, D sums, each (T, H, stretches, 2 + D).
// Grid: (stretches, H, T). Thread block: kReaders warps.
MOSS_KERNEL(attend)
(const float* queries, const u8* memory, const i32* slots, const i32* positions, const i32* table, float* parts,
 i64 block_bytes, i32 table_width, i32 row_bytes, i32 kind, i32 width, i32 keys_at, i32 values_at) {
    __shared__ float weights[kStretch];
    __shared__ float sums[kReaders][kWide];
    __shared__ float shared[2];
    const i32 head = (i32)blockIdx.y, heads = (i32)gridDim.y, first = (i32)blockIdx.x * kStretch;
    const i32 warp = (i32)threadIdx.x / kWarp, lane = (i32)threadIdx.x % kWarp;
    const i64 token = blockIdx.z;
    const i32 count = least(positions[token] + 1 - first, kStretch), slot = slots[token];
    if (count <= 0) return;
    const Cache cache = {(u8*)memory, table, block_bytes, table_width, row_bytes, kind, width};
    const float* query = queries + (token * heads + head) * width;
    const float scale = 1.0f / sqrtf((float)width);
    float q[kMostWidth / kWide][kLaneWidth], eight[kLaneWidth];
    const i32 turns = (width + kWide - 1) / kWide;
#pragma unroll
    for (i32 turn = 0; turn < kMostWidth / kWide; turn++)
#pragma unroll
        for (i32 i = 0; i < kLaneWidth; i++) {
            const i32 d = turn * kWide + lane * kLaneWidth + i;
            q[turn][i] = d < width ? query[d] * scale : 0.0f;
        }
    for (i32 p = warp; p < count; p += kReaders) {
        const u8* key = cache.row(keys_at, slot, head, first + p);
        float score = 0.0f;
#pragma unroll
        for (i32 turn = 0; turn < kMostWidth / kWide; turn++) {
            if (turn >= turns) break;
            load_eight(cache, key, turn * kWide + lane * kLaneWidth, eight);
#pragma unroll
            for (i32 i = 0; i < kLaneWidth; i++) score += q[turn][i] * eight[i];
        }
        score = warp_sum(score);
        if (lane == 0) weights[p] = score;
    }
    __syncthreads();
    if (warp == 0) {
        float top = __int_as_float((i32)0xff800000u), total = 0.0f;
        for (i32 p = lane; p < count; p += kWarp) top = fmaxf(top, weights[p]);
        top = warp_max(top);
        for (i32 p = lane; p < count; p += kWarp) {
            const float weight = expf(weights[p] - top);
            weights[p] = weight;
            total += weight;
        }
        total = warp_sum(total);
        if (lane == 0) {
            shared[0] = top;
            shared[1] = total;
        }
    }
    __syncthreads();
    float* part = parts + ((token * heads + head) * gridDim.x + blockIdx.x) * (2 + width);
    for (i32 turn = 0; turn < turns; turn++) {
        const i32 d = turn * kWide + lane * kLaneWidth;
        float sum[kLaneWidth] = {};
        for (i32 p = warp; p < count; p += kReaders) {
            load_eight(cache, cache.row(values_at, slot, head, first + p), d, eight);
#pragma unroll
            for (i32 i = 0; i < kLaneWidth; i++) sum[i] += weights[p] * eight[i];
        }
#pragma unroll
        for (i32 i = 0; i < kLaneWidth; i++) sums[warp][lane * kLaneWidth + i] = sum[i];
        __syncthreads();
        for (i32 i = (i32)threadIdx.x; i < least(kWide, width - turn * kWide); i += kReaders * kWarp) {
            float whole = 0.0f;
            for (i32 from = 0; from < kReaders; from++) whole += sums[from][i];
            part[2 + turn * kWide + i] = whole;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        part[0] = shared[0];
        part[1] = shared[1];
    }
}

// The stretches of a token and head become one: out (T, H, D). Grid: (H, T). Thread block: any number of threads.
MOSS_KERNEL(merge)
(const float* parts, const i32* positions, float* out, i32 stretches, i32 width) {
    const i64 item = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    const float* part = parts + item * stretches * (2 + width);
    const i32 used = positions[blockIdx.y] / kStretch + 1;
    for (i32 d = (i32)threadIdx.x; d < width; d += (i32)blockDim.x) {
        float top = part[0], total = part[1], sum = part[2 + d];
        for (i32 i = 1; i < used; i++) {
            const float* later = part + i * (2 + width);
            const float best = fmaxf(top, later[0]), keep = expf(top - best), take = expf(later[0] - best);
            total = total * keep + later[1] * take;
            sum = sum * keep + later[2 + d] * take;
            top = best;
        }
        out[item * width + d] = sum / total;
    }
}
