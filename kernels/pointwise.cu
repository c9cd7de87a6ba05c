// The small steps on whole tensors: layer normalisation, GELU, the residual sum.

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

// In place. Grid: count / threads of a block.
MOSS_KERNEL(gelu)
(float* x, i32 count) {
    const i32 i = (i32)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) x[i] = gelu_of(x[i]);
}

// x += a + b
MOSS_KERNEL(add_both)
(float* x, const float* a, const float* b, i32 count) {
    const i32 i = (i32)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) x[i] += a[i] + b[i];
}
