// Layer normalisation, and activations rounded to int8 for the products of linear_few.cu.
//
//   codes  (T, padded_in) int8, in the order in which the matrix holds its inputs
//   steps  (blocks, T) float: max(max |x| / 127, smallest normal float); NaN where the block holds a NaN or an infinity
//   sums   (blocks, T) int32, of the codes
//
// The same numbers as on the CPU (kernels/cpu/rounding.h), to the bit.

constexpr float kSmallestNormal = 1.17549435e-38f;

// gelu_new in float: u / (1 + e^(-2 z)), z = sqrt(2 / pi) (u + 0.044715 u^3)
MOSS_INLINE float gelu_of(float u) { return u / (1.0f + expf(-1.5957691216057308f * (u + 0.044715f * u * u * u))); }

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

// Of all threads of a block of up to 32 warps, in every thread.
MOSS_INLINE float block_sum(float value, float* shared) {
    const i32 warp = (i32)threadIdx.x / kWarp, lane = (i32)threadIdx.x % kWarp, warps = (i32)blockDim.x / kWarp;
    value = warp_sum(value);
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    const float sum = warp_sum(lane < warps ? shared[lane] : 0.0f);
    __syncthreads();
    return sum;
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias. Grid: a block for each token.
MOSS_KERNEL(layer_norm)
(const float* x, const float* weight, const float* bias, float* y, i32 width, float eps) {
    __shared__ float shared[kWarp];
    const float* from = x + (i64)blockIdx.x * width;
    float* to = y + (i64)blockIdx.x * width;
    float sum = 0.0f, squares = 0.0f;
    for (i32 i = (i32)threadIdx.x; i < width; i += (i32)blockDim.x) sum += from[i];
    const float mean = block_sum(sum, shared) / (float)width;
    for (i32 i = (i32)threadIdx.x; i < width; i += (i32)blockDim.x) {
        const float off = from[i] - mean;
        squares += off * off;
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, shared) / (float)width + eps);
    for (i32 i = (i32)threadIdx.x; i < width; i += (i32)blockDim.x) to[i] = (from[i] - mean) * factor * weight[i] + bias[i];
}
