// Activations rounded to int8, for the products of linear_rounded.cu.
//
//   codes  (T, padded_in) int8, in the order in which the matrix holds its inputs
//   steps  (blocks, T) float: max(max |x| / 127, smallest normal float); NaN where the block holds a NaN or an infinity
//   sums   (blocks, T) int32, of the codes
//
// The same numbers as on the CPU (kernels/cpu/rounding.h), to the bit.

constexpr float kSmallestNormal = 1.17549435e-38f;

// One warp for each block of each token. GELU comes before, where `gelu` says so.
// Grid: (blocks / warps of a thread block, T).
MOSS_KERNEL(round_activations)
(const float* x, const i32* perm, i8* codes, float* steps, i32* sums, i32 tokens, i32 x_stride, i32 padded_in,
 i32 padded_group, i32 block, i32 permuted, i32 gelu) {
    const Blocks blocks = {padded_in, padded_group, block};
    const i32 index = (i32)(blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp), lane = (i32)threadIdx.x % kWarp;
    if (index >= blocks.count()) return;
    const i64 token = blockIdx.y;
    const Block b = blocks.at(index);
    constexpr i32 kEach = 4;  // positions of a lane; a block has up to 128
    float values[kEach];
    i32 largest = 0;
#pragma unroll
    for (i32 i = 0; i < kEach; i++) {
        const i32 p = b.start + lane + i * kWarp, from = lane + i * kWarp >= b.size ? -1 : permuted ? perm[p] : p;
        float value = from < 0 ? 0.0f : x[token * x_stride + from];
        if (gelu) value = gelu_of(value);
        values[i] = value;
        const i32 magnitude = __float_as_int(value) & 0x7fffffff;  // in the order of the magnitudes, NaN on top
        largest = magnitude > largest ? magnitude : largest;
    }
    largest = warp_max(largest);
    const bool finite = largest < 0x7f800000;
    const float wide = __fmul_rn(__int_as_float(largest), 1.0f / 127.0f);
    const float step = wide < kSmallestNormal ? kSmallestNormal : wide, inverse = __fdiv_rn(1.0f, step);
    i32 sum = 0;
#pragma unroll
    for (i32 i = 0; i < kEach; i++) {
        const i32 code = finite ? __float2int_rn(__fmul_rn(values[i], inverse)) : 0;
        if (lane + i * kWarp < b.size) codes[token * padded_in + b.start + lane + i * kWarp] = (i8)code;
        sum += code;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        steps[(i64)index * tokens + token] = finite ? step : __int_as_float(0x7fc00000);
        sums[(i64)index * tokens + token] = sum;
    }
}
