// Activations rounded to int8 or to half, for the products of linear_rounded.cu; block by block, with a step for each.
//
//   codes  (T, padded_in) int8 or half, in the order in which the matrix holds its inputs; of four halves the two in the
//          middle change places, as the codes of weights come apart
//   steps  (blocks, T) float; NaN where the block holds a NaN or an infinity.
//          int8: max(max |x| / 127, smallest normal float); half: the power of two that leaves magnitudes of 2^15 at most,
//          so that an input far smaller than the largest keeps its bits, too
//   sums   (blocks, T) int32, of the codes; for int8 only
//
// Those of int8 are the same numbers as on the CPU (kernels/cpu/rounding.h), to the bit.

constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr i32 kLargestHalf = 14;  // exponent of the largest magnitude as half
constexpr i32 kEach = 4;  // positions of a lane; a block has up to 128

// What a warp has of a block of a token: each lane every 32nd position, 0 behind the end.
struct Run {
    Block block;
    float values[kEach];
    i32 largest;  // magnitude, as bits: in the order of the magnitudes, NaN on top

    __device__ Run(const float* x, const i32* perm, const Block& b, i32 lane, i32 permuted, i32 gelu) : block(b) {
        largest = 0;
#pragma unroll
        for (i32 i = 0; i < kEach; i++) {
            const i32 p = b.start + lane + i * kWarp, from = lane + i * kWarp >= b.size ? -1 : permuted ? perm[p] : p;
            float value = from < 0 ? 0.0f : x[from];
            if (gelu) value = gelu_of(value);
            values[i] = value;
            const i32 magnitude = __float_as_int(value) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        largest = warp_max(largest);
    }

    __device__ bool finite() const { return largest < 0x7f800000; }
};

// One warp for each block of each token. GELU comes before, where `gelu` says so.
// Grid: (blocks / warps of a thread block, T).
MOSS_KERNEL(round_activations)
(const float* x, const i32* perm, i8* codes, float* steps, i32* sums, i32 tokens, i32 x_stride, i32 padded_in,
 i32 padded_group, i32 block, i32 permuted, i32 gelu) {
    const Blocks blocks = {padded_in, padded_group, block};
    const i32 index = (i32)(blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp), lane = (i32)threadIdx.x % kWarp;
    if (index >= blocks.count()) return;
    const i64 token = blockIdx.y;
    const Run run(x + token * x_stride, perm, blocks.at(index), lane, permuted, gelu);
    const float wide = __fmul_rn(__int_as_float(run.largest), 1.0f / 127.0f);
    const float step = wide < kSmallestNormal ? kSmallestNormal : wide, inverse = __fdiv_rn(1.0f, step);
    i32 sum = 0;
#pragma unroll
    for (i32 i = 0; i < kEach; i++) {
        const i32 code = run.finite() ? __float2int_rn(__fmul_rn(run.values[i], inverse)) : 0, at = lane + i * kWarp;
        if (at < run.block.size) codes[token * padded_in + run.block.start + at] = (i8)code;
        sum += code;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        steps[(i64)index * tokens + token] = run.finite() ? step : __int_as_float(0x7fc00000);
        sums[(i64)index * tokens + token] = sum;
    }
}

// The same to half; `sums` stays as it is.
MOSS_KERNEL(halve_activations)
(const float* x, const i32* perm, u16* codes, float* steps, i32* sums, i32 tokens, i32 x_stride, i32 padded_in,
 i32 padded_group, i32 block, i32 permuted, i32 gelu) {
    const Blocks blocks = {padded_in, padded_group, block};
    const i32 index = (i32)(blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp), lane = (i32)threadIdx.x % kWarp;
    if (index >= blocks.count()) return;
    const i64 token = blockIdx.y;
    const Run run(x + token * x_stride, perm, blocks.at(index), lane, permuted, gelu);
    const i32 wanted = (run.largest >> 23) - kLargestHalf, exponent = wanted < 1 ? 1 : wanted;  // as it is stored
    const float inverse = __int_as_float((254 - exponent) << 23);
#pragma unroll
    for (i32 i = 0; i < kEach; i++) {
        const i32 at = lane + i * kWarp, p = run.block.start + at, place = (p & ~3) | (p & 1) << 1 | (p >> 1 & 1);
        const u16 code = run.finite() ? float_to_half(__fmul_rn(run.values[i], inverse)) : 0;
        if (at < run.block.size) codes[token * padded_in + place] = code;
    }
    if (lane == 0) steps[(i64)index * tokens + token] = __int_as_float(run.finite() ? exponent << 23 : 0x7fc00000);
}
