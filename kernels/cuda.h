// What every CUDA kernel of ours stands on. It is put before each *.cu, and the two are compiled as one text: by NVRTC
// (which has no headers of its own, so nothing is included here), by nvcc, or on the host with kernels/host/cuda_shim.h.
//
// Kernels are named with MOSS_KERNEL(name)(arguments). Warps are 32 threads; a lane is a thread's place in its warp, and
// as in the fragments of tensor cores its row is lane / 4 and its column lane % 4.

#define MOSS_KERNEL(name) extern "C" __global__ void name
#define MOSS_WIDE_KERNEL(name) extern "C" __global__ void __launch_bounds__(1024, 1) name // of up to 1024 threads
#define MOSS_INLINE __device__ __forceinline__

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;

constexpr i32 kWarp = 32;
constexpr u32 kAll = 0xffffffffu;  // lanes

#if !defined(MOSS_SHIM)
MOSS_INLINE float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

MOSS_INLINE u16 float_to_half(float value) {  // to nearest, ties to even; what is too large becomes infinity
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// d += a * b: a is 16 x 32 unsigned, b 32 x 8 signed bytes, d 16 x 8. Of lane (row, column):
//   a[0], a[1]  four bytes of row `row` and `row + 8` from k = 4 * column on; a[2], a[3] the same from 16 more
//   b[0], b[1]  of column `row` from k = 4 * column on, and from 16 more
//   d[0], d[1]  of row `row`, columns 2 * column and the next; d[2], d[3] of row + 8
MOSS_INLINE void multiply_bytes(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (i32 half = 0; half < 2; half++)
#pragma unroll
        for (i32 low = 0; low < 2; low++)
            asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(d[2 * half]), "+r"(d[2 * half + 1])
                : "r"(a[half + 2 * low]), "r"(b[low]));
#endif
}

// d += a * b: a is 16 x 16, b 16 x 8, in pairs of halves; d 16 x 8 in float. Of lane (row, column):
//   a[0], a[1]  of row `row` and `row + 8`, k = 2 * column and the next; a[2], a[3] the same from 8 more
//   b[0], b[1]  of column `row` from k = 2 * column on, and from 8 more
//   d           as in multiply_bytes
MOSS_INLINE void multiply_halves(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (i32 part = 0; part < 2; part++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * part]), "r"(a[2 * part + 1]), "r"(b[part]));
#endif
}

MOSS_INLINE u32 subtract_halves(u32 a, u32 b) {  // two of them
    u32 difference;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

MOSS_INLINE u32 multiply_pairs(u32 a, u32 b) {  // two halves with two halves, each rounded to nearest
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
#endif

MOSS_INLINE i32 least(i32 a, i32 b) { return a < b ? a : b; }

MOSS_INLINE float brain_to_float(u16 bits) { return __int_as_float((i32)((u32)bits << 16)); }  // bfloat16

// Of all lanes, in every lane; in an order that is always the same.
MOSS_INLINE float warp_sum(float value) {
#pragma unroll
    for (i32 apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(kAll, value, apart);
    return value;
}

MOSS_INLINE i32 warp_sum(i32 value) {
#pragma unroll
    for (i32 apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(kAll, value, apart);
    return value;
}

MOSS_INLINE i32 warp_max(i32 value) {
#pragma unroll
    for (i32 apart = 16; apart > 0; apart /= 2) {
        const i32 other = __shfl_xor_sync(kAll, value, apart);
        value = other > value ? other : value;
    }
    return value;
}

MOSS_INLINE float warp_max(float value) {
#pragma unroll
    for (i32 apart = 16; apart > 0; apart /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, apart));
    return value;
}

// Keys and values: blocks of block_bytes; in a block the keys of one layer lie at keys_at, its values at values_at, each
// (H, kBlock) rows of row_bytes (moss_jt/kv_layout.py); position p of a slot lies in block table[slot][p / kBlock].
struct Cache {
    static constexpr i32 kBlock = 32;      // positions
    static constexpr i32 kStretch = 256;  // positions of a partial result of attention, from the start of a sequence
    u8* memory;
    const i32* table;
    i64 block_bytes;
    i32 table_width, row_bytes, kind, width;

    __device__ u8* row(i32 at, i32 slot, i32 head, i32 position) const {
        const i64 block = table[slot * table_width + position / kBlock];
        return memory + block * block_bytes + at + (i64)(head * kBlock + position % kBlock) * row_bytes;
    }
};

// The runs in which activations are rounded: up to `block` positions of one group.
struct Block {
    i32 group, start, size;
};

struct Blocks {
    i32 padded_in, padded_group, block;

    __device__ i32 per_group() const { return (padded_group + block - 1) / block; }
    __device__ i32 count() const {
        const i32 rest = padded_in % padded_group;
        return padded_in / padded_group * per_group() + (rest + block - 1) / block;
    }
    __device__ Block at(i32 index) const {
        const i32 group = index / per_group(), start = group * padded_group + index % per_group() * block;
        const i32 end = least((group + 1) * padded_group, padded_in);
        return {group, start, least(block, end - start)};
    }
};

// gelu_new in float: u / (1 + e^(-2 z)), z = sqrt(2 / pi) (u + 0.044715 u^3)
MOSS_INLINE float gelu_of(float u) { return u / (1.0f + expf(-1.5957691216057308f * (u + 0.044715f * u * u * u))); }
